"""The examples do what they say: an agent before and after, and a graph for LangGraph's own tools."""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

from viaticum import FakeRouter, ScriptedModel, build_graph
from viaticum.questions import read_questions

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
DOCS = (ROOT / "docs" / "reference" / "workflow.md").read_text(encoding="utf-8")


def changes() -> list[str]:
    """The lines that differ between the two agents, blank ones left out."""
    before, after = ((EXAMPLES / f"agent_{name}.py").read_text().splitlines() for name in ("plain", "budget"))
    diff = list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]
    return [line for line in diff if not line.startswith("@@") and line[1:].strip()]


def printed(*arguments: str, cwd: Path, home: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        check=False,
        env=os.environ
        | {"XDG_DATA_HOME": str(home), "PYTHONPATH": os.pathsep.join([str(ROOT), str(EXAMPLES)])},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_an_agent_gets_routing_and_a_budget_in_ten_lines() -> None:
    assert 0 < len(changes()) <= 10
    assert "\n".join(changes()) in DOCS


def test_the_agent_says_the_same_for_less(tmp_path: Path) -> None:
    *before, cost_before = printed("agent_plain.py", cwd=EXAMPLES, home=tmp_path)
    *after, cost_after = printed("agent_budget.py", cwd=EXAMPLES, home=tmp_path)
    assert before == after
    assert before[0] == "What is 17 * 23? The answer is 391."
    dollars = [Decimal(cost.removeprefix("cost: $")) for cost in (cost_before, cost_after)]
    assert dollars[1] < dollars[0] / 2
    for name, cost in (("before", cost_before), ("after", cost_after)):
        assert f"| {name} | {cost.removeprefix('cost: ')} |" in DOCS


def test_the_questions_to_try_a_batch_with_have_answers() -> None:
    questions = list(read_questions(EXAMPLES / "questions.jsonl"))
    assert (
        len({question.id for question in questions})
        == len({question.query.text for question in questions})
        == 40
    )
    assert all(question.gold and question.gold.isdecimal() for question in questions)
    assert {question.query.kind for question in questions} == {"number"}


def test_langgraph_json_names_a_graph(tmp_path: Path) -> None:
    named = json.loads((EXAMPLES / "langgraph.json").read_text())
    file, _, name = named["graphs"]["viaticum"].partition(":")
    assert named["dependencies"] == ["."]
    program = f"from {Path(file).stem} import {name}; print(type({name}).__name__, {name}.checkpointer)"
    assert printed("-c", program, cwd=EXAMPLES, home=tmp_path) == ["CompiledStateGraph None"]


def test_langgraphs_server_can_show_what_the_graph_takes() -> None:
    """It makes JSON schemas of input, output and context, for its API and for Studio."""
    graph = build_graph("0.05", models={"m": ScriptedModel("42")}, router=FakeRouter("m+cot"))
    assert {"question", "kind"} <= set(graph.get_input_jsonschema()["properties"])
    assert {"value", "cost_usd"} <= set(graph.get_output_jsonschema()["properties"])
    context = graph.get_context_jsonschema()
    assert context is not None
    assert context["properties"]["policy"]["anyOf"][0] == {"type": "string"}
    assert {"budget", "only", "max_seconds", "session"} <= set(context["properties"])
