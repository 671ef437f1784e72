"""Results in a terminal and in a notebook: one line, a table, and HTML that runs nothing."""

from __future__ import annotations

from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path

import pytest
from scripted_client import client

from viaticum import Answer, Pair, Route, RoutingTable, Usage
from viaticum.display import LONG, text_table
from viaticum.money import MAX_NANOUSD, as_usd
from viaticum.types import Outcome, Row, TokenCount

EVIL = "<script>alert(1)</script><img src=x onerror='a()'>\"&</pre></td>"
ROW = Row(Pair("m", "cot"), 0.876, 120, 300, 1_234_567, 2_000_000)


class Tags(HTMLParser):
    """Collects the tags of a page, and which were left open."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.seen.add(tag)
        assert attributes == []
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def tags(page: str) -> set[str]:
    parser = Tags()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser.seen


def answer(value: str | None, text: str = "text", why: str = "best") -> Answer:
    usage = Usage({"m": TokenCount(10, 5)}, 1.5)
    return Answer(value, text, (Route(ROW.pair, ROW, why),), usage, 1_230, 4_000, "stop", 1.5, "no program")


def test_an_answer_is_one_line() -> None:
    assert repr(answer("42")) == "Answer('42' by m+cot for $0.00000123, 1.5 s)"
    assert repr(answer(None)) == "Answer(no answer: no program by m+cot for $0.00000123, 1.5 s)"
    assert len(repr(answer("long" * 10_000)).splitlines()[0]) < 200
    assert repr(answer("two\nlines")).count("\n") == 0
    assert "nobody" in repr(Answer(None, "", (), Usage(), 0, 0, "", 0.0, "empty"))


def test_a_route_and_a_table() -> None:
    table = RoutingTable((ROW, Row(Pair("dear", "think"), 0.9, 1000, 3000, 5 * 10**9, 9 * 10**9)))
    assert repr(Route(ROW.pair, ROW, "cheapest")) == "Route(m+cot, $0.00123 expected: cheapest)"
    assert repr(table) == "RoutingTable(2 pairs: m+cot 88% $0.00123, dear+think 90% $5.00)"
    assert str(table).splitlines() == [
        "pair        right  tokens p50 / p90     cost p50 / p90",
        "m+cot         88%         120 / 300  $0.00123 / $0.002",
        "dear+think    90%       1000 / 3000      $5.00 / $9.00",
    ]
    assert str(RoutingTable(())) == "pair  right  tokens p50 / p90  cost p50 / p90"
    assert tags(table._repr_html_()) == {"table", "thead", "tbody", "tr", "th", "td"}


@pytest.mark.parametrize("text", [EVIL, "", "x" * (LONG * 2), "<b>", "\x00\ud800"])
def test_what_a_model_wrote_is_shown_and_never_run(text: str) -> None:
    pair = Pair(text or "m", "cot")
    row = Row(pair, 0.5, 1, 2, 3, 4)
    shown = Answer(
        text or None,
        text,
        (Route(pair, row, text),),
        Usage({text: TokenCount(1, 2)}),
        1,
        2,
        text,
        0.1,
        text,
        text,
    )
    allowed = {"table", "thead", "tbody", "tr", "th", "td", "details", "summary", "pre"}
    for page in (shown._repr_html_(), shown.routes[0]._repr_html_(), RoutingTable((row,))._repr_html_()):
        assert tags(page) <= allowed
        assert len(page.encode()) < 14 * LONG
    repr(shown)


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert text_table(("a", "b"), [("one\ntwo", "1"), ("x", "1000")]) == (
        "a           b\none two     1\nx        1000"
    )


def test_dollars_are_exact() -> None:
    assert answer("42").cost_usd == Decimal("0.00000123")
    assert (answer("42").held_usd, ROW.cost_usd) == (Decimal("0.000004"), Decimal("0.001234567"))
    assert as_usd(MAX_NANOUSD) == Decimal("9223372036.854775807")
    assert as_usd(-1) == Decimal("-0.000000001")
    unknown = Outcome("d", "1", "q", "m", "cot", "4", True)
    assert unknown.cost_usd is None


def test_a_client_says_what_it_has_left_and_nothing_secret(tmp_path: Path) -> None:
    viaticum = client(tmp_path, budget_name="<b>mine")
    assert repr(viaticum) == (
        "Viaticum(budget <b>mine: $0 spent, $0 held, $0.1 left; router FakeRouter; policy within:0.01)"
    )
    viaticum.solve("twice 4?")
    assert viaticum.budget().posted_usd + (viaticum.budget().left_usd or 0) == Decimal("0.1")
    assert tags(viaticum._repr_html_()) == {"table", "tbody", "tr", "th", "td"}
    viaticum.close()
    assert "closed" in repr(viaticum)
    assert "closed" in viaticum._repr_html_()


def test_a_ledger_that_fails_breaks_no_repr(tmp_path: Path) -> None:
    viaticum = client(tmp_path)
    viaticum.ledger.close()
    assert "is closed" in repr(viaticum)
    viaticum.close()
