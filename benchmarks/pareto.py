"""Accuracy against LLM share and speed of the ways in which a small and a large model write a text together.

The 1.5B and the 0.5B model of the catalogue, cot, greedy, on questions with answers: the large model alone,
with drafts of the small one (speculative), the small one alone, R-Stitch with thresholds on entropy, and on
demand R2R's trained router at several shares (--r2r DIR), R-Stitch+'s policy asked above the same thresholds
on entropy (--policy DIR), and tokens handed over by chance (--chance), the control. Every way writes the same
--each-time questions before the next questions are begun, so that all are timed under the same conditions and
a run that was stopped compares equal sets. Prints for each way its accuracy with a 95% Wilson interval, the
difference to the large model alone (or to --against WAY) in points with a paired bootstrap interval, the
large model's share of the tokens, and tokens a second of all texts together; with `--costs` known (`viaticum
models measure`) also what one stream would reach, and which ways no other beats in both.

    viaticum models pull && viaticum models measure qwen2.5-coder-r-stitch
    python benchmarks/pareto.py QUESTIONS.jsonl --limit 100 --journal pareto.jsonl \\
      [--r2r DIR] [--policy DIR] [--chance] [--json]

Finished answers go to --journal, so that a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from viaticum.catalogue import Catalogue
from viaticum.decoders import MixedDecoder, Request, Result, Runner, Stats, load_runner
from viaticum.decoders.cost import CostModel
from viaticum.decoders.decoding_mode import DecodingMode, HandoffStats
from viaticum.errors import DataError, ModelError
from viaticum.models.decoding_modes import thorough_costs
from viaticum.models.local import stop_ids
from viaticum.models.settings import ANSWER_TOKENS
from viaticum.outcomes import accuracy_interval
from viaticum.questions import Question, read_questions
from viaticum.routers.token import AlwaysLarge, EntropyRouter, RandomRouter, TokenRouter
from viaticum.routers.token.neural import LearnedDivergenceRouter, TrainedRouter
from viaticum.routers.token.policy import RStitchPlus, TrainedPolicy
from viaticum.strategies import get as get_strategy
from viaticum.strategies.answers import is_right
from viaticum.types import Completion, Usage
from viaticum.weights import locate

SMALL, LARGE, PAIR = "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "qwen2.5-coder-r-stitch"
TAUS = (0.01, 0.03, 0.06, 0.12, 0.25)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.55)
DRAFT = 3
COT = get_strategy("cot")


@dataclass(frozen=True)
class Arm:
    """A way to write, under the name that the journal has. way: None for the small model alone.

    router: given the small model's runner; of a way that is routed.
    """

    name: str
    way: DecodingMode | None
    router: Callable[[Runner], TokenRouter] | None = None


def arms_of(r2r: Path | None, policy: Path | None, chance: bool) -> list[Arm]:
    """All ways, each family from few tokens of the large model to many."""
    routed = DecodingMode(True)
    arms = [
        Arm("large", DecodingMode(False)),
        Arm("small", None),
        Arm("speculative", DecodingMode(False, DRAFT)),
    ]
    arms += [Arm(f"r-stitch {tau:g}", routed, lambda _, tau=tau: EntropyRouter(tau)) for tau in TAUS]  # type: ignore[misc]
    if r2r is not None:
        trained = TrainedRouter.load(r2r)
        arms += [Arm(f"r2r {share:g}", routed, _r2r(trained, share)) for share in SHARES]
    if policy is not None:
        learned = TrainedPolicy.load(policy)
        arms += [Arm(f"r-stitch+ {tau:g}", routed, _r_stitch_plus(learned, tau)) for tau in TAUS]
    if chance:
        arms += [
            Arm(f"chance {share:g}", routed, lambda _, share=share: RandomRouter(share)) for share in SHARES
        ]  # type: ignore[misc]
    return arms


def _r2r(trained: TrainedRouter, share: float) -> Callable[[Runner], TokenRouter]:
    return lambda small: LearnedDivergenceRouter(
        trained.network, small.embeddings, trained.threshold_for(share)
    )


def _r_stitch_plus(learned: TrainedPolicy, tau: float) -> Callable[[Runner], TokenRouter]:
    return lambda small: RStitchPlus(learned.policy.to(small.device), tau, learned.threshold)


@dataclass(frozen=True)
class Done:
    """One answered question. `seconds` and counts are those of the whole batch."""

    arm: str
    question: str
    right: bool
    tokens: int
    large: int
    finish: str
    seconds: float
    counts: dict[str, int]  # see `Stats`
    batch: int


class Pair:
    """The two models, loaded once."""

    def __init__(self, slots: int) -> None:
        folders = [locate(Catalogue.load()[name]) for name in (SMALL, LARGE)]
        self.tokenizer = AutoTokenizer.from_pretrained(folders[-1], local_files_only=True)
        self.small, self.large = (load_runner(folder, slots=slots, context=1536) for folder in folders)

    def decoder(self, arm: Arm) -> MixedDecoder:
        large = self.large if arm.way else self.small
        both = arm.way is not None and (arm.way.routed or arm.way.draft > 0)
        return MixedDecoder(
            large,
            self.small if both else None,
            tokenizer=self.tokenizer,
            router=arm.router(self.small) if arm.router else AlwaysLarge(),
            stop_ids=stop_ids([self.small, self.large], self.tokenizer),
            draft=arm.way.draft if arm.way else 0,
        )

    def write(self, decoder: MixedDecoder, questions: Sequence[Question]) -> list[Result]:
        requests = [
            Request(
                self.tokenizer.apply_chat_template(
                    COT.messages(question.query), add_generation_prompt=True, return_dict=False
                ),
                max_new_tokens=COT.max_new_tokens or ANSWER_TOKENS,
                stop=COT.stop,
            )
            for question in questions
        ]
        return decoder.generate_all(requests)


def answer(pair: Pair, arm: Arm, asked: Sequence[Question], batch: int) -> list[Done]:
    decoder = pair.decoder(arm)
    began = time.perf_counter()
    results = pair.write(decoder, asked)
    seconds, stats = time.perf_counter() - began, decoder.stats
    counts = {
        "proposed": stats.proposed,
        "dropped": stats.dropped,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "large_tokens": stats.large_tokens,
        "large_rows": stats.large.rows,
    }
    done = []
    for question, result in zip(asked, results, strict=True):
        if result.error is not None:
            raise ModelError(f"{arm.name}, question {question.id}: {result.error}")
        read = COT.read(
            Completion(result.text, Usage(result.usage, 0.0), result.finish_reason), question.query
        )
        done.append(
            Done(
                arm.name,
                question.id,
                is_right(read.value, question.accepted, "number"),
                len(result.trace.made_by),
                sum(result.trace.made_by),
                result.finish_reason,
                seconds,
                counts,
                batch,
            )
        )
    return done


def run(
    questions: list[Question], arms: Sequence[Arm], slots: int, each_time: int, journal: Path
) -> list[Done]:
    done: list[Done] = []
    if journal.exists():
        done = [Done(**json.loads(line)) for line in journal.read_text(encoding="utf-8").splitlines()]
    wanted = {question.id for question in questions}
    done = [each for each in done if each.question in wanted]
    known = {(each.arm, each.question) for each in done}
    pair: Pair | None = None
    with journal.open("a", encoding="utf-8") as file:
        for batch, at in enumerate(range(0, len(questions), each_time)):
            for arm in arms:
                asked = [each for each in questions[at : at + each_time] if (arm.name, each.id) not in known]
                if not asked:
                    continue
                pair = pair or Pair(slots)
                written = answer(pair, arm, asked, batch)
                file.writelines(json.dumps(vars(each)) + "\n" for each in written)
                file.flush()
                os.fsync(file.fileno())
                done += written
                rate = sum(each.tokens for each in written) / written[0].seconds
                sys.stderr.write(
                    f"{arm.name}: questions {at + 1} to {at + len(asked)},"
                    f" {sum(each.right for each in written)} right, {rate:.1f} tokens a second\n"
                )
    return done


def habits(rows: Sequence[Done]) -> HandoffStats:
    """How the models handed over, from the sums of all batches."""
    batches = {each.batch: each.counts for each in rows}.values()
    total = {name: sum(counts[name] for counts in batches) for name in next(iter(batches))}
    stats = Stats()
    stats.proposed, stats.dropped = total["proposed"], total["dropped"]
    stats.drafted, stats.accepted = total["drafted"], total["accepted"]
    stats.large_tokens, stats.large.rows = total["large_tokens"], total["large_rows"]
    return HandoffStats.from_stats(stats)


def against(rows: Sequence[Done], others: Sequence[Done]) -> tuple[float, float, float]:
    """Accuracy above another's, on the questions both answered: the mean and its 95% bootstrap interval."""
    of = {each.question: each.right for each in others}
    pairs = np.array([each.right - of[each.question] for each in rows if each.question in of], dtype=float)
    if not len(pairs):
        return (float("nan"),) * 3
    drawn = np.random.default_rng(0).choice(pairs, (2000, len(pairs))).mean(1)
    return float(pairs.mean()), *(float(each) for each in np.percentile(drawn, (2.5, 97.5)))


def table(
    done: Sequence[Done], arms: Sequence[Arm], costs: CostModel | None, other: str = "large"
) -> list[dict[str, Any]]:
    found = []
    others = [each for each in done if each.arm == other]
    for arm in arms:
        rows = [each for each in done if each.arm == arm.name]
        if not rows:
            continue
        right = sum(each.right for each in rows)
        low, high = accuracy_interval(right, len(rows))
        tokens = sum(each.tokens for each in rows)
        line: dict[str, Any] = {
            "way": arm.name,
            "right": right,
            "questions": len(rows),
            "accuracy": round(right / len(rows), 4),
            "low": round(low, 3),
            "high": round(high, 3),
            f"above_{other}": [round(100 * each, 1) for each in against(rows, others)],
            "llm_share": round(sum(each.large for each in rows) / tokens, 3) if arm.way else 0.0,
            "tok_s": round(tokens / sum({each.batch: each.seconds for each in rows}.values()), 1),
            "tokens_mean": round(statistics.mean(each.tokens for each in rows), 1),
            "cut": sum(each.finish != "stop" for each in rows),
        }
        if costs is not None:
            speed = 1 / costs.small(1, 1)
            if arm.way is not None:
                seen = habits(rows)
                speed = costs.predict(arm.way, seen, 1)
                line |= {"drop": round(seen.drop, 3), "back": round(seen.back, 3)}
                line |= {"accept": round(seen.accept, 3)} if arm.way.draft else {}
            line |= {"tok_s_1": round(speed, 1), "seconds_1": round(line["tokens_mean"] / speed, 2)}
        found.append(line)
    for line in found if costs is not None else ():
        line["pareto"] = not any(
            other["accuracy"] >= line["accuracy"]
            and other["seconds_1"] <= line["seconds_1"]
            and (other["accuracy"], other["seconds_1"]) != (line["accuracy"], line["seconds_1"])
            for other in found
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", type=Path)
    parser.add_argument("--limit", type=int, default=100, help="the first so many questions (default 100)")
    parser.add_argument("--slots", type=int, default=20, help="questions written at once (default 20)")
    parser.add_argument(
        "--each-time", type=int, help="questions of a way before the next way (default: --slots)"
    )
    parser.add_argument("--journal", type=Path, default=Path("pareto.jsonl"), help="finished answers")
    parser.add_argument("--r2r", type=Path, help="the folder of a trained router")
    parser.add_argument("--policy", type=Path, help="the folder of a learned policy")
    parser.add_argument("--chance", action="store_true", help="also tokens handed over by chance")
    parser.add_argument("--arm", action="append", help="only these ways, by name (default: all)")
    parser.add_argument(
        "--against", default="large", help="the way that others are compared with (default large)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    questions = list(read_questions(arguments.questions, limit=arguments.limit))
    if any(question.gold is None for question in questions):
        raise DataError("every question needs its answer, to compare with")
    arms = [
        arm
        for arm in arms_of(arguments.r2r, arguments.policy, arguments.chance)
        if not arguments.arm or arm.name in arguments.arm
    ]
    done = run(questions, arms, arguments.slots, arguments.each_time or arguments.slots, arguments.journal)
    costs = thorough_costs(Catalogue.load()[PAIR])
    found = table(done, arms, costs, arguments.against)
    conditions = {"torch": torch.__version__, "slots": arguments.slots, "each_time": arguments.each_time} | (
        costs.conditions if costs is not None else {}
    )
    if arguments.json:
        print(json.dumps({"conditions": conditions, "ways": found}))
        return
    shown = Table(*found[0], box=None, pad_edge=False)
    for line in found:
        shown.add_row(*("" if line.get(name) is None else str(line.get(name)) for name in found[0]))
    Console(width=150).print(shown)
    print(", ".join(f"{name} {value}" for name, value in conditions.items()))


if __name__ == "__main__":
    main()
