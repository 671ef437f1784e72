"""The setting of shadow sampling: how many answered questions are asked again of one model, and for how much.

Leaves out the calls (`viaticum.agents.workflow.shadow`) and what follows from them
(`viaticum.reports.shadow`).
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from viaticum.budgets.records import digest
from viaticum.checks import checked_text
from viaticum.errors import InputError
from viaticum.money import nanousd

WAIT_SECONDS = 10.0


@dataclass(frozen=True)
class ShadowSampling:
    """Asks a share of the answered questions again, of one model, in the background.

    Which questions are sampled depends on their ids and the seed alone, so that a run that goes on, and
    another process, choose the same ones.

    Args:
        model: always this model, or model+strategy. Of a model alone the policy chooses the strategy.
        rate: share of the questions, above 0 and at most 1.
        budget: dollars for all shadow calls and verdicts, a budget of its own in the ledger, called after the
            budget that pays for the answers: its name and "-shadow".
        judge: a model that says which of two different answers is right, paid from the same budget; None for
            none.
        seed: of the choice.
        wait_seconds: for which closing waits for shadow calls in progress; then they are ended and settled.

    Raises:
        InputError: a value is out of range.
    """

    model: str
    rate: float
    budget: str | int | float | Decimal
    judge: str | None = None
    seed: int = 0
    wait_seconds: float = WAIT_SECONDS

    def __post_init__(self) -> None:
        checked_text("the model of shadow calls", self.model)
        if self.judge is not None:
            checked_text("the judge of shadow calls", self.judge)
        if isinstance(self.rate, bool) or not isinstance(self.rate, int | float) or not 0 < self.rate <= 1:
            raise InputError(f"the rate of shadow calls is above 0 and at most 1, got {self.rate!r}")
        if self.limit_nanousd <= 0:
            raise InputError(f"the budget of shadow calls is above zero dollars, got {self.budget}")
        if not 0 <= self.wait_seconds <= 86_400:
            raise InputError(f"wait_seconds is from 0 to 86400, got {self.wait_seconds!r}")

    @property
    def limit_nanousd(self) -> int:
        return nanousd(self.budget)

    def is_sampled(self, request: str) -> bool:
        """Whether the question with this id is asked again."""
        return int(digest(["shadow", self.seed, request])[:13], 16) < self.rate * 16**13
