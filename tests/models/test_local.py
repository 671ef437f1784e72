"""Local models, profiling and the SDK over tiny random models on disk: everything real but the wits."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from viaticum import InputError, Pair, Viaticum
from viaticum.agents.batch.profile import profile
from viaticum.catalogue import Catalogue
from viaticum.cli import app
from viaticum.decoders.auto_mode import Rates
from viaticum.decoders.call_times import CallTimes
from viaticum.decoders.cost import CostModel
from viaticum.decoders.decoding_mode import HandoffStats
from viaticum.errors import DataError, PromptTooLong, UnknownPrice
from viaticum.generation import GenerationSettings
from viaticum.models.base import Generation
from viaticum.models.decoding_modes import PairCosts, costs_path, in_measured_modes, thorough_costs
from viaticum.models.local import LocalModels
from viaticum.outcomes import checked_pair, read_outcomes, read_verdicts
from viaticum.questions import Question, read_questions
from viaticum.routers.query import StaticRouter
from viaticum.strategies import get as get_strategy
from viaticum.types import Completion, Message, Outcome, Query, RoutingTable, Row

CHAT: list[Message] = [{"role": "user", "content": "How many?"}]
PAIRS = [Pair("tiny-small", "direct"), Pair("tiny-pair", "direct")]


def questions(count: int) -> list[Question]:
    return [Question(f"q{n}", Query(f"What is {n} + {n}?", "number"), str(2 * n)) for n in range(count)]


# --- models
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-small", "tiny-large", "tiny-pair"])
def test_pieces_make_the_text_and_usage_is_within_the_worst_case(
    tiny_catalogue: Catalogue, name: str
) -> None:
    model = LocalModels(tiny_catalogue).model(name)
    *pieces, completion = model.stream(CHAT, Generation(max_new_tokens=40))
    assert isinstance(completion, Completion)
    assert "".join(str(piece) for piece in pieces) == completion.text
    assert completion.trace is not None
    assert completion.usage.output_tokens == len(completion.trace.tokens) <= 40
    worst = model.worst_case(CHAT, 40)
    assert set(completion.usage.models) <= set(worst)
    prices = tiny_catalogue.prices(worst)
    most = sum(prices[name].cost(count.input_tokens, count.output_tokens) for name, count in worst.items())
    real = sum(
        prices[name].cost(count.input_tokens, count.output_tokens)
        for name, count in completion.usage.models.items()
    )
    assert 0 < real <= most
    if name == "tiny-pair":
        assert set(completion.trace.made_by) == {0, 1}, "else the threshold of the fixture tests nothing"


def test_a_prompt_longer_than_the_context_is_refused(tiny_catalogue: Catalogue) -> None:
    model = LocalModels(tiny_catalogue).model("tiny-small")
    with pytest.raises(PromptTooLong, match="8192"):
        model.worst_case([{"role": "user", "content": "x" * 9000}], 10)


def test_many_at_once_equal_one_at_a_time(tiny_catalogue: Catalogue) -> None:
    chats: list[list[Message]] = [[{"role": "user", "content": f"How many {n}?"}] for n in range(7)]
    generation = Generation(max_new_tokens=12)
    together = dict(LocalModels(tiny_catalogue, slots=3).model("tiny-pair").generate_all(chats, generation))
    alone = LocalModels(tiny_catalogue).model("tiny-pair")
    assert len(together) == 7
    for n, chat in enumerate(chats):
        assert together[n].text == alone.generate(chat, generation).text


def test_a_pair_decodes_in_the_mode_that_is_fastest_here(
    tiny_catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIATICUM_CACHE", str(tmp_path))
    auto = tiny_catalogue.with_models(tiny_catalogue["tiny-pair"].model_copy(update={"mode": None}))
    written = {
        name: LocalModels(tiny_catalogue).model(name).generate(CHAT, Generation(40))
        for name in ("tiny-large", "tiny-pair")
    }
    assert written["tiny-large"].text != written["tiny-pair"].text, "else nothing can be told apart"

    def writes(catalogue: Catalogue = auto) -> Completion:
        return LocalModels(catalogue).model("tiny-pair").generate(CHAT, Generation(40))

    def keep(small: float, large: float) -> None:
        """Times of calls of the two models, whatever they read."""
        pool = LocalModels(auto)
        runners = [pool.runner(name) for name in ("tiny-small", "tiny-large")]
        times = [CallTimes((1,), (1,), ((each,),)) for each in (small, large)]
        costs = PairCosts(auto["tiny-pair"], auto, runners)
        costs.keep(CostModel(*times, {}), Rates(HandoffStats(0.3, 0.5), HandoffStats(0.3, 0.5, 0.1)))
        assert costs.times() is not None

    writes()
    path = costs_path(auto["tiny-pair"])
    assert json.loads(path.read_text())["conditions"]["quick"], "measured at first use"
    keep(small=5.0, large=0.1)
    alone = writes()
    assert alone.text == written["tiny-large"].text
    assert set(alone.usage.models) == {"tiny-large"}, "nothing is paid for a model that was not asked"
    assert writes(in_measured_modes(auto)).text == written["tiny-pair"].text, "as outcomes are measured"
    assert in_measured_modes(auto, ["another"])["tiny-pair"].mode is None
    keep(small=0.01, large=5.0)
    assert set(writes().usage.models) == {"tiny-small", "tiny-large"}
    keep(small=5.0, large=0.1)
    path.write_text(path.read_text().replace(torch.__version__, "1.0"))
    writes()
    assert json.loads(path.read_text())["conditions"]["torch"] == torch.__version__, "measured again"


def test_calls_of_a_pair_are_measured_and_kept(
    tiny_catalogue_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIATICUM_CACHE", str(tmp_path))
    asked = ["models", "measure", "tiny-pair", "--streams", "4", "--catalogue", str(tiny_catalogue_file)]
    shown = CliRunner().invoke(app, [*asked, "--json"])
    assert shown.exit_code == 0, shown.output
    payload = json.loads(shown.stdout)
    assert set(payload["tokens_per_second"]) == {"1", "4"}
    assert all(speed > 0 for speeds in payload["tokens_per_second"].values() for speed in speeds.values())
    spec = Catalogue.load(tiny_catalogue_file)["tiny-pair"]
    assert payload["path"] == str(costs_path(spec))
    assert thorough_costs(spec) is not None
    assert "speculative:3" in CliRunner().invoke(app, asked).stdout
    refused = CliRunner().invoke(app, [*asked[:2], "tiny-small", *asked[3:]])
    assert isinstance(refused.exception, InputError)
    assert "only a pair" in str(refused.exception)


def test_the_workflow_on_local_models(tiny_catalogue: Catalogue, tmp_path: Path) -> None:
    rows = tuple(Row(pair, 0.5, 10, 20, 1000, 2000) for pair in PAIRS)
    with Viaticum(
        catalogue=tiny_catalogue, router=StaticRouter(RoutingTable(rows)), folder=tmp_path
    ) as viaticum:
        answer = viaticum.solve("What is 2 + 3?", kind="number")
        assert answer.routes
        assert 0 < answer.cost <= answer.held
        assert viaticum.budget().posted_nanousd == answer.cost
        assert viaticum.ledger.check() == []


# --- profiling
# ------------------------------------------------------------------------------------------------


def without_time(rows: list[Outcome]) -> list[Outcome]:
    return [replace(row, seconds=None) for row in rows]


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl"])
def test_profile_writes_every_outcome(tiny_catalogue: Catalogue, tmp_path: Path, name: str) -> None:
    asked = questions(5)
    seen: list[tuple[int, int]] = []
    made = profile(
        asked,
        PAIRS,
        tmp_path / name,
        catalogue=tiny_catalogue,
        dataset="sums",
        slots=3,
        progress=lambda pair, of_pair, done, total, accuracy: seen.append((done, total)),
    )
    assert read_outcomes(tmp_path / name) == made
    assert [(row.model, row.strategy, row.question_id) for row in made] == [
        (pair.model, pair.strategy, question.id) for pair in PAIRS for question in asked
    ]
    assert seen == [(n, 10) for n in range(1, 11)]
    assert all(row.cost_nanousd and row.output_tokens and row.question for row in made)
    assert [path.name for path in tmp_path.iterdir()] == [name], "no journal is left"


def test_profile_counts_every_sample(tiny_catalogue: Catalogue, tmp_path: Path) -> None:
    pair = Pair("tiny-small", "self-consistency:direct:3")
    made = profile(questions(4), [pair], tmp_path / "o.jsonl", catalogue=tiny_catalogue, dataset="d", slots=2)
    once = profile(
        questions(4), PAIRS[:1], tmp_path / "p.jsonl", catalogue=tiny_catalogue, dataset="d", slots=2
    )
    assert [row.question_id for row in sorted(made, key=lambda row: row.question_id)] == [
        "q0",
        "q1",
        "q2",
        "q3",
    ]
    for several, one in zip(made, once, strict=True):
        assert several.strategy == "self-consistency:direct:3"
        assert several.input_tokens in (2 * (one.input_tokens or 0), 3 * (one.input_tokens or 0))


def test_profile_keeps_what_the_models_wrote(tiny_catalogue: Catalogue, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    pairs = [Pair("tiny-small", "direct"), Pair("tiny-small", "self-consistency:direct:3")]
    made = profile(
        questions(2),
        pairs,
        tmp_path / "o.jsonl",
        catalogue=tiny_catalogue,
        dataset="d",
        slots=2,
        completions=texts,
    )
    kept = [json.loads(line) for line in texts.read_text().splitlines()]
    assert [(row["strategy"], row["question_id"]) for row in kept] == [
        (row.strategy, row.question_id) for row in made
    ]
    direct = get_strategy("direct")
    chat = direct.messages(questions(2)[0].query)
    written = (
        LocalModels(tiny_catalogue).model("tiny-small").generate(chat, Generation(direct.max_new_tokens))
    )
    assert kept[0]["texts"] == [written.text]
    assert all(len(row["texts"]) in (2, 3) and len(set(row["texts"])) > 1 for row in kept[2:])


def test_profile_records_what_verifiers_say(tiny_catalogue: Catalogue, tmp_path: Path) -> None:
    """A verdict for every answer there is; equal answers are asked about once, and cost alike."""
    out, texts = tmp_path / "o.parquet", tmp_path / "texts.jsonl"
    pairs = [Pair("tiny-small", "direct"), Pair("tiny-small", "cod"), Pair("tiny-small", "chat")]
    rows = profile(
        questions(6),
        pairs,
        out,
        catalogue=tiny_catalogue,
        dataset="d",
        completions=texts,
        verifiers=["tiny-large"],
    )
    answers, verdicts = read_outcomes(out), read_verdicts(out)
    assert rows == [*answers, *verdicts]
    assert len(answers) == 18
    given = {(row.pair, row.question_id): row for row in answers if row.answer is not None}
    assert given, "else the models of the fixture test nothing"
    assert {(checked_pair(row), row.question_id) for row in verdicts} == set(given)
    for row in verdicts:
        checked = given[Pair.parse(row.strategy.removeprefix("verify:")), row.question_id]
        assert row.model == "tiny-large"
        assert row.answer in ("yes", "no", None)
        assert row.correct == ((row.answer == "yes") == checked.correct)
        assert row.cost_nanousd
        assert row.output_tokens
        assert row.question == checked.question
    by_answer: dict[tuple[str, str | None], set[tuple[str | None, int | None]]] = {}
    for row in verdicts:
        answer = given[Pair.parse(row.strategy.removeprefix("verify:")), row.question_id].answer
        by_answer.setdefault((row.question_id, answer), set()).add((row.answer, row.cost_nanousd))
    assert all(len(each) == 1 for each in by_answer.values())
    assert len(texts.read_text().splitlines()) == 18


def test_profile_without_texts_keeps_the_ids(tiny_catalogue: Catalogue, tmp_path: Path) -> None:
    made = profile(
        questions(2), PAIRS[:1], tmp_path / "o.jsonl", catalogue=tiny_catalogue, dataset="d", with_text=False
    )
    assert [(row.question_id, row.question) for row in made] == [("q0", ""), ("q1", "")]


def test_profile_refuses_before_it_computes(tiny_catalogue: Catalogue, tmp_path: Path) -> None:
    unknown = [replace(question, gold=None) for question in questions(1)]
    with pytest.raises(DataError, match="no answer"):
        profile(unknown, PAIRS, tmp_path / "o.jsonl", catalogue=tiny_catalogue, dataset="d")
    free = tiny_catalogue["tiny-small"].model_copy(update={"input_price": None, "output_price": None})
    with pytest.raises(UnknownPrice, match="tiny-small"):
        profile(
            questions(1), PAIRS, tmp_path / "o.jsonl", catalogue=tiny_catalogue.with_models(free), dataset="d"
        )
    assert list(tmp_path.iterdir()) == []


def test_a_profile_that_fails_before_its_first_row_leaves_nothing(
    tiny_catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, journal = tmp_path / "o.jsonl", tmp_path / "o.jsonl.journal"
    long = [replace(questions(1)[0], query=Query("word " * 5000))]
    with pytest.raises(InputError):
        profile(long, PAIRS[:1], out, catalogue=tiny_catalogue, dataset="d")
    assert list(tmp_path.iterdir()) == []
    journal.write_text('{"fingerprint": "of another run, killed before its first row"}\n')
    assert len(profile(questions(1), PAIRS[:1], out, catalogue=tiny_catalogue, dataset="d")) == 1
    assert list(tmp_path.iterdir()) == [out]


KILLED = Path(__file__).resolve().parents[1] / "support" / "killed_at_line.py"


def test_a_killed_profile_goes_on_and_a_journal_of_other_questions_is_refused(
    tiny_catalogue_file: Path, tiny_catalogue: Catalogue, tmp_path: Path
) -> None:
    """Killed midway, twice, with the last row cut in half: the table is that of an uninterrupted run."""
    file = tmp_path / "questions.jsonl"
    rows = [{"question": q.query.text, "answer": q.gold, "kind": "number"} for q in questions(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal"
    arguments = [
        "profile",
        str(file),
        "--out",
        str(out),
        "--catalogue",
        str(tiny_catalogue_file),
        "--model",
        "tiny-small",
        "--strategy",
        "direct",
        "--strategy",
        "cod",
        "--slots",
        "2",
        "--json",
    ]
    done = 0
    for _ in range(2):
        killed = [sys.executable, str(KILLED), journal.name, "5", *arguments]
        assert subprocess.run(killed, capture_output=True).returncode == -signal.SIGKILL
        done = journal.read_bytes().count(b"\n")
        with journal.open("ab") as half:
            half.write(b'{"dataset": "ques')
    assert 0 < done < 40
    pairs = [Pair("tiny-small", "direct"), Pair("tiny-small", "cod")]
    with pytest.raises(InputError, match="other questions"):
        profile(questions(3), pairs, out, catalogue=tiny_catalogue, dataset="questions")
    command = [sys.executable, "-c", "from viaticum.cli import main; main()", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    payload = json.loads(finished.stdout)
    assert payload["outcomes"] == 40
    assert [row["pair"] for row in payload["rows"]] == ["tiny-small+cod", "tiny-small+direct"]
    for row in payload["rows"]:
        low, high = row["accuracy_95"]
        assert 0 <= low <= row["accuracy"] <= high <= 1
        assert low < high
        assert 0 <= row["without_answer"] <= 20
    assert "/40 tiny-small+" in finished.stderr
    assert "Loading weights" not in finished.stderr  # transformers' own bar, among ours
    assert not journal.exists()
    fresh = profile(
        read_questions(file), pairs, tmp_path / "fresh.jsonl", catalogue=tiny_catalogue, dataset="questions"
    )
    assert without_time(read_outcomes(out)) == without_time(fresh)


def test_a_profile_killed_among_its_verdicts_goes_on(
    tiny_catalogue_file: Path, tiny_catalogue: Catalogue, tmp_path: Path
) -> None:
    """Killed after two answers, then after a verdict: the table is that of an uninterrupted run."""
    file = tmp_path / "questions.jsonl"
    rows = [{"question": q.query.text, "answer": q.gold, "kind": "text"} for q in questions(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal"
    options = {"out": out, "catalogue": tiny_catalogue_file, "model": "tiny-small", "strategy": "chat"}
    options |= {"verifier": "tiny-large", "slots": 1, "max-tokens": 30}
    arguments = ["profile", str(file), "--json"]
    for name, value in options.items():
        arguments += [f"--{name}", str(value)]
    for _ in range(2):
        killed = [sys.executable, str(KILLED), journal.name, "3", *arguments]
        assert subprocess.run(killed, capture_output=True, timeout=240).returncode == -signal.SIGKILL
    assert '"verify:tiny-small+chat"' in journal.read_text()
    command = [sys.executable, "-c", "from viaticum.cli import main; main()", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    payload = json.loads(finished.stdout)
    assert (payload["outcomes"], payload["verdicts"]) == (4, 4)
    (judged,) = payload["verifiers"]
    assert (judged["verifier"], judged["pair"], judged["answers"]) == ("tiny-large", "tiny-small+chat", 4)
    fresh = profile(
        read_questions(file),
        [Pair("tiny-small", "chat")],
        tmp_path / "fresh.jsonl",
        catalogue=tiny_catalogue,
        dataset="questions",
        verifiers=["tiny-large"],
        settings=GenerationSettings.of(max_new_tokens=30),
    )
    assert without_time([*read_outcomes(out), *read_verdicts(out)]) == without_time(fresh)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "1+1?", "answer": "2"}\n{"question": \n')
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from viaticum.cli import main; main()",
            "profile",
            str(file),
            "--out",
            str(tmp_path / "o"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {file}, line 2: not valid JSON")
    assert done.stderr.count("\n") == 1


def test_questions_with_a_marked_gold_answer_ask_for_a_number(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    rows = [
        {"question": "1+1?", "answer": "One and one.\n#### 2"},
        {"question": "Who?", "answer": "Ada", "id": "w"},
        {"question": "Is it?", "kind": "boolean"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(q.id, q.query.kind, q.gold) for q in read_questions(file)] == [
        ("1", "number", "2"),
        ("w", "auto", "Ada"),
        ("3", "boolean", None),
    ]


def test_a_template_without_a_system_role_gets_it_in_the_first_user_turn(tiny_catalogue: Catalogue) -> None:
    model = LocalModels(tiny_catalogue).model("tiny-small")
    model.tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for each in messages %}{{ each.role }}: {{ each.content }}\n{% endfor %}{{ tone }}"
    )
    chat: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many?"},
    ]
    text = model.tokenizer.decode(model.prompt(chat, Generation(chat_template_kwargs={"tone": "dry"})))
    folded: list[Message] = [{"role": "user", "content": "Be brief.\n\nHow many?"}]
    assert model.prompt(chat) == model.prompt(folded)
    assert text.rstrip().endswith("dry")


def test_a_model_without_a_template_is_refused_unless_its_entry_has_one(
    tiny_catalogue: Catalogue, tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny_catalogue["tiny-small"].sources[0].path, folder)  # type: ignore[union-attr]
    (folder / "chat_template.jinja").unlink()
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}!{% endfor %}")
    file = tmp_path / "catalogue.toml"
    entry = (
        '[models.bare]\ndescription = "x"\nkind = "local"\ncontext_length = 8192\n{}'
        f'[[models.bare.sources]]\ntype = "path"\npath = "{folder}"\n'
    )
    file.write_text(entry.format(""))
    with pytest.raises(InputError, match=r"bare has no chat template.*chat_template\.jinja"):
        LocalModels(Catalogue.load(file)).model("bare")
    for template in ("own.jinja", "{% for m in messages %}{{ m.content }}!{% endfor %}"):
        file.write_text(entry.format(f'chat_template = "{template}"\n'))
        model = LocalModels(Catalogue.load(file)).model("bare")
        assert model.tokenizer.decode(model.prompt([{"role": "user", "content": "Hi"}])) == "Hi!"
    file.write_text(entry.format('chat_template = "gone.jinja"\n'))
    with pytest.raises(InputError, match=r"models\.bare\.chat_template: neither Jinja"):
        Catalogue.load(file)
