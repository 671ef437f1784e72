"""`viaticum router arena`: the files of a RouterArena submission from a fitted router; asks no model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from viaticum.commands.model_entries import CatalogueFile, JsonFlag
from viaticum.commands.table import print_table
from viaticum.errors import InputError, ViaticumError
from viaticum.money import NANOUSD_PER_USD


def arena(
    folder: Annotated[Path, typer.Argument(help="The folder of a router.")],
    dataset: Annotated[
        Path, typer.Argument(help="Questions, as RouterArena's prep_datasets.py writes them.")
    ],
    name: Annotated[str, typer.Option(help="The name of the submission.")],
    out: Annotated[Path, typer.Option(help="Folder to write to, such as RouterArena's repository.")],
    robustness: Annotated[
        Path | None,
        typer.Option(help="The questions of its robustness split, which have a file of their own."),
    ] = None,
    policy: Annotated[str, typer.Option(help="How a model is chosen, as in `viaticum ask`.")] = "within:0.01",
    strategy: Annotated[
        str | None, typer.Option(help="Whose predictions count; by default chat, or direct.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="NAME=ARENA: what a model is called there, where otherwise.")
    ] = None,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Write a RouterArena submission: which model each of its questions goes to. Asks no model."""
    from viaticum.routers.query import as_policy
    from viaticum.routers.query.arena import choose_models, plain_strategy, read_questions, write_submission
    from viaticum.routers.query.folders import load_router

    rule, names = as_policy(policy), dict(map(_renamed, model or ()))
    router = load_router(folder)
    kind = plain_strategy(router.pairs, strategy)
    known = [pair.model for pair in router.pairs if pair.strategy == kind]
    if strange := sorted(set(names) - set(known)):
        raise InputError(f"the router knows no {strange[0]} with {kind}; it knows {', '.join(known)}")
    choices = choose_models(router, read_questions(dataset), kind, rule, names)
    robust = (
        [] if robustness is None else choose_models(router, read_questions(robustness), kind, rule, names)
    )
    prices = _prices(known, names, catalogue)
    if free := sorted(
        {each.model for each in choices} - {name for name, price in prices.items() if any(price)}
    ):
        typer.echo(
            f"warning: no price of {', '.join(free)} in the catalogue; RouterArena refuses results that cost "
            "nothing, so that its list of prices needs one",
            err=True,
        )
    called = [names.get(each, each) for each in known]
    files = write_submission(out, name, called, choices, robust, prices)
    counts = Counter(each.model for each in choices)
    accuracy = sum(each.route.row.accuracy for each in choices) / len(choices)
    dollars = sum(each.route.row.expected_cost for each in choices) / len(choices) / NANOUSD_PER_USD
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "files": [str(each) for each in files],
                    "questions": len(choices),
                    "models": dict(counts),
                    "expected_accuracy": accuracy,
                    "expected_cost": dollars,
                }
            )
        )
        return
    print_table(
        ("model", "questions", "share"),
        [(each, str(count), f"{count / len(choices):.1%}") for each, count in counts.most_common()],
    )
    typer.echo(
        f"expected by predictions alone: {accuracy:.1%} right, ${1000 * dollars:.4f} a thousand questions"
    )
    for each in files:
        typer.echo(str(each))


def _renamed(text: str) -> tuple[str, str]:
    name, _, other = text.partition("=")
    if not name or not other:
        raise InputError(f"not a name and what it is called in RouterArena: {text!r}; write NAME=ARENA")
    return name, other


def _prices(
    models: Sequence[str], names: Mapping[str, str], path: Path | None
) -> dict[str, tuple[float, float]]:
    """Dollars a million tokens of those models that the catalogue knows, by their names in RouterArena."""
    from viaticum.catalogue import Catalogue

    found = {}
    try:
        catalogue = Catalogue.load(path)
    except ViaticumError:
        return {}
    for name in models:
        price = catalogue[name].price if name in catalogue else None
        if price is not None:
            found[names.get(name, name)] = (
                price.input_nanousd_per_million / NANOUSD_PER_USD,
                price.output_nanousd_per_million / NANOUSD_PER_USD,
            )
    return found
