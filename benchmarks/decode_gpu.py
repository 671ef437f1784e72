"""Decoding at the limit of a GPU's memory: a small and a large model of real shapes, with random weights.

Needs torch and transformers and no install: this file puts its own checkout on the path. The shapes are those
of DeepSeek-R1-Distill-Qwen 1.5B and 32B with one vocabulary. The decoded tokens are noise, so which model
decodes which token is replayed from generated traces: the large model has 13% of the tokens, in runs of
mostly 1 to 3, as the papers report.

    python benchmarks/decode_gpu.py --out decode_gpu.json        # one GPU of 96 GB or more
    python benchmarks/decode_gpu.py --device cpu --tiny          # seconds: whether it works

One JSON object on stdout, and in --out after every part, so that a run that is ended keeps what it has. A
part that fails is listed under `faults` with its traceback; the others run, and the exit status is 1.

For 1, 4, 8 and 16 streams, after an untimed run that prefills the prompts and captures every graph: tokens a
second of the large model alone and of both together (with the best number of rows that the large one waits
for). floor_s: the bytes that the calls have to read (weights but the input embedding, keys and values of the
rows) over the measured bandwidth; floor_ratio: that over the seconds taken, 1 at the limit.

Speculative decoding is predicted, not run: random models agree on nothing. `decoders.cost` simulates it with
the measured call times and --acceptance; its predictions of the two modes that were run stand beside them.
launches: what a token of one stream of both models costs in calls of the CUDA runtime, by torch's profiler.
graph_error: the largest logit difference of static (on CUDA: captured) calls from dynamic ones, tiny model,
float32.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from viaticum.decoders import MixedDecoder, Request, Runner, Stats, TorchRunner
from viaticum.decoders.call_times import CallTimes, measure
from viaticum.decoders.cost import CostModel
from viaticum.decoders.decoding_mode import LARGE_ALONE, DecodingMode, HandoffStats
from viaticum.decoders.graphs import GraphRunner
from viaticum.routers.token import Step, TokenRouter

STREAMS = (1, 4, 8, 16)
BATCHES = (1, 2, 4)  # rows that the large model waits for
SHARE = 0.13  # of the tokens, the large model's
RUNS = {1: 0.60, 2: 0.25, 3: 0.10, 4: 0.03, 5: 0.02}  # lengths of the large model's runs, and how often
DRAFTS = (1, 2, 3, 4, 6, 8)
VOCABULARY = 152_064


def shape(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
    }


SHAPES = {"small": shape(1536, 28, 12, 2, 8960), "large": shape(5120, 64, 40, 8, 27648)}
TINY = {"small": shape(32, 2, 4, 2, 64), "large": shape(64, 3, 4, 2, 128)}


class Numbers:
    """A tokenizer for noise."""

    def decode(self, token_ids: list[int]) -> str:
        return "." * len(token_ids)


class Trace(TokenRouter):
    """`ReplayRouter` with decisions uploaded from pinned memory, and R-Stitch's comparison beside them."""

    depends_on_token = False

    def __init__(self, large: Sequence[Sequence[bool]], device: torch.device) -> None:
        self._large, self._device = large, device
        self._pinned = torch.zeros(64, dtype=torch.bool, pin_memory=device.type == "cuda")

    def keep_small(self, step: Step) -> Tensor:
        return self._answers(step, 0)

    def hand_back(self, step: Step) -> Tensor:
        return self._answers(step, 1)

    def _answers(self, step: Step, ahead: int) -> Tensor:
        small = []
        for request, at in zip(step.requests, step.positions, strict=True):
            trace = self._large[request]
            small.append(at + ahead >= len(trace) or not trace[at + ahead])
        # The results of a step are on the host before the next one begins: the buffer is free again.
        staged = self._pinned[: len(small)]
        staged.copy_(torch.tensor(small))
        return staged.to(self._device, non_blocking=True) & (step.entropy <= 2)


def a_trace(length: int, rng: random.Random) -> list[bool]:
    """Who writes: True for the large model, whose share is exact. The small one's runs are geometric."""
    lengths, chances = list(RUNS), list(RUNS.values())
    mean = sum(run * chance for run, chance in RUNS.items())
    ends = 1 / (mean * (1 - SHARE) / SHARE)  # the chance that a run of the small model ends after a token
    while True:
        trace: list[bool] = []
        while len(trace) < length:
            trace.append(False)
            if rng.random() < ends:
                trace += [True] * rng.choices(lengths, chances)[0]
        if sum(trace[:length]) == round(SHARE * length):
            return trace[:length]


def build(
    shape: dict[str, Any], vocabulary: int, context: int, device: torch.device, dtype: torch.dtype
) -> Any:
    config = Qwen2Config(
        **shape,
        vocab_size=vocabulary,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        rms_norm_eps=1e-6,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    )
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def bandwidth(device: torch.device, gigabytes: float) -> dict[str, float]:
    """Bytes a second of reading alone (a sum) and of a copy, which reads and writes: the best of ten."""
    source = torch.ones(int(gigabytes * 2**30) // 4, device=device)
    target = torch.empty_like(source)
    size = source.numel() * 4
    works = {"read": (size, lambda: source.sum()), "copy": (2 * size, lambda: target.copy_(source))}
    found = {}
    for name, (moved, work) in works.items():
        seconds = []
        for _ in range(12):
            settle(device)
            began = time.perf_counter()
            work()
            settle(device)
            seconds.append(time.perf_counter() - began)
        found[name] = moved / min(seconds[2:])
    return found


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def graph_error(device: torch.device) -> float:
    """The largest logit difference of static and dynamic calls with ragged rows, on a tiny float32 model."""
    torch.manual_seed(0)
    # Weights large enough that logits differ where keys do.
    model = build(TINY["large"] | {"initializer_range": 0.3}, 97, 512, device, torch.float32).eval()
    static, dynamic = (
        GraphRunner(copy.deepcopy(model), slots=5, context=400),
        TorchRunner(model, slots=5, context=400),
    )
    rng, worst = random.Random(0), 0.0
    for _ in range(40):
        slots = rng.sample(range(5), rng.choice([1, 2, 5]))
        new = [[rng.randrange(97) for _ in range(rng.choice([1, 1, 2, 5, 12]))] for _ in slots]
        got, expected = static.extend(slots, new), dynamic.extend(slots, new)
        worst = max(worst, float((got - expected).abs().max()))
    assert static.static_calls == 40
    return worst


class Bench:
    """Both models, and what a call of each has to read."""

    def __init__(
        self, small: Runner, large: Runner, prompts: list[list[int]], new: int, bytes_a_second: float
    ):
        self.small, self.large, self.prompts, self.new = small, large, prompts, new
        self.bytes_a_second = bytes_a_second
        rng = random.Random(1)
        self.traces = [a_trace(new, rng) for _ in prompts]

    def read(self) -> None:
        """Let each prompt lie in a slot of its own, at both models."""
        for slot, prompt in enumerate(self.prompts):
            for runner in (self.small, self.large):
                runner.reuse_prefix(slot, prompt)
                if new := prompt[len(runner.cached_tokens[slot]) :]:
                    runner.forward([slot], [new])

    def floor(self, stats: Stats) -> float:
        """Seconds that reading takes for the calls that were made."""
        length = len(self.prompts[0]) + self.new / 2
        bytes_read = 0.0
        for runner, calls in ((self.small, stats.small), (self.large, stats.large)):
            config = runner.model.config
            head_dim = config.hidden_size // config.num_attention_heads
            width = runner.model.dtype.itemsize
            token = 2 * width * config.num_hidden_layers * config.num_key_value_heads * head_dim
            embedding: Any = runner.model.get_input_embeddings()
            weights = runner.weight_bytes - embedding.weight.numel() * width
            bytes_read += calls.calls * weights + calls.rows * length * token
        return bytes_read / self.bytes_a_second

    def write(self, streams: int, *, mixed: bool, batch: int = 1) -> dict[str, Any]:
        """The second of two equal runs: the first one captures the graphs."""
        decoder = MixedDecoder(
            self.large,
            self.small if mixed else None,
            tokenizer=Numbers(),
            router=Trace(self.traces, self.large.device) if mixed else None,
            llm_batch=batch,
            loop_guard=None,
        )
        requests = [Request(prompt, max_new_tokens=self.new) for prompt in self.prompts[:streams]]
        seconds = 0.0
        for _ in range(2):
            self.read()
            settle(self.large.device)
            decoder.stats = Stats()
            began = time.perf_counter()
            results = decoder.generate_all(requests)
            seconds = time.perf_counter() - began
        bad = [result.error for result in results if len(result.trace.tokens) != self.new]
        assert not bad, f"a text was cut: {bad}"
        stats, tokens = decoder.stats, self.new * streams
        floor = self.floor(stats)
        return {
            "tok_s": tokens / seconds,
            "seconds": seconds,
            "floor_s": floor,
            "floor_ratio": floor / seconds,
            "llm_share": stats.large_tokens / tokens,
            "small_calls": stats.small.calls,
            "large_calls": stats.large.calls,
            "small_call_ms": 1e3 * stats.small.seconds / max(1, stats.small.calls),
            "large_call_ms": 1e3 * stats.large.seconds / max(1, stats.large.calls),
            "beside_calls_s": seconds - stats.small.seconds - stats.large.seconds,
            "habits": HandoffStats.from_stats(stats) if mixed else None,
        }


def streams_of(bench: Bench, costs: CostModel | None, streams: int, acceptance: float) -> dict[str, Any]:
    """Everything about one number of streams; without predictions where calls could not be timed."""
    alone = bench.write(streams, mixed=False)
    both = {n: bench.write(streams, mixed=True, batch=n) for n in BATCHES if n <= max(1, streams // 2)}
    best = max(both, key=lambda n: both[n]["tok_s"])
    mixed = both[best] | {"llm_batch": best}
    alone.pop("habits")
    habits = {n: each.pop("habits") for n, each in both.items()}
    mixed.pop("habits")
    found = {
        "llm": alone,
        "mixed": mixed,
        "mixed_tok_s_by_llm_batch": {n: each["tok_s"] for n, each in both.items()},
        "mixed_over_llm": mixed["tok_s"] / alone["tok_s"],
        "mixed_over_llm_floor": alone["floor_s"] / mixed["floor_s"],
    }
    if costs is None:
        return found
    guesses = {
        k: costs.predict(DecodingMode(False, k), HandoffStats(1.0, 0.0, acceptance), streams) for k in DRAFTS
    }
    draft = max(guesses, key=lambda k: guesses[k])
    alone["predicted_tok_s"] = costs.predict(LARGE_ALONE, HandoffStats(1.0, 0.0), streams)
    mixed["predicted_tok_s"] = costs.predict(DecodingMode(True), habits[best], streams, batch=best)
    return found | {
        "speculative_predicted": {"draft": draft, "acceptance": acceptance, "tok_s": guesses[draft]},
        "mixed_over_speculative": mixed["tok_s"] / guesses[draft],
    }


def say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def build_runners(arguments: argparse.Namespace, vocabulary: int, device: torch.device) -> list[Runner]:
    """The runners of the small and the large model, with random weights."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    kind = Runner if arguments.dynamic else GraphRunner
    runners = []
    for name, shape in (TINY if arguments.tiny else SHAPES).items():
        say(f"building the {name} model")
        torch.manual_seed(0)
        model = build(shape, vocabulary, 4096, device, dtype)
        slots, context = max(arguments.streams), arguments.prompt + arguments.new + 32
        runners.append(kind(model, slots=slots, context=context))
    return runners


def conditions(arguments: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """What the measurements depend on: the machine, the libraries, the models and the prompts."""
    device = bench.large.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shapes": "tiny" if arguments.tiny else "R1-Distill-Qwen 1.5B and 32B",
        "dtype": str(bench.large.model.dtype),
        "runner": type(bench.large).__name__,
        "prompt": arguments.prompt,
        "new": arguments.new,
        "trace_llm_share": sum(map(sum, bench.traces)) / (arguments.new * len(bench.prompts)),
        "speculative": "predicted by decoders.cost from the measured call times, not run",
    }


def timed(small: Runner, large: Runner, arguments: argparse.Namespace) -> CostModel:
    sizes = {"rows": arguments.streams, "context": arguments.prompt, "repeats": 3}
    of_small = measure(small, **sizes, tokens=(1, 2, 3, 4))
    return CostModel(of_small, measure(large, **sizes, tokens=(1, 2, 3, 4, 6, 9), verifies=True), {})


def milliseconds(costs: CostModel) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of a call by its rows, one number for each measured number of tokens."""

    def table(times: CallTimes) -> dict[str, list[float]]:
        return {
            f"{rows} rows": [round(1e3 * each, 3) for each in line]
            for rows, line in zip(times.rows, times.seconds, strict=True)
        }

    return {"small (1 to 4 tokens)": table(costs.small), "large (1, 2, 3, 4, 6, 9)": table(costs.large)}


def graphs_of(bench: Bench) -> dict[str, int | None]:
    """Graphs that were captured so far, and the most memory that was in use."""
    device = bench.large.device
    return {
        "small": len(getattr(bench.small, "_graphs", ())),
        "large": len(getattr(bench.large, "_graphs", ())),
        "memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


class Report:
    """What was found so far, written to a file after every part.

    Args:
        path: of the JSON file; None: none is written.
    """

    def __init__(self, path: Path | None) -> None:
        self.found: dict[str, Any] = {"faults": []}
        self._path = path

    def part(self, name: str, work: Callable[[], Any], show: Callable[[Any], Any] | None = None) -> Any:
        """Run a part and keep what it returns, as `show` writes it; None if it fails, which is kept too."""
        say(name)
        made, began = None, time.perf_counter()
        try:
            made = work()
            self.found[name] = made if show is None else show(made)
        except Exception as error:
            say(f"{name}: {error!r}")
            self.found["faults"].append({"part": name, "error": repr(error), "trace": traceback.format_exc()})
        self.found.setdefault("part_seconds", {})[name] = time.perf_counter() - began
        if self._path is not None:
            self._path.write_text(json.dumps(rounded(self.found), indent=1))
        return made


def launches(bench: Bench) -> dict[str, float]:
    """Calls of the CUDA runtime a token, by name, while both models write one text."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        made = bench.write(1, mixed=True)
    tokens = 2 * bench.new  # `write` writes twice
    counts = Counter(event.name for event in profile.events() if event.name.startswith("cuda"))
    return {name: count / tokens for name, count in counts.most_common()} | {"tok_s": made["tok_s"]}


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure everything; returns the JSON object that is printed."""
    device, tiny = torch.device(arguments.device), arguments.tiny
    if tiny:
        arguments.prompt, arguments.new = 24, 40
    prompt, new = arguments.prompt, arguments.new
    vocabulary, slots = 512 if tiny else VOCABULARY, max(arguments.streams)
    report = Report(arguments.out)
    report.part("graph_error", lambda: graph_error(device))
    speeds = report.part("bandwidth_bytes_s", lambda: bandwidth(device, 0.06 if tiny else 4.0))
    small, large = build_runners(arguments, vocabulary, device)
    report.found |= {"small_weight_bytes": small.weight_bytes, "large_weight_bytes": large.weight_bytes}
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what was measured above, and of layers that were joined
    costs = report.part("call_ms", lambda: timed(small, large, arguments), milliseconds)
    rng = random.Random(0)
    prompts = [[rng.randrange(vocabulary) for _ in range(prompt)] for _ in range(slots)]
    bench = Bench(small, large, prompts, new, max((speeds or {"unknown": math.nan}).values()))
    report.found["conditions"] = conditions(arguments, bench)
    for streams in arguments.streams:
        report.part(
            f"streams_{streams}",
            lambda count=streams: (
                streams_of(bench, costs, count, arguments.acceptance) | {"graphs": graphs_of(bench)}
            ),
        )
    if device.type == "cuda" and torch.version.cuda:
        report.part("launches", lambda: launches(bench))
    return report.found


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes; always so on a CPU")
    parser.add_argument("--dynamic", action="store_true", help="without static calls, to see what they bring")
    parser.add_argument(
        "--streams", type=int, nargs="+", default=list(STREAMS), help="rising, beginning with 1"
    )
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=256, help="tokens that each stream writes")
    parser.add_argument(
        "--acceptance", type=float, default=0.8, help="of a draft's next token, for speculative"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON object, written after every part")
    parser.add_argument("--json", action="store_true", help="the JSON object on one line")
    arguments = parser.parse_args()
    arguments.tiny |= torch.device(arguments.device).type == "cpu"
    found = work(arguments)
    print(json.dumps(rounded(found), indent=None if arguments.json else 1))
    sys.exit(bool(found["faults"]))


if __name__ == "__main__":
    main()
