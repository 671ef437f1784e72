"""The folder of a run of `tune`: what it began with, the budget that pays, and whose the router in `out` is.

A run that goes on has the questions, pairs, models, prompts and settings that it began with; only the budget
may change. Leaves out what is asked (`agents.batch.tune`) and in which order (`agents.batch.tune_rounds`).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from viaticum.agents.batch.folder import job_folder, without_password
from viaticum.agents.batch.tune import Tuning
from viaticum.budgets import Ledger
from viaticum.budgets.records import digest
from viaticum.catalogue import Catalogue
from viaticum.errors import DataError, InputError, UnknownName
from viaticum.files import atomic_write, private_folder
from viaticum.strategies import get as get_strategy

STATE = "tune.json"  # in the folder of the run, and in that of the router that it wrote
SHOWN = 3  # differences of a kind that an error names


def prepare_run(tuning: Tuning) -> Path:
    """The folder of the run, made where it is missing.

    Raises:
        InputError: `out` is not of this run, or the folder cannot be made.
    """
    out, folder = tuning.out, job_folder(tuning.out)
    if out.exists() and _read(out / STATE).get("run") != _read(folder / STATE).get("budget", ""):
        raise InputError(f"{out} exists, and the run in {folder} did not make it; give another --out")
    if not out.parent.is_dir():
        raise InputError(f"cannot write {out}: there is no folder {out.parent}; make it first")
    try:
        private_folder(folder)
    except OSError as error:
        raise InputError(f"cannot make {folder}: {error.strerror or error}") from None
    return folder


def open_budget(tuning: Tuning, folder: Path, ledger: Ledger) -> str:
    """The scope that pays: that of the run which goes on, with its limit set anew, or a new one.

    Raises:
        InputError: the run began with something else, or its budget is not in this ledger.
    """
    facts, path = _facts(tuning), folder / STATE
    if not path.exists():
        scope = f"tune-{uuid.uuid4().hex[:12]}"
        ledger.create(scope, limit_nanousd=tuning.limit)
        begun = {"budget": scope, "ledger": without_password(tuning.ledger_address), "facts": facts}
        atomic_write(path, json.dumps(begun))
        return scope
    state = _read(path)
    for name, value in facts.items():
        if (before := state["facts"].get(name)) != value:
            raise InputError(
                f"the run in {folder} began with {_difference(name, before, value)}; give what it began "
                "with, or another --out"
            )
    try:
        ledger.set_limit(state["budget"], limit_nanousd=tuning.limit)
    except UnknownName:
        raise InputError(
            f"this ledger has no budget {state['budget']!r}; give the ledger that the run in {folder} began "
            f"with ({state['ledger']})"
        ) from None
    return str(state["budget"])


def mark_router(out: Path) -> None:
    """Make the folder of the router, and note in it which run it is of."""
    out.mkdir(exist_ok=True)
    atomic_write(out / STATE, json.dumps({"run": _read(job_folder(out) / STATE)["budget"]}))


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise DataError(f"{path} is damaged; give another --out") from None
    return dict(state)


def _facts(tuning: Tuning) -> dict[str, Any]:
    """What outcomes depend on, as JSON has it."""
    catalogue = tuning.workflow.catalogue
    assert isinstance(catalogue, Catalogue)
    strategies = {pair.strategy: get_strategy(pair.strategy) for pair in tuning.pairs}
    first = min(tuning.questions, key=lambda each: each.id).query
    facts: dict[str, Any] = {
        "seed": tuning.seed,
        "questions": {
            each.id: digest([each.query.text, each.query.kind, *each.accepted])[:16]
            for each in sorted(tuning.questions, key=lambda each: each.id)
        },
        "pairs": list(map(str, tuning.pairs)),
        "models": {name: catalogue[name].identity for name in sorted({pair.model for pair in tuning.pairs})},
        "prompts": {
            name: digest([each.messages(first), each.samples, each.changed_settings])
            for name, each in sorted(strategies.items())
        },
        "judge": None if tuning.judge is None else catalogue[tuning.judge].identity,
        "grading": None if tuning.grading == "rubric" else tuning.grading,
        "settings": tuning.workflow.generation.model_dump(mode="json", exclude_defaults=True),
    }
    found: dict[str, Any] = json.loads(json.dumps(facts))
    return found


def _difference(name: str, before: Any, now: Any) -> str:
    """What differs, in words."""
    if name == "questions":
        return f"other questions: {_changed(before or {}, now)} ({len(before or {})} then, {len(now)} now)"
    if name == "models":
        changed = [each for each in now if (before or {}).get(each) != now[each]]
        if len(changed) == 1 and changed[0] in (before or {}):
            return f"another entry of the model {changed[0]}: {_changed(before[changed[0]], now[changed[0]])}"
        return f"other models: {_changed(before or {}, now)}"
    if name == "prompts":
        return f"other prompts or settings of these strategies: {_changed(before or {}, now)}"
    if isinstance(now, list):
        return f"other {name}: {', '.join(before or ())} then, {', '.join(now)} now"
    if name == "judge":
        before, now = (None if each is None else each["name"] for each in (before, now))
    return f"another {name}: {before!r} then, {now!r} now"


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first names whose values differ, with the values where they are short."""
    names = [each for each in {**before, **now} if before.get(each) != now.get(each)]
    found = []
    for each in names[:SHOWN]:
        if each not in now or each not in before:
            found.append(f"{each} is {'gone' if each not in now else 'new'}")
            continue
        old, new = (json.dumps(side[each], ensure_ascii=False) for side in (before, now))
        long = max(len(old), len(new)) > 40 or len(old) == len(new) == 18
        found.append(f"{each} differs" if long else f"{each} was {old} and is {new}")
    more = len(names) - len(found)
    return ", ".join(found) + (f" and {more} more" if more > 0 else "")
