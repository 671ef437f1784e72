"""Shadow sampling of a job: after its results are written, a share of its rows is asked again of one model.

Rows that were answered from the cache are left out: what they saved, routing did not. A job that goes on asks
those of which no shadow answer is recorded. Leaves out the calls (`viaticum.agents.workflow.shadow`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from viaticum.agents.batch.input import BatchRow
from viaticum.agents.batch.planning import PACED
from viaticum.agents.batch.settings import BatchSettings
from viaticum.agents.workflow.resources import WorkflowResources
from viaticum.agents.workflow.shadow import ShadowSampler
from viaticum.agents.workflow.shadow_questions import Sampled
from viaticum.generation import NO_SETTINGS
from viaticum.jobs import Job, JobRow
from viaticum.routers.query import DEFAULT_POLICY, parse_policy
from viaticum.shadow_samples import SHADOWS, GivenAnswer, read_samples


def open_sampler(
    settings: BatchSettings, resources: WorkflowResources, folder: Path, stack: ExitStack
) -> ShadowSampler | None:
    """The sampler of a job, which the stack closes; None where the job has none. folder: of the job."""
    if settings.shadow is None:
        return None
    sampler = ShadowSampler(resources, settings.shadow, folder / SHADOWS, threads=settings.concurrency)
    stack.callback(sampler.close)
    return sampler


def sampled_rows(
    job: Job, rows: Iterable[BatchRow], ended: Iterable[JobRow], sampler: ShadowSampler
) -> Iterator[Sampled]:
    """The rows that are asked again, and are not yet.

    Args:
        job: its budget is part of the ids; its policy chooses the strategy of a model, and the usual one
            where the job is paced.
        rows: of the input, in order.
        ended: what became of them, in order.
    """
    done = _done(sampler.path)
    residency = sampler.resources.ledger.residency(job.budget)
    results = iter(ended)
    result = next(results, None)
    chosen = parse_policy(DEFAULT_POLICY if job.policy == PACED else job.policy)
    for row in rows:
        while result is not None and result.number < row.number:
            result = next(results, None)
        if result is None or result.number != row.number or row.query is None:
            continue
        name = f"{job.budget}/{row.id}"
        if row.names_model or name in done or not _is_routed(result):
            continue
        if sampler.sampling.is_sampled(name):
            settings = NO_SETTINGS if row.overrides is None else row.overrides.settings
            live = GivenAnswer(result.pair, result.answer, result.cost_nanousd, result.seconds)
            routes = tuple(call.pair for call in result.calls)
            yield Sampled(name, row.query, live, routes, chosen, settings, residency, row.accepted)


def ask_again(sampled: Iterable[Sampled], sampler: ShadowSampler, is_over: Callable[[], bool]) -> None:
    """Ask them, until all are answered or `is_over`; then what is in progress is ended and settled."""
    for each in sampled:
        while not sampler.wait_for_room(0.2):
            if is_over():
                return sampler.close(0)
        if is_over():
            return sampler.close(0)
        sampler.put(each)
    while not sampler.wait(0.2):
        if is_over():
            return sampler.close(0)
    return None


def _is_routed(row: JobRow) -> bool:
    return row.state != "skipped" and bool(row.calls) and not any(call.cached for call in row.calls)


def _done(path: Path) -> set[str]:
    if not path.exists():
        return set()
    return {sample.id for sample in read_samples(path) if sample.shadow is not None}
