"""The files of a RouterArena submission: what its own check of configuration and predictions asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from viaticum.cli import app
from viaticum.errors import DataError, InputError
from viaticum.routers.query import StaticRouter, as_policy
from viaticum.routers.query.arena import (
    choose_models,
    plain_strategy,
    read_questions,
    write_submission,
)
from viaticum.types import Pair, Query, RoutingTable, Row

# In the form that the repository shows: `global index`, the prompt with its template, gold columns beside it.
SAMPLE = [
    {
        "global index": "AIME_1",
        "prompt": "unused",
        "prompt_formatted": "Please solve the following problem.\n\nContext: None\n\nQuestion: What is 2 + 2?"
        "\n\nProvide your final answer in \\boxed{{}} format. Ünïcode stays – as it is.",
        "answer": "4",
    },
    {"global index": "ArcMMLU_2", "prompt": "Which is hot?\n\nOptions: \nA. ice\nB. fire", "options": []},
    {"global_index": "LiveCodeBench_3", "prompt": "Write a function.", "prompt_formatted": ""},
]


class ByLength(StaticRouter):
    """`big` is worth its price for long prompts; with cot everything is perfect, and is not asked for."""

    def table(self, query: Query) -> RoutingTable:
        right = 0.9 if len(query.text) > 60 else 0.5
        return RoutingTable(
            (
                Row(Pair("small", "direct"), 0.5, 10, 20, 100, 200),
                Row(Pair("big", "direct"), right, 10, 20, 900, 1_800),
                Row(Pair("small", "cot"), 1.0, 10, 20, 1, 2),
            )
        )


ROUTER = ByLength(RoutingTable(()))


def a_file(folder: Path, entries: Any = SAMPLE, name: str = "router_data_10.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(entries))
    return path


def findings(folder: Path, name: str, dataset: list[dict[str, Any]], file: str) -> list[str]:
    """What the check in RouterArena's repository would find, told anew."""
    config = json.loads((folder / "router_inference/config" / f"{name}.json").read_text())
    entries = json.loads((folder / "router_inference/predictions" / file).read_text())
    models = set(config["pipeline_params"]["models"])
    known = {each.get("global index") or each.get("global_index"): each for each in dataset}
    found = [] if len(entries) == len(dataset) else [f"{len(entries)} entries"]
    for entry in entries:
        there = known.get(entry["global index"])
        if there is None:
            found.append(f"no such index {entry['global index']}")
        elif entry["prompt"] != (there.get("prompt_formatted") or there.get("prompt")):
            found.append(f"another prompt {entry['prompt']}")
        if entry["prediction"] not in models:
            found.append(f"a model that is not configured: {entry['prediction']}")
        if {entry[each] for each in ("generated_result", "cost", "accuracy")} != {None}:
            found.append("a result before any call")
    return found


def test_a_submission_passes_the_check_of_the_repository(tmp_path: Path) -> None:
    questions = read_questions(a_file(tmp_path))
    assert [each.index for each in questions] == ["AIME_1", "ArcMMLU_2", "LiveCodeBench_3"]
    choices = choose_models(ROUTER, questions, "direct", as_policy("best"), {"big": "openai/big-1"})
    assert [each.model for each in choices] == ["openai/big-1", "small", "small"]
    models = ["small", "openai/big-1"]
    files = write_submission(
        tmp_path / "arena", "my-router", models, choices, choices[:1], {"small": (0.1, 0.4)}
    )
    assert len(files) == 4
    assert findings(tmp_path / "arena", "my-router", SAMPLE, "my-router.json") == []
    assert findings(tmp_path / "arena", "my-router", SAMPLE[:1], "my-router-robustness.json") == []
    config = json.loads(files[0].read_text())
    assert config == {"pipeline_params": {"router_name": "my-router", "models": models}}
    assert "Ünïcode stays – as" in files[1].read_text(encoding="utf-8"), "texts as they are, not escaped"
    assert json.loads(files[3].read_text()) == {
        "small": {"input_token_price_per_million": 0.1, "output_token_price_per_million": 0.4}
    }


@pytest.mark.parametrize("name", ["AsiaInfo Router", "", "../up", "a/b", ".hidden"])
def test_names_that_its_workflow_cannot_take(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="letters, digits"):
        write_submission(tmp_path, name, ["m"], [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ([], "no list of questions"),
        ({"questions": SAMPLE}, "no list of questions"),
        ([{"prompt": "no index"}], "entry 1: no 'global index'"),
        ([{"global index": "A_1"}], "entry 1: no 'global index'"),
        ([{"global index": "A_1", "prompt": "  "}], "entry 1"),
        (["a text"], "entry 1"),
        ([*SAMPLE, SAMPLE[1]], "entry 4: the global index 'ArcMMLU_2' comes twice"),
    ],
)
def test_files_that_are_no_questions(tmp_path: Path, entries: Any, what: str) -> None:
    with pytest.raises(DataError, match=what):
        read_questions(a_file(tmp_path, entries))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_questions(tmp_path / "nothing.json")
    (tmp_path / "broken.json").write_text("[")
    with pytest.raises(DataError, match="no JSON"):
        read_questions(tmp_path / "broken.json")


def test_the_strategy_is_the_plainest_or_named() -> None:
    def pairs(*names: str) -> list[Pair]:
        return [Pair("m", name) for name in names]

    assert plain_strategy(pairs("cot", "direct")) == "direct"
    assert plain_strategy(pairs("direct", "chat", "cot")) == "chat"
    assert plain_strategy(pairs("cot")) == "cot"
    assert plain_strategy(pairs("cot", "direct"), "cot") == "cot"
    for known, wanted in ((("cot", "cod"), None), (("cot",), "direct")):
        with pytest.raises(InputError, match="prompts as they are"):
            plain_strategy(pairs(*known), wanted)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    router = ByLength(RoutingTable(()))
    router.pairs = tuple(row.pair for row in router.table(Query("any")))  # type: ignore[attr-defined]
    monkeypatch.setattr("viaticum.routers.query.folders.load_router", lambda folder: router)
    dataset = a_file(tmp_path)
    out = ["--out", str(tmp_path / "arena"), "--name", "mine"]
    done = CliRunner().invoke(
        app,
        [
            "router",
            "arena",
            "folder",
            str(dataset),
            *out,
            "--model",
            "big=gpt-4o",
            "--policy",
            "best",
            "--json",
        ],
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["models"] == {"gpt-4o": 1, "small": 2}
    assert found["questions"] == 3
    assert findings(tmp_path / "arena", "mine", SAMPLE, "mine.json") == []
    shown = CliRunner().invoke(app, ["router", "arena", "folder", str(dataset), *out])
    assert "expected by predictions alone" in shown.output
    wrong = CliRunner().invoke(app, ["router", "arena", "folder", str(dataset), *out, "--model", "huge=x"])
    assert wrong.exit_code == 1
