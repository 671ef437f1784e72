"""Tokens a second of a local pair on every engine and in every mode, beside llama.cpp's own server.

Everything in one run, on the real pair of the catalogue (1.5B and 0.5B): questions asked as cot asks them,
greedy tokens, prompts read beforehand; 1, 4 and 16 texts at once. All ways take turns, so that whatever slows
the machine slows all; figures are medians. The ways: the large model alone, speculative, R-Stitch without and
with drafts, R2R, on each engine; "auto"; llama.cpp's server of the wheel that the engine "llama" uses, on the
same GGUF file, with as many slots as there are texts. "auto" is the pair as a catalogue entry with so many
slots and without `mode` and `engine` runs it: each model on the engine that was the fastest for them where
`viaticum models test` times it (here in the same run), its mode left to it.

    viaticum models pull && pip install xllamacpp
    python benchmarks/decode.py QUESTIONS.jsonl [--json] [--questions 8] [--tokens 32] [--rounds 3]

Keys: auto_over_best_N, "auto" over the fastest single way of any engine at N texts; auto_over_llm_N, over the
large model alone on the better engine; llm_over_llamacpp_N, that over llama.cpp's server; overhead_N, wall
time over the time inside the models, of the way that adds most; model_error_max, the largest distance from 1
of measured over predicted tokens a second.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _llama import LlamaServer
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from viaticum.catalogue import Catalogue
from viaticum.decoders import MixedDecoder, Request, Runner, Stats, load_runner
from viaticum.decoders.auto_mode import ModeChooser
from viaticum.decoders.cost import CostModel, conditions, measure_pair
from viaticum.decoders.decoding_mode import LARGE_ALONE, DecodingMode, HandoffStats
from viaticum.errors import ViaticumError
from viaticum.models.engine_choice import EngineFigures, fastest_engine
from viaticum.models.engine_trial import time_calls
from viaticum.models.token_routers import token_router
from viaticum.questions import read_questions
from viaticum.routers.token import AlwaysLarge, EntropyRouter, TokenRouter
from viaticum.strategies import get as get_strategy
from viaticum.weights import locate

SMALL, LARGE, R2R = "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "r2r"
COUNTS = (1, 4, 16)
OTHERS = 16  # questions from which hand-off rates are learned
CONTEXT = 1536
Prompt = list[int]


@dataclass(frozen=True)
class Way:
    """A mode, with the router of its routed form."""

    name: str
    mode: DecodingMode
    router: str = ""


WAYS = (
    Way("llm", LARGE_ALONE),
    Way("speculative", DecodingMode(False, 3)),
    Way("r-stitch", DecodingMode(True), "r-stitch"),
    Way("r-stitch:1", DecodingMode(True, 1), "r-stitch"),
    Way("r2r", DecodingMode(True), "r2r"),
)
AUTO = "auto"


@dataclass
class Result:
    """tokens a second; wall time over the time inside the models; share of tokens of the large model."""

    speed: float
    overhead: float
    share: float


@dataclass
class EnginePair:
    """The two models on one engine, or on one each."""

    engine: str
    small: Runner
    large: Runner
    tokenizer: Any
    routers: dict[str, TokenRouter]
    inside: float = 0.0
    decoders: dict[str, MixedDecoder] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for runner in (self.small, self.large):
            self._watch(runner)

    def _watch(self, runner: Runner) -> None:
        call = runner._forward

        def timed(*given: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*given, **options)
            finally:
                self.inside += time.perf_counter() - began

        runner._forward = timed  # type: ignore[method-assign]

    @property
    def ways(self) -> list[Way]:
        return [way for way in WAYS if not way.router or way.router in self.routers]

    def decoder(self, way: Way | None) -> MixedDecoder:
        """None: the mode chooses itself."""
        name = AUTO if way is None else way.name
        if name not in self.decoders:
            alone = way is not None and way.mode == LARGE_ALONE
            self.decoders[name] = MixedDecoder(
                self.large,
                None if alone else self.small,
                tokenizer=self.tokenizer,
                router=self.routers[way.router if way and way.router else "r-stitch"]
                if way is None or way.router
                else AlwaysLarge(),
                draft=0 if way is None else way.mode.draft,
                loop_guard=None,
                modes=ModeChooser(self.routers["r-stitch"]) if way is None else None,
            )
        return self.decoders[name]

    def read(self, prompts: Sequence[Prompt]) -> None:
        """Let each prompt lie in a slot of its own, at both models."""
        for slot, prompt in enumerate(prompts):
            for runner in (self.small, self.large):
                runner.reuse_prefix(slot, prompt)
                runner.extend([slot], [prompt[len(runner.cached_tokens[slot]) :]])

    def write(self, way: Way | None, prompts: Sequence[Prompt], tokens: int) -> Result:
        """Decode all prompts at once."""
        decoder = self.decoder(way)
        decoder.stats = Stats()
        self.inside, began = 0.0, time.perf_counter()
        results = decoder.generate_all([Request(prompt, max_new_tokens=tokens) for prompt in prompts])
        wall = time.perf_counter() - began
        made_by = [maker for result in results for maker in result.trace.made_by]
        share = sum(results[0].trace.models[maker] == "large" for maker in made_by) / len(made_by)
        return Result(len(made_by) / wall, wall / self.inside, share)

    def rates(self, way: Way, prompts: Sequence[Prompt], tokens: int) -> HandoffStats:
        """How the models hand over on these prompts, all at once."""
        self.write(way, prompts, tokens)
        return HandoffStats.from_stats(self.decoder(way).stats)


def prompts_of(tokenizer: Any, path: Path, count: int) -> list[Prompt]:
    cot = get_strategy("cot")
    return [
        tokenizer.apply_chat_template(
            cot.messages(question.query), add_generation_prompt=True, return_dict=False
        )
        for question in read_questions(path, limit=count)
    ]


def load_pair(engine: str, arguments: argparse.Namespace, tokenizer: Any) -> EnginePair:
    catalogue = Catalogue.load()
    small, large = (
        load_runner(
            locate(catalogue[name]),
            engine=engine,  # type: ignore[arg-type]
            dtype=arguments.dtype,
            slots=max(arguments.streams),
            context=CONTEXT,
        )
        for name in (SMALL, LARGE)
    )
    routers: dict[str, TokenRouter] = {"r-stitch": EntropyRouter(arguments.tau)}
    try:
        routers["r2r"] = token_router(catalogue[R2R], catalogue, small)
    except ViaticumError as error:  # no embeddings or hidden states on this engine
        sys.stderr.write(f"{engine}: without R2R: {error}\n")
    return EnginePair(engine, small, large, tokenizer, routers)


def measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    folder = locate(Catalogue.load()[LARGE])
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    most = max(arguments.streams)
    prompts = prompts_of(tokenizer, arguments.file, max(most, arguments.questions) + OTHERS)
    asked, others = prompts[:-OTHERS], prompts[-OTHERS:][:most]
    pairs = [load_pair(engine, arguments, tokenizer) for engine in arguments.engines]
    costs, rates = {}, {}
    context = arguments.tokens // 2 + int(statistics.median(map(len, prompts)))
    for pair in pairs:
        sys.stderr.write(f"{pair.engine}: timing calls\n")
        costs[pair.engine] = measure_pair(pair.small, pair.large, context=context, repeats=arguments.repeats)
        pair.read(others)
        for way in pair.ways:
            rates[pair.engine, way.name] = pair.rates(way, others, arguments.tokens)
    figures = [engine_figures(pairs, name) for name in ("small", "large")]
    measured: dict[int, dict[str, dict[str, float]]] = {}
    flags: dict[int, Any] = {}
    found = list[EnginePair]()
    for streams in arguments.streams:
        auto = auto_pair([*pairs, *found], [fastest_engine(each, streams) for each in figures])
        found.append(auto)
        auto.read(others[:streams])
        for _ in range(max(3, 512 // (streams * max(arguments.tokens, 24)) + 1)):  # until its trials are over
            auto.write(None, others[:streams], max(arguments.tokens, 24))
        measured[streams], flags[streams] = turns(arguments, pairs, auto, folder, asked, streams)
    return summary(measured, pairs, costs, rates) | {
        "auto_chose": {streams: values[AUTO]["mode"] for streams, values in measured.items()},
        "llamacpp": flags,
        "tau": arguments.tau,
        "conditions": conditions(*(runner for pair in pairs for runner in (pair.small, pair.large))),
    }


def engine_figures(pairs: list[EnginePair], name: str) -> dict[str, EngineFigures]:
    """Of the small or the large model on each engine of the run, as `viaticum models test` times it."""
    runners = {pair.engine: getattr(pair, name) for pair in pairs}
    for runner in runners.values():
        for slot in range(runner.slots):
            runner.reset(slot)
    return {engine: EngineFigures(0.0, None, *time_calls(runner)) for engine, runner in runners.items()}


def auto_pair(pairs: list[EnginePair], engines: Sequence[str]) -> EnginePair:
    """The pair with the small and the large model on these engines, of the weights that are loaded."""
    small, large = engines
    name = large if small == large else f"{small} {large}"
    by_engine = {pair.engine: pair for pair in pairs}
    if name in by_engine:
        return by_engine[name]
    return EnginePair(
        name,
        by_engine[small].small,
        by_engine[large].large,
        by_engine[small].tokenizer,
        by_engine[small].routers,
    )


def turns(
    arguments: argparse.Namespace,
    pairs: list[EnginePair],
    auto: EnginePair,
    folder: Path,
    asked: Sequence[Prompt],
    streams: int,
) -> tuple[dict[str, dict[str, Any]], Any]:
    """Medians of every way, in turns over groups of prompts."""
    server = None if arguments.no_server else LlamaServer(folder / "model.gguf", streams, CONTEXT)
    total = max(streams, arguments.questions) // streams * streams
    groups = [asked[at : at + streams] for at in range(0, total, streams)]
    found: dict[str, list[Result]] = {}
    servers: list[float] = []
    for number in range(max(arguments.rounds, len(groups) if streams == 1 else 0)):
        group = groups[number % len(groups)]
        sys.stderr.write(f"{streams} at once, turn {number + 1}\n")
        for pair in {id(pair): pair for pair in (*pairs, auto)}.values():
            pair.read(group)
        if number == 0:  # a mode and its times are chosen for so many texts
            auto.write(None, group, arguments.tokens)
        for pair in pairs:
            for way in pair.ways:
                result = pair.write(way, group, arguments.tokens)
                found.setdefault(f"{pair.engine} {way.name}", []).append(result)
        found.setdefault(AUTO, []).append(auto.write(None, group, arguments.tokens))
        if server is not None:
            servers.append(server.speed(group, arguments.tokens))
    values: dict[str, dict[str, Any]] = {
        name: {
            "tok_s": statistics.median(each.speed for each in results),
            "overhead": statistics.median(each.overhead for each in results),
            "share": statistics.mean(each.share for each in results),
        }
        for name, results in found.items()
    }
    modes = auto.decoder(None).config.modes
    values[AUTO]["mode"] = f"{auto.engine} {modes.mode if modes else ''}"
    flags = None
    if server is not None:
        values["llama.cpp"] = {"tok_s": statistics.median(servers)}
        flags = server.flags
        server.close()
    return values, flags


def summary(
    measured: dict[int, dict[str, dict[str, Any]]],
    pairs: list[EnginePair],
    costs: dict[str, CostModel],
    rates: dict[tuple[str, str], HandoffStats],
) -> dict[str, Any]:
    found: dict[str, Any] = {"measured": measured, "predicted": {}}
    errors = []
    for streams, values in measured.items():
        single = {
            f"{pair.engine} {way.name}": costs[pair.engine].predict(
                way.mode, rates[pair.engine, way.name], streams
            )
            for pair in pairs
            for way in pair.ways
        }
        found["predicted"][streams] = single
        errors += [abs(values[name]["tok_s"] / expected - 1) for name, expected in single.items()]
        best = max(single, key=lambda name: values[name]["tok_s"])
        llm = max(values[f"{pair.engine} llm"]["tok_s"] for pair in pairs)
        found[f"best_{streams}"] = best
        found[f"auto_over_best_{streams}"] = values[AUTO]["tok_s"] / values[best]["tok_s"]
        found[f"auto_over_llm_{streams}"] = values[AUTO]["tok_s"] / llm
        found[f"overhead_{streams}"] = max(values[name]["overhead"] for name in (*single, AUTO))
        if "llama.cpp" in values:
            found[f"llm_over_llamacpp_{streams}"] = llm / values["llama.cpp"]["tok_s"]
    return found | {"model_error_max": max(errors)}


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return round(value, 3) if isinstance(value, float) else value


def show(found: dict[str, Any]) -> None:
    table = Table("way", "at once", "tokens/s", "expected", "overhead", "large model's share", box=None)
    for streams, each in found["measured"].items():
        for name, values in each.items():
            expected = found["predicted"][streams].get(name)
            table.add_row(
                name,
                str(streams),
                f"{values['tok_s']:.1f}",
                "" if expected is None else f"{expected:.1f}",
                f"{values['overhead']:.3f}" if "overhead" in values else "",
                f"{values['share']:.0%}" if "share" in values else "",
            )
    Console(width=110).print(table)
    for name, value in found.items():
        if name not in ("measured", "predicted"):
            print(f"{name}: {value}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="JSONL with question and answer, at least 32 of them")
    parser.add_argument("--engines", nargs="+", default=["torch"], help="torch, llama (default torch)")
    parser.add_argument("--dtype", default="auto", help="of torch: float32, bfloat16, auto")
    parser.add_argument("--tau", type=float, default=0.06, help="R-Stitch's threshold")
    parser.add_argument("--questions", type=int, default=8, help="at one text at once (default 8)")
    parser.add_argument("--tokens", type=int, default=32, help="of each text (default 32)")
    parser.add_argument("--rounds", type=int, default=3, help="turns at each number of texts (default 3)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each size (default 3)")
    parser.add_argument("--streams", type=int, nargs="+", default=COUNTS, help="texts at once (1 4 16)")
    parser.add_argument("--no-server", action="store_true", help="without llama.cpp's server")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    found = rounded(
        {"machine": platform.machine(), "cores": os.cpu_count()}
        | {name: getattr(arguments, name) for name in ("questions", "tokens", "rounds", "dtype")}
        | measure_all(arguments)
    )
    if arguments.json:
        print(json.dumps(found))
    else:
        show(found)


if __name__ == "__main__":
    main()
