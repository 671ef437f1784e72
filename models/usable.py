"""Which models can be used on this machine: their weights are here, their key is set, their price is known.

Leaves out whether a provider accepts the key, which only a call says.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable

from viaticum.catalogue import Catalogue
from viaticum.errors import InputError, MissingExtra, ViaticumError, WeightsError
from viaticum.model_prices import LITELLM_PRICES
from viaticum.models.remote.model import check_usable
from viaticum.models.remote.prices import with_litellm_price
from viaticum.models.templates import require_template
from viaticum.weights import locate

RECHECK_SECONDS = 10.0  # a model that could not be used is looked at again: its weights may have come
_log = logging.getLogger("viaticum")


class UsableModels:
    """Finds out by name, once a model; what cannot be used is logged once.

    Args:
        catalogue: whose models are looked at.
        given: names of models that were passed in code, which are always usable.
        named: a model that is asked alone: that it cannot be used is an error, and not logged beside.
    """

    def __init__(self, catalogue: Catalogue, given: Iterable[str] = (), *, named: str | None = None) -> None:
        self._catalogue, self._named = catalogue, named
        self._usable = set(given)
        self._problems: dict[str, tuple[float, ViaticumError]] = {}
        self._lock = threading.Lock()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.problem(name) is None

    def problem(self, name: str) -> ViaticumError | None:
        """Why a model cannot be used, and what to do; None where it can."""
        with self._lock:
            if name in self._usable:
                return None
            checked, known = self._problems.get(name, (0.0, None))
            if known is not None and time.monotonic() - checked < RECHECK_SECONDS:
                return known
            try:
                check_model(self._catalogue, name)
            except ViaticumError as error:
                if known is None and name != self._named:
                    level = logging.INFO if isinstance(error, WeightsError) else logging.WARNING
                    _log.log(level, "left out of routing: %s", error)
                self._problems[name] = time.monotonic(), error
                return error
            self._usable.add(name)
            self._problems.pop(name, None)
            return None

    def none_usable(self, names: Iterable[str]) -> ViaticumError:
        """The error where none of these models can be used: the only reason, or one of each kind.

        Remote models come first: what they lack is a key, not a download.
        """
        reasons: dict[type[ViaticumError], ViaticumError] = {}
        for name in dict.fromkeys(names):
            problem = self.problem(name)
            if problem is not None:
                reasons.setdefault(type(problem), problem)
        if not reasons:
            return InputError("no pair is left to choose from; add a model: viaticum models add NAME")
        if len(reasons) == 1:
            return next(iter(reasons.values()))
        ordered = sorted(reasons.values(), key=lambda reason: isinstance(reason, WeightsError | MissingExtra))
        return InputError(f"no model can be used here: {'; '.join(map(str, ordered))}")


def check_model(catalogue: Catalogue, name: str) -> None:
    """Check that a model of the catalogue can be called.

    Raises:
        UnknownName: there is no such model.
        UnknownPrice: it has no price.
        WeightsError: the weights of a local model are not on this machine.
        MissingExtra: LiteLLM, which a remote model needs, is not installed.
        AuthenticationFailed: the environment variable of its key is not set.
        InputError: a local model has no chat template.
    """
    spec = catalogue[name]
    if spec.kind in ("local", "pair"):
        members = [catalogue[member] for member in spec.members]
        folders = [locate(member) for member in members]
        require_template(members[-1], folders[-1])
    if spec.kind == "remote":
        check_usable(spec)
        if spec.price is None and spec.price_version == LITELLM_PRICES:
            with_litellm_price(spec)
    if spec.kind != "encoder":
        catalogue.prices(spec.members)
