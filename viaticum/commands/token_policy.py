"""`viaticum tokens policy`: learn when an unsure small model calls the large one (R-Stitch+); evaluate it.

Results go to stdout, progress to stderr. Leaves out errors and exit codes, as `viaticum.commands.tokens`
does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from viaticum.commands.local import with_local_options
from viaticum.commands.models import CatalogueFile, JsonFlag
from viaticum.commands.progress import ProgressBar
from viaticum.commands.table import print_table
from viaticum.commands.tokens import Limit, Skip, read_slice
from viaticum.local_settings import NO_LOCAL_SETTINGS, LocalSettings

if TYPE_CHECKING:
    from viaticum.decoders.cost import CostModel
    from viaticum.routers.token.policy import TrainedPolicy

# --- options --------------------------------------------------------------------------------------------

Answered = Annotated[Path, typer.Argument(help="JSONL with question and answer.", metavar="QUESTIONS")]
PairName = Annotated[str, typer.Option(help="A pair of the catalogue.")]
RunFolder = Annotated[
    Path, typer.Option(help="The folder of the run; one that was begun goes on.", metavar="DIR")
]
Tau = Annotated[
    float | None, typer.Option(help="The entropy above which the policy is asked; by default the pair's.")
]
LatencyWeight = Annotated[
    float, typer.Option("--lambda", help="What a second of latency costs of a right answer.")
]
Streams = Annotated[int, typer.Option(help="Texts at once whose latency is estimated.", min=1)]
Group = Annotated[int, typer.Option(help="Texts to each question.", min=2)]
QuestionsPerStep = Annotated[
    int, typer.Option(help="Questions with different rewards that a step wants.", min=1)
]
MostPerStep = Annotated[
    int | None,
    typer.Option(help="Questions that it asks at most for them; by default thrice as many.", min=1),
]
Steps = Annotated[int, typer.Option(help="In all, those of earlier runs among them.", min=0)]
Minutes = Annotated[
    float | None, typer.Option(help="Begin no step after so long; the same command goes on.", min=0)
]
HeldOut = Annotated[int, typer.Option(help="Questions to evaluate on, before and after.", min=0)]
Seed = Annotated[int, typer.Option(help="Of the split and every draw.", min=0)]
StrategyName = Annotated[str, typer.Option(help="How the questions are asked.")]
Temperature = Annotated[float, typer.Option(help="Of the models' tokens while learning.", min=0)]
Rank = Annotated[
    int, typer.Option(help="Principal components of hidden states; 0: all, layer-normed.", min=0)
]
Width = Annotated[int, typer.Option(help="Of the policy's layers.", min=1)]
StartLogit = Annotated[float, typer.Option(help="The logit of calling before anything is learned.")]
Rate = Annotated[float, typer.Option(help="Learning rate.")]
Epochs = Annotated[int, typer.Option(help="Passes over the texts of a step.", min=1)]
Minibatches = Annotated[int, typer.Option(help="Of a pass.", min=1)]
Scale = Annotated[
    Literal["group", "batch"],
    typer.Option(help="Advantages by the deviation of their group, or of the batch."),
]
Costs = Annotated[
    Path | None, typer.Option(help="Times of the pair's calls; by default those measured here.")
]

# --- commands -------------------------------------------------------------------------------------------


@with_local_options
def policy(
    questions: Answered,
    pair: PairName,
    out: RunFolder,
    tau: Tau = None,
    latency_weight: LatencyWeight = 0.01,
    streams: Streams = 1,
    group: Group = 8,
    questions_per_step: QuestionsPerStep = 4,
    most_per_step: MostPerStep = None,
    steps: Steps = 50,
    minutes: Minutes = None,
    held_out: HeldOut = 0,
    seed: Seed = 0,
    strategy: StrategyName = "cot",
    temperature: Temperature = 0.0,
    rank: Rank = 32,
    width: Width = 64,
    start: StartLogit = 2.5,
    rate: Rate = 3e-3,
    epochs: Epochs = 4,
    minibatches: Minibatches = 4,
    scale: Scale = "group",
    limit: Limit = None,
    skip: Skip = 0,
    local: LocalSettings = NO_LOCAL_SETTINGS,
    costs: Costs = None,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Learn R-Stitch+'s policy: when an unsure small model calls the large one. Goes on after a kill."""
    from viaticum.catalogue import Catalogue
    from viaticum.training.policy import PolicySettings, default_tau, learn

    models = Catalogue.load(catalogue).with_local(local)
    tau = default_tau(models[pair]) if tau is None else tau
    most = 3 * questions_per_step if most_per_step is None else most_per_step
    groups, shape, update = (
        (group, questions_per_step, most),
        (rank, width, start),
        (rate, epochs, minibatches),
    )
    settings = PolicySettings(
        tau, strategy, latency_weight, streams, *groups, temperature, seed, held_out, *shape, *update, scale
    )
    run = partial(learn, catalogue=models, settings=settings, steps=steps, minutes=minutes)
    selected = read_slice(questions, limit, skip)
    with ProgressBar() as bar:
        learned = run(selected, pair, out, costs=_load_costs(costs), report=bar.report)
    _print_policy(learned, out, as_json)


@with_local_options
def policy_evaluate(
    folder: Annotated[Path, typer.Argument(help="The folder of a policy.", metavar="DIR")],
    questions: Answered,
    pair: Annotated[str, typer.Option(help="By default the pair it was learned for.")] = "",
    limit: Limit = None,
    skip: Skip = 0,
    local: LocalSettings = NO_LOCAL_SETTINGS,
    costs: Annotated[
        Path | None, typer.Option(help="Times of the pair's calls; by default those it was learned with.")
    ] = None,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Compare a policy with R-Stitch at the same tau: reward, accuracy, share of the large model, latency."""
    from viaticum.catalogue import Catalogue
    from viaticum.training.policy_evaluation import evaluate

    selected = read_slice(questions, limit, skip)
    with ProgressBar() as bar:
        result = evaluate(
            folder,
            selected,
            catalogue=Catalogue.load(catalogue).with_local(local),
            pair=pair,
            costs=_load_costs(costs),
            report=bar.report,
        )
    if as_json:
        typer.echo(json.dumps(result))
        return
    _print_comparison(result)
    if result["learned_from"]:
        typer.echo(f"it learned from {result['learned_from']} of these questions")


def _load_costs(path: Path | None) -> CostModel | None:
    if path is None:
        return None
    from viaticum.decoders.cost import CostModel

    return CostModel.load(path)


def _print_policy(learned: TrainedPolicy, out: Path, as_json: bool) -> None:
    evaluation = learned.metadata["evaluation"]
    if as_json:
        kept = ("pair", "tau", "threshold", "steps", "learned", "last", "evaluation")
        facts = {name: learned.metadata[name] for name in kept}
        if evaluation:
            facts["evaluation"] = {name: value for name, value in evaluation.items() if name != "rows"}
        typer.echo(json.dumps({"path": str(out), **facts}))
        return
    if evaluation:
        _print_comparison(evaluation)
    typer.echo(
        f"{learned.metadata['steps']} steps, {learned.metadata['learned']} that taught something; "
        f"policy in {out}"
    )


def _print_comparison(result: Mapping[str, Any]) -> None:
    rows = []
    for name, change in result["difference"].items():
        low, high = change["95%"]
        values = (f"{result['before'][name]:.3f}", f"{result['after'][name]:.3f}", f"{change['mean']:+.3f}")
        rows.append((name.replace("_", " "), *values, f"{low:+.3f} to {high:+.3f}"))
    print_table(("", "R-Stitch", "R-Stitch+", "difference", "95%"), rows)
    typer.echo(f"{result['questions']} questions")
