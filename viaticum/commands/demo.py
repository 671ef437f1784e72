"""`viaticum demo`: the options of the demo, and fetching its weights first. The demo: `viaticum.demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from viaticum.commands.model_entries import CatalogueFile

LIMIT = 24  # questions of a file


def demo(
    questions: Annotated[
        Path | None,
        typer.Argument(help="Questions with answers in place of its own; the first 24.", metavar="[FILE]"),
    ] = None,
    dollars: Annotated[
        str, typer.Option("--budget", help="Dollars for all lanes; each has a quarter.")
    ] = "0.02",
    pull: Annotated[bool, typer.Option("--pull", help="Fetch weights that are missing, then go on.")] = False,
    router: Annotated[
        Path | None,
        typer.Option(help="The folder of a fitted router in place of the default one.", metavar="DIR"),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Of the routed lane and the job: within:DISTANCE, best, cheapest:ACCURACY, fastest:ACCURACY "
            "or weighted:PER_DOLLAR; by default that of the router that ships, and paced for the job."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder for ledger, results and report; by default one beside your ledger."),
    ] = None,
    catalogue: CatalogueFile = None,
) -> None:
    """Show what routing gets on this machine, in minutes: always small, always large, Viaticum.

    24 questions of four kinds are answered by two local models in three lanes within one budget. One answer
    shows which model wrote which token. Then a job has too little money, is killed and goes on, and its
    report ends the demo. All figures are measured in this run.
    """
    from viaticum.budgets import default_path
    from viaticum.commands.progress import loading_shown
    from viaticum.demo.questions import demo_questions, router_folder
    from viaticum.demo.show import Demo, DemoSettings, new_folder
    from viaticum.errors import DataError
    from viaticum.heavy import check_installed
    from viaticum.questions import read_questions

    check_installed("torch", "local")  # before a gigabyte of weights is fetched for it
    asked = demo_questions() if questions is None else read_questions(questions, limit=LIMIT)
    if unknown := [each.id for each in asked if not each.accepted]:
        raise DataError(f"question {unknown[0]!r} has no answer; the demo compares with known answers")
    router = router or router_folder()
    if pull:
        _pull(catalogue, router)
    folder = new_folder(default_path().parent / "demo") if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    with loading_shown():
        Demo(DemoSettings(asked, dollars, folder, catalogue, router, policy)).run()


def _pull(path: Path | None, router: Path | None) -> None:
    """Fetch what is missing, and tell how long that took."""
    from viaticum.catalogue import Catalogue
    from viaticum.commands.models import byte_reporter
    from viaticum.commands.progress import ProgressBar
    from viaticum.demo.show import needed_weights
    from viaticum.weights import pull_all

    began = time.perf_counter()
    with ProgressBar("", unit="bytes") as bar:
        pulled = pull_all(needed_weights(Catalogue.load(path), router), byte_reporter(bar))
    size = sum(each.bytes for each in pulled)
    typer.echo(f"weights: {size / 1e9:.1f} GB are here, after {time.perf_counter() - began:.1f} s")
