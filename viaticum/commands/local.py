"""Options that several commands share: how local models run on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from viaticum.commands.options import with_options
from viaticum.local_settings import LocalSettings

PANEL = "Local models"

Device = Annotated[
    str | None,
    typer.Option(
        help="auto, cpu, cuda, cuda:1 or mps. [default: the entry's, else auto]", rich_help_panel=PANEL
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=PANEL),
]
Engine = Annotated[
    str | None,
    typer.Option("--local-engine", help="auto, torch, llama or served.", rich_help_panel=PANEL),
]
Slots = Annotated[
    str | None,
    typer.Option(
        help="Texts that a model writes at once; auto for as many as the memory holds.",
        metavar="NUMBER|auto",
        rich_help_panel=PANEL,
    ),
]
Context = Annotated[
    int | None,
    typer.Option(help="Tokens of prompt and answer to keep memory for.", min=1, rich_help_panel=PANEL),
]
TensorParallel = Annotated[
    int | None, typer.Option(help="GPUs over which a model is spread.", min=1, rich_help_panel=PANEL)
]
GpuMemory = Annotated[
    float | None, typer.Option(help="Fraction of a GPU's memory to use.", rich_help_panel=PANEL)
]
# The options of `LocalSettings`, by its names. `engine` has another option: `viaticum batch` has an --engine.
OPTIONS: dict[str, Any] = {
    "device": Device,
    "dtype": Dtype,
    "local_engine": Engine,
    "slots": Slots,
    "context": Context,
    "tensor_parallel": TensorParallel,
    "gpu_memory": GpuMemory,
}


def settings_of(**options: Any) -> LocalSettings:
    """Settings from the values of these options. Raises `InputError` for a value out of range."""
    slots = options.get("slots")
    if isinstance(slots, str) and slots.isdecimal():
        options["slots"] = int(slots)
    options["engine"] = options.pop("local_engine", None)
    return LocalSettings.of(**options)


with_local_options = with_options("local", OPTIONS, settings_of)
