"""What a call of a local model costs by new tokens and by kernel, and one stream beside llama.cpp.

For each model and layout of its weights (`load_runner(weights=...)`): milliseconds of a call that reads 1 to
32 new tokens of one sequence (2 to 32 are what verifying drafts and catching up cost), of 16 sequences that
decode one token each, and of a prompt of 512 tokens; and tokens a second of one greedy stream. llama.cpp runs
the same GGUF file with as many threads (`pip install xllamacpp`; left out where it is not installed). Streams
take turns, so that whatever slows the machine slows all of them. `--quality`: how far low-bit logits are from
bfloat16 ones.

    viaticum models pull
    python benchmarks/call_costs.py [--json] [--model qwen2.5-coder-0.5b] [--quality text.jsonl]
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _llama import llama_speed
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from viaticum.catalogue import Catalogue
from viaticum.decoders import Runner, load_runner
from viaticum.weights import locate

MODELS = ("qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b")
WAYS = ("plain", "bfloat16", "low-bit")
NEW_TOKENS = (1, 2, 3, 4, 5, 8, 16, 32)
PROMPT = list(range(1000, 1200))  # 200 tokens that every stream has before it
STREAM = 48  # tokens of one stream that are timed at once
Stream = Callable[[], float]


def median_ms(work: Callable[[], Any], runs: int) -> float:
    taken = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return round(1000 * statistics.median(taken), 1)


def by_new_tokens(runner: Runner, runs: int) -> dict[str, float]:
    """Milliseconds of one call, by what it reads."""

    def read(tokens: int) -> Callable[[], Any]:
        def work() -> None:
            runner.cached_tokens[0] = PROMPT[:]  # each call comes after the same 200 tokens
            runner.extend([0], [[7] * tokens])

        return work

    runner.extend([0], [PROMPT])
    found = {str(tokens): median_ms(read(tokens), runs) for tokens in NEW_TOKENS}
    rows = list(range(runner.slots))
    for row in rows[1:]:
        runner.reuse_prefix(row, PROMPT)
    runner.extend(rows, [PROMPT[len(runner.cached_tokens[row]) :] or [7] for row in rows])
    found[f"{len(rows)} rows"] = median_ms(lambda: runner.extend(rows, [[7]] * len(rows)), max(3, runs // 2))
    for row in rows:
        runner.reset(row)
    found["prompt 512"] = median_ms(lambda: (runner.reset(0), runner.extend([0], [list(range(512))])), 1)
    runner.reset(0)
    return found


def our_stream(runner: Runner) -> Stream:
    """Tokens a second of a greedy stream after a prompt that was read before."""

    def work() -> float:
        runner.reset(0)
        token = int(runner.extend([0], [PROMPT]).argmax())
        started = time.perf_counter()
        for _ in range(STREAM):
            token = int(runner.extend([0], [[token]]).argmax())
        return STREAM / (time.perf_counter() - started)

    return work


def quality(folder: Path, file: Path, tokens: int = 110) -> dict[str, float]:
    """Low-bit against plain: mean KL of the logits per position, in nats, and the share of equal argmaxes.

    The text is read one token a call, so that the low-bit forms do all the work; greedy answers to eight
    questions of 64 tokens each say how soon the two part.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    questions = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    texts = [
        tokenizer(f"{line['question']}\n{line['answer']}").input_ids[:tokens] for line in questions[300:304]
    ]
    logprobs: dict[str, list[torch.Tensor]] = {}
    greedy: dict[str, list[list[int]]] = {}
    for layout in ("plain", "low-bit"):
        runner = load_runner(folder, weights=layout)  # type: ignore[arg-type]
        rows = []
        for text in texts:
            runner.reset(0)
            for part in [text] if layout == "plain" else [[token] for token in text]:
                rows += list(runner.forward([0], [part], [len(part)]).logits.log_softmax(-1))
        logprobs[layout] = rows
        greedy[layout] = []
        for line in questions[310:318]:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": line["question"]}], add_generation_prompt=True, return_dict=False
            )
            runner.reset(0)
            made = [int(runner.extend([0], [ids]).argmax())]
            while len(made) < 64:
                made.append(int(runner.extend([0], [made[-1:]]).argmax()))
            greedy[layout].append(made)
        del runner
        gc.collect()
    pairs = list(zip(logprobs["plain"], logprobs["low-bit"], strict=True))
    ids = [token for text in texts for token in text]
    starts = {sum(map(len, texts[:n])) for n in range(len(texts) + 1)}
    following = [(n, ids[n + 1]) for n in range(len(ids) - 1) if n + 1 not in starts]
    same = [
        next((n for n, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), len(one))
        for one, two in zip(greedy["plain"], greedy["low-bit"], strict=True)
    ]
    return {
        "tokens": len(ids),
        "mean_kl": round(statistics.mean(float((a.exp() * (a - b)).sum()) for a, b in pairs), 5),
        "same_first_choice": round(statistics.mean(float(a.argmax() == b.argmax()) for a, b in pairs), 4),
        "perplexity_plain": round(
            float(torch.stack([-logprobs["plain"][n][t] for n, t in following]).mean().exp()), 4
        ),
        "perplexity_low_bit": round(
            float(torch.stack([-logprobs["low-bit"][n][t] for n, t in following]).mean().exp()), 4
        ),
        "greedy_tokens_before_first_difference_of_64": round(statistics.mean(same), 1),
        "greedy_texts_equal_of_8": sum(n == 64 for n in same),
    }


def measure(name: str, layouts: list[str], runs: int, rounds: int) -> dict[str, Any]:
    folder = locate(Catalogue.load()[name])
    found: dict[str, Any] = {"model": name, "calls": {}, "load_s": {}, "streams": {}}
    for layout in layouts:
        started = time.perf_counter()
        runner = load_runner(folder, slots=16, context=1024, weights=layout)  # type: ignore[arg-type]
        found["load_s"][layout] = round(time.perf_counter() - started, 1)
        found["calls"][layout] = by_new_tokens(runner, runs)
        if layout != layouts[-1]:
            del runner
            gc.collect()
    streams = {f"viaticum {layouts[-1]}": our_stream(runner)}
    if importlib.util.find_spec("xllamacpp"):
        streams["llama.cpp"] = lambda: llama_speed(folder / "model.gguf", PROMPT, STREAM)
    speeds: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(rounds):
        for name, stream in streams.items():
            speeds[name].append(stream())
    found["streams"] = {name: round(statistics.median(each), 1) for name, each in speeds.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", choices=MODELS, help="default: both")
    parser.add_argument("--weights", action="append", choices=WAYS, help="default: all; the last one streams")
    parser.add_argument("--runs", type=int, default=9, help="calls a figure (default 9)")
    parser.add_argument("--rounds", type=int, default=5, help="streams a figure (default 5)")
    parser.add_argument("--quality", type=Path, help="only this: a JSONL file with question and answer")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    models = arguments.model or MODELS
    conditions = (
        f"{torch.get_num_threads()} threads, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{platform.machine()}"
    )
    if arguments.quality:
        found = [
            {"model": name, **quality(locate(Catalogue.load()[name]), arguments.quality)} for name in models
        ]
        print(json.dumps({"conditions": conditions, "quality": found}, indent=None if arguments.json else 1))
        return
    results = [
        measure(name, arguments.weights or list(WAYS), arguments.runs, arguments.rounds) for name in models
    ]
    if arguments.json:
        print(json.dumps({"conditions": conditions, "results": results}))
        return
    for result in results:
        columns = list(next(iter(result["calls"].values())))
        table = Table(
            f"{result['model']}, ms", *columns, "load s", box=None, pad_edge=False, title_justify="left"
        )
        for layout, calls in result["calls"].items():
            table.add_row(
                layout, *(f"{calls[column]:g}" for column in columns), f"{result['load_s'][layout]:g}"
            )
        Console(width=140).print(table)
        print(
            "one stream, tokens/s:", ", ".join(f"{name} {speed}" for name, speed in result["streams"].items())
        )
        print()
    print(conditions)


if __name__ == "__main__":
    main()
