"""A job that goes on finds the entries that it uses as they were; others may come, change and go."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from batch_jobs import (
    CHEAP,
    OLD_ROWS,
    FixedPlansRouter,
    all_plans_router,
    main,
    models,
    old_job,
    spec,
    write_questions,
)
from scripted_batch import rows_of, run

import viaticum.catalogue as catalogues
from viaticum.agents.batch.run import BatchEnd
from viaticum.agents.workflow.shadow_settings import ShadowSampling
from viaticum.budgets.records import digest
from viaticum.catalogue import Catalogue
from viaticum.errors import InputError
from viaticum.jobs import ROWS, Job
from viaticum.model_spec import ModelSpec
from viaticum.routers.query import StaticRouter
from viaticum.routers.query.fake import FakeRouter
from viaticum.types import Query

USED = "cheap"


def scripted(name: str, price: float = 0.1, **fields: Any) -> ModelSpec:
    return spec(name, price).model_copy(update={"text": "The answer is 2.", "default": False, **fields})


def table(*pairs: str) -> StaticRouter:
    """A router that names these pairs."""
    return StaticRouter(FakeRouter(*pairs).table(Query("any")))


def job(folder: Path, entries: Iterable[ModelSpec], **settings: Any) -> BatchEnd:
    """Begin the job of FOLDER/in.jsonl or go on with it, over the packaged entries and these."""
    catalogue = Catalogue.load().with_models(*entries)
    wanted: dict[str, Any] = {"models": None, "router": table(f"{USED}+cot"), "resume": True}
    return run(folder, catalogue=catalogue, **{**wanted, **settings})


def with_all_entries(ended: BatchEnd, catalogue: Mapping[str, ModelSpec], *, listed: bool) -> None:
    """Write a job's fingerprint as earlier versions did, whatever the job uses.

    listed: whether it also has a list of the entries, which the first version did not write.
    """
    identities = {name: each.identity for name, each in catalogue.items()}
    fingerprint = {**ended.job.fingerprint, "catalogue": digest(identities)}
    memory = dict(ended.job.memory)
    del memory["entries"]
    if listed:
        memory["entries"] = {name: digest(each)[:12] for name, each in identities.items()}
    replace(ended.job, fingerprint=fingerprint, memory=memory).save(ended.folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_questions(tmp_path / "in.jsonl", 2)
    return tmp_path


@pytest.mark.parametrize("form", ["now", "listed", "first"])
def test_entries_that_a_job_does_not_use_come_change_and_go(folder: Path, form: str) -> None:
    own, other = scripted(USED), scripted("other")
    begun = job(folder, [own, other])
    if form != "now":
        with_all_entries(begun, Catalogue.load().with_models(own, other), listed=form == "listed")
    job(folder, [own, other, scripted("added", 5)])  # the first form tells entries that came, and no others
    again = job(folder, [own, scripted("other", 9)])
    assert again.job.memory["entries"] == begun.job.memory["entries"]
    job(folder, [own])
    with pytest.raises(InputError, match=f"the catalogue differs: {USED} changed"):
        job(folder, [scripted(USED, 0.2)])
    rows_of(job(folder, [own]))


@pytest.mark.parametrize("form", ["now", "listed", "first"])
@pytest.mark.parametrize(
    "fields",
    [
        {"input_price": Decimal(7)},
        {"output_price": Decimal(7)},
        {"text": "The answer is 3."},
        {"context_length": 100},
        {"generation": {"temperature": 0.7}},
        {"thinking": True},
    ],
    ids=str,
)
def test_a_changed_entry_that_a_job_uses_is_refused(folder: Path, form: str, fields: dict[str, Any]) -> None:
    own = scripted(USED)
    begun = job(folder, [own])
    if form != "now":
        with_all_entries(begun, Catalogue.load().with_models(own), listed=form == "listed")
    changed = ModelSpec.model_validate({**own.model_dump(), **fields})
    with pytest.raises(InputError, match="catalogue") as refused:
        job(folder, [changed])
    assert form == "first" or f"{USED} changed" in str(refused.value)
    with pytest.raises(InputError, match=r"catalogue|model"):
        job(folder, [])
    job(folder, [own])


def test_an_entry_that_a_router_names_and_that_comes_later_is_refused(folder: Path) -> None:
    router = table(f"{USED}+cot", "later+cot")
    job(folder, [scripted(USED)], router=router)
    job(folder, [scripted(USED), scripted("other")], router=router)
    with pytest.raises(InputError, match="the catalogue differs: later is new"):
        job(folder, [scripted(USED), scripted("later")], router=router)


def test_without_a_router_a_job_keeps_to_the_models_that_it_began_with(folder: Path) -> None:
    """A model that comes later would be the best one by far."""
    own = scripted(USED, default=True)
    later = scripted("later", 0.0001, default=True, benchmarks={"mmlu-pro": 0.99})
    wanted: dict[str, Any] = {"models": None, "router": None, "policy": "best"}
    stopped = threading.Event()
    stopped.set()
    begun = run(folder, catalogue=Catalogue([own]), stop=stopped, **wanted)
    assert (begun.job.ending, rows_of(begun)) == ("drained", [])
    ended = run(folder, catalogue=Catalogue([own, later]), resume=True, **wanted)
    assert {row.pair.partition("+")[0] for row in rows_of(ended)} == {USED}
    assert ended.job.fingerprint == begun.job.fingerprint
    new = run(folder, catalogue=Catalogue([own, later]), out=folder / "new.jsonl", **wanted)
    assert {row.pair.partition("+")[0] for row in rows_of(new)} == {"later"}


def test_a_shadow_judge_of_the_same_model_is_refused_before_an_earlier_job_is_cleared(folder: Path) -> None:
    write_questions(folder / "in.jsonl", 2)
    entries = [scripted(USED), scripted("asked")]
    rows = job(folder, entries).folder / ROWS
    kept = rows.read_bytes()
    assert kept
    shadow = ShadowSampling("asked+cot", 1.0, "0.01", judge="asked")
    with pytest.raises(InputError, match="asked would judge its own answers"):
        job(folder, entries, shadow=shadow, resume=False, force=True)
    assert rows.read_bytes() == kept


def test_models_that_rows_options_and_shadow_calls_name_are_used(folder: Path) -> None:
    lines = [
        {
            "custom_id": f"q{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": model, "messages": [{"role": "user", "content": "What is 1 + 1?"}]},
        }
        for number, model in enumerate(("auto", "named+cot"))
    ]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shadow = ShadowSampling("shadow", 0.5, "0.01", judge="judge")
    names = (USED, "named", "shadow", "judge")
    used = {name: scripted(name) for name in names}
    job(folder, [*used.values(), scripted("other")], shadow=shadow)
    for name in names:
        with pytest.raises(InputError, match=f"differs: {name} changed"):
            job(folder, (used | {name: scripted(name, 3)}).values(), shadow=shadow)
    job(folder, [*used.values()], shadow=shadow)
    (folder / "two").mkdir()
    write_questions(folder / "two" / "in.jsonl", 2)
    job(folder / "two", [scripted(USED), scripted("asked")], model="asked")
    job(folder / "two", [scripted(USED, 4), scripted("asked")], model="asked")
    with pytest.raises(InputError, match="differs: asked changed"):
        job(folder / "two", [scripted(USED), scripted("asked", 4)], model="asked")


def test_the_members_of_a_pair_are_used(folder: Path) -> None:
    loaded = Catalogue.load()
    small = loaded["qwen2.5-coder-0.5b"]
    router = table(f"{USED}+cot", "qwen2.5-coder-r-stitch+cot")
    job(folder, [scripted(USED)], router=router, policy="best")
    changed = small.model_copy(update={"input_price": Decimal(3)})
    with pytest.raises(InputError, match=r"differs: qwen2\.5-coder-0\.5b changed"):
        job(folder, [scripted(USED), changed], router=router, policy="best")
    others = [loaded["smollm2-135m"].model_copy(update={"input_price": Decimal(3)}), scripted(USED)]
    job(folder, others, router=router, policy="best")


def test_a_router_that_does_not_say_its_models_may_name_all_that_were_there(folder: Path) -> None:
    router = FixedPlansRouter({CHEAP: (0.5, 40_000)})
    assert not any(each.models for each in router.knowledge())
    job(folder, [scripted(USED), scripted("other")], router=router)
    job(folder, [scripted(USED), scripted("other"), scripted("added")], router=router)
    for entries in ([scripted(USED), scripted("other", 2)], [scripted(USED)]):
        with pytest.raises(InputError, match=r"differs: other (changed|is missing)"):
            job(folder, entries, router=router)


@pytest.mark.parametrize("own", [False, True], ids=["packaged", "user's"])
def test_the_job_of_the_first_version_goes_on_after_a_new_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    inside = old_job(tmp_path)
    assert "entries" not in Job.load(inside).memory
    text = (
        '[models.brand-new]\ndescription = "new"\nkind = "scripted"\ncontext_length = 8192\n'
        'input_price = 0.001\noutput_price = 0.001\ntext = "The answer is 0."\n'
    )
    if own:
        (tmp_path / "catalogue.toml").write_text(text)
        monkeypatch.setenv("VIATICUM_CATALOGUE", str(tmp_path / "catalogue.toml"))
    else:
        read = catalogues.read_catalogue

        def with_new(found: bytes, origin: str) -> Any:
            return read(found + text.encode() if origin == catalogues.PACKAGED else found, origin)

        monkeypatch.setattr(catalogues, "read_catalogue", with_new)
    assert "brand-new" in Catalogue.load()
    main(tmp_path, "0.02", str(tmp_path / "ledger.db"), 0.0)
    after = Job.load(inside)
    assert (after.ending, after.rows) == ("completed", OLD_ROWS)


def test_the_job_of_the_first_version_is_refused_after_a_change_of_price(tmp_path: Path) -> None:
    old_job(tmp_path)
    changed = {**models(), "cheap": type(models()["cheap"])(spec=spec("cheap", 0.2))}
    with pytest.raises(InputError, match="another catalogue"):
        run(tmp_path, models=changed, router=all_plans_router(), resume=True)
