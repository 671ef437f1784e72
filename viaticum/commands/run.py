"""`viaticum run`: a program under a budget. Leaves out how its calls are held (`agents.instrumentation`)."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path
from typing import Annotated

import typer

from viaticum.commands.budget import Where
from viaticum.commands.models import CatalogueFile
from viaticum.money import format_usd

Program = Annotated[
    list[str], typer.Argument(help="The program and its arguments, after --.", metavar="-- PROGRAM ...")
]
Dollars = Annotated[
    str | None, typer.Option("--budget", help="Dollars; not needed for a budget that exists.", metavar="USD")
]
Name = Annotated[
    str | None, typer.Option("--budget-name", help="The budget in the ledger. [default: a new one]")
]
Prices = Annotated[
    list[str] | None,
    typer.Option(
        "--price",
        help="Dollars per million tokens of a model, as the program names it; repeatable.",
        metavar="MODEL=INPUT,OUTPUT",
    ),
]
Free = Annotated[list[str] | None, typer.Option("--unpriced", help="A model that costs nothing; repeatable.")]
MaxTokens = Annotated[int, typer.Option(help="Maximum of new tokens of calls that set none.", min=1)]
ImageTokens = Annotated[
    int | None, typer.Option(help="Tokens of an image at most; without it images are refused.", min=1)
]
Estimated = Annotated[
    bool,
    typer.Option(
        "--estimated-holds", help="Hold prompts without a tokenizer by what the provider counted before."
    ),
]
AllowUnheld = Annotated[
    bool, typer.Option("--allow-unheld", help="Send calls that cannot be held, and tell them at the end.")
]


def run(
    program: Program,
    dollars: Dollars = None,
    budget_name: Name = None,
    where: Where = None,
    catalogue: CatalogueFile = None,
    price: Prices = None,
    unpriced: Free = None,
    max_tokens: MaxTokens = 8192,
    image_tokens: ImageTokens = None,
    estimated_holds: Estimated = False,
    allow_unheld: AllowUnheld = False,
) -> None:
    """Run a program under a budget: viaticum run --budget 0.50 -- python my_agent.py

    Every call of it and of the processes that it starts is held before it is sent: by the SDKs of OpenAI,
    Anthropic and others, by LiteLLM and by LangChain, in Python; in other languages by clients that read
    OPENAI_BASE_URL or ANTHROPIC_BASE_URL. What does not fit is not sent; the program sees an error with
    status 402. The exit code is that of the program.
    """
    from viaticum.agents.instrumentation.prices import parse_price
    from viaticum.agents.instrumentation.run import RunSettings, run_program
    from viaticum.budgets import Ledger, default_path
    from viaticum.errors import InputError
    from viaticum.money import budget_nanousd

    prices = dict(map(parse_price, price or ()))
    if dollars is None and budget_name is None:
        raise InputError(
            "say how much the program may cost: --budget USD, or --budget-name of one that exists"
        )
    name, address = budget_name or f"run-{uuid.uuid4().hex[:8]}", where or str(default_path())
    with Ledger(address) as ledger:
        if dollars is None:
            ledger.budget(name)
        else:
            ledger.create(name, limit_nanousd=budget_nanousd(dollars))
        settings = RunSettings(
            name,
            address if "://" in address else str(Path(address).absolute()),
            {
                model: (each.input_nanousd_per_million, each.output_nanousd_per_million)
                for model, each in prices.items()
            },
            str(catalogue.absolute()) if catalogue else None,
            tuple(unpriced or ()),
            max_tokens,
            image_tokens,
            "estimated" if estimated_holds else "bound",
            "allow" if allow_unheld else "refuse",
        )
        report = run_program(program, settings, ledger)
    state = report.state
    models = ", ".join(f"{model} {number}" for model, number in sorted(report.calls.items()))
    limit = "" if state.limit_nanousd is None else f" of {format_usd(state.limit_nanousd)}"
    total = sum(report.calls.values())
    lines = [
        f"{name}: {format_usd(state.posted_nanousd)}{limit} spent; {total} call{'s' * (total != 1)}"
        + (f" ({models})" if models else "")
    ]
    if state.held_nanousd:
        lines.append(f"still held, for calls whose end is not known: {format_usd(state.held_nanousd)}")
    lines += [f"not sent, {reason}: {number}" for reason, number in sorted(report.refused.items())]
    lines += [f"sent without a hold, {what}: {number}" for what, number in sorted(report.unheld.items())]
    for line in lines:
        print(line, file=sys.stderr)
    raise typer.Exit(report.code)
