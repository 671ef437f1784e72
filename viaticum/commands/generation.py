"""Options that several commands share: how completions are generated, and what is asked."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from viaticum.errors import InputError
from viaticum.generation import GenerationSettings

PANEL = "Generation"

Kind = Annotated[
    str, typer.Option(help="Of the answer: auto, number, choice, boolean, date, expression or text.")
]
Model = Annotated[str | None, typer.Option(help="Ask this model alone.")]
Strategy = Annotated[
    str | None, typer.Option(help="Ask with this strategy alone; MODULE:NAME loads one of your own.")
]
Load = Annotated[
    list[str] | None,
    typer.Option(help="Load a strategy of your own; may be repeated.", metavar="MODULE:NAME"),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(help="Most tokens of a completion, its thought included.", min=1, rich_help_panel=PANEL),
]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.", min=0, max=2, rich_help_panel=PANEL)]
TopP = Annotated[
    float | None, typer.Option(help="Sample from the likeliest tokens of this total.", rich_help_panel=PANEL)
]
TopK = Annotated[
    int | None, typer.Option(help="Sample from so many likeliest tokens.", min=0, rich_help_panel=PANEL)
]
MinP = Annotated[
    float | None,
    typer.Option(help="Sample from tokens this likely, measured by the likeliest.", rich_help_panel=PANEL),
]
Seed = Annotated[int | None, typer.Option(help="Of the first sample.", rich_help_panel=PANEL)]
System = Annotated[
    str | None,
    typer.Option(help="System turn in place of the strategy's; '' for none.", rich_help_panel=PANEL),
]
ReasoningEffort = Annotated[
    str | None, typer.Option(help="How long a model thinks, such as low.", rich_help_panel=PANEL)
]
ThinkingBudget = Annotated[
    int | None,
    typer.Option(help="Most tokens of the thought; 0 asks for none.", min=0, rich_help_panel=PANEL),
]
TemplateVariables = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        help="Variables of the chat template as JSON, such as '{\"enable_thinking\": false}'.",
        metavar="JSON",
        rich_help_panel=PANEL,
    ),
]


def settings_of(**options: Any) -> GenerationSettings:
    """Settings from the values of these options, by their names in `GenerationKeywords`.

    Raises:
        InputError: a value is out of range; the message names the option.
    """
    text = options.pop("chat_template_kwargs", None)
    if text is not None:
        options["chat_template_kwargs"] = _json_object(text)
    return GenerationSettings.from_keywords(options)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"--chat-template-kwargs is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"--chat-template-kwargs is a JSON object, got {text}")
    return value
