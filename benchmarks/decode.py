"""Tokens a second of the decoding modes of a local pair, beside llama.cpp and assisted generation.

Everything in one run, on the real pair of the catalogue (1.5B and 0.5B): 12 questions asked as cot asks them,
64 greedy tokens each, prompts read beforehand. At one stream all ways and the two others take turns, question
by question, so that whatever slows the machine slows all; the ratios are of medians. At 4 and 16 streams our
ways alone are compared, with what the cost model expected of each; it was told how often the models hand over
from twelve other questions.

    viaticum models pull && pip install xllamacpp
    python benchmarks/decode.py QUESTIONS.jsonl [--json] [--tau 0.06]

llama.cpp runs the same GGUF file of the 1.5B model with as many threads. transformers' assisted generation
runs the same two models in bfloat16. Keys: overhead_N is the wall time over the sum of the model calls at N
streams, of the way that adds most; model_error_max the largest distance of measured over predicted tokens a
second from 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _llama import llama_speed
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from viaticum.catalogue import Catalogue
from viaticum.decoders import MixedDecoder, Request, Runner, Stats, load_runner
from viaticum.decoders.cost import CostModel, measure_pair
from viaticum.decoders.decoding_mode import LARGE_ALONE, DecodingMode, HandoffStats
from viaticum.questions import read_questions
from viaticum.routers.token import AlwaysLarge, EntropyRouter
from viaticum.strategies import get as get_strategy
from viaticum.weights import locate

SMALL, LARGE = "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"
QUESTIONS, OTHERS, NEW = 12, 12, 64
SLOTS = 16
WAYS = (LARGE_ALONE, DecodingMode(False, 3), DecodingMode(True), DecodingMode(True, 1))
Prompt = list[int]


@dataclass
class Pair:
    """The two models, their prompts read, and the seconds of their calls."""

    small: Runner
    large: Runner
    tokenizer: Any
    tau: float
    in_calls: float = 0.0
    decoders: dict[DecodingMode, MixedDecoder] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for runner in (self.small, self.large):
            self._watch(runner)

    def _watch(self, runner: Runner) -> None:
        call = runner._call

        def timed(*given: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*given, **options)
            finally:
                self.in_calls += time.perf_counter() - began

        runner._call = timed  # type: ignore[method-assign]

    def decoder(self, way: DecodingMode) -> MixedDecoder:
        if way not in self.decoders:
            self.decoders[way] = MixedDecoder(
                self.large,
                self.small if way.routed or way.draft else None,
                tokenizer=self.tokenizer,
                router=EntropyRouter(self.tau) if way.routed else AlwaysLarge(),
                draft=way.draft,
                loop_guard=None,
            )
        return self.decoders[way]

    def read(self, prompts: Sequence[Prompt]) -> None:
        """Let each prompt lie in a slot of its own, at both models."""
        for slot, prompt in enumerate(prompts):
            for runner in (self.small, self.large):
                runner.reuse_prefix(slot, prompt)
                runner.extend([slot], [prompt[len(runner.cached_tokens[slot]) :]])

    def write(self, way: DecodingMode, prompts: Sequence[Prompt]) -> tuple[float, float, float]:
        """Decode all prompts at once: tokens a second, wall time over call time, share of the large model."""
        decoder = self.decoder(way)
        decoder.stats = Stats()
        self.in_calls, began = 0.0, time.perf_counter()
        results = decoder.generate_all([Request(prompt, max_new_tokens=NEW) for prompt in prompts])
        wall = time.perf_counter() - began
        made_by = [maker for result in results for maker in result.trace.made_by]
        return len(made_by) / wall, wall / self.in_calls, sum(made_by) / len(made_by)

    def habits(self, way: DecodingMode, prompts: Sequence[Prompt]) -> HandoffStats:
        """How the models hand over on these prompts, all at once."""
        self.write(way, prompts)
        return HandoffStats.from_stats(self.decoder(way).stats)


def prompts_of(tokenizer: Any, path: Path) -> list[Prompt]:
    cot = get_strategy("cot")
    return [
        tokenizer.apply_chat_template(
            cot.messages(question.query), add_generation_prompt=True, return_dict=False
        )
        for question in read_questions(path, limit=SLOTS + OTHERS)
    ]


def assisted(small: Path, large: Path) -> Callable[[Prompt], float]:
    """transformers' assisted generation; the prompt's time, taken from a text of one token, is left out."""
    models = [AutoModelForCausalLM.from_pretrained(each, dtype=torch.bfloat16) for each in (large, small)]

    def seconds(ids: torch.Tensor, tokens: int) -> float:
        began = time.perf_counter()
        models[0].generate(
            ids,
            attention_mask=torch.ones_like(ids),
            assistant_model=models[1],
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            repetition_penalty=1.0,
        )
        return time.perf_counter() - began

    def work(prompt: Prompt) -> float:
        ids = torch.tensor([prompt])
        first = seconds(ids, 1)
        return (NEW - 1) / (seconds(ids, NEW) - first)

    return work


def one_stream(
    pair: Pair, prompts: Sequence[Prompt], others: dict[str, Callable[[Prompt], float]]
) -> dict[str, dict[str, float]]:
    """Medians of every way and of the others, in turns, question by question."""
    found: dict[str, dict[str, list[float]]] = {}
    for number, prompt in enumerate(prompts):
        sys.stderr.write(f"one stream, question {number + 1} of {len(prompts)}\n")
        for way in WAYS:
            values = pair.write(way, [prompt])
            for name, value in zip(("tok_s", "overhead", "share"), values, strict=True):
                found.setdefault(str(way), {}).setdefault(name, []).append(value)
        for name, work in others.items():
            found.setdefault(name, {}).setdefault("tok_s", []).append(work(prompt))
    return {
        name: {
            key: statistics.mean(values) if key == "share" else statistics.median(values)
            for key, values in each.items()
        }
        for name, each in found.items()
    }


def many_streams(
    pair: Pair, prompts: Sequence[Prompt], streams: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Medians of every way, in turns: `rounds` times where one group of prompts is all there is."""
    found: dict[str, list[tuple[float, float, float]]] = {str(way): [] for way in WAYS}
    groups = [prompts[at : at + streams] for at in range(0, len(prompts) // streams * streams, streams)]
    for _ in range(rounds if len(groups) == 1 else 1):
        for group in groups:
            for way in WAYS:
                sys.stderr.write(f"{streams} streams, {way}\n")
                found[str(way)].append(pair.write(way, group))
    return {
        name: dict(
            zip(
                ("tok_s", "overhead", "share"), map(statistics.median, zip(*values, strict=True)), strict=True
            )
        )
        for name, values in found.items()
    }


def compare(path: Path, tau: float, with_others: bool, counts: Sequence[int], rounds: int) -> dict[str, Any]:
    folders = {name: locate(Catalogue.load()[name]) for name in (SMALL, LARGE)}
    tokenizer = AutoTokenizer.from_pretrained(folders[LARGE], local_files_only=True)
    small, large = (load_runner(folders[name], slots=SLOTS, context=1536) for name in (SMALL, LARGE))
    pair = Pair(small, large, tokenizer, tau)
    sys.stderr.write("measuring calls\n")
    prompts = prompts_of(tokenizer, path)
    costs = measure_pair(small, large, context=NEW // 2 + int(statistics.median(map(len, prompts))))
    asked, others = prompts[:SLOTS], prompts[SLOTS:]
    pair.read(others)
    habits = {way: pair.habits(way, others) for way in WAYS}
    pair.read(asked)
    rivals = (
        {
            "llama.cpp": lambda prompt: llama_speed(folders[LARGE] / "model.gguf", prompt, NEW),
            "assisted": assisted(folders[SMALL], folders[LARGE]),
        }
        if with_others and 1 in counts
        else {}
    )
    measured = {1: one_stream(pair, asked[:QUESTIONS], rivals)} if 1 in counts else {}
    rivals.clear()
    gc.collect()
    for streams in sorted({*counts} - {1}):
        measured[streams] = many_streams(pair, asked[: max(QUESTIONS, streams)], streams, rounds)
    return summary(measured, costs, habits) | {
        "tau": tau,
        "conditions": costs.conditions | {"cores": os.cpu_count()},
    }


def summary(
    measured: dict[int, dict[str, dict[str, float]]],
    costs: CostModel,
    habits: dict[DecodingMode, HandoffStats],
) -> dict[str, Any]:
    predicted = {
        streams: {str(way): costs.predict(way, habits[way], streams) for way in WAYS} for streams in measured
    }
    told: dict[str, Any] = {"measured": measured, "predicted": predicted}
    errors = [
        abs(measured[streams][str(way)]["tok_s"] / predicted[streams][str(way)] - 1)
        for streams in measured
        for way in WAYS
    ]
    told["model_error_max"] = max(errors)
    for streams, expected in predicted.items():
        auto = max(expected, key=lambda name: expected[name])
        best = max(measured[streams][str(way)]["tok_s"] for way in WAYS)
        told[f"auto_{streams}"] = auto
        told[f"auto_over_best_{streams}"] = measured[streams][auto]["tok_s"] / best
        told[f"overhead_{streams}"] = max(measured[streams][str(way)]["overhead"] for way in WAYS)
    if 1 not in measured:
        return told
    alone = measured[1]
    stitch = max((way for way in WAYS if way.routed), key=lambda way: alone[str(way)]["tok_s"])
    told["stitch"], told["stitch_llm_share"] = str(stitch), alone[str(stitch)]["share"]
    if "llama.cpp" in alone:
        other = alone["llama.cpp"]["tok_s"]
        told["llm_over_llamacpp"] = alone[str(LARGE_ALONE)]["tok_s"] / other
        told["speculative_over_llamacpp"] = alone[str(WAYS[1])]["tok_s"] / other
        told["stitch_over_llamacpp"] = alone[str(stitch)]["tok_s"] / other
        told["stitch_over_assisted"] = alone[str(stitch)]["tok_s"] / alone["assisted"]["tok_s"]
    return told


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return round(value, 3) if isinstance(value, float) else value


def show(told: dict[str, Any]) -> None:
    table = Table("way", "streams", "tokens/s", "expected", "overhead", "large model's share", box=None)
    for streams, each in told["measured"].items():
        for name, values in each.items():
            expected = told["predicted"][streams].get(name)
            table.add_row(
                name,
                str(streams),
                f"{values['tok_s']:.1f}",
                "" if expected is None else f"{expected:.1f}",
                f"{values['overhead']:.3f}" if "overhead" in values else "",
                f"{values['share']:.0%}" if "share" in values else "",
            )
    Console(width=110).print(table)
    for name, value in told.items():
        if name not in ("measured", "predicted"):
            print(f"{name}: {value}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", type=Path, help="JSONL with question and answer, at least 28 of them")
    parser.add_argument("--tau", type=float, default=0.06, help="R-Stitch's threshold")
    parser.add_argument("--rounds", type=int, default=3, help="turns at 16 streams (default 3)")
    parser.add_argument(
        "--streams", type=int, action="append", choices=(1, 4, SLOTS), help="texts at once; all by default"
    )
    parser.add_argument("--alone", action="store_true", help="without llama.cpp and assisted generation")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    told = rounded(
        {"machine": platform.machine()}
        | compare(
            arguments.questions,
            arguments.tau,
            not arguments.alone,
            arguments.streams or (1, 4, SLOTS),
            arguments.rounds,
        )
    )
    if arguments.json:
        print(json.dumps(told))
    else:
        show(told)


if __name__ == "__main__":
    main()
