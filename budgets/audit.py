"""The audit behind `Ledger.check`: each rule is a query that returns the rows which break it.

It reads, and mends nothing. Leaves out rows altered together so that all still adds up.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlite_utils import Database

from viaticum.budgets.records import amounts, prices_from, usage_from
from viaticum.errors import ViaticumError


def audit(db: Database) -> list[str]:
    """What is wrong, one line each. Call it inside a read transaction, so that it sees one moment."""
    damage = [row["quick_check"] for row in db.query("PRAGMA quick_check")]
    if damage != ["ok"]:
        return [f"the file is damaged: {' '.join(line.split())}" for line in damage]
    return [*_broken_rules(db), *_wrong_amounts(db)]


def _broken_rules(db: Database) -> Iterator[str]:
    for rule, sql in _RULES.items():
        for row in db.query(sql):
            details = ", ".join(f"{name} {value!r}" for name, value in row.items())
            yield f"{rule}: {details}"


def _wrong_amounts(db: Database) -> Iterator[str]:
    """Amounts that do not follow from the tokens and the prices kept with the hold."""
    for row in db.query(_PRICED_ENTRIES):
        try:
            expected = amounts(usage_from(row["usage"]), prices_from(row["prices"]))
        except (ViaticumError, ValueError, TypeError, AttributeError) as error:
            yield f"entry {row['id']} cannot be priced again: {error}"
            continue
        if expected != (row["nanousd"], row["tokens"]):
            yield (
                f"entry {row['id']} says {row['nanousd']} nano-dollars and {row['tokens']} tokens, "
                f"its usage makes {expected[0]} and {expected[1]}"
            )


_PRICED_ENTRIES = """
SELECT e.id, e.nanousd, e.tokens, e.usage, h.prices
FROM entries e JOIN holds h ON h.key = e.key ORDER BY e.id
"""

# What each hold set aside and what became of it, from entries alone.
_CALLS = """
WITH calls AS (
  SELECT r.budget, r.key, r.nanousd AS held_nanousd, r.tokens AS held_tokens, e.kind AS end,
    coalesce(e.nanousd, 0) AS nanousd, coalesce(e.tokens, 0) AS tokens, e.overrun
  FROM entries r LEFT JOIN entries e ON e.key = r.key AND e.kind IN ('post', 'void')
  WHERE r.kind = 'reserve'
),
sums AS (
  SELECT b.name AS budget,
    coalesce(sum(c.nanousd) FILTER (WHERE c.end = 'post'), 0) AS posted_nanousd,
    coalesce(sum(c.tokens) FILTER (WHERE c.end = 'post'), 0) AS posted_tokens,
    coalesce(sum(c.held_nanousd) FILTER (WHERE c.end IS NULL), 0) AS held_nanousd,
    coalesce(sum(c.held_tokens) FILTER (WHERE c.end IS NULL), 0) AS held_tokens,
    coalesce(sum(max(0, c.nanousd - c.held_nanousd)) FILTER (WHERE c.end = 'post'), 0) AS over_nanousd,
    coalesce(sum(max(0, c.tokens - c.held_tokens)) FILTER (WHERE c.end = 'post'), 0) AS over_tokens
  FROM budgets b LEFT JOIN calls c ON c.budget = b.name GROUP BY b.name
)
"""

_RULES = {
    "totals differ from the entries": _CALLS
    + """
SELECT b.name AS budget, b.posted_nanousd, s.posted_nanousd AS entries_posted_nanousd,
  b.held_nanousd, s.held_nanousd AS entries_held_nanousd,
  b.posted_tokens, s.posted_tokens AS entries_posted_tokens,
  b.held_tokens, s.held_tokens AS entries_held_tokens
FROM budgets b JOIN sums s ON s.budget = b.name
WHERE (b.posted_nanousd, b.held_nanousd, b.posted_tokens, b.held_tokens)
  IS NOT (s.posted_nanousd, s.held_nanousd, s.posted_tokens, s.held_tokens)
""",
    # An overrun is the only way past a limit, so what is past it is at most the overruns' sum.
    "a limit is exceeded": _CALLS
    + """
SELECT b.name AS budget, b.limit_nanousd, s.posted_nanousd + s.held_nanousd AS used_nanousd,
  b.limit_tokens, s.posted_tokens + s.held_tokens AS used_tokens
FROM budgets b JOIN sums s ON s.budget = b.name
WHERE s.posted_nanousd + s.held_nanousd > b.limit_nanousd + s.over_nanousd
   OR s.posted_tokens + s.held_tokens > b.limit_tokens + s.over_tokens
""",
    "a limit differs from its last entry": """
SELECT b.name AS budget, b.limit_nanousd, e.nanousd AS entry_nanousd, b.limit_tokens, e.tokens AS entry_tokens
FROM budgets b LEFT JOIN entries e
  ON e.id = (SELECT max(id) FROM entries WHERE budget = b.name AND kind = 'limit')
WHERE (coalesce(b.limit_nanousd, 0), coalesce(b.limit_tokens, 0)) IS NOT (e.nanousd, e.tokens)
""",
    "a hold was not reserved once": """
SELECT h.key, count(e.id) AS reserved FROM holds h LEFT JOIN entries e ON e.key = h.key AND e.kind = 'reserve'
GROUP BY h.key HAVING count(e.id) <> 1
""",
    "a hold ended more than once": """
SELECT key, count(*) AS ends FROM entries WHERE kind IN ('post', 'void') GROUP BY key HAVING count(*) > 1
""",
    "a hold differs from its entries": _CALLS
    + """
SELECT h.key, h.state, c.end FROM holds h JOIN calls c ON c.key = h.key
WHERE h.state <> CASE WHEN c.end IS NULL THEN 'reserved' WHEN c.end = 'post' THEN 'posted' ELSE 'void' END
   OR (h.budget, h.held_nanousd, h.held_tokens) IS NOT (c.budget, c.held_nanousd, c.held_tokens)
   OR (c.end = 'post' AND c.overrun <> max(0, c.nanousd - c.held_nanousd))
   OR (c.end = 'void' AND (c.nanousd, c.tokens) IS NOT (c.held_nanousd, c.held_tokens))
""",
    "an entry names no such hold or another budget": """
SELECT e.id, e.key, e.budget FROM entries e LEFT JOIN holds h ON h.key = e.key
WHERE e.key IS NOT NULL AND e.budget IS NOT h.budget
""",
}
