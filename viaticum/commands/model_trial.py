"""`viaticum models test` of an API model or a pair: one question, with its cost and tokens a second."""

from __future__ import annotations

import json
import time

import typer

from viaticum.catalogue import Catalogue
from viaticum.commands.terminal import literal
from viaticum.errors import ModelError
from viaticum.money import format_usd
from viaticum.types import Answer

SHOWN = 60  # characters of the answer
QUESTION = "What is 17 + 25? Answer with the number alone."
STRATEGY = "direct"


def try_call(catalogue: Catalogue, name: str, dollars: str, *, as_json: bool) -> None:
    """Ask one question through the ledger and print answer, cost and tokens a second.

    Raises:
        ViaticumError: the model cannot be used, the budget does not hold the call, or the call failed.
    """
    from viaticum.agents.client import Viaticum
    from viaticum.agents.workflow.events import TextPiece, ThinkingPiece

    first: float | None = None
    answer: Answer | None = None
    ended = 0.0
    with Viaticum(dollars, catalogue=catalogue, model=name, strategy=STRATEGY, tries=1) as client:
        for event in client.stream(QUESTION, kind="number"):
            if isinstance(event, TextPiece | ThinkingPiece) and first is None:
                first = time.perf_counter()
            elif isinstance(event, Answer):
                answer, ended = event, time.perf_counter()
    if answer is None:
        raise ModelError(f"{name} gave no answer")
    usage = answer.usage
    seconds = max(usage.seconds, 1e-9)
    if first is not None:  # after the call was sent: loading LiteLLM is no part of it
        first = max(0.0, usage.seconds - (ended - first))
    speed = usage.output_tokens / seconds
    if as_json:
        facts = {
            "model": name,
            "answer": answer.value,
            "text": answer.text,
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "seconds": round(usage.seconds, 3),
            "first_token_seconds": None if first is None else round(first, 3),
            "tokens_per_second": round(speed, 1),
            "cost_nanousd": answer.cost,
            "held_nanousd": answer.held,
        }
        typer.echo(json.dumps(facts))
        return
    text = " ".join(answer.text.split())
    shown = text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
    typer.echo(f"{name}: {literal(shown) or 'an empty text'}")
    typer.echo(f"{usage.input_tokens} tokens read, {usage.output_tokens} written")
    started = "" if first is None else f", the first after {first:.2f} s"
    typer.echo(f"{usage.seconds:.2f} s, {speed:.1f} tokens a second{started}")
    typer.echo(f"{format_usd(answer.cost)} of {format_usd(answer.held)} held")
