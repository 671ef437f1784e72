"""Changes to the scopes of a ledger: create them, change limits and windows, pause, resume and close them.

Each change is an entry. Leaves out holds: see `ledger`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from viaticum.budgets import postings, rules
from viaticum.budgets.chain import Chain
from viaticum.budgets.ledger_reader import LedgerReader
from viaticum.budgets.records import Budget, Entry, EntryKind, checked_name, checked_window
from viaticum.budgets.store import Rows, Scope
from viaticum.budgets.windows import Window
from viaticum.checks import checked_text
from viaticum.errors import BudgetClosed
from viaticum.residency import Only, checked_only

_UNCHANGED = Window("hour")  # default of arguments that were not given; compared by identity
_STATE_AFTER: dict[str, Any] = {"pause": "paused", "resume": "open", "close": "closed"}


class ScopeLedger(LedgerReader):
    """The part of `Ledger` that changes scopes."""

    def create(
        self,
        name: str,
        *,
        limit_nanousd: int | None = None,
        limit_tokens: int | None = None,
        parent: str | None = None,
        window: Window | None = None,
        only: Only | None = None,
    ) -> Budget:
        """Create a scope, or return the existing one of that name with the same terms.

        Args:
            name: its name.
            limit_nanousd: most that may be spent and held, in nano-dollars.
            limit_tokens: the same in tokens. A scope without a parent needs at least one limit.
            parent: scope above it, whose limits apply as well.
            window: time window in which the limits hold; None for all time.
            only: labels of models, one of which a model has to have to be paid from here or below
                (`viaticum.residency`); None for all models. It never changes.

        Raises:
            InputError: a limit is missing or not above zero, or a label is none.
            BudgetError: the name exists with other terms.
            BudgetClosed: the parent is closed.
        """
        limits = rules.checked_limits(limit_nanousd, limit_tokens, needed=parent is None)
        checked_window(window)
        labels = checked_only(only)
        wanted = Budget(checked_name("budget name", name), *limits, parent=parent, window=window, only=labels)

        def action(rows: Rows) -> Budget:
            found = rows.lineage(name)
            if found:
                return rules.require_same_terms(rules.budget_at(rows, found[-1], self._clock()), wanted)
            ancestors = rules.get_lineage(rows, parent) if parent is not None else []
            _refuse_closed_parent(ancestors)
            root = ancestors[0].name if ancestors else name
            scope = Scope(name, parent, root, len(ancestors), *limits, window, only=labels)
            rows.insert_scope(scope)
            chain = Chain(rows, ancestors[0] if ancestors else scope, self._now())
            chain.append(name, "limit", None, _limits_as_amounts(limits), note=_terms_note(scope))
            return wanted

        return self._store.write(action)

    def set_limit(
        self,
        name: str,
        *,
        limit_nanousd: int | None = None,
        limit_tokens: int | None = None,
        window: Window | None = _UNCHANGED,
    ) -> Budget:
        """Change or add a limit or the window; arguments left out stay as they are.

        A new window is filled from the entries.

        Raises:
            BudgetError: more than the new limit is already spent or held.
        """
        limits = rules.checked_limits(limit_nanousd, limit_tokens, needed=window is _UNCHANGED)
        checked_window(window)

        def action(rows: Rows) -> Budget:
            lineage = rules.get_lineage(rows, name)
            chain = self._chain(rows, lineage)
            old = lineage[-1]
            new = replace(
                old,
                limit_nanousd=old.limit_nanousd if limits[0] is None else limits[0],
                limit_tokens=old.limit_tokens if limits[1] is None else limits[1],
                window=old.window if window is _UNCHANGED else window,
            )
            moment = chain.moment
            before = rules.budget_at(rows, old, moment)
            if new == old:
                return before
            if new.window != old.window:
                postings.rebuild_buckets(rows, new, moment)
            after = rules.budget_at(rows, new, moment)
            rules.refuse_limit_below_use(before, after)
            rows.update_scope(new)
            new_limits = _limits_as_amounts((new.limit_nanousd, new.limit_tokens))
            chain.append(name, "limit", None, new_limits, note=_terms_note(new))
            return after

        return self._store.write(action)

    def pause(self, name: str, reason: str = "") -> Budget:
        """Refuse new calls here and below until `resume`; existing holds can still be settled."""
        return self._set_state(name, "pause", reason)

    def resume(self, name: str, reason: str = "") -> Budget:
        """Accept calls again. Raises `BudgetClosed` if the scope is closed, which is final."""
        return self._set_state(name, "resume", reason)

    def close_budget(self, name: str, reason: str = "") -> Budget:
        """Refuse new calls here and below for good; existing holds can still be settled."""
        return self._set_state(name, "close", reason)

    def restart_clock(self, name: str, reason: str = "") -> Entry | None:
        """Let the tree of a budget go on at this machine's time, after a clock that ran ahead.

        The entries keep their times. What was posted at a later time than now counts as posted now in every
        window, and no lease ends later than if it had begun now.

        Returns:
            The entry that tells of it; None where no entry is later than now.
        """
        checked_text("reason", reason, blank=True)

        def action(rows: Rows) -> Entry | None:
            root, now = rules.get_lineage(rows, name)[0], self._now()
            if root.last_at <= now:
                return None
            return postings.restart_clock(rows, Chain(rows, replace(root, last_at=""), now), root, reason)

        return self._store.write(action)

    def _set_state(self, name: str, kind: EntryKind, reason: str) -> Budget:
        state = _STATE_AFTER[kind]
        checked_text("reason", reason, blank=True)

        def action(rows: Rows) -> Budget:
            lineage = rules.get_lineage(rows, name)
            chain = self._chain(rows, lineage)
            scope = lineage[-1]
            if scope.state != state:
                if scope.state == "closed":
                    raise BudgetClosed(f"budget {name!r} is closed for good; take another budget")
                scope = replace(scope, state=state)
                rows.update_scope(scope)
                chain.append(name, kind, note={"reason": reason} if reason else {})
            return rules.budget_at(rows, scope, chain.moment)

        return self._store.write(action)


def _refuse_closed_parent(ancestors: list[Scope]) -> None:
    for scope in ancestors:
        if scope.state == "closed":
            raise BudgetClosed(f"budget {scope.name!r} is closed; nothing can be made below it")


def _terms_note(scope: Scope) -> dict[str, str]:
    """The note of an entry of kind `limit`."""
    return {
        **({"parent": scope.parent} if scope.parent is not None else {}),
        **({"window": str(scope.window)} if scope.window is not None else {}),
        **({"only": ",".join(scope.only)} if scope.only else {}),
    }


def _limits_as_amounts(limits: tuple[int | None, int | None]) -> tuple[int, int]:
    return limits[0] or 0, limits[1] or 0
