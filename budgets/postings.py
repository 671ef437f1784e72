"""The writes of each step of a call: the hold, the totals of its scopes, their windows, and the entry.

Each function performs one step inside the caller's write transaction. Leaves out whether the step is allowed
(`rules`), transactions (`ledger`) and storage (`store`).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from viaticum.budgets import rules
from viaticum.budgets.chain import Chain, result_hash
from viaticum.budgets.records import Entry, EntryKind, Hold, amounts, costs
from viaticum.budgets.store import Rows, Scope
from viaticum.types import TokenCount


def lock_hold(rows: Rows, key: str) -> tuple[Hold, list[Scope]]:
    """Lock a hold and its lineage. Reads the hold again after locking: it may have ended meanwhile."""
    hold = rules.get_hold(rows, key)
    lineage = rows.lineage(hold.budget)
    return hold if rows.is_exclusive else rules.get_hold(rows, key), lineage


def insert_hold(rows: Rows, chain: Chain, lineage: list[Scope], wanted: Hold) -> Hold:
    hold = wanted.with_times(chain.at, lease_end(chain.moment, wanted.lease))
    held = (hold.held_nanousd, hold.held_tokens)
    rows.insert_hold(hold)
    rows.add_to_totals([scope.name for scope in lineage], held, (0, 0))
    note: dict[str, Any] = {"lease": hold.lease, "until": hold.until}
    note |= {"parameters": hold.parameters} if hold.parameters else {}
    note |= {"tags": dict(hold.tags)} if hold.tags else {}
    chain.append(hold.budget, "reserve", hold.key, held, usage=hold.usage, prices=hold.prices, note=note)
    return hold


def dispatch(rows: Rows, chain: Chain, hold: Hold) -> Hold:
    until = lease_end(chain.moment, hold.lease) if hold.lease else hold.until
    rows.update_hold(hold.key, "dispatched", until)
    chain.append(hold.budget, "dispatch", hold.key, note={"until": until})
    return hold.with_state("dispatched", until)


def post(
    rows: Rows,
    chain: Chain,
    lineage: list[Scope],
    hold: Hold,
    used: Mapping[str, TokenCount],
    source: str,
    result: str | None,
) -> Entry:
    by_model = costs(used, hold.prices)
    posted = amounts(used, by_model)
    note: dict[str, Any] = {"costs": by_model, "usage": source}
    note |= {"tags": dict(hold.tags)} if hold.tags else {}
    note |= {"was": "unknown"} if hold.state == "unknown" else {}
    if posted[1] > hold.held_tokens:
        note["overrun_tokens"] = posted[1] - hold.held_tokens
    if result is not None and hold.result is None:
        rows.set_result(hold.key, result)
        note["result"] = result_hash(result)
    elif result is not None:
        rules.refuse_other_result(hold, result)
    rows.update_hold(hold.key, "posted", hold.until)
    rows.add_to_totals([scope.name for scope in lineage], (-hold.held_nanousd, -hold.held_tokens), posted)
    for scope in lineage:
        if scope.window is not None:
            rows.add_to_bucket(scope.name, scope.window.bucket(chain.moment), posted)
    overrun = max(0, posted[0] - hold.held_nanousd)
    return chain.append(
        hold.budget, "post", hold.key, posted, overrun=overrun, usage=used, prices=hold.prices, note=note
    )


def release(rows: Rows, chain: Chain, lineage: list[Scope], hold: Hold, kind: EntryKind) -> Entry:
    held = (hold.held_nanousd, hold.held_tokens)
    rows.update_hold(hold.key, "void" if kind == "void" else "expired", hold.until)
    rows.add_to_totals([scope.name for scope in lineage], (-held[0], -held[1]), (0, 0))
    note = {"was": hold.state} if hold.state != "reserved" else {}
    return chain.append(hold.budget, kind, hold.key, held, usage=hold.usage, prices=hold.prices, note=note)


def expire_lease(rows: Rows, chain: Chain, lineage: list[Scope], hold: Hold) -> Entry:
    """End the lease of a hold: a call that was sent or has a result may cost money, any other does not."""
    if hold.state == "reserved" and hold.result is None:
        return release(rows, chain, lineage, hold, "expire")
    rows.update_hold(hold.key, "unknown", hold.until)
    held = (hold.held_nanousd, hold.held_tokens)
    return chain.append(hold.budget, "unknown", hold.key, held, usage=hold.usage, prices=hold.prices)


def expire_undispatched(rows: Rows, chain: Chain, root: str) -> bool:
    """Release holds of this tree that a crashed caller reserved and never sent; returns whether any were."""
    expired = [hold for hold in rows.expired_holds(root, chain.at, ("reserved",)) if hold.result is None]
    for hold in expired:
        release(rows, chain, rows.lineage(hold.budget), hold, "expire")
    return bool(expired)


def store_result(rows: Rows, chain: Chain, hold: Hold, result: str | None) -> None:
    if result is None:
        return
    rules.refuse_other_result(hold, result)
    if hold.result is None:
        rows.set_result(hold.key, result)
        chain.append(hold.budget, "result", hold.key, note={"result": result_hash(result)})


def rebuild_buckets(rows: Rows, scope: Scope, moment: datetime) -> None:
    """Sum the current window from the entries. Those of a clock that ran ahead count as of now."""
    rows.clear_buckets(scope.name)
    if scope.window is None:
        return
    since = format_time(datetime.fromtimestamp(scope.window.since(moment), UTC))
    sums: dict[int, tuple[int, int]] = {}
    for entry in rows.posts_below(scope.name, since):
        bucket = scope.window.bucket(min(datetime.fromisoformat(entry.at), moment))
        nanousd, tokens = sums.get(bucket, (0, 0))
        sums[bucket] = (nanousd + entry.nanousd, tokens + entry.tokens)
    for bucket, posted in sums.items():
        rows.add_to_bucket(scope.name, bucket, posted)


def restart_clock(rows: Rows, chain: Chain, root: Scope, reason: str) -> Entry:
    """Go on from an earlier time: what was posted later counts as posted now, leases end as if begun now."""
    for scope in rows.scopes(root.name):
        if scope.window is not None:
            before = rows.buckets(scope.name)
            after = folded(before, scope.window.bucket(chain.moment))
            if after != before:
                rows.clear_buckets(scope.name)
                for bucket, posted in after.items():
                    rows.add_to_bucket(scope.name, bucket, posted)
    for hold in rows.expired_holds(root.name, "9999", ("reserved", "dispatched")):
        until = lease_end(chain.moment, hold.lease)
        if hold.until > until:
            rows.update_hold(hold.key, hold.state, until)
    note = {"was": root.last_at, **({"reason": reason} if reason else {})}
    return chain.append(root.name, "clock", note=note)


def folded(buckets: Mapping[int, tuple[int, int]], last: int) -> dict[int, tuple[int, int]]:
    """The buckets, with those after `last` added to it."""
    sums: dict[int, tuple[int, int]] = {}
    for bucket, posted in buckets.items():
        nanousd, tokens = sums.get(min(bucket, last), (0, 0))
        sums[min(bucket, last)] = (nanousd + posted[0], tokens + posted[1])
    return sums


@lru_cache(maxsize=64)  # calls reserved together share the time and usually the lease
def lease_end(moment: datetime, lease: int) -> str:
    return format_time(moment + timedelta(seconds=lease))


def format_time(moment: datetime) -> str:
    """UTC in ISO 8601 with a fixed width, so that text sorts by time."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")
