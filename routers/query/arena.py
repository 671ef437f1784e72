"""The files of a RouterArena submission (arXiv 2510.00202), from a fitted router.

RouterArena sends every prompt, as it is, to the one model that a router chose for it: a configuration with
the names of the models, and a list with a choice for each question. Only single pairs can be chosen, and
their strategy adds nothing to the prompt there. Nothing is fitted here: the questions are for evaluation
alone. Leaves out asking the models, which RouterArena's own scripts do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from viaticum.errors import DataError, InputError
from viaticum.files import atomic_write
from viaticum.routers.query.base import QueryRouter
from viaticum.routers.query.choose import Policy, choose
from viaticum.types import Pair, Query, Route, RoutingTable

PLAIN = ("chat", "direct")  # strategies that are nearest to a prompt as it is
BLOCK = 256  # questions that are predicted together
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # RouterArena's workflow splits paths at blanks


@dataclass(frozen=True, slots=True)
class ArenaQuestion:
    """A question of RouterArena. index: its `global index`; prompt: exactly as it is sent."""

    index: str
    prompt: str


@dataclass(frozen=True, slots=True)
class ArenaChoice:
    """What was chosen for a question. model: by its name in RouterArena."""

    question: ArenaQuestion
    model: str
    route: Route

    def to_json(self) -> dict[str, Any]:
        """The entry of a prediction file before any model was asked."""
        return {
            "global index": self.question.index,
            "prompt": self.question.prompt,
            "prediction": self.model,
            "generated_result": None,
            "cost": None,
            "accuracy": None,
        }


def read_questions(path: Path) -> list[ArenaQuestion]:
    """The questions of a file that RouterArena's `prep_datasets.py` wrote.

    Raises:
        InputError: the file cannot be read.
        DataError: it is none, is empty, or an index comes twice.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error})") from None
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: no list of questions, as prep_datasets.py of RouterArena writes it")
    found: dict[str, ArenaQuestion] = {}
    for number, entry in enumerate(entries, 1):
        question = _question(entry, f"{path}, entry {number}")
        if question.index in found:
            raise DataError(f"{path}, entry {number}: the global index {question.index!r} comes twice")
        found[question.index] = question
    return list(found.values())


def _question(entry: Any, where: str) -> ArenaQuestion:
    fields = entry if isinstance(entry, dict) else {}
    index = fields.get("global index", fields.get("global_index"))
    prompt = fields.get("prompt_formatted") or fields.get("prompt")
    if not index or not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where}: no 'global index', or neither 'prompt_formatted' nor 'prompt'")
    return ArenaQuestion(str(index), prompt)


def plain_strategy(pairs: Iterable[Pair], wanted: str | None = None) -> str:
    """The strategy whose predictions are used.

    Raises:
        InputError: the router does not know the wanted one, or knows several and none of `PLAIN`.
    """
    known = sorted({pair.strategy for pair in pairs})
    candidates = [wanted] if wanted is not None else [*PLAIN, *(known if len(known) == 1 else ())]
    for each in candidates:
        if each in known:
            return each
    raise InputError(
        f"RouterArena sends prompts as they are; say whose predictions are nearest to that: --strategy, "
        f"one of {', '.join(known)}"
    )


def choose_models(
    router: QueryRouter,
    questions: Sequence[ArenaQuestion],
    strategy: str,
    policy: Policy,
    names: Mapping[str, str] | None = None,
) -> list[ArenaChoice]:
    """A choice for each question, from its own prediction alone.

    names: in RouterArena, of models that are called otherwise here.
    """
    choices = []
    for start in range(0, len(questions), BLOCK):
        block = questions[start : start + BLOCK]
        router.prefetch([Query(each.prompt) for each in block])
        for question in block:
            rows = [row for row in router.table(Query(question.prompt)) if row.pair.strategy == strategy]
            policy.check(rows)
            route = choose(RoutingTable(tuple(rows)), None, policy)
            model = route.pair.model
            choices.append(ArenaChoice(question, (names or {}).get(model, model), route))
    return choices


def write_submission(
    folder: Path,
    name: str,
    models: Sequence[str],
    choices: Sequence[ArenaChoice],
    robustness: Sequence[ArenaChoice] = (),
    prices: Mapping[str, tuple[float, float]] | None = None,
) -> list[Path]:
    """Write the files below a folder as they lie in RouterArena's repository; returns their paths.

    Args:
        folder: of the repository, or any other.
        name: of the router.
        models: all that could be chosen, by their names in RouterArena.
        choices: for the questions of one split.
        robustness: for those of the robustness split.
        prices: dollars a million input and output tokens, by model. They are written beside the other files,
            for the list of prices that is there already.

    Raises:
        InputError: the name has other characters than letters, digits, dots, dashes and underscores.
    """
    if NAME.fullmatch(name) is None:
        raise InputError(
            f"not a name for a submission: {name!r}; use letters, digits, dots, dashes and underscores"
        )
    inference = folder / "router_inference"
    documents: dict[Path, Any] = {
        inference / "config" / f"{name}.json": {
            "pipeline_params": {"router_name": name, "models": list(dict.fromkeys(models))}
        },
        inference / "predictions" / f"{name}.json": [each.to_json() for each in choices],
    }
    if robustness:
        documents[inference / "predictions" / f"{name}-robustness.json"] = [
            each.to_json() for each in robustness
        ]
    if prices:
        documents[folder / f"{name}-model-cost.json"] = {
            model: {"input_token_price_per_million": given, "output_token_price_per_million": written}
            for model, (given, written) in prices.items()
        }
    for path, document in documents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(document, ensure_ascii=False, indent=2) + "\n")
    return list(documents)
