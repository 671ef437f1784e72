"""`viaticum models add` and `viaticum models where`: the user's own catalogue. Asks no model."""

from __future__ import annotations

import json
import os
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from viaticum.catalogue import Catalogue, user_file
from viaticum.errors import InputError

if TYPE_CHECKING:
    from viaticum.catalogue_file import Added

CatalogueFile = Annotated[
    Path | None,
    typer.Option("--catalogue", help="A TOML file laid over the packaged catalogue.", metavar="FILE"),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Source = Annotated[
    str, typer.Argument(help="PROVIDER/MODEL, hub:OWNER/NAME or the path of a GGUF file.", metavar="MODEL")
]
Name = Annotated[str | None, typer.Option(help="By which it is asked; that of the model by default.")]
Description = Annotated[str | None, typer.Option(help="What it is good at; routers read it.")]
Context = Annotated[int | None, typer.Option(help="Tokens of prompt and answer together.", min=1)]
InputPrice = Annotated[str | None, typer.Option(help="Dollars per million tokens read.")]
OutputPrice = Annotated[str | None, typer.Option(help="Dollars per million tokens written.")]
ApiBase = Annotated[str | None, typer.Option(help="A server other than the provider's own.", metavar="URL")]
KeyVariable = Annotated[
    str | None, typer.Option("--api-key-env", help="The variable that holds its key.", metavar="VARIABLE")
]


def add(
    model: Source,
    name: Name = None,
    description: Description = None,
    context: Context = None,
    input_price: InputPrice = None,
    output_price: OutputPrice = None,
    api_base: ApiBase = None,
    api_key_env: KeyVariable = None,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Add a model to your catalogue, with price and context from LiteLLM's list, and show its entry.

    What else is in the file stays as it is. A model that is there already is left alone; what differs is
    shown.
    """
    from viaticum.catalogue_file import add_entry
    from viaticum.models.added import new_entry

    if (input_price is None) != (output_price is None):
        raise InputError("give both --input-price and --output-price, or neither")
    entry = new_entry(
        model,
        name=name,
        description=description,
        context=context,
        prices=(_dollars("--input-price", input_price), _dollars("--output-price", output_price)),
        api_base=api_base,
        api_key_env=api_key_env,
    )
    path, _ = user_file(catalogue)
    added = add_entry(path, entry.name, entry.fields, entry.comment)
    if as_json:
        spec = Catalogue.load(added.path)[entry.name].model_dump(mode="json", exclude_none=True)
        differences = [dict(zip(("field", "there", "now"), each, strict=True)) for each in added.differences]
        facts = {"path": str(added.path), "added": added.is_new, "entry": spec, "differences": differences}
        typer.echo(json.dumps(facts, indent=2))
        return
    _print(entry.name, added, path if catalogue is not None else None)


def where(as_json: JsonFlag = False, catalogue: CatalogueFile = None) -> None:
    """Tell which files and folders are used: your catalogue, the ledger, weights.

    A catalogue in the current folder is used only where --catalogue or VIATICUM_CATALOGUE names it.
    """
    from viaticum.budgets import default_path
    from viaticum.weights import cache_dir

    path, why = user_file(catalogue)
    places = {
        "catalogue": (path, why if path.is_file() else f"{why}; there is none yet"),
        "home": (default_path().parent, _named_by("VIATICUM_HOME", "ledger, checkpoints, keys, outcomes")),
        "weights": (cache_dir(), _named_by("VIATICUM_CACHE", "models that were fetched")),
    }
    if as_json:
        typer.echo(
            json.dumps({name: {"path": str(at), "exists": at.exists()} for name, (at, _) in places.items()})
        )
        return
    for name, (at, reason) in places.items():
        typer.echo(f"{name:<10} {at}")
        typer.echo(f"{'':<10} {reason}")
    here = Path("catalogue.toml")
    if here.is_file() and not (path.exists() and here.samefile(path)):
        typer.echo(f"not used: {here.absolute()}; name it with --catalogue or VIATICUM_CATALOGUE")


def _named_by(variable: str, what: str) -> str:
    return f"{what}; named by {variable}" if os.environ.get(variable) else f"{what}; {variable} names another"


def _dollars(option: str, text: str | None) -> Decimal | None:
    try:
        return None if text is None else Decimal(text)
    except InvalidOperation:
        raise InputError(f"{option} is dollars per million tokens, such as 0.25; got {text!r}") from None


def _print(name: str, added: Added, named: Path | None) -> None:
    """The entry on stdout; what to do next on stderr."""
    typer.echo(added.text, nl=False)
    typer.echo(f"{'added to' if added.is_new else 'unchanged: it is in'} {added.path}", err=True)
    for field, there, now in added.differences:
        typer.echo(f"{field} is {there} there and would be {now} now; edit the file to change it", err=True)
    option = f" --catalogue {named}" if named is not None else ""
    spec = Catalogue.load(added.path)[name]
    variable = spec.api_key_env
    if variable is not None and not os.environ.get(variable):
        typer.echo(f"put its key into the variable {variable}", err=True)
    step = "pull" if spec.sources else "test"
    typer.echo(f"next: viaticum models {step} {name}{option}", err=True)
