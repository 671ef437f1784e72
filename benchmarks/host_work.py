"""CPU milliseconds of host work a step by the length of the texts, with a model whose calls cost nothing.

    python benchmarks/host_work.py --streams 16 --lengths 500 2000 8000 32000

Decodes to the longest length with a stub in place of both models and reports the mean step around each
length: slots, sampling, routing, text, stop rules and events are the engine's own. A step must cost the same
at every length. Leaves out models, attention and the device.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from viaticum.decoders import MixedDecoder, Request, Sampling
from viaticum.decoders.runner import Runner, RunnerOutput
from viaticum.routers.token import EntropyRouter

VOCABULARY = 256
TABLE = 4096  # rows of logits that calls take in turn
WINDOW = 200  # steps that are averaged around a length


class FreeRunner(Runner):
    """Random logits from a table; keeps the bookkeeping of slots and computes nothing."""

    def __init__(self, slots: int, context: int, seed: int) -> None:
        super().__init__(slots=slots, context=context, vocabulary=VOCABULARY, weight_bytes=1)
        self._table = 3 * torch.randn(TABLE, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        self._next = 0

    @property
    def embeddings(self) -> Tensor:
        return self._table.T

    def _forward(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], keep: Sequence[int], hidden: bool
    ) -> RunnerOutput:
        for slot, new in zip(slots, tokens, strict=True):
            self.cached_tokens[slot].extend(new)
        self.calls += 1
        count = sum(keep)
        self._next = (self._next + 61) % (TABLE - count)
        logits = self._table[self._next : self._next + count]
        return RunnerOutput(logits, torch.isfinite(logits.sum(-1)), logits if hidden else None)

    def _copy_prefix(self, source: int, target: int, length: int) -> None:
        pass

    def _wipe(self, slot: int) -> None:
        pass


class Bytes:
    """Token i is one character."""

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(0x21 + token) for token in token_ids)


def measure(streams: int, lengths: Sequence[int], tau: float | None, temperature: float) -> dict[int, float]:
    """Mean milliseconds of a step around each length of the texts."""
    context = max(lengths) + WINDOW + 10
    large, small = (FreeRunner(streams, context, seed) for seed in (1, 2))
    decoder = MixedDecoder(
        large,
        None if tau is None else small,
        tokenizer=Bytes(),
        router=None if tau is None else EntropyRouter(tau),
    )
    engine = decoder.engine()
    for seed in range(streams):
        sampling = Sampling(temperature, top_p=0.95, seed=seed)
        engine.add(Request([seed % VOCABULARY], context - 1, sampling, stop=("never written",)))
    spent, written, step = dict.fromkeys(lengths, 0.0), 0, 0
    counted = dict.fromkeys(lengths, 0)
    while written < max(lengths) + WINDOW // 2:
        began = time.process_time()
        events = engine.step()
        took = time.process_time() - began
        assert all(event.result is None for event in events), "no text may end while it is measured"
        written += sum(event.index == 0 for event in events)
        step += 1
        for length in lengths:
            if abs(written - length) <= WINDOW // 2:
                spent[length] += took
                counted[length] += 1
    return {length: 1000 * spent[length] / counted[length] for length in lengths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="+", default=[500, 2000, 8000, 32000])
    parser.add_argument("--tau", type=float, help="route with R-Stitch at this entropy; else one model alone")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(given.streams, given.lengths, given.tau, given.temperature)
    if given.json:
        print(json.dumps({"streams": given.streams, "ms_per_step": found}))
        return
    for length, milliseconds in found.items():
        print(f"{length:>7} tokens  {milliseconds:6.2f} ms a step, {given.streams} streams")


if __name__ == "__main__":
    main()
