"""Shadow sampling: a share of questions is asked again of one model, and no caller notices it."""

from __future__ import annotations

import json
import math
import operator
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from batch_jobs import CHEAP, EXPENSIVE, models, two_plans_router, write_questions
from openai_server import OpenAIServer, running_server, spec_for
from typer.testing import CliRunner
from viaticum_server import chat_body, serving, wait_until

from viaticum import Allowance, ChatViaticum, InputError, Viaticum, build_graph
from viaticum.agents.batch import job_folder, run_batch
from viaticum.agents.cancellation import CancellationToken
from viaticum.agents.completions import CompletionRequest, complete
from viaticum.agents.workflow.shadow_settings import ShadowSampling
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue
from viaticum.cli import app
from viaticum.errors import BudgetError, ModelError, UnknownName
from viaticum.jobs import read_rows
from viaticum.models.base import Generation
from viaticum.models.scripted import ScriptedModel
from viaticum.questions import digest_of
from viaticum.reports.shadow import difference_interval, read_shadow_numbers, shadow_numbers
from viaticum.routers.query import StaticRouter
from viaticum.shadow_samples import SHADOWS, GivenAnswer, ShadowSample, append_sample, read_samples
from viaticum.types import AnswerKind, Message, Pair, RoutingTable, Row

ALL = ShadowSampling("expensive", 1.0, "1")


def question(number: int) -> str:
    return f"What is {number} + 2?"


def opened(folder: Path, shadow: ShadowSampling | None = ALL, **settings: Any) -> Viaticum:
    given = settings.pop("models", None) or models()
    return Viaticum(
        settings.pop("budget", "1"),
        budget_name=settings.pop("budget_name", "live"),
        folder=folder,
        models=given,
        router=two_plans_router(),
        policy=settings.pop("policy", "cheapest:0.1"),
        shadow=shadow,
        **settings,
    )


def test_questions_are_asked_again_and_pay_from_a_budget_of_their_own(tmp_path: Path) -> None:
    with opened(tmp_path) as viaticum:
        answers = [viaticum.solve(question(number), kind="number") for number in (3, 4)]
        assert viaticum.wait_for_shadows(120)
        live, shadow = viaticum.budget(), viaticum.ledger.budget("live-shadow")
        assert viaticum.ledger.check() == []
    assert [str(answer.routes[-1].pair) for answer in answers] == [str(CHEAP), str(CHEAP)]
    assert live.posted_nanousd == sum(answer.cost for answer in answers)
    samples = {each.question_id: each for each in read_samples(tmp_path / SHADOWS)}
    assert [samples[digest_of(question(number))].equal for number in (3, 4)] == [True, False]
    assert all(each.shadow is not None and each.shadow.pair == str(EXPENSIVE) for each in samples.values())
    costs = [each.shadow.cost_nanousd for each in samples.values() if each.shadow]
    assert shadow.posted_nanousd == sum(costs) > 0
    assert shadow.held_nanousd == 0
    assert shadow.parent is None  # so that it takes nothing from the answers
    assert (tmp_path / SHADOWS).stat().st_mode & 0o077 == 0


def test_which_questions_are_sampled_depends_on_their_ids_alone(tmp_path: Path) -> None:
    names = [f"thread {number}" for number in range(40)]
    some = ShadowSampling("expensive", 0.3, "1")
    for folder in ("one", "two"):
        with opened(tmp_path / folder, some) as viaticum:
            for name in names:
                viaticum.solve(question(3), thread_id=name)
                viaticum.solve(question(3), thread_id=name)  # from its checkpoint: no second sample
            assert viaticum.wait_for_shadows(120)
    found = [[each.id for each in read_samples(tmp_path / folder / SHADOWS)] for folder in ("one", "two")]
    assert sorted(found[0]) == sorted(found[1]) == sorted(filter(some.is_sampled, names))
    assert 4 <= len(found[0]) <= 20
    assert sorted(found[0]) != sorted(filter(ShadowSampling("expensive", 0.3, "1", seed=1).is_sampled, names))


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, float("nan"), True, "0.1"])
def test_a_rate_that_is_none_is_refused(rate: Any) -> None:
    with pytest.raises(InputError, match="rate"):
        ShadowSampling("expensive", rate, "1")


def test_rates_are_heeded() -> None:
    shares = [
        sum(ShadowSampling("m", rate, 1).is_sampled(str(n)) for n in range(4000)) for rate in (0.02, 0.5)
    ]
    assert 50 <= shares[0] <= 115
    assert 1900 <= shares[1] <= 2100


def test_a_budget_that_is_used_up_ends_the_sampling_and_not_the_answers(tmp_path: Path) -> None:
    with opened(tmp_path, ShadowSampling("expensive", 1.0, "0.0012")) as viaticum:
        for number in range(6):
            assert viaticum.solve(question(number)).text
            assert viaticum.wait_for_shadows(120)
        shadow = viaticum.ledger.budget("live-shadow")
        assert viaticum.ledger.overruns == {}
    assert shadow.posted_nanousd <= 1_200_000
    samples = read_samples(tmp_path / SHADOWS)
    missing = [each.reason for each in samples if each.shadow is None]
    assert 0 < len(missing) < 6 == len(samples)
    assert all("live-shadow" in reason for reason in missing)


def test_the_answer_does_not_wait_and_closing_settles_what_is_in_progress(tmp_path: Path) -> None:
    begun = threading.Event()

    def slow(messages: Sequence[Message], generation: Generation) -> str:
        begun.set()
        return " ".join(["word"] * 500)

    given = models()
    given["expensive"] = ScriptedModel(slow, spec=given["expensive"].spec, pause=0.2)
    shadow = ShadowSampling("expensive", 1.0, "1", wait_seconds=0)
    with opened(tmp_path, shadow, models=given) as viaticum:
        before = time.monotonic()
        viaticum.solve(question(3))
        assert time.monotonic() - before < 60  # the shadow call takes 100
        assert begun.wait(120)
    (sample,) = read_samples(tmp_path / SHADOWS)
    assert sample.reason == "the process ended"
    with Ledger(tmp_path / "ledger.db") as ledger:
        holds = list(ledger.holds("live-shadow"))
        assert [hold.state for hold in holds] == ["posted"]  # what was read and written is paid
        assert ledger.check() == []


def test_draining_ends_the_shadow_calls_too(tmp_path: Path) -> None:
    given = models()
    given["expensive"] = ScriptedModel("word " * 2000, spec=given["expensive"].spec, pause=0.05)
    shadow = ShadowSampling("expensive", 1.0, "1", wait_seconds=0.1)
    with opened(tmp_path, shadow, models=given) as viaticum:
        viaticum.solve(question(3))
        wait_until(lambda: any(viaticum.ledger.holds("live-shadow", "dispatched")))
        assert viaticum.drain(60)
        assert not list(viaticum.ledger.holds("live-shadow", "dispatched"))


def test_a_model_that_fails_is_recorded_and_the_answer_stands(tmp_path: Path) -> None:
    given = models()
    given["expensive"] = ScriptedModel(ModelError("it broke"), spec=given["expensive"].spec)
    with opened(tmp_path, models=given) as viaticum:
        assert viaticum.solve(question(3)).value == "5"
        assert viaticum.wait_for_shadows(120)
        assert viaticum.ledger.budget("live-shadow").held_nanousd == 0
    (sample,) = read_samples(tmp_path / SHADOWS)
    assert sample.shadow is None
    assert "it broke" in sample.reason


@pytest.mark.parametrize("fits", [False, True])
def test_a_call_that_would_be_the_same_is_compared_only_where_others_would_be(
    tmp_path: Path, fits: bool
) -> None:
    """Else a budget that is used up leaves the equal answers alone to compare."""
    shadow = ShadowSampling("expensive", 1.0, "0.01" if fits else "0.0001")
    with opened(tmp_path, shadow, policy="best") as viaticum:
        viaticum.solve(question(3))
        assert viaticum.wait_for_shadows(120)
    (sample,) = read_samples(tmp_path / SHADOWS)
    assert (sample.shadow is not None, "live-shadow" in sample.reason) == (fits, not fits)


def test_what_waits_when_it_closes_is_recorded(tmp_path: Path) -> None:
    given = models()
    given["expensive"] = ScriptedModel("word " * 2000, spec=given["expensive"].spec, pause=0.05)
    shadow = ShadowSampling("expensive", 1.0, "1", wait_seconds=0)
    with opened(tmp_path, shadow, models=given) as viaticum:
        for number in range(7):
            viaticum.solve(question(number))
    reasons = [each.reason for each in read_samples(tmp_path / SHADOWS)]
    assert reasons == ["the process ended"] * 7


def test_draining_takes_no_longer_than_it_may(tmp_path: Path) -> None:
    goes_on = threading.Event()

    def silent(messages: Sequence[Message], generation: Generation) -> str:
        goes_on.wait(120)  # a model that cannot be ended
        return "The answer is 5."

    given = models(expensive=silent)
    with opened(tmp_path, models=given) as viaticum:
        viaticum.solve(question(3))
        wait_until(lambda: bool(given["expensive"].calls))
        before = time.monotonic()
        assert viaticum.drain(1.0)
        assert time.monotonic() - before < 60
        goes_on.set()
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert [hold.state for hold in ledger.holds("live-shadow")] == ["posted"]


def test_the_judge_is_ended_too(tmp_path: Path) -> None:
    given = models() | {"judge": ScriptedModel("RIGHT " * 2000, name="judge", pause=0.05)}
    shadow = ShadowSampling("expensive", 1.0, "1", judge="judge", wait_seconds=0)
    with opened(tmp_path, shadow, models=given) as viaticum:
        viaticum.solve(question(4), kind="number")
        wait_until(lambda: bool(given["judge"].calls))
        before = time.monotonic()
    assert time.monotonic() - before < 60  # a verdict takes 100
    assert len(given["judge"].calls) == 1
    (sample,) = read_samples(tmp_path / SHADOWS)
    assert (sample.equal, sample.by) == (False, "")


@pytest.mark.parametrize("name", ["cheap", "ChatViaticum"])
def test_a_local_model_is_not_asked_while_a_chat_is_in_progress(tmp_path: Path, name: str) -> None:
    given = models()
    local = given["expensive"].spec.model_copy(update={"kind": "local"})
    given["expensive"] = ScriptedModel("The answer is 5.", spec=local)
    given["cheap"] = ScriptedModel("The answer is 5. " * 9, spec=given["cheap"].spec)
    with opened(tmp_path, models=given) as viaticum:
        request = CompletionRequest("cheap", [{"role": "user", "content": "hi"}], "live", "k")
        chat: Any = complete(viaticum, request, CancellationToken())
        if name == "ChatViaticum":
            chat = ChatViaticum(model="cheap", client=viaticum).stream("hi")
        next(chat)
        viaticum.solve(question(3))
        assert not viaticum.wait_for_shadows(0.5)
        assert given["expensive"].calls == []
        assert list(chat)
        assert viaticum.wait_for_shadows(120)
    assert len(given["expensive"].calls) == 1


def labelled(**tags: str) -> dict[str, ScriptedModel]:
    """The models, and a judge, each with a tag."""
    given = models() | {"judge": ScriptedModel("RIGHT", name="judge")}
    for name, tag in tags.items():
        given[name].spec = given[name].spec.model_copy(update={"tags": (tag,)})
    return given


@pytest.mark.parametrize("restricts", ["question", "its budget", "the budget of all"])
def test_a_question_goes_nowhere_that_its_data_may_not(tmp_path: Path, restricts: str) -> None:
    given = labelled(expensive="far", cheap="near")
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.create("patients", limit_nanousd=10**9, only="near")
    settings: dict[str, Any] = {"models": given}
    if restricts == "the budget of all":
        settings |= {"budget": None, "budget_name": "patients"}
    allowance = {"question": Allowance(only="near"), "its budget": Allowance(budget="patients")}
    with opened(tmp_path, **settings) as viaticum:
        viaticum.solve(question(3), allowance=allowance.get(restricts))
        assert viaticum.wait_for_shadows(120)
    assert given["expensive"].calls == []
    (sample,) = read_samples(tmp_path / SHADOWS)
    assert "near" in sample.reason


def test_the_judge_is_restricted_too(tmp_path: Path) -> None:
    given = labelled(expensive="near", cheap="near", judge="far")
    with opened(tmp_path, ShadowSampling("expensive", 1.0, "1", judge="judge"), models=given) as viaticum:
        viaticum.ledger.create("patients", parent="live", only="near")
        viaticum.solve(question(4), kind="number", allowance=Allowance(budget="patients"))
        assert viaticum.wait_for_shadows(120)
    assert given["judge"].calls == []
    (sample,) = read_samples(tmp_path / SHADOWS)
    assert (sample.equal, sample.by) == (False, "")


def test_a_call_that_would_be_the_same_is_not_paid_twice(tmp_path: Path) -> None:
    with opened(tmp_path, policy="best") as viaticum:
        answer = viaticum.solve(question(3))
        assert viaticum.wait_for_shadows(120)
        assert viaticum.ledger.budget("live-shadow").posted_nanousd == 0
    (sample,) = read_samples(tmp_path / SHADOWS)
    assert sample.equal
    assert sample.shadow is not None
    assert sample.shadow.cost_nanousd == answer.cost


def test_a_judge_decides_between_different_answers_alone(tmp_path: Path) -> None:
    def judges(messages: Sequence[Message], generation: Generation) -> str:
        return "RIGHT" if 'Answer: "6"' in messages[-1]["content"] else "It is not.\nWRONG"

    given = models()
    given["judge"] = ScriptedModel(judges, name="judge")
    with opened(tmp_path, ShadowSampling("expensive", 1.0, "1", judge="judge"), models=given) as viaticum:
        for number in (3, 4):
            viaticum.solve(question(number), kind="number")
        assert viaticum.wait_for_shadows(120)
        assert viaticum.ledger.check() == []
    assert len(given["judge"].calls) == 2
    samples = {each.question_id: each for each in read_samples(tmp_path / SHADOWS)}
    assert samples[digest_of(question(3))].by == ""
    decided = samples[digest_of(question(4))]
    assert decided.shadow is not None
    assert (decided.by, decided.live.correct, decided.shadow.correct) == ("judge", False, True)
    (numbers,) = read_shadow_numbers(tmp_path / SHADOWS)
    assert (numbers.won, numbers.lost, dict(numbers.by)) == (0, 1, {"agreement": 1, "judge": 1})


def test_no_judge_decides_about_answers_of_its_own_model(tmp_path: Path) -> None:
    """The model that is asked again is refused; where the live answer is the judge's, nobody decides."""
    with pytest.raises(InputError, match="expensive would judge its own answers"):
        opened(tmp_path / "refused", ShadowSampling("expensive+cot", 1.0, "1", judge="expensive"))
    given = models()
    with opened(tmp_path, ShadowSampling("expensive", 1.0, "1", judge="cheap"), models=given) as viaticum:
        viaticum.solve(question(4), kind="number")
        assert viaticum.wait_for_shadows(120)
    (sample,) = read_samples(tmp_path / SHADOWS)
    assert (sample.equal, sample.by, sample.live.correct) == (False, "", None)
    assert len(given["cheap"].calls) == 1


def test_a_verdict_that_was_cut_off_decides_nothing(tmp_path: Path) -> None:
    given = models() | {"judge": ScriptedModel("word " * 600 + "RIGHT", name="judge")}
    with opened(tmp_path, ShadowSampling("expensive", 1.0, "1", judge="judge"), models=given) as viaticum:
        viaticum.solve(question(4), kind="number")
        assert viaticum.wait_for_shadows(120)
    (sample,) = read_samples(tmp_path / SHADOWS)
    assert sample.shadow is not None
    assert (sample.live.correct, sample.shadow.correct) == (None, None)
    assert dict(read_shadow_numbers(tmp_path / SHADOWS)[0].by) == {"nobody": 1}


def test_settings_that_name_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="nobody"):
        opened(tmp_path / "a", ShadowSampling("nobody", 1.0, "1"))
    with pytest.raises(UnknownName, match="nobody"):
        opened(tmp_path / "b", ShadowSampling("expensive", 1.0, "1", judge="nobody"))
    with pytest.raises(InputError, match="shadow"):
        build_graph(folder=tmp_path / "c", models=models(), router=two_plans_router(), shadow=ALL)
    with opened(tmp_path / "d"):
        pass
    with pytest.raises(BudgetError, match="live-shadow"):
        opened(tmp_path / "d", ShadowSampling("expensive", 1.0, "2"))


def test_the_server_samples_what_it_routes_and_nothing_that_is_named(tmp_path: Path) -> None:
    with serving(tmp_path, shadow=ShadowSampling("mute+direct", 1.0, "1")) as server:
        for model in ("auto", "fast", "fast+cot"):
            assert server.ask(model).status_code == 200
        asked = {"model": "auto", "max_tokens": 100, "messages": chat_body()["messages"]}
        assert server.http.post("/v1/messages", json=asked).status_code == 200
        said = {"model": "auto", "input": chat_body()["messages"][0]["content"], "store": False}
        assert server.http.post("/v1/responses", json=said).status_code == 200
        assert server.client.wait_for_shadows(120)
        server.assert_settled()
        assert server.client.ledger.budget("serve-shadow").posted_nanousd > 0
    samples = read_samples(tmp_path / SHADOWS)
    assert len(samples) == 3
    sample = samples[0]
    assert sample.question_id == digest_of(chat_body()["messages"][0]["content"])
    assert sample.live.answer == "42"


def test_a_chat_with_tools_is_compared_by_what_it_costs_and_calls(tmp_path: Path) -> None:
    """The answer is that of the cheap one; both call the same tool, then they write different texts."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    table = RoutingTable(
        (Row(Pair("near", "direct"), 0.9, 20, 30, 10, 20), Row(Pair("far", "direct"), 0.5, 20, 30, 10, 20))
    )
    with running_server() as near, running_server(OpenAIServer()) as far:
        dear: dict[str, Any] = {"input_price": "10", "output_price": "20"}
        catalogue = Catalogue([spec_for(near, name="near"), spec_for(far, name="far", **dear)])
        settings: dict[str, Any] = {"catalogue": catalogue, "router": StaticRouter(table), "policy": "best"}
        shadow = ShadowSampling("far", 1.0, "1")
        with Viaticum("1", budget_name="live", folder=tmp_path, shadow=shadow, **settings) as viaticum:
            for number, text in enumerate(("same", "other")):
                near.text, far.text = "same", text
                asked: Any = [{"role": "user", "content": "hi"}]
                extra = {"tools": [tool], **({"tool_choice": "none"} if number else {})}
                request = CompletionRequest("auto", asked, "live", f"k{number}", extra=extra)
                *_, last = complete(viaticum, request, CancellationToken())
                assert last.routes == ("near",)  # type: ignore[union-attr]
                assert viaticum.wait_for_shadows(120)
            assert viaticum.ledger.check() == []
            spent = viaticum.ledger.budget("live-shadow").posted_nanousd
        assert (len(near.requests), len(far.requests)) == (2, 2)
    samples = {each.id: each for each in read_samples(tmp_path / SHADOWS)}
    assert [samples[f"k{number}"].equal for number in (0, 1)] == [True, None]
    assert spent == sum(each.shadow.cost_nanousd for each in samples.values() if each.shadow) > 0
    (numbers,) = read_shadow_numbers(tmp_path / SHADOWS)
    assert dict(numbers.by) == {"agreement": 1, "nobody": 1}


@pytest.mark.parametrize("model", ["near", "far"])
def test_a_chat_is_asked_again_only_within_the_budget(tmp_path: Path, model: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    table = RoutingTable((Row(Pair("near", "direct"), 0.9, 20, 30, 10, 20),))
    with running_server() as near, running_server() as far:
        specs = [spec_for(server, name=name) for server, name in ((near, "near"), (far, "far"))]
        shadow = ShadowSampling(model, 1.0, "0.000001")
        settings: dict[str, Any] = {"catalogue": Catalogue(specs), "router": StaticRouter(table)}
        with Viaticum("1", folder=tmp_path, shadow=shadow, **settings) as viaticum:
            asked: Any = [{"role": "user", "content": "hi"}]
            request = CompletionRequest("auto", asked, viaticum.budget_name, "k", extra={"tools": [tool]})
            list(complete(viaticum, request, CancellationToken()))
            assert viaticum.wait_for_shadows(120)
    (sample,) = read_samples(tmp_path / SHADOWS)
    assert (sample.shadow, "-shadow" in sample.reason) == (None, True)


def test_a_chat_that_is_asked_again_ends_with_the_client(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    table = RoutingTable((Row(Pair("near", "direct"), 0.9, 20, 30, 10, 20),))
    with running_server() as near, running_server() as far:
        far.text, far.pause = "word " * 500, 0.2
        specs = [spec_for(server, name=name) for server, name in ((near, "near"), (far, "far"))]
        shadow = ShadowSampling("far", 1.0, "1", wait_seconds=0)
        settings: dict[str, Any] = {"catalogue": Catalogue(specs), "router": StaticRouter(table)}
        with Viaticum("1", folder=tmp_path, shadow=shadow, **settings) as viaticum:
            asked: Any = [{"role": "user", "content": "hi"}]
            extra = {"tools": [tool], "tool_choice": "none"}
            request = CompletionRequest("auto", asked, viaticum.budget_name, "k", extra=extra)
            list(complete(viaticum, request, CancellationToken()))
            wait_until(lambda: bool(far.requests))
            before, scope = time.monotonic(), f"{viaticum.budget_name}-shadow"
        assert time.monotonic() - before < 60  # the chat takes 100
    (sample,) = read_samples(tmp_path / SHADOWS)
    assert sample.reason == "the process ended"
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert [hold.state for hold in ledger.holds(scope)] == ["posted"]


def test_a_chat_goes_nowhere_that_its_budget_may_not(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    table = RoutingTable((Row(Pair("near", "direct"), 0.9, 20, 30, 10, 20),))
    with running_server() as near, running_server() as far:
        specs = [spec_for(server, name=name, tags=(name,)) for server, name in ((near, "near"), (far, "far"))]
        settings: dict[str, Any] = {"catalogue": Catalogue(specs), "router": StaticRouter(table)}
        with Viaticum("1", folder=tmp_path, shadow=ShadowSampling("far", 1.0, "1"), **settings) as viaticum:
            viaticum.ledger.create("patients", parent=viaticum.budget_name, only="near")
            asked: Any = [{"role": "user", "content": "hi"}]
            request = CompletionRequest("auto", asked, "patients", "k", extra={"tools": [tool]})
            list(complete(viaticum, request, CancellationToken()))
            assert viaticum.wait_for_shadows(120)
        assert (len(near.requests), len(far.requests)) == (1, 0)
    (sample,) = read_samples(tmp_path / SHADOWS)
    assert "near" in sample.reason


def batch(folder: Path, **settings: Any) -> Any:
    given = {"models": models(), "router": two_plans_router(), "ledger": folder / "ledger.db"} | settings
    return run_batch(folder / "in.jsonl", folder / "out.jsonl", policy="cheapest:0.1", **given)


def test_a_job_asks_a_sample_again_after_its_results_and_once(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 20)
    ended = batch(tmp_path, budget="1", shadow=ShadowSampling("expensive", 0.5, "1"))
    folder = job_folder(tmp_path / "out.jsonl")
    samples = read_samples(folder / SHADOWS)
    assert 4 <= len(samples) <= 16
    assert all(each.by == "gold" and each.shadow is not None and each.shadow.correct for each in samples)
    rows = {row.id: row for row in read_rows(folder)}
    assert {each.id for each in samples} <= {f"{ended.job.budget}/{name}" for name in rows}
    (numbers,) = read_shadow_numbers(folder)
    assert numbers.won == 0
    assert numbers.lost == sum(not each.live.correct for each in samples) > 0
    assert numbers.saved is not None
    assert numbers.saved.low > 0
    with Ledger(tmp_path / "ledger.db") as ledger:
        spent = ledger.budget(f"{ended.job.budget}-shadow")
        assert spent.posted_nanousd == sum(each.shadow.cost_nanousd for each in samples if each.shadow)
    (folder / SHADOWS).unlink()  # as if a kill had come before it was written
    batch(tmp_path, resume=True)
    assert sorted(each.id for each in read_samples(folder / SHADOWS)) == sorted(each.id for each in samples)
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert ledger.budget(f"{ended.job.budget}-shadow").posted_nanousd == spent.posted_nanousd
        assert ledger.check() == []


def test_the_report_of_a_job_and_the_command_say_what_was_saved(tmp_path: Path) -> None:
    from viaticum.reports import build

    write_questions(tmp_path / "in.jsonl", 12)
    batch(tmp_path, budget="1", shadow=ShadowSampling("expensive", 1.0, "1"))
    made = build(tmp_path / "out.jsonl", tmp_path / "report.md")
    text = made.path.read_text()
    assert "Against always asking expensive, on 12 questions that both were asked: 90.0% (" in text
    result = CliRunner().invoke(app, ["shadow", str(tmp_path / "out.jsonl"), "--json"])
    assert result.exit_code == 0, result.output
    (numbers,) = json.loads(result.stdout)
    assert (numbers["compared"], numbers["won"], numbers["lost"]) == (12, 0, 6)
    assert numbers["accuracy"]["value"] == -0.5


# --- the arithmetic ---------------------------------------------------------------------------------


def sample(number: int, *, equal: bool, **fields: Any) -> ShadowSample:
    live = GivenAnswer("cheap+cot", "1", 100, 1.0, fields.pop("right", None))
    shadow = GivenAnswer("x+cot", "1" if equal else "2", 300, 2.0, fields.pop("other_right", None))
    return ShadowSample(f"r{number}", f"q{number}", "x", live, shadow, equal, **fields)


def numbers_of(folder: Path, *samples: ShadowSample) -> Any:
    for each in samples:
        append_sample(folder / SHADOWS, each)
    (numbers,) = read_shadow_numbers(folder / SHADOWS)
    return numbers


def test_no_difference_in_few_questions_is_not_taken_for_certain(tmp_path: Path) -> None:
    found = numbers_of(tmp_path, *(sample(n, equal=True) for n in range(30)))
    assert found.accuracy.value == 0.0
    assert -0.17 < found.accuracy.low < -0.1 < 0.1 < found.accuracy.high < 0.17  # Wilson: 11.4% of 0 in 30
    assert (found.saved.value, found.saved_share.value) == (200.0, pytest.approx(2 / 3))


def test_answers_that_nobody_judged_widen_the_interval(tmp_path: Path) -> None:
    judged = [sample(n, equal=False, by="judge", right=True, other_right=False) for n in range(5)]
    found = numbers_of(
        tmp_path,
        *(sample(n, equal=True) for n in range(80, 170)),
        *judged,
        *(sample(n, equal=False) for n in range(40, 45)),
    )
    assert found.accuracy.value == pytest.approx(0.10)  # as the judged ones, in all ten
    assert found.accuracy.low < 0.01
    assert dict(found.by) == {"agreement": 90, "judge": 5, "nobody": 5}


def test_without_any_verdict_no_accuracy_is_given(tmp_path: Path) -> None:
    found = numbers_of(tmp_path, *(sample(n, equal=n > 2) for n in range(10)))
    assert found.accuracy is None
    assert found.equal.value == 0.7


def test_feedback_counts_for_the_worse(tmp_path: Path) -> None:
    """A live answer that was wrong is counted as lost, since nobody knows of the other one."""
    with opened(tmp_path) as viaticum:
        for number in (4, 6, 3):
            answer = viaticum.solve(question(number), kind="number")
            viaticum.feedback(question(number), answer, answer.value == str(number + 2))
        assert viaticum.wait_for_shadows(120)
    (found,) = read_shadow_numbers(tmp_path / SHADOWS)
    assert (found.won, found.lost, dict(found.by)) == (0, 2, {"feedback": 2, "agreement": 1})


@pytest.mark.parametrize(
    ("right", "other", "kind", "verdict"),
    [
        (True, None, "number", (1, 0, "feedback")),
        (False, None, "number", (0, 1, "feedback")),
        (True, False, "text", (1, 0, "feedback")),
        (True, True, "text", (0, 0, "feedback")),
        (True, True, "number", (0, 0, "feedback")),
        (False, False, "text", (0, 0, "feedback")),
        (False, True, "text", (0, 1, "feedback")),
        (True, None, "text", (0, 0, "nobody")),
        (False, None, "text", (0, 0, "nobody")),
    ],
)
def test_feedback_counts_beside_what_is_known_of_the_other_answer(
    right: bool, other: bool | None, kind: AnswerKind, verdict: tuple[int, int, str]
) -> None:
    different = sample(1, equal=False, kind=kind, other_right=other)
    (found,) = shadow_numbers([different], {("q1", "cheap+cot"): right})
    assert (found.won, found.lost, *found.by) == verdict


@pytest.mark.parametrize(("won", "lost"), [(0.45, 0.45), (0.3, 0.1), (0.04, 0.02)])
def test_the_interval_holds_the_difference_as_often_as_it_says(won: float, lost: float) -> None:
    """Of 100 questions: the chance of every outcome, by the multinomial, summed over those that it covers."""
    of, covered, log = 100, 0.0, [math.log(share) for share in (won, lost, 1 - won - lost)]
    for each in range(of + 1):
        for other in range(of + 1 - each):
            low, high = difference_interval(each, other, of)
            if low <= won - lost <= high:
                counts = (each, other, of - each - other)
                chance = math.lgamma(of + 1) - sum(math.lgamma(count + 1) for count in counts)
                covered += math.exp(chance + sum(map(operator.mul, counts, log)))
    assert 0.94 < covered < 0.99


def test_a_line_that_a_kill_cut_off_loses_that_sample_alone(tmp_path: Path) -> None:
    path = tmp_path / SHADOWS
    append_sample(path, sample(1, equal=True))
    with path.open("ab") as file:
        file.write(b'{"id": "cut')
    append_sample(path, sample(2, equal=True))
    assert [each.id for each in read_samples(path)] == ["r1", "r2"]
