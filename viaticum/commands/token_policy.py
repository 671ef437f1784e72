"""`viaticum tokens policy`: learn when an unsure small model should call the large one (R-Stitch+), and say what that is worth.

Results go to stdout, progress to stderr. Leaves out errors and exit codes, as `viaticum.commands.tokens` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from viaticum.commands.models import CatalogueFile, JsonFlag
from viaticum.commands.progress import ProgressBar
from viaticum.commands.tokens import Slots

Answered = Annotated[Path, typer.Argument(help="JSONL with question and answer.", metavar="QUESTIONS")]
Costs = Annotated[
    Path | None, typer.Option(help="Times of the pair's calls; by default those measured here.")
]
Device = Annotated[str, typer.Option(help="Where the models run: cpu, cuda")]
Limit = Annotated[int | None, typer.Option(help="Only the first so many questions.", min=1)]
Skip = Annotated[int, typer.Option(help="Leave out the first so many questions.", min=0)]


def policy(
    questions: Answered,
    pair: Annotated[str, typer.Option(help="A pair of the catalogue.")],
    out: Annotated[
        Path, typer.Option(help="The folder of the run; one that was begun goes on.", metavar="DIR")
    ],
    tau: Annotated[
        float | None, typer.Option(help="The entropy above which the policy is asked; by default the pair's.")
    ] = None,
    latency_weight: Annotated[
        float, typer.Option("--lambda", help="What a second of latency costs of a right answer.")
    ] = 0.01,
    streams: Annotated[int, typer.Option(help="Texts at once whose latency is estimated.", min=1)] = 1,
    group: Annotated[int, typer.Option(help="Texts to each question.", min=2)] = 8,
    questions_per_step: Annotated[
        int, typer.Option(help="Questions with different rewards that a step wants.", min=1)
    ] = 4,
    most_per_step: Annotated[
        int | None,
        typer.Option(help="Questions that it asks at most for them; by default thrice as many.", min=1),
    ] = None,
    steps: Annotated[int, typer.Option(help="In all, those of earlier runs among them.", min=0)] = 50,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no step after so long; the same command goes on.", min=0)
    ] = None,
    held_out: Annotated[int, typer.Option(help="Questions to evaluate on, before and after.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Of the split and every draw.", min=0)] = 0,
    strategy: Annotated[str, typer.Option(help="How the questions are asked.")] = "cot",
    temperature: Annotated[float, typer.Option(help="Of the models' tokens while learning.", min=0)] = 0.0,
    rank: Annotated[
        int, typer.Option(help="Principal components of hidden states; 0: all, layer-normed.", min=0)
    ] = 32,
    width: Annotated[int, typer.Option(help="Of the policy's layers.", min=1)] = 64,
    start: Annotated[float, typer.Option(help="The logit of calling before anything is learned.")] = 2.5,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 3e-3,
    epochs: Annotated[int, typer.Option(help="Passes over the texts of a step.", min=1)] = 4,
    minibatches: Annotated[int, typer.Option(help="Of a pass.", min=1)] = 4,
    scale: Annotated[
        Literal["group", "batch"],
        typer.Option(help="Advantages by the deviation of their group, or of the batch."),
    ] = "group",
    limit: Limit = None,
    skip: Skip = 0,
    slots: Slots = 16,
    device: Device = "cpu",
    costs: Costs = None,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Learn R-Stitch+'s policy: when an unsure small model calls the large one. Goes on after a kill."""
    from viaticum.catalogue import Catalogue
    from viaticum.questions import read_questions
    from viaticum.training.policy import PolicySettings, default_tau, learn

    models = Catalogue.load(catalogue)
    settings = PolicySettings(
        default_tau(models[pair]) if tau is None else tau,
        strategy,
        latency_weight,
        streams,
        group,
        questions_per_step,
        3 * questions_per_step if most_per_step is None else most_per_step,
        temperature,
        seed,
        held_out,
        rank,
        width,
        start,
        rate,
        epochs,
        minibatches,
        scale,
    )
    asked = read_questions(questions, limit=None if limit is None else limit + skip)[skip:]
    with ProgressBar() as bar:
        found = learn(
            asked,
            pair,
            out,
            catalogue=models,
            settings=settings,
            steps=steps,
            minutes=minutes,
            slots=slots,
            device=device,
            costs=_costs(costs),
            report=bar.report,
        )
    kept = ("pair", "tau", "threshold", "steps", "learned", "last", "evaluation")
    if as_json:
        facts = {name: found.facts[name] for name in kept}
        typer.echo(json.dumps({"path": str(out), **_without_rows(facts)}))
        return
    if found.facts["evaluation"]:
        _print(found.facts["evaluation"])
    typer.echo(
        f"{found.facts['steps']} steps, {found.facts['learned']} that taught something; policy in {out}"
    )


def policy_evaluate(
    folder: Annotated[Path, typer.Argument(help="The folder of a policy.", metavar="DIR")],
    questions: Answered,
    pair: Annotated[str, typer.Option(help="By default the pair it was learned for.")] = "",
    limit: Limit = None,
    skip: Skip = 0,
    slots: Slots = 16,
    device: Device = "cpu",
    costs: Annotated[
        Path | None, typer.Option(help="Times of the pair's calls; by default those it was learned with.")
    ] = None,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """A policy beside R-Stitch with the same tau: reward, accuracy, share of the large model, latency."""
    from viaticum.catalogue import Catalogue
    from viaticum.questions import read_questions
    from viaticum.training.policy_evaluation import evaluate

    asked = read_questions(questions, limit=None if limit is None else limit + skip)[skip:]
    with ProgressBar() as bar:
        told = evaluate(
            folder,
            asked,
            catalogue=Catalogue.load(catalogue),
            pair=pair,
            slots=slots,
            device=device,
            costs=_costs(costs),
            report=bar.report,
        )
    if as_json:
        typer.echo(json.dumps(told))
        return
    _print(told)
    if told["learned_from"]:
        typer.echo(f"it learned from {told['learned_from']} of these questions")


def _costs(path: Path | None) -> Any:
    if path is None:
        return None
    from viaticum.decoders.cost import CostModel

    return CostModel.load(path)


def _without_rows(facts: dict[str, Any]) -> dict[str, Any]:
    told = facts["evaluation"]
    if told:
        facts["evaluation"] = {name: value for name, value in told.items() if name != "rows"}
    return facts


def _print(told: Mapping[str, Any]) -> None:
    table = Table("", "R-Stitch", "R-Stitch+", "difference", "95%", box=None, pad_edge=False)
    for name, change in told["difference"].items():
        low, high = change["95%"]
        table.add_row(
            name.replace("_", " "),
            f"{told['before'][name]:.3f}",
            f"{told['after'][name]:.3f}",
            f"{change['mean']:+.3f}",
            f"{low:+.3f} to {high:+.3f}",
        )
    Console(width=max(90, Console().width)).print(table)
    typer.echo(f"{told['questions']} questions")
