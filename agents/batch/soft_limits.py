"""Soft limits of a job: what this process posts is told at once, what workers post with the progress."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from viaticum.agents.batch.progress import Progress
from viaticum.agents.batch.settings import BatchSettings
from viaticum.agents.workflow.soft_limits import SoftLimitWatch
from viaticum.budgets import Ledger


def watch_soft_limits(
    settings: BatchSettings, ledger: Ledger, progress: Progress, stack: ExitStack
) -> SoftLimitWatch | None:
    """Watch the job's budget until the stack is closed; None where the job has no soft limits.

    Args:
        ledger: through which this process posts.
        progress: of the job; it names the budget.
    """
    if settings.soft_limits is None:
        return None
    watch = SoftLimitWatch(ledger, settings.soft_limits)
    stack.callback(watch.close)
    if settings.engine != "local":
        progress.each = partial(watch.look, progress.budget)
    return watch
