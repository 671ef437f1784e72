"""The catalogue: the models, their prices, and where their weights come from.

Reads the TOML file that ships with the package and merges the user's own file into it. Leaves out what one
entry says (`viaticum.model_spec`), fetching weights (`viaticum.weights`) and running models
(`viaticum.models`). Imports neither torch nor transformers, and never uses the network.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import platformdirs
from pydantic import BaseModel, ValidationError

from viaticum.errors import InputError, UnknownName, UnknownPrice, one_line
from viaticum.local_settings import LocalSettings
from viaticum.model_kinds import Kind
from viaticum.model_prices import PriceTier
from viaticum.model_spec import ModelSpec, ThinkingTags
from viaticum.money import Price
from viaticum.thinking import ThinkingFormat

__all__ = ["Catalogue", "ModelSpec", "PriceTier", "ThinkingTags", "read_catalogue", "user_file"]


PACKAGED = "catalogue.toml of viaticum"


class Catalogue(Mapping[str, ModelSpec]):
    """Models by name, in the order they were given. Immutable."""

    def __init__(
        self, specs: Iterable[ModelSpec], *, origin: str = "catalogue", strategies: Iterable[str] = ()
    ) -> None:
        self.strategies = tuple(strategies)  # own strategies to load, as module:name
        self._specs = {spec.name: spec for spec in specs}
        self._keys: dict[str, frozenset[str]] = {}  # of models, as far as they were asked for
        for spec in self._specs.values():
            _check_pair(spec, self._specs, origin)

    @classmethod
    def load(cls, path: str | Path | None = None) -> Catalogue:
        """The packaged catalogue with the user's file merged into it, entry by entry and field by field.

        Args:
            path: the user's file; by default what VIATICUM_CATALOGUE names, else catalogue.toml in the user's
                configuration folder if there is one.

        Raises:
            InputError: the file cannot be read or is invalid; the message names the file and the entry.
        """
        user = _existing_file(path)
        own, strategies = dict[str, Any](), tuple[str, ...]()
        if user is not None:
            try:
                own, strategies = read_catalogue(user.read_bytes(), str(user))
            except OSError as error:
                raise InputError(f"cannot read the catalogue {user}: {error.strerror}") from None
        return cls.parse(own, user, strategies)

    @classmethod
    def parse(
        cls, own: Mapping[str, Any], user: Path | None = None, strategies: Iterable[str] = ()
    ) -> Catalogue:
        """The packaged catalogue with the tables of the user's file, as `read_catalogue` returns them.

        Raises:
            InputError: an entry is invalid.
        """
        packaged = resources.files("viaticum") / "catalogue.toml"
        tables, _ = read_catalogue(packaged.read_bytes(), PACKAGED)
        for name, fields in own.items():
            tables[name] = {**tables.get(name, {}), **_with_template(name, fields, Path(user or "."))}
        origin = str(user) if user is not None else PACKAGED
        specs = (_spec(name, fields, tables, origin) for name, fields in tables.items())
        return cls(specs, origin=origin, strategies=strategies)

    def __getitem__(self, name: str) -> ModelSpec:
        try:
            return self._specs[name]
        except KeyError:
            raise UnknownName("model", name, self._specs) from None

    def get(self, name: str, default: Any = None) -> Any:
        return self._specs.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def names(self) -> tuple[str, ...]:
        return tuple(self._specs)

    def local(self) -> tuple[ModelSpec, ...]:
        """The single models that run on this machine."""
        return self._of_kind("local")

    def encoders(self) -> tuple[ModelSpec, ...]:
        """The sentence encoders that routers use."""
        return self._of_kind("encoder")

    def models(self) -> tuple[ModelSpec, ...]:
        """Everything that answers questions: local models, pairs, remote and scripted models."""
        return self._of_kind("local", "pair", "remote", "scripted")

    def weights_of(self, *names: str) -> tuple[ModelSpec, ...]:
        """The entries whose weights the named models need, members of pairs among them, each once.

        Without names: those that all `default` entries need. A remote model needs none.
        """
        chosen = [self[name] for name in names] if names else [spec for spec in self.values() if spec.default]
        members = dict.fromkeys(member for spec in chosen for member in spec.members)
        return tuple(self[member] for member in members if self[member].sources)

    def labels(self, name: str) -> frozenset[str]:
        """Where the data of a model's calls goes, by labels (`viaticum.residency`).

        Of a pair: what both models have.
        """
        return frozenset.intersection(*(self[member].labels for member in self[name].members))

    def is_same_model(self, one: str, other: str) -> bool:
        """Whether two names are of one model: the same entry, the same model in two, or a pair's member.

        So far as their entries tell it; a name that has none is like itself alone.
        """
        return not self._model_keys(one).isdisjoint(self._model_keys(other))

    def _model_keys(self, name: str) -> frozenset[str]:
        """What an entry shares with others of the same model: a name, weights, or a provider's model."""
        if name not in self:
            return frozenset((f"name {name}",))
        if name not in self._keys:
            members = [self[member] for member in self[name].members]
            self._keys[name] = frozenset(key for spec in members for key in _keys_of(spec))
        return self._keys[name]

    def thinking_format(self, name: str) -> ThinkingFormat:
        """The tags around a model's thoughts; by default a pair has those of its large model."""
        spec = self[name]
        return self[spec.members[-1] if spec.thinking == "auto" else name].thinking_format

    def local_settings(self, name: str, pair: str | None = None) -> LocalSettings:
        """How a local model runs: what `pair` says, of which it is a member, else its own entry."""
        own = self[name].local
        settings = own if pair is None else self[pair].local.over(own)
        return settings if own.engine != "served" else LocalSettings.of(engine="served").over(settings)

    def with_local(self, settings: LocalSettings) -> Catalogue:
        """A catalogue whose local models and pairs run as `settings` says, where it says anything."""
        if not settings.given:
            return self
        changed = [
            spec.model_copy(update=settings.given)
            if spec.kind in ("local", "pair") and spec.engine != "served"
            else spec
            for spec in self.values()
        ]
        return Catalogue(changed, strategies=self.strategies)

    def prices(self, names: Iterable[str]) -> dict[str, Price]:
        """Prices of some models, by name.

        Raises:
            UnknownPrice: a model has no price; no call is made for free.
        """
        prices = {}
        for name in names:
            price = self[name].price
            if price is None:
                raise UnknownPrice(
                    f"{name} has no price; give input_price and output_price in your catalogue"
                )
            prices[name] = price
        return prices

    def with_models(self, *specs: ModelSpec) -> Catalogue:
        """A catalogue with some entries added, or replaced where the name is taken."""
        added = {spec.name: spec for spec in specs}
        return Catalogue((self._specs | added).values(), strategies=self.strategies)

    def _of_kind(self, *kinds: Kind) -> tuple[ModelSpec, ...]:
        return tuple(spec for spec in self._specs.values() if spec.kind in kinds)


def user_file(path: str | Path | None = None) -> tuple[Path, str]:
    """The user's own catalogue, whether it exists or not, and what names it.

    A file in the current folder is taken only where it is named.

    Args:
        path: names it; else VIATICUM_CATALOGUE does, else it is in the user's configuration folder.
    """
    if path is not None:
        return Path(path), "named by you"
    if named := os.environ.get("VIATICUM_CATALOGUE"):
        return Path(named), "named by VIATICUM_CATALOGUE"
    return Path(platformdirs.user_config_dir("viaticum")) / "catalogue.toml", "your configuration folder"


def _existing_file(path: str | Path | None) -> Path | None:
    """The user's catalogue; None where nobody names one and there is none. A named one has to exist."""
    file, _ = user_file(path)
    named = path is not None or os.environ.get("VIATICUM_CATALOGUE")
    return file if named or file.is_file() else None


def read_catalogue(text: bytes, origin: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The tables under [models] of a catalogue's text, by name, and its strategies.

    Numbers with a point stay exact decimals. Raises `InputError` for a text that is no catalogue.
    """
    try:
        document = tomllib.loads(text.decode("utf-8-sig"), parse_float=Decimal)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{origin}: not valid TOML: {one_line(error)}") from None
    for key in document:
        if key not in ("models", "strategies"):
            raise InputError(f"{origin}: unknown key {key!r}; entries are tables named [models.NAME]")
    strategies = document.get("strategies", [])
    if not isinstance(strategies, list) or not all(isinstance(each, str) for each in strategies):
        raise InputError(f'{origin}: `strategies` is a list of own strategies, such as ["my.module:Mine"]')
    models = document.get("models", {})
    if not isinstance(models, dict):
        raise InputError(f"{origin}: `models` is not a table; entries are tables named [models.NAME]")
    for name, fields in models.items():
        if not isinstance(fields, dict):
            raise InputError(f"{origin}: models.{name} is not a table; write [models.{name}]")
        inner = [key for key, value in fields.items() if isinstance(value, dict)]
        if unknown := [key for key in inner if key not in ModelSpec.model_fields]:
            raise InputError(
                f"{origin}: models.{name} has no field {unknown[0]!r}; quote names with dots: "
                f'[models."{name}.{unknown[0]}"]'
            )
    return models, tuple(strategies)


def _with_template(name: str, fields: Mapping[str, Any], catalogue: Path) -> Mapping[str, Any]:
    """The fields of an entry, a chat template that names a file beside the catalogue replaced by its text."""
    template = fields.get("chat_template")
    if not isinstance(template, str) or "{{" in template or "{%" in template:
        return fields
    path = catalogue.parent / template
    try:
        return {**fields, "chat_template": path.read_text(encoding="utf-8")}
    except (OSError, ValueError) as error:
        raise InputError(
            f"{catalogue}: models.{name}.chat_template: neither Jinja, nor can the file {path} be read: "
            f"{getattr(error, 'strerror', None) or error}"
        ) from None


def _spec(name: str, fields: Mapping[str, Any], tables: Mapping[str, Any], origin: str) -> ModelSpec:
    if fields.get("kind") == "pair" and "context_length" not in fields:
        fields = {**fields, "context_length": _shorter_context(fields, tables)}
    try:
        return ModelSpec.model_validate({**fields, "name": name})
    except ValidationError as error:
        raise InputError(f"{origin}: models.{name}{_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    """The field and what is wrong with it; a misspelt name before the field that is missing because of it."""
    found = error.errors(include_url=False)
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    field = "".join(f".{part}" for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"{field}: {one_line(first['msg'].removeprefix('Value error, '))}"
    near = get_close_matches(str(first["loc"][-1]), _fields_beside(first["loc"]), n=1)
    return f"{field}: there is no such field" + (f"; did you mean {near[0]!r}?" if near else "")


def _fields_beside(location: Sequence[int | str]) -> Iterable[str]:
    """The fields that one at a location of an entry could be; none where its table is of several kinds."""
    if len(location) == 1:
        return ModelSpec.model_fields
    outer = ModelSpec.model_fields.get(str(location[0]))
    models = [*_models_in(outer.annotation)] if outer else []
    return models[0].model_fields if len(models) == 1 else ()


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _keys_of(spec: ModelSpec) -> Iterator[str]:
    yield f"name {spec.name}"
    yield from (f"weights {source.model_dump_json()}" for source in spec.sources)
    if served := spec.litellm_model or spec.served_model:
        yield f"served {spec.api_base} {served if spec.api_base else served.rpartition('/')[2]}"


def _shorter_context(fields: Mapping[str, Any], tables: Mapping[str, Any]) -> int:
    """The shorter context of a pair's members. Wrong members are reported elsewhere."""
    members = [fields.get(role) for role in ("small", "large")]
    lengths = [
        tables[name].get(field)
        for name in members
        if isinstance(name, str) and name in tables
        for field in ("context_length", "context")
    ]
    return min((length for length in lengths if isinstance(length, int)), default=1)


_READ_HIDDEN_STATES = ("r2r", "r-stitch+")


def _check_pair(spec: ModelSpec, specs: Mapping[str, ModelSpec], origin: str) -> None:
    if spec.kind != "pair":
        return
    for member in spec.members:
        if member not in specs:
            raise InputError(f"{origin}: models.{spec.name}: the pair names an unknown model {member!r}")
        if specs[member].kind != "local":
            raise InputError(
                f"{origin}: models.{spec.name}: a pair is made of local models, and {member!r} is"
                f" {specs[member].kind}"
            )
    small = specs[spec.members[0]]
    if spec.router in _READ_HIDDEN_STATES and small.engine == "served":
        raise InputError(
            f"{origin}: models.{spec.name}: the router {spec.router} reads hidden states of the small model,"
            f" and a served one gives none; run {small.name} here, or use r-stitch"
        )
