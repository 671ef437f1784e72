"""The settings of a workflow: `WorkflowSettings`, and the keywords by which callers give them.

`Viaticum`, `build_graph` and the batch all take these keywords. A function that takes them declares
`**settings: Unpack[SettingsKeywords]` and passes them to `WorkflowSettings.from_keywords`, so that a keyword
is named here alone. Leaves out opening what the settings name (`viaticum.agents.build`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self, TypedDict

from viaticum.agents.workflow.checkpoints import is_postgres
from viaticum.agents.workflow.shadow_settings import ShadowSampling
from viaticum.agents.workflow.soft_limits import SoftLimits
from viaticum.agents.workflow.state import Allowance
from viaticum.budgets import default_path
from viaticum.budgets.planner import WhenShort
from viaticum.catalogue import Catalogue
from viaticum.checks import checked_count, checked_items, checked_text, checked_type, shown
from viaticum.errors import InputError
from viaticum.generation import NO_SETTINGS, GenerationSettings
from viaticum.local_settings import NO_LOCAL_SETTINGS, LocalSettings
from viaticum.models.base import Model
from viaticum.money import nanousd
from viaticum.residency import Only
from viaticum.routers.query import DEFAULT_POLICY, Policy, QueryRouter, as_policy

AUTO = "auto"  # the model name that stands for the routed workflow
DEFAULT_BUDGET_USD = "0.01"
TRIES = 3
CONCURRENCY = 16
LIVE_OUTCOMES = "outcomes.jsonl"  # what `feedback` records, in the folder of the ledger
SLOTS = 4  # cached prompts: one per strategy of the packaged table, so that its examples are read once

Dollars = str | int | float | Decimal


class ModelKeywords(TypedDict, total=False):
    """Keywords for everything that asks models. Meanings and defaults: `WorkflowSettings`."""

    catalogue: Catalogue | str | Path | None
    router: QueryRouter | str | Path | None
    models: Mapping[str, Model] | None
    timeout: float | None
    max_seconds: float | None
    tries: int
    concurrency: int
    slots: int | Literal["auto"]
    local: LocalSettings
    generation: GenerationSettings
    strategies: Sequence[str]
    model: str | None
    strategy: str | None
    only: Only | None
    shadow: ShadowSampling | None


class SettingsKeywords(ModelKeywords, total=False):
    """All fields of `WorkflowSettings` but `budget`, which callers take as their first argument."""

    budget_name: str | None
    policy: str | Policy
    on_short: WhenShort
    folder: str | Path | None
    store: str | None
    soft_limits: SoftLimits | None


@dataclass(frozen=True, kw_only=True)
class WorkflowSettings:
    """What a workflow is opened with; validated here, once.

    Args:
        budget: dollars for all questions together; None for 0.01, or for the limit that `budget_name` has
            already.
        budget_name: a budget of the ledger, created if it does not exist; None for a new name.
        catalogue: a `Catalogue`, or the path of a TOML file laid over the packaged one.
        router: a `QueryRouter`, or the folder of a fitted one; None for the packaged table.
        policy: "within:DISTANCE" (the cheapest pair whose expected accuracy is so near the best; 0.01 is one
            point, and the default), "best", "cheapest:ACCURACY", "fastest:ACCURACY", "weighted:PER_DOLLAR"
            or a `Policy`.
        on_short: what to do when the plan that the policy prefers does not fit in the budget: take the best
            plan that fits ("cheaper"), raise `DecisionNeeded` ("ask") or raise `BudgetExceeded` ("stop").
        models: models by name, in addition to those of the catalogue and in place of those with the same
            name.
        folder: folder of the ledger and the checkpoints; None for the user's data folder.
        store: a `postgresql://` address that holds both instead.
        soft_limits: where word is given that a budget has spent a share of its limit; None for nowhere.
        timeout: seconds that one call of a model may take; None for no limit.
        max_seconds: that one question may take, all its calls together; None for no limit. A way that is not
            expected to end in time is not chosen, and what is in flight then is ended.
        tries: attempts of a call whose model is unavailable, at least 1.
        concurrency: questions that the async and batch methods answer at the same time, at least 1.
        slots: sequences that a local model decodes at the same time, where neither `local` nor its entry
            says; "auto" for as many as the free memory holds, and no more than `concurrency`.
        local: how local models run, such as `LocalSettings(device="cuda:1")`, whatever their entries say.
        generation: how all calls are generated, whatever strategies and catalogue entries say.
        strategies: own strategies to load, as `module:name`.
        model: asks this model alone, with the strategies that the router knows for it.
        strategy: asks with this strategy alone; with `model`, that one pair.
        only: labels of models, one of which a model has to have to be used: "local", a region or a tag of its
            entry (`viaticum.residency`); None for all models.
        shadow: how many answered questions are asked again of one model, to measure what routing saves and
            loses against it; None for none.

    Raises:
        InputError: a value is out of range, or a policy is unknown.
    """

    budget: Dollars | None = None
    budget_name: str | None = None
    catalogue: Catalogue | str | Path | None = None
    router: QueryRouter | str | Path | None = None
    policy: str | Policy = DEFAULT_POLICY
    on_short: WhenShort = "cheaper"
    models: Mapping[str, Model] | None = None
    folder: str | Path | None = None
    store: str | None = None
    soft_limits: SoftLimits | None = None
    timeout: float | None = None
    max_seconds: float | None = None
    tries: int = TRIES
    concurrency: int = CONCURRENCY
    slots: int | Literal["auto"] = SLOTS
    local: LocalSettings = NO_LOCAL_SETTINGS
    generation: GenerationSettings = NO_SETTINGS
    strategies: Sequence[str] = ()
    model: str | None = None
    strategy: str | None = None
    only: Only | None = None
    shadow: ShadowSampling | None = None

    def __post_init__(self) -> None:
        if self.limit_nanousd <= 0:
            raise InputError(f"a budget is above zero dollars, got {self.budget}")
        checked_type("on_short", self.on_short, str, "cheaper, ask or stop")
        # Validates all of these.
        Allowance(
            self.budget_name,
            as_policy(self.policy),
            self.on_short,
            self.timeout,
            self.generation,
            self.only,
            self.max_seconds,
        )
        checked_count("tries", self.tries)
        checked_count("concurrency", self.concurrency)
        if self.slots is not None and self.slots != "auto":
            checked_count('slots, where it is not "auto",', self.slots)
        checked_type("local", self.local, LocalSettings, "LocalSettings")
        if self.soft_limits is not None:
            checked_type("soft_limits", self.soft_limits, SoftLimits, "SoftLimits")
        if self.shadow is not None:
            checked_type("shadow", self.shadow, ShadowSampling, "ShadowSampling")
        self._check_names()
        self._check_places()

    def _check_names(self) -> None:
        """Raises `InputError` where models or strategies are not given by name."""
        for name, given in ("model", self.model), ("strategy", self.strategy):
            if given is not None:
                checked_text(name, given)
        for each in checked_items("strategies", self.strategies, str, "a text module:name"):
            checked_text("a strategy", each)
        if self.models is not None:
            wanted = "a dict of models by name"
            for name, model in checked_type("models", self.models, Mapping, wanted).items():
                checked_type(f"models[{name!r}]", model, Model, "a Model")
                checked_text("the name of a model", name)

    def _check_places(self) -> None:
        """Raises `InputError` where files, folders or addresses are given by something else."""
        for name, given, kind, what in (
            ("catalogue", self.catalogue, Catalogue, "a Catalogue or the path of a TOML file"),
            ("router", self.router, QueryRouter, "a QueryRouter or the folder of a fitted one"),
            ("folder", self.folder, Path, "the path of a folder"),
        ):
            if given is None or isinstance(given, (kind, Path)):
                continue
            if "\0" in checked_text(name, checked_type(name, given, str, what)):
                raise InputError(f"{name} is {what}, got {shown(given)}")
        if self.store is not None and not is_postgres(checked_text("store", self.store)):
            raise InputError(
                f"store is a postgresql:// address, got {shown(self.store)}; folder takes a path"
            )

    @classmethod
    def from_keywords(cls, budget: Dollars | None, keywords: Mapping[str, Any]) -> Self:
        """Settings from a budget and `SettingsKeywords`. Raises `TypeError` for an unknown keyword."""
        known = [field.name for field in fields(cls)]
        for name in keywords:
            if name not in known:
                close = get_close_matches(name, known, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
                raise TypeError(f"unexpected keyword {name!r}; {hint}")
        return cls(budget=budget, **keywords)

    @property
    def limit_nanousd(self) -> int:
        return nanousd(DEFAULT_BUDGET_USD if self.budget is None else self.budget)

    @property
    def home(self) -> Path:
        """The folder of the ledger, the checkpoints and the recorded outcomes."""
        return Path(self.folder) if self.folder is not None else default_path().parent

    @property
    def ledger_address(self) -> str | Path:
        return self.store if self.store is not None else self.home / "ledger.db"

    @property
    def checkpoints_address(self) -> str | Path:
        return self.store if self.store is not None else self.home / "checkpoints.db"
