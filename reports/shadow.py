"""What shadow samples say: what routing saved and lost against always asking one model, with 95% intervals.

Money and time are paired differences with a bootstrap over questions. Equal answers are equally right, so
that only different ones can have won or lost anything. Who says which of them is right is counted: known
answers ("gold"), `feedback` on the live answer, a judge. Feedback says nothing of the other answer: where the
live one was right the other is taken as wrong, and where it was wrong the other is taken as right, which is
the worse for routing; of texts several can be right, and feedback decides only where a judge knows the other
one. The shares of won and lost questions have Wilson's intervals, their difference that of Zou and Donner
(Statistics in Medicine 27, 2008, the square-and-add limits of correlated shares: both are of one
multinomial); different answers of which nobody says which is right count as lost in its lower limit, and as
won in its upper one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import numpy as np

from viaticum.money import format_usd
from viaticum.outcomes import accuracy_interval, read_outcomes
from viaticum.reports.intervals import Array, Estimate, Share, estimate, grouped, mean, resamples, share
from viaticum.reports.sections import Section, Table
from viaticum.shadow_samples import SHADOWS, ShadowSample, read_samples

LIVE_OUTCOMES = "outcomes.jsonl"  # feedback on live answers, beside their shadow samples
SOURCE = "shadow samples"
Feedback = Mapping[tuple[str, str], bool]  # by id of the question and pair


@dataclass(frozen=True, slots=True)
class ShadowNumbers:
    """Answers against those of one model, on the questions that both were asked.

    Attributes:
        model: that is always asked.
        sampled, compared: questions; of the others `missing` says why, with how many each.
        saved: nano-dollars a question that the model costs more.
        saved_share: of what the model costs.
        seconds: a question that the model takes longer.
        equal: the share of equal answers.
        won, lost: questions that only the answer, or only the model, got right.
        accuracy: of the answers less the model's; None where nobody says which of the different ones are
            right.
        by: who says what is right, with for how many questions: agreement, gold, feedback, judge, nobody.
    """

    model: str
    sampled: int
    compared: int
    missing: Mapping[str, int]
    saved: Estimate | None
    saved_share: Estimate | None
    seconds: Estimate | None
    equal: Share | None
    won: int
    lost: int
    accuracy: Estimate | None
    by: Mapping[str, int]


def shadow_numbers(samples: Sequence[ShadowSample], feedback: Feedback | None = None) -> list[ShadowNumbers]:
    """The numbers of each model that samples were asked of.

    feedback: whether a live answer was right.
    """
    models = dict.fromkeys(sample.model for sample in samples)
    return [_numbers(model, [each for each in samples if each.model == model], feedback) for model in models]


def read_shadow_numbers(path: str | Path) -> list[ShadowNumbers]:
    """The numbers of a file of samples, or of a job's folder, with the feedback that lies beside them.

    Raises:
        InputError: there are none.
        DataError: a file is damaged.
    """
    file = Path(path)
    file = file / SHADOWS if file.is_dir() else file
    outcomes = file.with_name(LIVE_OUTCOMES)
    rows = read_outcomes(outcomes) if outcomes.is_file() else []
    return shadow_numbers(read_samples(file), {(row.question_id, str(row.pair)): row.correct for row in rows})


def _numbers(model: str, samples: Sequence[ShadowSample], feedback: Feedback | None) -> ShadowNumbers:
    pairs = [(each.live, each.shadow) for each in samples if each.shadow is not None]
    live = np.array([one.cost_nanousd for one, _ in pairs], dtype=float)
    always = np.array([other.cost_nanousd for _, other in pairs], dtype=float)
    verdicts = [_verdict(each, feedback or {}) for each in samples if each.shadow is not None]
    by = Counter(who for _, who in verdicts)
    won, lost = (sum(worth == sign for worth, _ in verdicts) for sign in (1, -1))
    unequal = sum(each.shadow is not None and not each.equal for each in samples)
    return ShadowNumbers(
        model,
        len(samples),
        len(pairs),
        dict(Counter(each.reason for each in samples if each.shadow is None)),
        mean(always - live),
        _saved_share(live, always),
        mean(np.array([other.seconds - one.seconds for one, other in pairs])),
        share(len(pairs) - unequal, len(pairs)),
        won,
        lost,
        _accuracy(won, lost, by["nobody"], unequal, len(pairs)),
        dict(by),
    )


def _verdict(sample: ShadowSample, feedback: Feedback) -> tuple[int, str]:
    """1 where only the live answer is right, -1 where only the other one is, else 0; and who says so."""
    assert sample.shadow is not None
    ours, other = sample.live.correct, sample.shadow.correct
    if sample.by == "gold" and ours is not None and other is not None:
        return int(ours) - int(other), "gold"
    if sample.equal:
        return 0, "agreement"
    was_right = feedback.get((sample.question_id, sample.live.pair))
    if was_right is not None and (other is not None or sample.kind != "text"):
        return int(was_right) - int(not was_right if other is None else other), "feedback"
    if ours is not None and other is not None:
        return int(ours) - int(other), sample.by
    return 0, "nobody"


def _accuracy(won: int, lost: int, unknown: int, unequal: int, of: int) -> Estimate | None:
    """The difference in accuracy; unknown ones are expected to be won and lost as often as the others."""
    if not of or (unequal and unknown == unequal):
        return None
    scale = unequal / (unequal - unknown) if unknown else 1.0
    value = (won - lost) * scale / of
    low = difference_interval(won, lost + unknown, of)[0]
    high = difference_interval(won + unknown, lost, of)[1]
    return Estimate(value, min(low, value), max(high, value), of)


def difference_interval(won: int, lost: int, of: int) -> tuple[float, float]:
    """95% limits of the difference of two shares of the same questions, none of which is in both."""
    (won_low, won_high), (lost_low, lost_high) = accuracy_interval(won, of), accuracy_interval(lost, of)
    won_share, lost_share = won / of, lost / of
    product = won * lost
    correlation = -sqrt(product / ((of - won) * (of - lost))) if product else 0.0

    def length(x: float, y: float) -> float:
        return sqrt(x * x + y * y - 2 * correlation * x * y)

    low = length(won_share - won_low, lost_high - lost_share)
    high = length(won_high - won_share, lost_share - lost_low)
    return won_share - lost_share - low, won_share - lost_share + high


def _saved_share(live: Array, always: Array) -> Estimate | None:
    """1 - sum(live) / sum(always), by a bootstrap over questions."""
    if not len(live) or not always.sum():
        return None
    sums = grouped(np.stack([live, always], axis=1))
    drawn = np.concatenate([weights @ sums for weights in resamples(len(sums))])
    drawn = drawn[drawn[:, 1] > 0]
    return estimate(1 - live.sum() / always.sum(), 1 - drawn[:, 0] / drawn[:, 1], len(live))


# --- as text ------------------------------------------------------------------------------------------


def shadow_section(folder: Path) -> Section | None:
    """The section of a job's report; None where the job has no shadow samples."""
    if not (folder / SHADOWS).is_file():
        return None
    numbers = read_shadow_numbers(folder)
    return Section(
        "shadow",
        "Against always asking one model",
        SOURCE,
        lead=tuple(sentence(each) for each in numbers),
        tables=(table(numbers),),
        notes=NOTES,
    )


NOTES = (
    "Equal answers count as equally right. Of different answers nobody judged, the lower limit takes all as "
    "lost and the upper one all as won; after feedback that an answer was wrong the other counts as right.",
)
COLUMNS = (
    ("always", False),
    ("questions", True),
    ("saved", True),
    ("seconds saved", True),
    ("equal answers", True),
    ("won", True),
    ("lost", True),
    ("accuracy", True),
)


def table(numbers: Sequence[ShadowNumbers]) -> Table:
    rows = tuple(
        (
            each.model,
            f"{each.compared} of {each.sampled}",
            _percent(each.saved_share),
            "" if each.seconds is None else f"{each.seconds.value:.2g}",
            "" if each.equal is None else f"{each.equal.value:.1%}",
            str(each.won),
            str(each.lost),
            _points(each.accuracy),
        )
        for each in numbers
    )
    return Table("answers against always asking one model", COLUMNS, rows)


def sentence(numbers: ShadowNumbers) -> str:
    """What was saved and lost, in words."""
    model = f"always asking {numbers.model}"
    if not numbers.compared or numbers.saved is None:
        return f"Against {model} nothing was compared yet ({_missing(numbers)})."
    saved, per = numbers.saved, numbers.saved_share
    dollars = " to ".join(format_usd(round(1000 * each)) for each in (saved.low, saved.high))
    text = (
        f"Against {model}, on {numbers.compared} questions that both were asked: "
        f"{_percent(per)} saved, {format_usd(round(1000 * saved.value))} per 1,000 questions ({dollars}); "
    )
    if numbers.accuracy is None:
        assert numbers.equal is not None
        text += f"{numbers.equal.value:.1%} of the answers are equal, and nobody says which others are right"
    else:
        text += f"accuracy {_points(numbers.accuracy)} points ({_sources(numbers.by)})"
    more = f"; {_missing(numbers)}" if numbers.missing else ""
    return f"{text}{more}."


def _sources(by: Mapping[str, int]) -> str:
    return ", ".join(f"{who} {count}" for who, count in by.items() if count)


def _missing(numbers: ShadowNumbers) -> str:
    if not numbers.missing:
        return "no question was sampled"
    reasons = sorted(numbers.missing.items(), key=lambda each: -each[1])
    first, count = reasons[0]
    more = sum(each for _, each in reasons[1:])
    return f"{count} not asked: {first}" + (f"; and {more} for other reasons" if more else "")


def _percent(each: Estimate | None) -> str:
    return "" if each is None else f"{each.value:.1%} ({each.low:.1%} to {each.high:.1%})"


def _points(each: Estimate | None) -> str:
    if each is None:
        return ""
    return f"{100 * each.value:+.1f} ({100 * each.low:+.1f} to {100 * each.high:+.1f})"
