"""`viaticum models`: list the catalogue; fetch, check and measure its weights on this machine.

Results go to stdout, progress to stderr. Leaves out errors and exit codes: `viaticum.cli` turns a
`ViaticumError` into one line and exit code 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import typer

from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.commands.completion import complete_entry, complete_model
from viaticum.commands.local import with_local_options
from viaticum.commands.model_entries import CatalogueFile, JsonFlag, add, where
from viaticum.commands.progress import ProgressBar
from viaticum.commands.table import print_table
from viaticum.errors import AuthenticationFailed, InputError, WeightsError
from viaticum.local_settings import NO_LOCAL_SETTINGS, LocalSettings
from viaticum.models.api_keys import require_key
from viaticum.money import format_usd
from viaticum.weights import Pulled, check, locate, pull_all

__all__ = ["CatalogueFile", "JsonFlag", "app"]

app = typer.Typer(
    no_args_is_help=True, help="List the models of the catalogue; fetch and check their weights."
)

Name = Annotated[str, typer.Argument(help="A model of the catalogue.", autocompletion=complete_entry)]


app.command()(add)
app.command()(where)


@app.command("list")
def list_models(as_json: JsonFlag = False, catalogue: CatalogueFile = None) -> None:
    """List every model: kind, prices, context, and whether its weights are here or its key is missing."""
    loaded = Catalogue.load(catalogue)
    if as_json:
        _print_json([_facts(spec, loaded) for spec in loaded.values()])
        return
    rows = []
    for spec in loaded.values():
        price_in, price_out = _price_texts(spec)
        weights = {None: _key_text(spec), True: "here", False: "not here"}[_is_here(spec, loaded)]
        rows.append((spec.name, spec.kind, price_in, price_out, str(spec.context_length), weights))
    columns = ("name", "kind", "$/M input", "$/M output", "context", "weights")
    print_table(columns, rows, spare=("context", "kind"))


@app.command()
def show(name: Name, as_json: JsonFlag = False, catalogue: CatalogueFile = None) -> None:
    """Show one entry of the catalogue."""
    loaded = Catalogue.load(catalogue)
    facts = _facts(loaded[name], loaded)
    if as_json:
        _print_json(facts)
        return
    for key, value in facts.items():
        for line in value if key == "sources" else [value]:
            typer.echo(f"{key}: {_source_text(line) if key == 'sources' else line}")


@app.command()
def pull(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Models; without any, those used by default.", autocompletion=complete_entry),
    ] = None,
    full_check: Annotated[
        bool, typer.Option("--check", help="Hash what is already here; repair it.")
    ] = False,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Fetch weights, check them against their hash, and keep them for good. A pair fetches both models."""
    loaded = Catalogue.load(catalogue)
    specs = _with_weights(loaded, names or [])
    with ProgressBar("", unit="bytes") as bar:
        pulled = pull_all(specs, byte_reporter(bar), full_check=full_check)
    _print_pulled(pulled, as_json)


@app.command("check")
def check_weights(name: Name, as_json: JsonFlag = False, catalogue: CatalogueFile = None) -> None:
    """Hash every file of a model's weights against what was written when they were fetched."""
    loaded = Catalogue.load(catalogue)
    specs = _with_weights(loaded, [name])
    with ProgressBar("", unit="bytes") as bar:
        checked = [check(spec, partial(byte_reporter(bar), spec.name)) for spec in specs]
    _print_pulled(checked, as_json)


@app.command()
@with_local_options
def measure(
    name: Annotated[str, typer.Argument(help="A pair of the catalogue.")],
    streams: Annotated[int, typer.Option(help="Most texts at once to measure for.", min=1)] = 16,
    local: LocalSettings = NO_LOCAL_SETTINGS,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Time the calls of a pair on this machine, so that its mode "auto" knows which decoding mode is fastest.

    Takes a minute or two; run it while nothing else does.
    """
    from viaticum.models.decoding_modes import costs_path
    from viaticum.models.measure import measure_costs

    loaded = Catalogue.load(catalogue).with_local(local)
    spec = loaded[name]
    if spec.kind != "pair":
        raise InputError(f"{name} is a {spec.kind} model; only a pair has several ways to decode")
    costs, expected = measure_costs(loaded, spec, streams, lambda stage: typer.echo(stage, err=True))
    path = costs_path(spec)
    if as_json:
        _print_json({"path": str(path), "conditions": costs.conditions, "tokens_per_second": expected})
        return
    rows = [(mode, *(f"{speeds[mode]:.1f}" for speeds in expected.values())) for mode in expected[1]]
    print_table(("mode", *(f"{count} at once" for count in expected)), rows)
    typer.echo(f"tokens a second to expect; kept in {path}")


@app.command("test")
@with_local_options
def try_model(
    name: Annotated[
        str, typer.Argument(help="A model that answers questions.", autocompletion=complete_model)
    ],
    rows: Annotated[int, typer.Option(help="Most texts at once of a local one: 1, 4 or 16.", min=1)] = 4,
    dollars: Annotated[
        str, typer.Option("--budget", help="Dollars that the call may cost at most.")
    ] = "0.05",
    local: LocalSettings = NO_LOCAL_SETTINGS,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Try a model: one question with its cost and tokens a second, or the engines of a local one.

    A local model is loaded with every engine that can and timed; engine "auto" takes the fastest from then
    on. That takes a minute or two; run it while nothing else does. The engines are torch and, for a model
    that came as a GGUF file, llama.cpp, if the extra llama is installed; --local-engine names one.
    """
    from viaticum.commands.model_trial import try_call
    from viaticum.models.engine_choice import measured_engine
    from viaticum.models.engine_trial import engines_of, try_engines

    loaded = Catalogue.load(catalogue).with_local(local)
    spec = loaded[name]
    if spec.kind == "encoder":
        raise InputError(f"{name} is an encoder: it answers no questions")
    if spec.kind != "local":
        try_call(loaded, name, dollars, as_json=as_json)
        return
    figures = try_engines(loaded, spec, engines_of(spec), rows, lambda stage: typer.echo(stage, err=True))
    if as_json:
        _print_json({engine: asdict(each) for engine, each in figures.items()})
        return
    counts = list(next(iter(figures.values())).steps)
    columns = [f"{count} at once" for count in counts]
    cells = []
    for engine, each in figures.items():
        speeds = [f"{each.tokens_per_second(count):.1f}" for count in counts]
        memory = "-" if each.resident is None else f"{each.resident / 1e6:,.0f} MB"
        cells.append((engine, f"{each.load:.1f} s", f"{each.prefill:.2f} s", memory, *speeds))
    print_table(("engine", "load", "first token", "memory", *columns), cells, spare=("load", "memory"))
    typer.echo("first token: after a prompt of 256 tokens; at once: tokens a second of all texts together")
    if chosen := measured_engine(spec, rows):
        typer.echo(f'engine "auto" takes {chosen}')


def byte_reporter(bar: ProgressBar) -> Callable[[str, str, int, int], None]:
    """Show the stages of several models, one bar each."""
    return lambda name, stage, done, total: bar.update(f"{name}: {stage}", done, total, task=name)


def _with_weights(catalogue: Catalogue, names: list[str]) -> tuple[ModelSpec, ...]:
    for name in names:
        if catalogue[name].kind == "remote":
            raise InputError(f"{name} is a remote model: it has no weights to keep on this machine")
    return catalogue.weights_of(*names)


def _is_here(spec: ModelSpec, catalogue: Catalogue) -> bool | None:
    """None for a remote model, which has no weights."""
    if spec.kind == "remote":
        return None
    try:
        for member in catalogue.weights_of(spec.name):
            locate(member)
    except WeightsError:
        return False
    return True


def _key_text(spec: ModelSpec) -> str:
    try:
        require_key(spec)
    except AuthenticationFailed:
        return "no key"
    return "-"


def _facts(spec: ModelSpec, catalogue: Catalogue) -> dict[str, Any]:
    """The entry with its labels, and `path` where its weights are here."""
    facts = spec.model_dump(exclude_none=True)
    facts["labels"] = sorted(catalogue.labels(spec.name))
    if not spec.sources:
        del facts["sources"]
    elif _is_here(spec, catalogue):
        facts["path"] = str(locate(spec))
    return facts


def _source_text(source: dict[str, Any]) -> str:
    if source["type"] == "wheels":
        packages = source["packages"]
        return (
            f"{len(packages)} wheels from {packages[0]}, {source['bytes']} bytes, sha256 {source['sha256']}"
        )
    if source["type"] == "path":
        return f"path {source['path']}"
    text = f"hub {source['repo']} at {source['revision']}"
    return f"{text}, {source['file']}, sha256 {source['sha256']}" if "file" in source else text


def _price_texts(spec: ModelSpec) -> tuple[str, str]:
    if spec.price is None:
        return ("-", "-") if spec.kind in ("pair", "encoder") else ("unknown", "unknown")
    return format_usd(spec.price.input_nanousd_per_million), format_usd(spec.price.output_nanousd_per_million)


def _print_pulled(pulled: list[Pulled], as_json: bool) -> None:
    if as_json:
        objects = [each.as_json() for each in pulled]
        _print_json(objects[0] if len(objects) == 1 else objects)
        return
    for each in pulled:
        typer.echo(f"{each.name}  {each.bytes} bytes  sha256 {each.sha256}  {each.path}")


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=float))  # exact decimals print as plain numbers
