"""The page in a real browser: no fetch, nothing logged, no script of a row runs, and axe-core passes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import chromium
import pytest
from job_runs import BEGAN, SCRIPT, SKILLS, make_job, questions

from viaticum.jobs import ROWS, Job, JobRow, read_rows, row_line
from viaticum.reports import build, read_numbers
from viaticum.reports.chart_rendering import LIGHT, NARROW, WIDE
from viaticum.reports.cost_accuracy_chart import cost_accuracy_chart
from viaticum.reports.page import DARK, GROUNDS, table_html
from viaticum.reports.sections import Table
from viaticum.reports.site import build_site

PATIENCE = 200_000  # milliseconds that the browser may take on a busy machine
NASTY = (
    '"><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}{% raw %} ${1} </style></title>&amp;'
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    program = chromium.find()
    assert program is not None, "no Chromium: python tests/support/chromium.py fetches one"
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(
            executable_path=str(program),
            args=list(chromium.ARGUMENTS),
            env=chromium.environment(),
            timeout=PATIENCE,
        )


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job in which every text that a report shows is an attack."""
    where = tmp_path_factory.mktemp("nasty")
    folder = make_job(where, questions(40, seed=3), name="nasty")
    rows = []
    for n, row in enumerate(read_rows(folder)):
        bad = replace(row, question=f"{n} {NASTY}", route=f"{NASTY}{n % 3}", gold=NASTY)
        if row.state == "answered":
            bad = replace(bad, answer=NASTY if n % 2 else None, correct=bool(n % 2), reason=NASTY)
            bad = replace(bad, pieces=[[NASTY, f"one {NASTY}"], ["small", " and the rest"]])
        rows.append(replace(bad, reason=NASTY))
    rows.append(JobRow(NASTY, NASTY, "failed", NASTY))
    (folder / ROWS).write_text("".join(map(row_line, rows)), encoding="utf-8")
    replace(Job.load(folder), policy=NASTY, input=NASTY, fingerprint={NASTY: NASTY}).save(folder)
    return folder


@pytest.fixture(scope="module")
def pages(report_runs: Path, nasty: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report on one job, on several runs, on an outcome table, and on a job made of attacks."""
    folder, table = tmp_path_factory.mktemp("pages"), report_runs / "table.jsonl"
    jobs = {name: report_runs / f"{name}.jsonl.job" for name in ("results", "thrifty", "running", "poor")}
    asked: dict[str, tuple[list[Path], Path | None]] = {
        "one": ([jobs["results"]], table),
        "several": ([jobs["running"], jobs["thrifty"], table], table),
        "table": ([table], None),
        "alone": ([jobs["poor"]], None),
        "nasty": ([nasty], None),
    }
    title = {"nasty": NASTY}
    made = {
        name: build(runs, folder / f"{name}.html", outcomes=outcomes, title=title.get(name)).path
        for name, (runs, outcomes) in asked.items()
    }
    return made | site_pages(folder, nasty)


def site_pages(folder: Path, nasty: Path) -> dict[str, Path]:
    """A site over nine weeks, with labels that are attacks, and one job whose every text is one."""
    asked, work = questions(12), folder / "work"
    for n, team in enumerate(TEAMS):
        began = BEGAN + timedelta(days=28 * n)
        make_job(work, asked, name=f"run-of-the-support-desk-{n}", seed=n, began=began, team=team)
    site = folder / "site"
    build_site([work, nasty], site)
    return {"index": site / "index.html", "spending": site / "spending.html"}


TEAMS = ("customer-support-and-a-long-name", "", "<script>alert(1)</script>")
PAGES = ("one", "several", "table", "alone", "nasty", "index", "spending")
LOOKS = {
    "light": ("light", 1200),
    "dark": ("dark", 1200),
    "phone": ("light", 360),
    "dark phone": ("dark", 360),
}


@pytest.fixture
def opened(browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    """Opens a page in a look; whatever it asked for, said or threw is in `heard`."""
    contexts = []

    def open_page(name: str, look: str) -> tuple[Any, list[str]]:
        scheme, width = LOOKS[look]
        context = browser.new_context(
            color_scheme=scheme,
            viewport={"width": width, "height": 800},
            offline=True,
            reduced_motion="reduce",
        )
        contexts.append(context)
        page, heard = context.new_page(), list[str]()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: heard.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (heard.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: heard.append(f"request: {request.url}"))
        page.goto(pages[name].as_uri())
        assert heard.pop(0) == f"request: {pages[name].as_uri()}"
        return page, heard

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize(
    ("name", "look"),
    [
        *(("one", look) for look in LOOKS),
        *((name, look) for name in PAGES[1:] for look in ("light", "dark phone")),
    ],
)
def test_a_page_is_quiet_fits_and_is_accessible(opened: Any, name: str, look: str) -> None:
    page, heard = opened(name, look)
    assert page.evaluate("document.documentElement.scrollWidth") <= LOOKS[look][1]
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= LOOKS[look][1]
    page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("async () => (await axe.run()).violations")
    told = [
        f"{each['impact']} {each['id']}: {node['html'][:200]}" for each in found for node in each["nodes"]
    ]
    assert not told
    assert not heard


@pytest.mark.parametrize("look", LOOKS)
def test_no_amount_is_broken_over_lines(opened: Any, look: str) -> None:
    page, _ = opened("one", look)
    amounts = page.locator(".tiles dd:not(.quiet)").filter(has_text="$")
    assert amounts.count()
    for amount in ("$0.000336255", "$1,234,567.8901"):
        lines = amounts.evaluate_all(
            """(found, amount) => found.map(each => {
                each.textContent = amount
                const text = document.createRange()
                text.selectNodeContents(each)
                return text.getClientRects().length
            })""",
            amount,
        )
        assert lines == [1] * amounts.count()
        assert page.evaluate("document.documentElement.scrollWidth") <= LOOKS[look][1]


def test_the_browser_would_have_told(browser: Any, tmp_path: Path) -> None:
    """The net of the test above holds: a page that fetches and is hard to read is caught."""
    (tmp_path / "bad.html").write_text(
        "<title>x</title><img src='http://example.invalid/x.png'>"
        "<p style='color:#eee'>pale</p><script>nothing()</script>"
    )
    page, heard = browser.new_page(), list[str]()
    page.on("pageerror", lambda error: heard.append("error"))
    page.on("request", lambda request: heard.append(request.url))
    page.set_default_timeout(PATIENCE)
    page.goto((tmp_path / "bad.html").as_uri())
    page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("async () => (await axe.run()).violations.map(each => each.id)")
    page.close()
    assert {"image-alt", "color-contrast"} <= set(found)
    assert "error" in heard
    assert "http://example.invalid/x.png" in heard


def test_what_comes_from_rows_is_text_and_nothing_else(opened: Any, pages: dict[str, Path]) -> None:
    page, heard = opened("nasty", "light")
    assert not heard
    assert page.evaluate("document.scripts.length") == 1
    assert page.evaluate("document.images.length") == 0
    assert page.evaluate("document.querySelectorAll('[onerror]').length") == 0
    assert page.title() == NASTY
    assert NASTY.replace("  ", " ") in page.inner_text("#r1-routes")
    source = pages["nasty"].read_text(encoding="utf-8")
    assert "<script>alert" not in source
    assert "<img" not in source
    assert SCRIPT not in pages["one"].read_text(encoding="utf-8")
    assert "&lt;script&gt;alert" in pages["one"].read_text(encoding="utf-8")


def test_the_page_would_not_run_what_slipped_through(
    browser: Any, pages: dict[str, Path], tmp_path: Path
) -> None:
    source = pages["one"].read_text(encoding="utf-8")
    (tmp_path / "hole.html").write_text(
        source.replace(
            "<main",
            "<script>window.ran = 1</script>"
            "<img src='http://example.invalid/x.png' onerror='window.ran = 1'><main",
            1,
        )
    )
    page, heard = browser.new_page(), list[str]()
    page.on("requestfailed", lambda request: heard.append(f"{request.url} {request.failure}"))
    page.set_default_timeout(PATIENCE)
    page.goto((tmp_path / "hole.html").as_uri())
    assert page.evaluate("window.ran") is None
    assert heard == ["http://example.invalid/x.png csp"]
    page.close()


def test_the_theme_goes_with_the_system_until_it_is_chosen(opened: Any) -> None:
    page, heard = opened("one", "dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark, light = _rgb(GROUNDS["ground"][1]), _rgb(GROUNDS["ground"][0])
    button = page.get_by_role("button")
    assert page.evaluate(ground) == dark
    button.click()
    assert page.evaluate(ground) == light
    assert button.inner_text() == "Theme: light"
    button.click()
    assert page.evaluate(ground) == dark
    assert button.inner_text() == "Theme: dark"
    button.click()
    assert button.inner_text() == "Theme: system"
    assert not heard


def test_charts_follow_the_theme_and_the_width(opened: Any) -> None:
    for look, colors in (("light", LIGHT), ("dark", DARK)):
        page, _ = opened("one", look)
        seen = page.evaluate(
            "getComputedStyle(document.querySelector('#plane .wide path[fill=\"var(--run-1)\"]')).fill"
        )
        assert seen == _rgb(colors["run-1"])
        assert page.locator(".chart .wide svg").first.is_visible()
        assert page.locator(".chart .narrow svg").first.is_hidden()
    phone, _ = opened("one", "phone")
    assert phone.locator(".chart .narrow svg").first.is_visible()
    assert phone.locator(".chart .wide svg").first.is_hidden()
    small = (
        "[...document.querySelectorAll('.narrow svg text')]"
        ".filter(each => each.getBoundingClientRect().height < 9).length"
    )
    assert phone.evaluate(small) == 0


def test_every_chart_is_told_in_words_and_ids_are_single(opened: Any) -> None:
    page, _ = opened("several", "light")
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(each => each.id)")
    assert len(ids) == len(set(ids))
    charts = page.evaluate(
        "[...document.querySelectorAll('figure svg')].map(each => [each.querySelector('title').textContent,"
        " each.querySelector('desc').textContent, each.getAttribute('aria-labelledby')])"
    )
    assert len(charts) >= 8
    for title, told, labels in charts:
        assert title
        assert len(told) > 20
        assert set(labels.split()) <= set(ids)


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("look", ["light", "phone"])
def test_no_label_of_a_chart_is_cut_or_covers_another(opened: Any, name: str, look: str) -> None:
    """Of every chart: ticks, legends and names stand inside the drawing, and apart from each other."""
    page, _ = opened(name, look)
    charts = page.evaluate(
        "() => { const box = each => { const b = each.getBoundingClientRect();"
        " return [b.left, b.top, b.right, b.bottom] };"
        " return [...document.querySelectorAll('figure svg')].filter(each => box(each)[2] > box(each)[0])"
        ".map(svg => [svg.querySelector('title').textContent, box(svg),"
        " [...svg.querySelectorAll('text')].map(each => [each.textContent, ...box(each)])]) }"
    )
    assert charts or name == "alone"
    for title, (left, top, right, bottom), texts in charts:
        shown = [each for each in texts if each[0].strip()]
        for text, *edges in shown:
            across = edges[0] >= left - 1 and edges[2] <= right + 1
            down = edges[1] >= top - 1 and edges[3] <= bottom + 1
            assert (across, down) == (True, True), (title, text)
        for n, (one, *a) in enumerate(shown):
            for two, *b in shown[n + 1 :]:
                apart = a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] + 3 or b[3] <= a[1] + 3
                assert apart, (title, one, two)


def test_every_pair_has_its_name_on_a_phone_too(opened: Any) -> None:
    page, _ = opened("one", "phone")
    names = page.evaluate(
        "['wide', 'narrow'].map(look => [...document.querySelectorAll("
        "`#plane .${look} .mark-text.role-mark text`)].map(each => each.textContent).sort())"
    )
    assert names[0] == names[1]
    assert len(names[1]) >= len(SKILLS)


def test_thinking_is_marked_and_a_run_of_a_site_leads_back(opened: Any) -> None:
    page, heard = opened("one", "light")
    assert page.locator("#r1-writers .text .think").count() > 0
    assert page.inner_text("#r1-writers .legend .think") == "thinking"
    page, heard = opened("index", "light")
    page.locator("#r1-runs tbody a").first.click()
    page.get_by_role("link", name="all runs").click()
    assert page.title() == "All runs"
    page.get_by_role("link", name="spending").click()
    assert page.title() == "Spending"
    assert TEAMS[2] in page.inner_text("main")
    assert not [line for line in heard if not line.startswith("request: file:")]


def test_names_in_the_plane_do_not_meet(opened: Any) -> None:
    page, _ = opened("several", "light")
    boxes = page.evaluate(
        "[...document.querySelectorAll('#plane .wide .mark-text.role-mark text')]"
        ".map(each => { const b = each.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom] })"
    )
    assert len(boxes) >= 6
    for n, one in enumerate(boxes):
        for two in boxes[n + 1 :]:
            assert one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] + 2 or two[3] <= one[1] + 2


def test_on_paper_all_is_unfolded_and_dark_on_white(opened: Any) -> None:
    page, heard = opened("one", "dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == _rgb(LIGHT["ink"])
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.querySelectorAll('details[open]').length") == 0
    assert page.pdf()[:5] == b"%PDF-"
    assert not heard


def test_a_page_names_its_sources_and_why_a_part_is_empty(opened: Any) -> None:
    page, _ = opened("alone", "light")
    assert page.inner_text("#r1-budget .source") == "from: ledger"
    assert "no outcome table was given" in page.inner_text("#plane").lower()
    page, _ = opened("table", "light")
    assert "an outcome table has no ledger" in page.inner_text("#r1-budget").lower()
    titles = [
        "Cost and accuracy",
        "Routes",
        "Calibration",
        "Predicted and real tokens",
        "Who wrote",
        "Budget",
        "Ledger against provider",
        "Failures",
        "Where this is from",
    ]
    assert (
        page.evaluate("[...document.querySelectorAll('section h2')].map(each => each.textContent)") == titles
    )
    assert all(
        page.evaluate("[...document.querySelectorAll('section')].map(each => each.innerText.length > 40)")
    )


def test_colours_of_text_have_contrast_in_both_themes() -> None:
    """Also what axe cannot see: text in charts, on the cards' ground (WCAG 2.2, 1.4.3 and 1.4.11)."""
    for theme, colors in ((0, LIGHT), (1, DARK)):
        grounds = [colors["paper"], GROUNDS["ground"][theme]]
        for name, least in (
            ("ink", 7.0),
            ("muted", 4.5),
            ("run-1", 3.0),
            ("run-2", 3.0),
            ("run-3", 3.0),
            ("run-4", 3.0),
            ("single", 3.0),
            ("hull", 3.0),
            ("oracle", 3.0),
            ("mix", 3.0),
            ("bad", 3.0),
        ):
            assert min(_contrast(colors[name], ground) for ground in grounds) >= least, (name, theme)


def test_a_table_keeps_its_text_and_its_headings() -> None:
    text = table_html(Table(NASTY, ((NASTY, False), ("{{x}}", True)), ((NASTY, "**1**"), ("|", NASTY))))
    assert "<script" not in text
    assert "<img" not in text
    assert "{{x}}" in text
    assert "**1**" in text
    assert text.count('scope="row"') == 2
    assert text.count('role="columnheader"') == 2
    assert text.count('data-label="{{x}}"') == 2


def test_the_picture_is_a_png_in_the_light_colours(report_runs: Path, tmp_path: Path) -> None:
    made = build(
        report_runs / "results.jsonl.job", tmp_path / "plane.png", outcomes=report_runs / "table.jsonl"
    )
    content = made.path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(content[16:20], "big") == 2 * WIDE
    chart = cost_accuracy_chart(made.numbers.runs)
    assert chart is not None
    assert "var(--" in chart.svg(NARROW)


def test_a_run_of_one_row_and_of_free_models_is_drawn(tmp_path: Path) -> None:
    folder = tmp_path / "one.jsonl.job"
    folder.mkdir()
    (folder / ROWS).write_text(
        row_line(JobRow("1", "?", "answered", answer="4", gold="4", correct=True, accuracy=0.5))
    )
    Job("in", "out", 1, "night", None, "gone.db", "best", ending="completed").save(folder)
    text = build(folder, tmp_path / "r.html").path.read_text(encoding="utf-8")
    assert "100.0% of 1 question right" in text
    assert len(re.findall("<svg", text)) >= 2
    assert read_numbers([folder]).runs[0].cost == 0


def _rgb(color: str) -> str:
    return f"rgb({', '.join(str(int(color[n : n + 2], 16)) for n in (1, 3, 5))})"


def _contrast(one: str, two: str) -> float:
    def light(color: str) -> float:
        parts = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    brighter, darker = sorted((light(one), light(two)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)
