"""`viaticum shadow`: what routing saved and lost against one model; and the options of shadow sampling."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from viaticum.commands.options import with_options
from viaticum.errors import InputError
from viaticum.shadow_samples import SHADOWS

if TYPE_CHECKING:
    from viaticum.agents.workflow.shadow_settings import ShadowSampling

PANEL = "Shadow sampling"
OPTIONS: dict[str, Any] = {
    "shadow_model": Annotated[
        str | None,
        typer.Option(
            "--shadow",
            help="Ask a share of the answered questions again of this model (or MODEL+STRATEGY), in the "
            "background, to measure what routing saves and loses.",
            metavar="MODEL",
            rich_help_panel=PANEL,
        ),
    ],
    "shadow_rate": Annotated[
        float | None,
        typer.Option(help="The share, above 0 and at most 1. [default: 0.05]", rich_help_panel=PANEL),
    ],
    "shadow_budget": Annotated[
        str | None,
        typer.Option(
            help="Dollars for it, in a budget of its own.",
            metavar="USD",
            rich_help_panel=PANEL,
        ),
    ],
    "shadow_judge": Annotated[
        str | None,
        typer.Option(
            help="A model that says which of different answers is right, from the same budget.",
            metavar="MODEL",
            rich_help_panel=PANEL,
        ),
    ],
}
RATE = 0.05


def sampling_of(
    shadow_model: str | None,
    shadow_rate: float | None,
    shadow_budget: str | None,
    shadow_judge: str | None,
) -> ShadowSampling | None:
    """The setting from the values of these options. Raises `InputError` where one is missing."""
    from viaticum.agents.workflow.shadow_settings import ShadowSampling

    if shadow_model is None:
        if (shadow_rate, shadow_budget, shadow_judge) != (None, None, None):
            raise InputError("--shadow-rate, --shadow-budget and --shadow-judge go with --shadow MODEL")
        return None
    if shadow_budget is None:
        raise InputError("--shadow needs --shadow-budget: the dollars that it may cost at most")
    rate = RATE if shadow_rate is None else shadow_rate
    return ShadowSampling(shadow_model, rate, shadow_budget, judge=shadow_judge)


with_shadow_options = with_options("shadow", OPTIONS, sampling_of)


def shadow(
    samples: Annotated[
        Path | None,
        typer.Argument(
            help="shadows.jsonl, or the folder or RESULTS of a job. [default: yours, beside the ledger]",
            metavar="SAMPLES",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Say what routing saved and lost against always asking one model, on the questions that were sampled."""
    from viaticum.budgets import default_path
    from viaticum.commands.table import print_table
    from viaticum.reports.shadow import NOTES, read_shadow_numbers, sentence, table

    path = samples or default_path().parent / SHADOWS
    if (folder := path.with_name(path.name + ".job")).is_dir():
        path = folder
    numbers = read_shadow_numbers(path)
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in numbers], ensure_ascii=False))
        return
    shown = table(numbers)
    print_table([name for name, _ in shown.columns], shown.rows)
    for each in numbers:
        typer.echo(sentence(each))
    for note in NOTES:
        typer.echo(note)
