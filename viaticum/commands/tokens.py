"""`viaticum tokens`: label a pair's tokens, train, evaluate and calibrate a token router on them.

Results go to stdout, progress to stderr. Leaves out errors and exit codes: `viaticum.cli` turns a
`ViaticumError` into one line and exit code 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from viaticum.commands.local import with_local_options
from viaticum.commands.models import CatalogueFile, JsonFlag
from viaticum.commands.progress import ProgressBar
from viaticum.commands.table import print_table
from viaticum.local_settings import NO_LOCAL_SETTINGS, LocalSettings

if TYPE_CHECKING:
    from viaticum.questions import Question

app = typer.Typer(no_args_is_help=True, help="Learn which tokens a small model may write (R2R).")

Labels = Annotated[Path, typer.Argument(help="A folder of labels.", metavar="LABELS")]
RouterFolder = Annotated[Path, typer.Argument(help="The folder of a token router.", metavar="DIR")]
Limit = Annotated[int | None, typer.Option(help="Only the first so many questions.", min=1)]
Skip = Annotated[int, typer.Option(help="Leave out the first so many questions.", min=0)]
NewRouterFolder = Annotated[
    Path, typer.Option(help="The folder that the router is written to.", metavar="DIR")
]
Inputs = Annotated[
    str,
    typer.Option(
        help="all, r2r (logits, hidden, embedding), or some of entropy, logits, hidden, embedding, second"
    ),
]
NeutralWeight = Annotated[
    float | None,
    typer.Option(
        help="What a neutral token counts beside an identical one; by default 1, or 5 where shapes are tried "
        "and it is better."
    ),
]
TrainingQuestions = Annotated[int | None, typer.Option(help="Learn from so many questions at most.", min=1)]


@app.command()
@with_local_options
def label(
    questions: Annotated[Path, typer.Argument(help="JSONL with a question a line; answers are not needed.")],
    pair: Annotated[str, typer.Option(help="A pair of the catalogue.")],
    out: Annotated[
        Path, typer.Option(help="The folder of labels; one that was begun goes on.", metavar="LABELS")
    ],
    strategy: Annotated[str, typer.Option(help="How the questions are asked.")] = "cot",
    verifier: Annotated[str, typer.Option(help="outcome, semantic, llm or llm:MODEL")] = "outcome",
    also: Annotated[
        str, typer.Option(help="More verifiers, with commas; their labels are kept beside.")
    ] = "",
    limit: Limit = None,
    skip: Skip = 0,
    local: LocalSettings = NO_LOCAL_SETTINGS,
    seed: Annotated[int, typer.Option(help="Of strategies that sample.")] = 0,
    sentence_cap: Annotated[
        int, typer.Option(help="Most tokens of a continuation that need not end.", min=1)
    ] = 128,
    step_tokens: Annotated[int, typer.Option(help="Tokens a call of the small model reads.", min=1)] = 4,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Find the tokens at which the small model would leave the large one's path; goes on after a kill."""
    from viaticum.catalogue import Catalogue
    from viaticum.training.token_labels import LabelSettings
    from viaticum.training.token_labels import label as run

    with ProgressBar() as bar:
        run(
            read_slice(questions, limit, skip),
            pair,
            out,
            catalogue=Catalogue.load(catalogue).with_local(local),
            verifiers=_names(verifier, also),
            settings=LabelSettings(strategy, seed, sentence_cap, step_tokens),
            report=bar.report,
        )
    _print_statistics(out, as_json)


@app.command()
@with_local_options
def verify(
    labels: Labels,
    verifier: Annotated[str, typer.Option(help="outcome, semantic, llm or llm:MODEL, with commas")],
    limit: Annotated[
        int | None, typer.Option(help="Judge only so many of the differences, spread evenly.", min=1)
    ] = None,
    local: LocalSettings = NO_LOCAL_SETTINGS,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Let more verifiers judge what was labelled, to see how far they agree."""
    from viaticum.catalogue import Catalogue
    from viaticum.training.token_labels import verify as run

    with ProgressBar() as bar:
        run(
            labels,
            _names(verifier),
            catalogue=Catalogue.load(catalogue).with_local(local),
            limit=limit,
            report=bar.report,
        )
    _print_statistics(labels, as_json)


@app.command()
def stats(labels: Labels, as_json: JsonFlag = False) -> None:
    """Shares of identical, neutral and divergent tokens, their entropies, and how far verifiers agree."""
    _print_statistics(labels, as_json)


@app.command()
def table(
    labels: Labels,
    out: Annotated[Path, typer.Argument(help="The Parquet file to write.", metavar="OUT.parquet")],
) -> None:
    """Write a row a token as Parquet, for analysis elsewhere: entropies, and what each verifier says."""
    from viaticum.training.label_export import write_table

    typer.echo(f"{write_table(labels, out)} tokens in {out}")


@app.command()
def train(
    labels: Labels,
    out: NewRouterFolder,
    inputs: Inputs = "all",
    verifier: Annotated[str, typer.Option(help="Whose labels; by default the first of the folder.")] = "",
    width: Annotated[int | None, typer.Option(help="Of a network; with it none is chosen.", min=1)] = None,
    depth: Annotated[int | None, typer.Option(help="Blocks; 0 is logistic regression.", min=0)] = None,
    rank: Annotated[int, typer.Option(help="Dimensions of hidden states; 0: all.", min=0)] = 64,
    members: Annotated[int, typer.Option(help="Networks that are averaged.", min=1)] = 5,
    dropout: Annotated[float, typer.Option(help="In training.", min=0.0, max=0.99)] = 0.3,
    rate: Annotated[float, typer.Option(help="Learning rate; the paper's is 5e-5.")] = 1e-3,
    decay: Annotated[float, typer.Option(help="Weight decay.", min=0.0)] = 0.05,
    neutral: NeutralWeight = None,
    recall: Annotated[float, typer.Option(help="Of divergent tokens, for the first threshold.")] = 0.95,
    questions: TrainingQuestions = None,
    seed: Annotated[int, typer.Option(help="Of the split and every draw.", min=0)] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Learn which of the small model's tokens diverge.

    Without --width and --depth the best of a few shapes is taken.
    """
    from viaticum.routers.token.labels import LabelledTokens
    from viaticum.routers.token.neural import Shape, parse_inputs
    from viaticum.routers.token.train import TrainSettings
    from viaticum.routers.token.train import train as run

    tokens = LabelledTokens.load(labels, verifier)
    shape = Shape(
        hidden=tokens.hidden.shape[1],
        top=tokens.top.shape[1],
        inputs=parse_inputs(inputs),
        rank=rank,
        width=64 if width is None else width,
        depth=2 if depth is None else depth,
        members=members,
        dropout=dropout,
    )
    settings = TrainSettings(seed=seed, rate=rate, decay=decay, neutral=neutral, recall=recall)
    with ProgressBar() as bar:
        router = run(
            tokens,
            shape,
            settings=settings,
            choose=width is None and depth is None,
            most=questions,
            report=bar.report,
        )
    router.save(out)
    kept = ("threshold", "calibration", "settings", "tokens", "metrics")
    if as_json:
        size = sum(path.stat().st_size for path in out.iterdir())
        facts = {name: router.metadata[name] for name in kept}
        typer.echo(json.dumps({"path": str(out), "bytes": size, **facts}))
        return
    _print_metrics(router.metadata["metrics"].items())
    _print_threshold(router.metadata, out)


@app.command()
def evaluate(
    folder: RouterFolder,
    labels: Labels,
    beside: Annotated[list[Path] | None, typer.Option(help="More routers, e.g. of other inputs.")] = None,
    verifier: Annotated[
        str, typer.Option(help="Whose labels; by default those that DIR learned from, else the first.")
    ] = "",
    as_json: JsonFlag = False,
) -> None:
    """How well a router finds divergent tokens in questions not learned from, beside entropy alone."""
    from viaticum.routers.token.labels import LabelledTokens
    from viaticum.routers.token.neural import TrainedRouter
    from viaticum.routers.token.train import evaluate as run

    routers = {str(path): TrainedRouter.load(path) for path in (folder, *(beside or []))}
    result = run(routers, LabelledTokens.load(labels, verifier, prefer=routers[str(folder)].verifier))
    if as_json:
        typer.echo(json.dumps(result))
        return
    _print_metrics([("entropy", result["entropy"]), *result["routers"].items()])
    typer.echo(
        f"{result['questions']} questions, {result['tokens']} tokens, {result['differing']} differ, "
        f"{result['divergent']} diverge"
    )


@app.command()
@with_local_options
def calibrate(
    folder: RouterFolder,
    prompts: Annotated[
        Path,
        typer.Argument(
            help="Your own questions (JSONL); for --recall a folder of labels.", metavar="QUESTIONS"
        ),
    ],
    share: Annotated[float | None, typer.Option(help="Of the tokens that the large model writes.")] = None,
    recall: Annotated[float | None, typer.Option(help="Of the divergent tokens.")] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(help="Of all texts together, on this machine.")
    ] = None,
    pair: Annotated[str, typer.Option(help="By default the pair that was labelled.")] = "",
    strategy: Annotated[str, typer.Option(help="By default that of the labels.")] = "",
    limit: Limit = None,
    local: LocalSettings = NO_LOCAL_SETTINGS,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Set the threshold to a share, a recall or a speed, and store it with the router."""
    from viaticum.catalogue import Catalogue
    from viaticum.errors import InputError
    from viaticum.questions import read_questions
    from viaticum.training.calibration import calibrate as run
    from viaticum.training.calibration import calibrate_recall

    if sum(each is not None for each in (share, recall, tokens_per_second)) != 1:
        raise InputError("give one of --share, --recall and --tokens-per-second")
    if recall is not None:
        if not prompts.is_dir():
            raise InputError(
                f"a recall is counted on labels, and {prompts} is no folder of them; make one with: "
                "viaticum tokens label"
            )
        router = calibrate_recall(folder, prompts, recall)
    else:
        with ProgressBar() as bar:
            router = run(
                folder,
                read_questions(prompts, limit=limit),
                catalogue=Catalogue.load(catalogue).with_local(local),
                share=share,
                tokens_per_second=tokens_per_second,
                pair=pair,
                strategy=strategy,
                report=bar.report,
            )
    if as_json:
        result = {
            "path": str(folder),
            "threshold": router.threshold,
            "calibration": router.metadata["calibration"],
        }
        typer.echo(json.dumps(result))
        return
    _print_threshold(router.metadata, folder)


def read_slice(path: Path, limit: int | None, skip: int) -> list[Question]:
    """Read `limit` questions of a file after the first `skip`."""
    from viaticum.questions import read_questions

    return read_questions(path, limit=None if limit is None else limit + skip)[skip:]


def _print_threshold(facts: Mapping[str, Any], folder: Path) -> None:
    calibration = facts["calibration"]
    details = ", ".join(
        f"{name.replace('_', ' ')} {value:.3g}"
        for name, value in calibration.items()
        if name != "by" and value is not None
    )
    typer.echo(f"threshold {facts['threshold']:.4f}, by {calibration['by']} ({details}); router in {folder}")


def _print_metrics(metrics: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    shares = ("0.05", "0.1", "0.2")
    columns = ("score", "AUC, all", "95%", "AUC, differing", "95% of it")
    recall_columns = [f"recall at {float(each):.0%}" for each in shares]
    rows = []
    for name, values in metrics:
        cells = [name]
        for part in ("all", "differing"):
            interval = values[part]["auc_95"]
            cells.append(_number(values[part]["auc"], 3))
            cells.append("-" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}")
        recalls = values["all"]["recall_at_share"]
        rows.append((*cells, *("-" if recalls[each] is None else f"{recalls[each]:.1%}" for each in shares)))
    print_table((*columns, *recall_columns), rows, spare=("95% of it", "95%", *recall_columns))


def _names(*texts: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for text in texts for name in text.split(",") if name.strip()))


def _print_statistics(labels: Path, as_json: bool) -> None:
    from viaticum.routers.token.label_stats import KINDS, statistics

    counts = statistics(labels)
    if as_json:
        typer.echo(json.dumps(counts))
        return
    rows = []
    for verifier, kinds in counts["verifiers"].items():
        for kind in KINDS:
            facts = kinds[kind]
            numbers = (_number(facts["entropy"], 4), _number(facts["nats"], 2))
            rows.append((verifier, kind, str(facts["tokens"]), f"{facts['share']:.1%}", *numbers))
    print_table(
        ("verifier", "tokens are", "count", "share", "entropy", "nats"), rows, spare=("nats", "entropy")
    )
    for each in counts["agreement"]:
        a, b = each["verifiers"]
        typer.echo(
            f"{a} and {b} agree on {_number(each['share'], 3)} of {each['differences']} differences, "
            f"kappa {_number(each['kappa'], 2)}"
        )
    typer.echo(f"{counts['questions']} texts, {counts['tokens']} tokens, {counts['differing']} differ")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
