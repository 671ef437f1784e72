"""Options that several commands share: how completions are generated, and what is asked."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from viaticum.commands.completion import complete_model, complete_strategy
from viaticum.commands.options import with_options
from viaticum.errors import InputError
from viaticum.generation import GenerationSettings

PANEL = "Generation"

Kind = Annotated[
    str, typer.Option(help="Of the answer: auto, number, choice, boolean, date, expression or text.")
]
Model = Annotated[str | None, typer.Option(help="Ask this model alone.", autocompletion=complete_model)]
Strategy = Annotated[
    str | None,
    typer.Option(
        help="Ask with this strategy alone; MODULE:NAME loads one of your own.",
        autocompletion=complete_strategy,
    ),
]
Policy = Annotated[
    str,
    typer.Option(
        help="within:DISTANCE (the cheapest so near the best accuracy), best, cheapest:ACCURACY, "
        "fastest:ACCURACY or weighted:PER_DOLLAR."
    ),
]
POLICY = "within:0.01"  # the default, as `routers.query.DEFAULT_POLICY`, which takes long to import
Only = Annotated[
    str | None,
    typer.Option(
        "--only",
        help="Labels of models, a,b,c: others are not used. local, or a region or a tag of an entry.",
    ),
]
MaxSeconds = Annotated[
    float | None,
    typer.Option("--max-seconds", help="Seconds that a question may take, all its calls together."),
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
FrequencyPenalty = Annotated[
    float | None,
    typer.Option(help="Of a token as often as it was written.", min=-2, max=2, rich_help_panel=PANEL),
]
PresencePenalty = Annotated[
    float | None, typer.Option(help="Of a token that was written.", min=-2, max=2, rich_help_panel=PANEL)
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(help="Above 1: tokens of prompt and output become less likely.", rich_help_panel=PANEL),
]
LogitBias = Annotated[
    str | None,
    typer.Option(
        help="Added to logits, as JSON by token id, such as '{\"42\": -100}'.",
        metavar="JSON",
        rich_help_panel=PANEL,
    ),
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
ExtraBody = Annotated[
    str | None,
    typer.Option(
        "--extra-body",
        help="Further fields of requests to remote models as JSON, such as '{\"top_a\": 0.1}'.",
        metavar="JSON",
        rich_help_panel=PANEL,
    ),
]
# The options of `GenerationSettings`, by their names in `GenerationKeywords`.
OPTIONS: dict[str, Any] = {
    "max_tokens": MaxTokens,
    "temperature": Temperature,
    "top_p": TopP,
    "top_k": TopK,
    "min_p": MinP,
    "frequency_penalty": FrequencyPenalty,
    "presence_penalty": PresencePenalty,
    "repetition_penalty": RepetitionPenalty,
    "logit_bias": LogitBias,
    "seed": Seed,
    "system": System,
    "reasoning_effort": ReasoningEffort,
    "thinking_budget": ThinkingBudget,
    "chat_template_kwargs": TemplateVariables,
    "extra_body": ExtraBody,
}


def settings_of(**options: Any) -> GenerationSettings:
    """Settings from the values of these options.

    Raises:
        InputError: a value is out of range; the message names the option.
    """
    for name in ("chat_template_kwargs", "extra_body", "logit_bias"):
        if options.get(name) is not None:
            options[name] = _json_object(f"--{name.replace('_', '-')}", options[name])
    return GenerationSettings.from_keywords(options)


def _json_object(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{option} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{option} is a JSON object, got {text}")
    return value


with_generation_options = with_options("generation", OPTIONS, settings_of)
