"""What other tools export, as rows with the names of outcome columns.

lm-evaluation-harness, LangSmith, promptfoo, and our own batches. A row of an export becomes a dict with some
of the columns of `outcome_imports.TARGETS`; what the export does not say is left out. Leaves out checking,
grading and column maps (`viaticum.outcome_imports`).
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from viaticum.errors import DataError, InputError
from viaticum.jobs import ROWS, Call, Job, JobRow, read_rows
from viaticum.records import Values, read_values
from viaticum.types import VERIFY, split_model

LEFT_OUT = "left out"  # key of a row that is no outcome; its value says why
Rows = Iterator[tuple[str, Values]]
_QUESTIONS = ("question", "query", "problem", "input", "prompt", "instruction", "goal", "ctx", "text")
_ANSWERS = ("answer", "output", "result", "response", "text", "content", "generation")
_GOLDS = ("answer", "expected", "output", "reference", "label", "gold", "target")
_SCORES = ("correct", "correctness", "accuracy", "exact_match", "is_correct")
_METRICS = ("exact_match", "acc", "acc_norm", "pass@1", "prompt_level_strict_acc", "em", "score")
_SAMPLES_FILE = re.compile(r"samples_(.+?)(?:_\d{4}-\d\d-\d\dT[\d.:+-]+)?")


def look_up(values: object, path: str) -> Any:
    """The value at a path such as `inputs.question`; objects that are written as text are read. None: none.

    A column whose own name has dots comes first.
    """
    values = _decoded(values)
    if isinstance(values, list) and path.partition(".")[0].isdigit():
        first, _, rest = path.partition(".")
        found = values[int(first)] if int(first) < len(values) else None
        return look_up(found, rest) if rest else found
    if not isinstance(values, Mapping):
        return None
    if path in values:
        return values[path]
    first, _, rest = path.partition(".")
    while rest:
        if first in values and (found := look_up(values[first], rest)) is not None:
            return found
        head, _, rest = rest.partition(".")
        first = f"{first}.{head}"
    return None


def _decoded(value: object) -> Any:
    """A list or object that was written as text, as in CSV; other values as they are."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _first(values: object, prefix: str, names: tuple[str, ...]) -> Any:
    """The first value under `prefix.NAME`; the value of `prefix` itself where it is a text or has one."""
    for name in names:
        if (found := look_up(values, f"{prefix}.{name}")) not in (None, ""):
            return found
    whole = _decoded(look_up(values, prefix))
    if isinstance(whole, Mapping):
        texts = [each for each in whole.values() if isinstance(each, str | int | float)]
        return texts[0] if len(texts) == 1 else None
    return whole


def _texts(value: object) -> object:
    """The text of a chat: that of its last user's turn; other values as they are."""
    if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        turns = [each for each in value if each.get("role", each.get("type")) in ("user", "human")] or value
        return turns[-1].get("content")
    return value


# --- lm-evaluation-harness ------------------------------------------------------------------------


def lm_eval_rows(path: Path) -> Rows:
    """Sample logs of lm-evaluation-harness (`--log_samples`): one line a question and filter.

    The model is that of the folder (`OWNER__NAME`), the data set that of the file
    (`samples_TASK_TIME.jsonl`).
    """
    named = _SAMPLES_FILE.fullmatch(path.stem)
    folder = path.resolve().parent.name
    for source, row in read_values(path, "jsonl"):
        if "doc" not in row and "doc_id" not in row:
            raise DataError(f"{source}: no doc and no doc_id; lm-eval writes sample logs with --log_samples")
        metrics = [*(row.get("metrics") or ()), *_METRICS]
        metric = next((name for name in metrics if isinstance(row.get(name), bool | int | float)), None)
        values: Values = {
            "dataset": named[1] if named else path.stem,
            "question_id": row.get("doc_id"),
            "question": _lm_eval_question(row),
            "answer": _lm_eval_answer(row),
            "correct": None if metric is None else row[metric],
            "gold": row.get("target"),
            "filter": row.get("filter"),
        }
        if "__" in folder:
            values["model"] = folder.replace("__", "/", 1)
        yield source, values | {"row": row}


def _lm_eval_question(row: Values) -> object:
    doc = row.get("doc")
    for name in _QUESTIONS:
        if isinstance(found := look_up(doc, name), str) and found.strip():
            return found
    given = row.get("arguments")
    return look_up(given, "gen_args_0.arg_0") or look_up(given, "0.0")


def _lm_eval_answer(row: Values) -> object:
    """The filtered response; of log-likelihoods the letter of the most likely choice."""
    given = row.get("filtered_resps")
    if not isinstance(given, list) or not given:
        return None
    if len(given) > 1 and all(isinstance(each, list) and each for each in given):
        try:
            likelihoods = [float(each[0]) for each in given]
        except (TypeError, ValueError):
            return None
        return string.ascii_uppercase[likelihoods.index(max(likelihoods))] if len(given) <= 26 else None
    first = given[0]
    while isinstance(first, list) and first:
        first = first[0]
    return first if isinstance(first, str | int | float) else None


# --- promptfoo ------------------------------------------------------------------------------------


def promptfoo_rows(path: Path) -> Rows:
    """What `promptfoo eval --output` writes: JSON (read whole), or JSON lines, a test and provider a row.

    The strategy is the prompt's label where the file has several prompts; rows that ended in an error are
    left out.
    """
    rows = list(_promptfoo_results(path)) if path.suffix.lower() == ".json" else read_values(path, "jsonl")
    for source, row in rows:
        provider, prompt, response = row.get("provider"), row.get("prompt"), row.get("response")
        if provider is None and response is None:
            raise DataError(
                f"{source}: no provider and no response; promptfoo eval --output FILE.json writes them"
            )
        failed = row.get("failureReason") == 2 or (row.get("error") and look_up(response, "output") is None)
        values: Values = {
            "model": provider if isinstance(provider, str) else _provider_name(provider),
            "strategy": look_up(prompt, "label"),
            "question": _first(row, "vars", _QUESTIONS) or look_up(prompt, "raw"),
            "answer": look_up(response, "output"),
            "correct": row.get("success"),
            "input_tokens": look_up(response, "tokenUsage.prompt"),
            "output_tokens": look_up(response, "tokenUsage.completion"),
            "finish_reason": look_up(response, "finishReason"),
            "row": row,
        }
        if not look_up(
            response, "cached"
        ):  # a cached answer cost nothing and took no time, another one would
            cost = look_up(response, "cost")
            values |= {
                "cost_usd": row.get("cost") if cost is None else cost,
                "milliseconds": row.get("latencyMs"),
            }
        if failed:
            values[LEFT_OUT] = "ended in an error"
        yield source, values


def _provider_name(provider: object) -> object:
    return look_up(provider, "label") or look_up(provider, "id")


def _promptfoo_results(path: Path) -> Rows:
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    found = document
    while isinstance(found, Mapping):
        found = found.get("results")
    if not isinstance(found, list):
        raise DataError(f"{path}: no list of results; give what `promptfoo eval --output FILE.json` wrote")
    labels = {json.dumps(look_up(row, "prompt.label") or look_up(row, "prompt.raw")) for row in found}
    for number, row in enumerate(found, 1):
        if not isinstance(row, Mapping):
            raise DataError(f"{path}, result {number}: not an object")
        one_prompt = {"prompt": {"raw": look_up(row, "prompt.raw")}} if len(labels) == 1 else {}
        yield f"{path}, result {number}", {**row, **one_prompt}


# --- LangSmith ------------------------------------------------------------------------------------


def langsmith_rows(path: Path) -> Rows:
    """Runs of LangSmith: CSV of an experiment, JSON lines or Parquet of runs; one root run a row.

    Nested runs and runs that ended in an error are left out. `correct` is the feedback of that meaning, or
    the only feedback there is.
    """
    for source, row in read_values(path):
        inputs = "inputs" if "inputs" in row or any(name.startswith("inputs.") for name in row) else "input"
        outputs = (
            "outputs" if "outputs" in row or any(name.startswith("outputs.") for name in row) else "output"
        )
        values: Values = {
            "question_id": row.get("reference_example_id") or row.get("example_id"),
            "question": _texts(look_up(row, f"{inputs}.messages") or _first(row, inputs, _QUESTIONS)),
            "answer": _texts(look_up(row, f"{outputs}.messages") or _first(row, outputs, _ANSWERS)),
            "gold": _langsmith_gold(row),
            "correct": _langsmith_feedback(row),
            "model": _langsmith_model(row),
            "input_tokens": row.get("prompt_tokens"),
            "output_tokens": row.get("completion_tokens"),
            "cost_usd": row.get("total_cost"),
            "seconds": _langsmith_seconds(row),
            "row": row,
        }
        if row.get("error"):
            values[LEFT_OUT] = "ended in an error"
        elif row.get("parent_run_id"):
            values[LEFT_OUT] = "are parts of other runs"
        yield source, values


def _langsmith_gold(row: Values) -> object:
    for name in ("reference_outputs", "reference", "reference_output"):
        if (found := _first(row, name, _GOLDS)) is not None:
            return found
    return None


def _langsmith_feedback(row: Values) -> object:
    """The feedback that says whether the run was right; that of `feedback_stats` is a mean."""
    found: dict[str, object] = {}
    for name, value in row.items():
        if name.startswith("feedback."):
            found[name.removeprefix("feedback.")] = value
    for column in ("feedback", "feedback_stats"):
        several = row.get(column)
        several = _decoded(several)
        if isinstance(several, Mapping):
            for name, value in several.items():
                found.setdefault(name, value.get("avg") if isinstance(value, Mapping) else value)
    found = {name: value for name, value in found.items() if value is not None}
    named = next((name for name in _SCORES if name in found), None)
    if named is not None:
        return found[named]
    return next(iter(found.values())) if len(found) == 1 else None


def _langsmith_model(row: Values) -> object:
    paths = (
        "extra.metadata.ls_model_name",
        "metadata.ls_model_name",
        "extra.invocation_params.model",
        "model",
    )
    return next((found for path in paths if (found := look_up(row, path)) is not None), None)


def _langsmith_seconds(row: Values) -> object:
    for name in ("execution_time", "latency", "latency_seconds"):
        if row.get(name) is not None:
            return row[name]
    try:
        began, ended = (
            each if isinstance(each, datetime) else datetime.fromisoformat(str(each))
            for each in (row["start_time"], row["end_time"])
        )
        return max(0.0, (ended - began).total_seconds())
    except (KeyError, ValueError, TypeError):
        return None


# --- our batches ----------------------------------------------------------------------------------


def batch_rows(path: Path) -> Rows:
    """The calls of a batch job, one row each: from its folder, or from its results, beside which that stands.

    A call's answer is as right as the row's where it is the same one. Cached calls have no cost of their own.
    Checks of answers are left out.
    """
    folder = path if path.is_dir() else path.with_name(path.name + ".job")
    journal = folder / ROWS
    if not journal.is_file():
        raise InputError(
            f"no job folder beside {path} ({journal} is missing); results alone do not say what was asked: "
            "give them as --from table with --map, or the folder of the job"
        )
    dataset = Path(Job.load(folder).input).stem
    for row in read_rows(folder):
        for call in row.calls:
            if split_model(call.pair)[1] != VERIFY:
                yield f"{journal}, row {row.number + 1}", _of_call(row, call, dataset)


def _of_call(row: JobRow, call: Call, dataset: str) -> Values:
    answer = row.answer if len(row.calls) == 1 else call.answer
    usage = list(call.usage.values())
    values: Values = {
        "dataset": dataset,
        "question_id": row.id,
        "question": row.question,
        "pair": call.pair,
        "answer": answer,
        "gold": row.gold,
        "correct": row.correct if answer == row.answer else None,
        "input_tokens": sum(each[0] for each in usage),
        "output_tokens": sum(each[1] for each in usage),
        "finish_reason": call.finish_reason,
    }
    if not call.cached:
        values |= {"cost_nanousd": call.cost_nanousd, "seconds": call.seconds}
    return values
