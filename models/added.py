"""Fields of a catalogue entry for a model that a user adds: an API model, a hub's repository, a GGUF file.

What LiteLLM's packaged list says of an API model is written into the entry, so that a later version of the
list changes nothing. Asks no provider. Leaves out the catalogue's file (`viaticum.catalogue_file`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from viaticum.errors import InputError
from viaticum.gguf.file import SHARD, read_header
from viaticum.hub import Repository, fetch_config, look_at
from viaticum.model_spec import ModelSpec
from viaticum.models.api_keys import key_variables
from viaticum.models.remote.prices import has_fee, list_entry, listed_names, listed_rates
from viaticum.weight_sources import Hub
from viaticum.wheels import FetchError

CHAT_MODES = ("chat", "responses", "completion")
HUB = "hub:"
SHOWN = 6  # files of a repository that a message names
_REPOSITORY = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[\w./-]+\.gguf))?(?:@(?P<revision>[\w./-]+))?", re.I
)
_NO_MODEL = re.compile(r"(?:\A|/)mmproj", re.I)  # projections of images
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


class NewEntry(NamedTuple):
    """name: by which the model is asked; fields: of its entry; comment: where they come from."""

    name: str
    fields: dict[str, Any]
    comment: str


def new_entry(
    source: str,
    *,
    name: str | None = None,
    description: str | None = None,
    context: int | None = None,
    prices: tuple[Decimal | None, Decimal | None] = (None, None),
    api_base: str | None = None,
    api_key_env: str | None = None,
) -> NewEntry:
    """The entry of a model.

    Args:
        source: "hub:OWNER/NAME" (with "/FILE.gguf" and "@REVISION"), the path of a GGUF file, or a model's
            name for LiteLLM.
        name: by which it is asked; that of the source by default.
        description: what it is good at; routers read it.
        context: tokens of prompt and answer together.
        prices: dollars per million tokens of input and of output.
        api_base: a server other than the provider's own.
        api_key_env: environment variable that holds its key.

    Raises:
        InputError: the source names no model, or what is not known of it was not given either.
        WeightsError: the GGUF file cannot be read.
    """
    if source.startswith(HUB):
        entry = _hub_entry(source.removeprefix(HUB), context)
    elif source.lower().endswith(".gguf"):
        entry = _gguf_entry(Path(source), context)
    else:
        entry = _remote_entry(source, context, prices, api_base, api_key_env)
    given = {"description": description, "input_price": prices[0], "output_price": prices[1]}
    fields = entry.fields | {key: value for key, value in given.items() if value is not None}
    _check(name or entry.name, fields)
    return NewEntry(name or entry.name, fields, entry.comment)


def _remote_entry(
    model: str,
    context: int | None,
    prices: tuple[Decimal | None, Decimal | None],
    api_base: str | None,
    api_key_env: str | None,
) -> NewEntry:
    listed = list_entry(model)
    if listed.get("mode", "chat") not in CHAT_MODES:
        raise InputError(f"{model} is for {listed['mode']}, not for chat; add a chat model")
    own_price = None not in prices
    if not listed and (context is None or not own_price):
        raise InputError(f"{_unlisted(model)} give --context, --input-price and --output-price")
    rates, fee = listed_rates(listed), has_fee(model, listed)
    if not own_price and (fee or not (rates.get("input_price") or rates.get("output_price"))):
        missing = " that covers what it takes for searches" if fee else ""
        raise InputError(
            f"litellm's list has no price for {model}{missing}; give --input-price and --output-price in "
            "dollars per million tokens (0 if it is free)"
        )
    length = context or listed.get("max_input_tokens") or listed.get("max_tokens")
    if not length:
        raise InputError(f"litellm's list has no context length for {model}; give --context")
    provider = str(listed.get("litellm_provider") or model.partition("/")[0])
    variables = key_variables(model, provider)
    thinks = bool(listed.get("supports_reasoning"))
    known = f"litellm {version('litellm')}"
    words = f"{'thinks before it answers; ' if thinks else ''}{int(length):,} tokens of context"
    fields = {
        "description": f"The model {model.rpartition('/')[2]} behind the API of {provider}; {words}.",
        "kind": "remote",
        "litellm_model": model,
        "context_length": int(length),
        **({} if own_price else rates),
        "price_version": None if own_price else known,
        "tools": listed.get("supports_function_calling") if listed else None,
        "vision": listed.get("supports_vision") if listed else None,
        "json_schema": listed.get("supports_response_schema") if listed else None,
        "thinking": None if not listed or api_base is not None else ("auto" if thinks else False),
        "api_base": api_base,
        "api_key_env": api_key_env or (None if api_base is not None else next(iter(variables), None)),
    }
    comment = f"From the model list of {known}" if listed else "Not in litellm's model list"
    return NewEntry(model, {key: value for key, value in fields.items() if value is not None}, comment)


def _unlisted(model: str) -> str:
    """A sentence about a name that LiteLLM's list lacks, with the names near it."""
    provider, _, bare = model.rpartition("/")
    ours = {}  # names as users write them, of the same provider where one is named
    for name in listed_names():
        owner = str(list_entry(name).get("litellm_provider") or "")
        written = name if "/" in name else f"{owner}/{name}"
        if provider in ("", written.partition("/")[0]):
            if "/" not in name:  # the provider that the list takes a bare name for
                ours[name] = written
            ours.setdefault(written.partition("/")[2], written)
    near = [ours[name] for name in get_close_matches(bare, ours, 3, 0.75)]
    hint = f"did you mean {' or '.join(near)}? Else" if near else "so"
    return f"litellm's list has no model {model!r}; {hint}"


def _hub_entry(text: str, context: int | None) -> NewEntry:
    match = _REPOSITORY.fullmatch(text)
    if match is None:
        raise InputError(
            f"not a repository: {text!r}; write hub:OWNER/NAME, with @REVISION for one of its versions and "
            "/FILE.gguf for one of its files"
        )
    source = Hub(type="hub", repo=match["repo"], revision=match["revision"] or "main")
    wanted = match["file"]
    try:
        found = look_at(source)
        if wanted is not None or not found.safetensors:
            return _gguf_of_hub(source, found, wanted, context)
        length = context or _context_of(fetch_config(source), source.repo)
    except FetchError as error:
        if context is None or wanted is not None:  # the hash of a file has to be known
            hint = "" if wanted is not None else "; give --context to add it all the same"
            raise InputError(f"cannot look at {source.repo} ({error}){hint}") from None
        length = context
    fields = _local_fields(source.repo.rpartition("/")[2], length, source.model_dump())
    return NewEntry(source.repo, fields, "From a model hub; it runs here, so no token is billed")


def _gguf_of_hub(source: Hub, found: Repository, wanted: str | None, context: int | None) -> NewEntry:
    """The entry of one GGUF file, with its hash; shards are one file, named by any of them."""
    files = sorted({_first_shard(each) for each in found.hashes if not _NO_MODEL.search(each)})
    if not files:
        raise InputError(
            f"{source.repo} holds neither safetensors nor a GGUF file of a language model; "
            "add another repository"
        )
    if wanted is None and len(files) > 1:
        listed = f"{', '.join(files[:SHOWN])}{' ...' if len(files) > SHOWN else ''}"
        raise InputError(
            f"{source.repo} holds {len(files)} GGUF files ({listed}); name one: hub:{source.repo}/{files[0]}"
        )
    name = _first_shard(wanted or files[0])
    if name not in files:
        if name in found.hashes:
            raise InputError(f"{name} is no language model; add another file")
        near = get_close_matches(name, files, 1, 0.3)
        hint = f"did you mean {near[0]}?" if near else f"it has {files[0]}"
        raise InputError(f"{source.repo} holds no file {name}; {hint}")
    shards = _shards(name)
    if missing := [each for each in shards if each not in found.hashes]:
        raise InputError(f"{source.repo} lacks a shard of {name}: {', '.join(missing[:SHOWN])}")
    if unknown := [each for each in shards if not found.hashes[each]]:
        raise InputError(f"the hub does not say the hash of {unknown[0]}; fetch the file and add its path")
    length = context or found.context
    if not length:
        raise InputError(f"the hub does not say how much {name} reads; give --context")
    hashes = {each: found.hashes[each] for each in shards}
    origin = Hub(
        type="hub",
        repo=source.repo,
        revision=source.revision,
        file=name,
        sha256=hashes.pop(name),
        others=hashes,
    )
    match = SHARD.fullmatch(name)
    title = Path(name if match is None else match["stem"]).name.removesuffix(".gguf")
    fields = _local_fields(title, length, origin.model_dump())
    return NewEntry(
        f"{source.repo.partition('/')[0]}/{title}", fields, "One GGUF file of a model hub; runs here"
    )


def _first_shard(name: str) -> str:
    """The first shard of the GGUF file that `name` is a shard of; else `name`."""
    match = SHARD.fullmatch(name)
    return name if match is None else f"{match['stem']}-00001-of-{match['count']}.gguf"


def _shards(first: str) -> list[str]:
    """The names of all shards of a GGUF file, which may be one."""
    match = SHARD.fullmatch(first)
    if match is None:
        return [first]
    stem, count = match["stem"], int(match["count"])
    return [f"{stem}-{at:05}-of-{count:05}.gguf" for at in range(1, count + 1)]


def _context_of(config: Mapping[str, Any], repo: str) -> int:
    inner = config.get("text_config")
    for table in (config, inner if isinstance(inner, Mapping) else {}):
        for field in _CONTEXT_FIELDS:
            if isinstance(value := table.get(field), int) and value > 0:
                return value
    raise InputError(f"the configuration of {repo} names no context length; give --context")


def _gguf_entry(path: Path, context: int | None) -> NewEntry:
    path = path.expanduser().absolute()
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    header = read_header(path)
    title = str(header.metadata.get("general.name") or path.stem)
    length = context or int(header.of_architecture("context_length"))
    name = re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower()).strip("-.") or "model"
    fields = _local_fields(title, length, {"type": "path", "path": str(path)})
    return NewEntry(name, fields, "From a file of this machine, so no token is billed")


def _local_fields(title: str, context: int, source: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "description": f"The model {title}, which runs on this machine; {context:,} tokens of context.",
        "kind": "local",
        "context_length": context,
        "input_price": 0,
        "output_price": 0,
        "sources": [dict(source)],
    }


def _check(name: str, fields: Mapping[str, Any]) -> None:
    """Raises `InputError` where the fields are no entry, naming the option where there is one."""
    from pydantic import ValidationError

    try:
        ModelSpec.model_validate({**fields, "name": name})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
