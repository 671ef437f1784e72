"""Time of a token router beside a step of the small model; its offline features against the served ones.

    python benchmarks/token_router.py QUESTIONS.jsonl [--router DIR] [--texts 16] [--tokens 48]

The small model writes some texts, once one at a time and once all together; everything that a router is given
is kept and compared with the offline pass (`decoders.features`) at several numbers of tokens a call. Without
--router a network of the default shape with random weights is timed: its cost is that of a trained one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from viaticum.catalogue import Catalogue
from viaticum.decoders import MixedDecoder, Request, Runner, TorchRunner
from viaticum.decoders.features import read_features
from viaticum.models.local import LocalModels, stop_ids
from viaticum.questions import read_questions
from viaticum.routers.token import DivergenceRouter, Step, entropy
from viaticum.routers.token.neural import DivergenceNetwork, LearnedDivergenceRouter, Shape, TrainedRouter
from viaticum.strategies import get as get_strategy
from viaticum.weights import locate


class Recorder(DivergenceRouter):
    """Keeps every token, and the router's inputs."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.seen: dict[tuple[int, int], tuple[int, torch.Tensor, torch.Tensor, float]] = {}

    def score(self, step: Step) -> torch.Tensor:
        assert step.hidden is not None
        top = step.top_logits()
        for row, key in enumerate(zip(step.requests, step.positions, strict=True)):
            self.seen[key] = (
                int(step.tokens[row]),
                top[row].clone(),
                step.hidden[row].float().clone(),
                float(step.entropy[row]),
            )
        return torch.zeros(len(step.tokens))


def median_ms(call: Callable[[], Any], times: int = 21) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return 1000 * sorted(seconds)[times // 2]


def compare(
    runner: Runner, reader: Runner, tokenizer: Any, prompts: list[list[int]], tokens: int
) -> dict[str, Any]:
    """Served features beside offline ones: the share of equal tokens, and how far the numbers are apart."""
    router = Recorder()
    decoder = MixedDecoder(
        TorchRunner(runner.model, slots=runner.slots),
        runner,
        tokenizer=tokenizer,
        router=router,
        stop_ids=stop_ids([runner], tokenizer),
    )
    results = decoder.generate_all([Request(prompt, max_new_tokens=tokens) for prompt in prompts])
    result: dict[str, Any] = {}
    for step_tokens in (1, 4, 16, 64):
        same, hidden, entropies, rows = 0, [], [], 0
        for number, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
            found = read_features(reader, prompt, result.trace.tokens, step_tokens=step_tokens)
            for index in range(len(found)):
                token, _, served, served_entropy = router.seen[number, index]
                offline = found.hidden[index].float()
                same += token == int(found.tokens[index])
                hidden.append(float((served - offline).norm() / served.norm()))
                entropies.append(abs(served_entropy - float(found.entropy[index])))
                rows += 1
        result[str(step_tokens)] = {
            "equal_tokens": same / rows,
            "hidden_relative_median": sorted(hidden)[rows // 2],
            "entropy_mean": sum(entropies) / rows,
            "rows": rows,
        }
    return result


def cost(
    runner: Runner, router: LearnedDivergenceRouter, prompts: list[list[int]], rows: int
) -> dict[str, float]:
    """Milliseconds of a step of the small model and of the router, at so many rows."""
    slots = list(range(rows))
    for slot in slots:
        runner.reset(slot)
        runner.reuse_prefix(slot, prompts[slot % len(prompts)])
        runner.forward([slot], [prompts[slot % len(prompts)][len(runner.cached_tokens[slot]) :]])
    heads = runner.forward(slots, [[7]] * rows, hidden=True)
    step = Step(heads.logits, entropy(heads.logits), slots, [0] * rows, heads.logits.argmax(-1), heads.hidden)

    def decode() -> None:
        logits = runner.forward(slots, [[7]] * rows).logits
        entropy(logits)

    with torch.inference_mode():
        whole, own = median_ms(decode), median_ms(lambda: router.keep_small(step))
    return {"step_ms": whole, "router_ms": own, "share": own / whole}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", type=Path)
    parser.add_argument("--small", default="qwen2.5-coder-0.5b")
    parser.add_argument("--router", type=Path)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    catalogue = Catalogue.load()
    pool = LocalModels(catalogue, slots=arguments.texts)
    runner, model = pool.runner(arguments.small), pool.model(arguments.small)
    reader = TorchRunner(runner.model, slots=1)
    tokenizer = pool.tokenizer(locate(catalogue[arguments.small]))
    strategy = get_strategy("cot")
    questions = read_questions(arguments.questions, limit=arguments.texts)
    prompts = [model.prompt(strategy.messages(each.query)) for each in questions]
    network = (
        TrainedRouter.load(arguments.router).network
        if arguments.router is not None
        else DivergenceNetwork(Shape(runner.embeddings.shape[1]))
    )
    router = LearnedDivergenceRouter(network, runner.embeddings)
    for rows in sorted({1, arguments.texts}):
        show(f"cost, {rows} rows", cost(runner, router, prompts, rows))
    show("features, 1 stream", compare(pool_of_one(runner), reader, tokenizer, prompts[:2], arguments.tokens))
    many = compare(runner, reader, tokenizer, prompts, arguments.tokens)
    show(f"features, {arguments.texts} streams", many)


def show(what: str, result: dict[str, Any]) -> None:
    conditions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({"what": what, **result, **conditions}), flush=True)


def pool_of_one(runner: Runner) -> Runner:
    """The same weights with a single slot: one text after the other."""
    return TorchRunner(runner.model, slots=1)


if __name__ == "__main__":
    main()
