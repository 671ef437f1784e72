"""The fastest decoding mode of a pair, chosen while it decodes, for as many texts as are decoded now.

The candidates are the routed modes and the lossless ones, the large model alone always among them. Their
throughput is predicted by the cost model from call times (measured briefly when first needed, corrected by
the calls that follow) and from how often the pair hands off and accepts drafts, which is learned by trying:
a kind of mode is tried for `TRIAL_TOKENS` if it would pay at best, once the texts so far are long enough
for it (`TRIAL_SHARE`): a short run is the large model's alone. Leaves out where times are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from viaticum.decoders.cost import CostModel, measure_quickly
from viaticum.decoders.decoding_mode import LARGE_ALONE, LOSSLESS, ROUTED, DecodingMode, HandoffStats
from viaticum.decoders.observed_times import ObservedTimes
from viaticum.decoders.runner import Runner
from viaticum.decoders.stats import Stats
from viaticum.errors import InputError, ModelError
from viaticum.routers.token import AlwaysLarge, TokenRouter

TRIAL_TOKENS = 128  # proposed or drafted tokens after which a pair's own rates are known
TRIAL_SHARE = 1 / 3  # of the tokens made so far, the trial's included, that trials may have taken at its end
AT_BEST = HandoffStats(drop=0.1, back=0.6, accept=0.9)  # rates with which a kind is worth a trial or not
TRIALS = {True: DecodingMode(True), False: DecodingMode(False, 2)}  # by kind: routed or lossless
GAIN = 1.03  # of the large model alone, that another mode has to promise
SWITCH = 1.05  # of the current mode, that another has to promise
# Steps after which a choice is reviewed with the times seen since; twice as many after one that stayed.
REVIEW_STEPS, LONGEST_REVIEW = 64, 1024
SIMULATED_TOKENS = 800
RATE_STEPS = 20  # rates are rounded to multiples of 1 / RATE_STEPS
REMEMBERED = 256  # choices

_COUNTERS = ("proposed", "dropped", "drafted", "accepted", "large_tokens")


@dataclass(frozen=True, slots=True)
class Rates:
    """How often a pair hands off, by kind of mode; None: not known yet.

    Of the lossless kind only `accept` counts.
    """

    routed: HandoffStats | None = None
    lossless: HandoffStats | None = None

    def of(self, routed: bool) -> HandoffStats | None:
        return self.routed if routed else self.lossless

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Rates:
        """From plain data, as `asdict` gives it."""
        return cls(**{kind: HandoffStats(**each) for kind, each in values.items() if each is not None})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class ModeChooser:
    """Chooses the mode of one pair's decoder. Used by the thread that steps its engine.

    Args:
        router: the pair's token router.
        costs: call times of the pair on this machine; None: they are measured when first needed.
        rates: what is known of the pair's hand-offs.
        keep: called with times and rates when either is new.
    """

    def __init__(
        self,
        router: TokenRouter,
        costs: CostModel | None = None,
        *,
        rates: Rates | None = None,
        keep: Callable[[CostModel, Rates], None] | None = None,
    ) -> None:
        self.router = router
        self.rates = rates or Rates()
        self.mode = DecodingMode(routed=True)
        self.expected: dict[DecodingMode, float] = {}  # tokens a second, at the last choice
        self._keep = keep
        self._large_alone = AlwaysLarge()
        self._costs = costs
        self._observed = None if costs is None else ObservedTimes(costs)
        self._failed = False  # to measure
        self._counted = {True: Stats(), False: Stats()}
        self._before: tuple[Stats, dict[str, int]] | None = None
        self._choices: dict[Any, dict[DecodingMode, float]] = {}
        self._corrected = costs
        self._streams, self._steps, self._review = 0, 0, REVIEW_STEPS
        self._made = self._tried = 0  # tokens in all, and in trials
        self._trial: DecodingMode | None = None  # that is going on

    def router_of(self, mode: DecodingMode) -> TokenRouter:
        return self.router if mode.routed else self._large_alone

    @property
    def needs_times(self) -> bool:
        return self._costs is None and not self._failed

    def prepare(self, small: Runner, large: Runner) -> None:
        """Measure the pair's calls, in seconds, if that is needed and no slot of either is in use."""
        if not self.needs_times or any(len(each.free_slots) < each.slots for each in (small, large)):
            return
        try:
            self._costs = measure_quickly(small, large)
        except (InputError, ModelError):  # too short a context, too little memory: routed, as was asked for
            self._failed = True
            return
        self._observed = ObservedTimes(self._costs)
        self._save()

    def observe(self, model: int, rows: int, tokens: int, seconds: float) -> None:
        """Record a call of a model (0 small, 1 large) that read `tokens` new tokens in all."""
        if self._observed is not None:
            self._observed.add(model, rows, tokens, seconds)

    def choose(self, streams: int, stats: Stats) -> DecodingMode:
        """The mode for so many texts at once.

        stats: counters of the decoder, from which the rates are learned.
        """
        self._learn(stats)
        self._steps += 1
        due = self._steps >= self._review
        if self._observed is None or (streams == self._streams and not due):
            return self.mode
        if due or self._corrected is None:
            self._steps, self._corrected = 0, self._observed.corrected()
        before, self._streams = self.mode, streams
        self.mode = self._best(streams)
        self._review = min(2 * self._review, LONGEST_REVIEW) if self.mode == before else REVIEW_STEPS
        return self.mode

    def _best(self, streams: int) -> DecodingMode:
        self.expected = expected = self._predictions(streams)
        for routed, trial in TRIALS.items():
            if (
                self.rates.of(routed) is None
                and (self._trial == trial or self._may_try)
                and any(
                    mode.routed == routed and tokens >= GAIN * expected[LARGE_ALONE]
                    for mode, tokens in expected.items()
                )
            ):
                self._trial = trial
                return trial
        self._trial = None
        expected = {mode: tokens for mode, tokens in expected.items() if not self._is_unknown(mode)}
        best = max(expected, key=lambda mode: expected[mode])
        if expected[best] < GAIN * expected[LARGE_ALONE]:
            best = LARGE_ALONE
        current = expected.get(self.mode, 0.0)
        keeps = current >= expected[LARGE_ALONE] and expected[best] < SWITCH * current
        return self.mode if keeps else best

    @property
    def _may_try(self) -> bool:
        """Whether so much was decoded that another trial is a small part of it."""
        return self._tried + TRIAL_TOKENS <= TRIAL_SHARE * (self._made + TRIAL_TOKENS)

    def _is_unknown(self, mode: DecodingMode) -> bool:
        return mode != LARGE_ALONE and self.rates.of(mode.routed) is None

    def _candidates(self) -> list[DecodingMode]:
        routed = [mode for mode in ROUTED if self.router.multi_token_handoff or not mode.draft]
        return [*LOSSLESS, *routed]

    def _predictions(self, streams: int) -> dict[DecodingMode, float]:
        """Tokens a second of every candidate; of a kind that was never tried, at best."""
        costs = self._corrected
        assert costs is not None
        streams = _bucket(streams)
        key = (streams, costs.small, costs.large, self.rates)
        if key not in self._choices:
            if len(self._choices) >= REMEMBERED:
                self._choices.clear()
            self._choices[key] = {
                mode: costs.predict(
                    mode, self.rates.of(mode.routed) or AT_BEST, streams, tokens=SIMULATED_TOKENS
                )
                for mode in self._candidates()
            }
        return self._choices[key]

    def _learn(self, stats: Stats) -> None:
        """Count what the decoder did since the last time for the kind of mode that it was in."""
        now = {name: getattr(stats, name) for name in _COUNTERS} | {"rows": stats.large.rows}
        before = self._before[1] if self._before is not None and self._before[0] is stats else None
        self._before = (stats, now)
        if before is None:
            return
        made = sum(now[name] - before[name] for name in ("proposed", "large_tokens"))
        made -= now["dropped"] - before["dropped"]
        self._made += made
        self._tried += made * (self._trial is not None)
        kind = self.mode.routed
        counted = self._counted[kind]
        for name in _COUNTERS:
            setattr(counted, name, getattr(counted, name) + now[name] - before[name])
        counted.large.rows += now["rows"] - before["rows"]
        if (counted.proposed if kind else counted.drafted) < TRIAL_TOKENS:
            return
        if self._steps % REVIEW_STEPS and self.rates.of(kind) is not None:
            return
        found = _rounded(HandoffStats.from_stats(counted))
        if found != self.rates.of(kind):
            if self.rates.of(kind) is None:
                self._steps = self._review  # the trial is over
            self.rates = replace(self.rates, **{"routed" if kind else "lossless": found})
            self._save()

    def _save(self) -> None:
        if self._keep is not None and self._costs is not None:
            self._keep(self._costs, self.rates)


def _rounded(rates: HandoffStats) -> HandoffStats:
    return HandoffStats(*(round(rate * RATE_STEPS) / RATE_STEPS for rate in asdict(rates).values()))


def _bucket(streams: int) -> int:
    """1, 2, 3, 4, 6, 8, 12, 16 ...: a choice for every number of texts would be made too often."""
    if streams < 4:
        return streams
    power = 1 << (streams.bit_length() - 1)
    return power + power // 2 if streams >= power + power // 2 else power
