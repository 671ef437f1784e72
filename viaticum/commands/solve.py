"""`viaticum solve`: one question within a budget. Leaves out errors and exit codes: see `viaticum.cli`."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from viaticum.commands.generation import (
    POLICY,
    Kind,
    Load,
    MaxSeconds,
    Model,
    Only,
    Policy,
    Strategy,
    with_generation_options,
)
from viaticum.commands.local import with_local_options
from viaticum.commands.models import CatalogueFile, JsonFlag
from viaticum.commands.progress import loading_shown
from viaticum.commands.terminal import visible
from viaticum.commands.thoughts import ShowThinking, ThoughtPrinter
from viaticum.generation import NO_SETTINGS, GenerationSettings
from viaticum.local_settings import NO_LOCAL_SETTINGS, LocalSettings
from viaticum.money import format_usd, usd_digits
from viaticum.types import Answer, AnswerKind, Query


@with_local_options
@with_generation_options
def solve(
    question: Annotated[str, typer.Argument(help="What you want answered; - reads it from stdin.")],
    dollars: Annotated[str | None, typer.Option("--budget", help="Dollars this may cost at most.")] = None,
    policy: Policy = POLICY,
    router: Annotated[Path | None, typer.Option(help="The folder of a fitted router.", metavar="DIR")] = None,
    kind: Kind = "auto",
    model: Model = None,
    strategy: Strategy = None,
    only: Only = None,
    max_seconds: MaxSeconds = None,
    load: Load = None,
    generation: GenerationSettings = NO_SETTINGS,
    local: LocalSettings = NO_LOCAL_SETTINGS,
    show_thinking: ShowThinking = None,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Answer one question within a budget.

    Without --model and --strategy the question is routed. --model alone asks that model with a strategy that
    suits the question, --strategy alone picks a model for it, both ask that pair. Exit code 1 without an
    answer.
    """
    from viaticum.agents.client import Viaticum
    from viaticum.agents.workflow.events import CallSettled, RouteChosen, TextPiece, ThinkingPiece, TriedAgain

    show, answered = ThoughtPrinter(show_thinking), False
    query = Query(sys.stdin.read() if question == "-" else question, cast(AnswerKind, kind))
    with (
        loading_shown(),
        Viaticum(
            budget=dollars,
            policy=policy,
            catalogue=catalogue,
            router=router,
            model=model,
            strategy=strategy,
            only=only,
            max_seconds=max_seconds,
            concurrency=1,
            strategies=load or (),
            generation=generation,
            local=local,
        ) as client,
        closing(show),
        closing(client.stream(query)) as events,  # type: ignore[type-var]
    ):
        for event in events:
            if isinstance(event, Answer):
                if as_json:
                    typer.echo(json.dumps(_answer_json(event, client.settings)))
                else:
                    if event.value is not None:
                        typer.echo(visible(event.value, sys.stdout))
                    else:
                        sys.stderr.write(f"no answer: {event.reason}\n")
                    sys.stderr.write(f"{format_usd(event.cost)} of {format_usd(event.held)} held\n")
                answered = event.value is not None
            elif isinstance(event, RouteChosen):
                row = event.route.row
                costs = f"{format_usd(row.cost_p50)} expected, {format_usd(row.cost_p90)} at p90"
                sys.stderr.write(f"{event.route.pair}: {event.route.why}; {costs}\n")
            elif isinstance(event, ThinkingPiece):
                show.thought(event.text)
            elif isinstance(event, TextPiece):
                show.text(event.text)
            elif isinstance(event, CallSettled | TriedAgain):
                show.close()
    if not answered:
        raise typer.Exit(1)


def _answer_json(answer: Answer, settings: GenerationSettings) -> dict[str, Any]:
    last = answer.routes[-1]
    return {
        "answer": answer.value,
        "text": answer.text,
        "thinking": answer.thinking,
        "model": last.pair.model,
        "strategy": last.pair.strategy,
        "route": asdict(last.row) | {"pair": str(last.pair), "why": last.why},
        "routes": [str(route.pair) for route in answer.routes],
        "settings": settings.model_dump(mode="json"),
        "usage": {name: asdict(count) for name, count in answer.usage.models.items()},
        "cost_nanousd": answer.cost,
        "cost_usd": usd_digits(answer.cost),
        "held_nanousd": answer.held,
        "finish_reason": answer.finish_reason,
        "seconds": round(answer.seconds, 3),
        "reason": answer.reason,
    }
