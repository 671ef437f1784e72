"""A folder of pages over many jobs: found, kept up, told by week; files of others are not touched."""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from job_runs import BEGAN, CHEAP, MIDDLE, make_job, questions, write_table
from typer.testing import CliRunner

from viaticum.budgets import Ledger
from viaticum.cli import app
from viaticum.errors import InputError
from viaticum.jobs import ROWS, Job, read_rows, row_line
from viaticum.outcomes import append_outcome
from viaticum.reports import read_numbers
from viaticum.reports.chart_rendering import money_ticks
from viaticum.reports.shadow import LIVE_OUTCOMES
from viaticum.reports.site import build_site, find_jobs
from viaticum.reports.trend_charts import shown_labels
from viaticum.shadow_samples import SHADOWS, GivenAnswer, ShadowSample, append_sample
from viaticum.types import Outcome, TokenCount


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    """Four jobs in three weeks, one of them deeper, and folders in which none is looked for."""
    folder, asked = tmp_path / "work", questions(24)
    for n, (name, days) in enumerate((("one", 0), ("two", 1), ("three", 5), ("four", 15))):
        where = folder / name if name == "three" else folder
        where.mkdir(parents=True, exist_ok=True)
        make_job(where, asked, name=name, seed=n, began=BEGAN + timedelta(days=days), team="search" * (n % 2))
    make_job(folder / ".cache", asked[:5], name="hidden")
    write_table(tmp_path / "table.jsonl", asked)
    return folder


@pytest.fixture
def site(jobs: Path, tmp_path: Path) -> Path:
    build_site([jobs], tmp_path / "site", outcomes=[tmp_path / "table.jsonl"])
    return tmp_path / "site"


def records(site: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((site / "site.json").read_text(encoding="utf-8"))["runs"]
    return found


def test_every_job_has_a_page_and_a_line_the_newest_first(site: Path, jobs: Path) -> None:
    found = records(site)
    assert [each["name"] for each in found] == ["four", "three", "two", "one"]
    index = (site / "index.html").read_text(encoding="utf-8")
    assert "4 runs, 2026-11-21 to 2026-12-06" in index
    for each in found:
        assert f'href="{each["page"]}"' in index
        numbers = read_numbers([each["path"]]).runs[0]
        assert (each["spent"], each["right"]) == (numbers.spent, numbers.accuracy and numbers.accuracy.count)
        page = (site / each["page"]).read_text(encoding="utf-8")
        assert 'href="../index.html"' in page
        assert each["saved"] is not None
    assert ">hidden<" not in index


def test_trends_pool_the_rows_of_a_week(site: Path) -> None:
    by_week: dict[str, list[dict[str, Any]]] = {"2026-W47": [], "2026-W48": [], "2026-W49": []}
    weeks = {"one": "2026-W47", "two": "2026-W47", "three": "2026-W48", "four": "2026-W49"}
    for each in records(site):
        by_week[weeks[each["name"]]].append(each)
    index = (site / "index.html").read_text(encoding="utf-8")
    for week, runs in by_week.items():
        right, graded = sum(each["right"] for each in runs), sum(each["graded"] for each in runs)
        line = index[index.index(f'scope="row">{week}<') :].partition("</tr>")[0]
        assert f"{right / graded:.1%}" in line
        assert f">{len(runs)}<" in line


def test_spending_is_that_of_all_ledgers(site: Path, jobs: Path) -> None:
    paths = [*jobs.glob("*.db"), jobs / "three" / "three.db"]
    assert len(paths) == 4
    posted = 0
    for path in paths:
        with Ledger(path, read_only=True) as ledger:
            posted += ledger.budget("night").posted_nanousd
    lines = list(csv.DictReader((site / "spending.csv").read_text(encoding="utf-8").splitlines()))
    assert sum(int(line["nanousd"]) for line in lines) == posted > 0
    assert {line["team"] for line in lines} == {"(none)", "search"}
    assert {line["week"] for line in lines} == {"2026-W47", "2026-W48", "2026-W49"}
    assert "By team" in (site / "spending.html").read_text(encoding="utf-8")


def test_a_page_is_made_anew_where_its_job_changed_and_goes_with_it(jobs: Path, tmp_path: Path) -> None:
    site = tmp_path / "pages"
    assert build_site([jobs], site).made == 4
    before = {path: path.stat().st_mtime_ns for path in (site / "runs").iterdir()}
    assert build_site([jobs], site).made == 0
    folder = jobs / "one.jsonl.job"
    rows = list(read_rows(folder))
    (folder / ROWS).write_text("".join(map(row_line, rows[:-1])), encoding="utf-8")
    again = build_site([jobs], site)
    assert again.made == 1
    changed = [path for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert [path.name.partition("-")[0] for path in changed] == ["one"]
    assert build_site([jobs], site, force=True).made == 4
    (site / "runs" / "mine.html").write_text("kept")
    for path in [*folder.iterdir(), folder]:
        path.rmdir() if path.is_dir() else path.unlink()
    assert len(build_site([jobs], site).runs) == 3
    assert sorted(path.name.partition("-")[0] for path in (site / "runs").iterdir()) == [
        "four",
        "mine.html",
        "three",
        "two",
    ]


def test_a_page_is_made_anew_where_its_ledger_samples_or_feedback_changed(jobs: Path, tmp_path: Path) -> None:
    site, folder = tmp_path / "pages", jobs / "one.jsonl.job"
    build_site([jobs], site)

    def spent() -> int:
        return next(int(each["spent"]) for each in records(site) if each["name"] == "one")

    before = spent()
    with Ledger(jobs / "one.db") as ledger:  # a call that nobody heard of when the site was made
        posted = ledger.settle("night/lost/0", {"large": TokenCount(80, 90)}).nanousd
    assert build_site([jobs], site).made == 1
    assert spent() == before + posted > before
    page = next((site / "runs").glob("one-*.html"))
    assert "Against always asking one model" not in page.read_text(encoding="utf-8")
    live, shadow = GivenAnswer(str(CHEAP), "1", 10, 0.1), GivenAnswer(str(MIDDLE), "2", 90, 0.2)
    append_sample(folder / SHADOWS, ShadowSample("r", "q-0001", "large", live, shadow, equal=False))
    assert build_site([jobs], site).made == 1
    page_before = page.read_text(encoding="utf-8")
    assert "Against always asking one model" in page_before
    row = Outcome("live", "q-0001", "", "small", "pot", "1", True, 1, 1, 10, 0.1, "stop")
    append_outcome(folder / LIVE_OUTCOMES, row)
    assert build_site([jobs], site).made == 1
    assert "feedback 1" in page.read_text(encoding="utf-8")
    assert "feedback 1" not in page_before
    assert build_site([jobs], site).made == 0


def test_a_page_without_its_ledger_is_not_kept(jobs: Path, tmp_path: Path) -> None:
    site, away = tmp_path / "pages", tmp_path / "away.db"
    (jobs / "two.db").rename(away)
    (jobs / "three" / "three.db").write_bytes(b"no ledger")
    assert build_site([jobs], site).made == 4
    assert build_site([jobs], site).made == 2
    away.rename(jobs / "two.db")
    assert build_site([jobs], site).made == 2
    two = next(each for each in records(site) if each["name"] == "two")
    assert two["spent"] == read_numbers([two["path"]]).runs[0].spent
    assert build_site([jobs], site).made == 1


def test_a_copy_of_a_job_counts_once_the_newest_and_is_told(jobs: Path, tmp_path: Path) -> None:
    site, folder, copy = tmp_path / "pages", jobs / "one.jsonl.job", jobs / "copies" / "one.jsonl.job"
    alone = build_site([jobs], site).runs
    shutil.copytree(folder, copy)
    for newer, older in ((folder, copy), (copy, folder)):
        for path, seconds in ((newer, 2_000_000_000), (older, 1_900_000_000)):
            for file in path.iterdir():
                os.utime(file, (seconds, seconds))
        made = build_site([jobs], site)
        paths = {each["path"] for each in made.runs}
        assert (str(newer) in paths, str(older) in paths) == (True, False)
        assert [each["spent"] for each in made.runs] == [each["spent"] for each in alone]
        (warning,) = made.warnings
        assert f"{older}: it is the same job as {newer}," in warning
        index = (site / "index.html").read_text(encoding="utf-8")
        assert "4 runs, 2026-11-21 to 2026-12-06" in index
        assert "it is the same job as" in index
        assert len(list((site / "runs").iterdir())) == 4


def test_what_cannot_be_read_is_told_and_the_rest_is_there(jobs: Path, tmp_path: Path) -> None:
    (jobs / "one.jsonl.job" / "job.json").write_text("no job\n")
    (jobs / "two.db").unlink()
    made = build_site([jobs], tmp_path / "site")
    assert len(made.runs) == 3
    assert any("one.jsonl.job" in each for each in made.warnings)
    assert any("two.jsonl.job" in each and "is gone" in each for each in made.warnings)
    assert "is gone" in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    (tmp_path / "site" / "site.json").write_text("{")
    assert build_site([jobs], tmp_path / "site").made == 3, "a damaged list makes every page anew"


def test_jobs_without_a_ledger_a_date_or_an_answer_have_a_site(tmp_path: Path) -> None:
    folder = tmp_path / "bare.jsonl.job"
    folder.mkdir()
    Job("in", "out", 0, "night", None, "memory:", "best", began="once").save(folder)
    site = tmp_path / "site"
    assert len(build_site([tmp_path], site).runs) == 1
    assert not (site / "spending.html").exists()
    index = (site / "index.html").read_text(encoding="utf-8")
    assert "No run says when it began." in index
    assert "spending.html" not in index


def test_nobody_s_files_are_written_over(jobs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "index.html").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        build_site([jobs], other)
    assert (other / "index.html").read_text() == "mine"
    (tmp_path / "file").write_text("")
    for folders, out, what in (
        ([jobs], tmp_path / "file", "is a file"),
        ([tmp_path / "nothing"], tmp_path / "new", "no folder"),
        ([other], tmp_path / "new", "no job in"),
    ):
        with pytest.raises(InputError, match=what):
            build_site(folders, out)
        assert not (tmp_path / "new").exists()
    evil = tmp_path / "evil"
    build_site([jobs], evil)
    document = json.loads((evil / "site.json").read_text(encoding="utf-8"))
    document["runs"][0] |= {"path": "/gone", "page": f"../{jobs.name}/one.db"}
    document["runs"][1] |= {"path": "/gone too", "page": "runs/../index.html"}
    del document["runs"][2]["spent"]
    (evil / "site.json").write_text(json.dumps(document))
    assert build_site([jobs], evil).made == 3
    assert (jobs / "one.db").is_file(), "a list that names other files removes none of them"
    assert (evil / "index.html").is_file()


def test_jobs_are_found_by_their_results_and_links_are_not_followed(jobs: Path, tmp_path: Path) -> None:
    names = [f"{name}.jsonl.job" for name in ("four", "one", "three", "two")]
    assert sorted(path.name for path in find_jobs(jobs)) == names
    assert [path.name for path in find_jobs(jobs / "one.jsonl.job")] == ["one.jsonl.job"]
    assert [path.name for path in find_jobs(jobs / "one.jsonl")] == ["one.jsonl.job"]
    os.symlink(jobs, jobs / "round")
    assert len(list(find_jobs(jobs))) == 4


def test_two_jobs_of_one_name_have_a_page_each(tmp_path: Path) -> None:
    asked = questions(6)
    for name in ("a", "b"):
        make_job(tmp_path / name, asked, name="same")
    pages = {each["page"] for each in build_site([tmp_path], tmp_path / "site").runs}
    assert len(pages) == 2


def test_the_command_tells_what_it_made(jobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(jobs)
    run = CliRunner()
    done = run.invoke(app, ["report", "--all", "-o", "pages"])
    assert done.exit_code == 0, done.output
    assert "4 runs, 4 of them new or changed; index in pages/index.html" in done.stdout
    done = run.invoke(app, ["report", "--all", "-o", "pages", "--json"])
    told = json.loads(done.stdout)
    assert (told["made"], len(told["runs"])) == (0, 4), "the site itself is no job"
    assert run.invoke(app, ["report"]).exit_code == 2
    assert run.invoke(app, ["report", "--all", "--format", "md"]).exit_code == 1


def test_a_run_whose_name_is_an_attack_is_text(tmp_path: Path) -> None:
    asked = questions(6)
    folder = make_job(tmp_path, asked, name="x")
    nasty = folder.with_name('"><script>alert(1)<.jsonl.job')
    folder.rename(nasty)
    replace(Job.load(nasty), policy="<b>").save(nasty)
    build_site([tmp_path], tmp_path / "site")
    index = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "<script>alert" not in index
    assert records(tmp_path / "site")[0]["page"].startswith("runs/script-alert-1-")


@pytest.mark.parametrize(("count", "width"), [(1, 258), (5, 258), (30, 258), (52, 690), (200, 690)])
def test_labels_of_weeks_leave_room_for_each_other(count: int, width: float) -> None:
    labels = [f"2026-W{n:02d}" for n in range(count)]
    shown = shown_labels(labels, width)
    assert shown[-1] == labels[-1]
    assert len(shown) * 3 * 8 <= width


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0.095, 0.105),
        (12.31, 12.39),
        (0, 1e-6),
        (0, 7.5e-6),
        (1234.5, 1240),
        (0, 3),
        (-2, 5),
        (0.0, 98_765.4),
        (2, 2),
    ],
)
@pytest.mark.parametrize("count", [4, 6])
def test_ticks_of_money_are_apart_also_as_they_read(low: float, high: float, count: int) -> None:
    ticks, form = money_ticks(low, high, count)
    assert len(ticks) >= 2 or low == high
    assert len(ticks) <= count + 1
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in ticks) or low == high
    digits = int(form.removeprefix("$,.").removesuffix("~r"))
    assert len({f"{tick:.{digits - 1}e}" for tick in ticks}) == len(ticks)
    assert all(float(f"{tick:.{digits - 1}e}") == pytest.approx(tick) for tick in ticks), "no tick is rounded"
