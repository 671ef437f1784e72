"""A causal language model in a GGUF file, computed by llama.cpp with the weights as they lie in the file.

The file is mapped into memory; nothing is unpacked. All slots share one KV cache of cells (llama.cpp's
"unified" cache), which grows as texts do: a prefix that two slots have in common takes its cells once. Calls
take rows of any lengths. Leaves out the C interface (`decoders.llama_library`) and loading
(`decoders.llama_load`).
"""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from viaticum.decoders import llama_library as llama
from viaticum.decoders.blocks import OutOfBlocks
from viaticum.decoders.llama_model import LlamaModel, summary
from viaticum.decoders.memory import RESERVE, free_bytes
from viaticum.decoders.runner import Runner, RunnerOutput, common_prefix_length, concatenate
from viaticum.errors import InputError, ModelError
from viaticum.gguf.blocks import float32_values, read_bfloat16
from viaticum.gguf.file import read_header

BATCH_TOKENS = 1024  # new tokens in one call of `llama_decode`, over all rows
UBATCH_TOKENS = 512  # of these computed at once: bounds the memory of activations
FIRST_CELLS = 2048  # positions in the cache at first, over all slots; doubled as needed
FEW = 8  # tokens for which an output that nobody wants costs less than a call of its own

_CACHE_TYPES = {torch.float32: llama.F32, torch.float16: llama.F16}


class LlamaRunner(Runner):
    """A `Runner` over llama.cpp.

    Args:
        model: the loaded model, which is closed with the runner, or its GGUF file.
        slots: sequences in the cache at once, at most 256.
        context: maximum positions of one sequence; None: what the model supports. It is never more than all
            positions together.
        cache_dtype: of keys and values. float16, with flash attention; float32 is exact and slower.
        positions: that the cache may grow to, over all slots; None: the whole context of every slot.

    Raises:
        InputError: too few or too many slots, or another dtype.
        ModelError: the memory is not enough for the cache.
        MissingExtra, WeightsError: as `LlamaModel`.
    """

    def __init__(
        self,
        model: str | Path | LlamaModel,
        *,
        slots: int = 1,
        context: int | None = None,
        cache_dtype: torch.dtype = torch.float16,
        positions: int | None = None,
    ) -> None:
        if cache_dtype not in _CACHE_TYPES:
            raise InputError(f"llama.cpp keeps keys and values in float16 or float32, not {cache_dtype}")
        if slots > llama.MAX_SEQUENCES:
            raise InputError(f"llama.cpp decodes at most {llama.MAX_SEQUENCES} texts at once, not {slots}")
        self._model = model if isinstance(model, LlamaModel) else LlamaModel(model)
        self._library = self._model.library
        self._c = self._library.functions
        self._finalizers: list[weakref.finalize[Any, Any]] = []
        context = min(context or self._model.context, self._model.context)
        self._most_cells = min(slots * context, positions or slots * context)
        self.position_bytes = self._model.position_numbers * cache_dtype.itemsize
        super().__init__(
            slots=slots,
            context=min(context, self._most_cells),
            vocabulary=self._model.vocabulary,
            weight_bytes=self._model.bytes,
            stop_ids=self._model.stop_ids,
        )
        self._cache_type = _CACHE_TYPES[cache_dtype]
        self._threads = torch.get_num_threads()
        self._gives_hidden = False
        self._started = 0  # texts
        self._shared: tuple[tuple[int, ...], int, int] = ((), 0, 0)  # slots, texts started, cells shared
        self._cells = 0
        self._context = self._make_context(min(FIRST_CELLS, self._most_cells))
        self._batch = _BatchArrays(BATCH_TOKENS)

    @property
    def description(self) -> str:
        return f"{super().description}, {llama.PACKAGE} {llama.VERSION}"

    @property
    def overflow_hint(self) -> str:
        if self._cache_type != llama.F16:
            return super().overflow_hint
        return (
            "its keys and values are float16, which ends at 65,504: set dtype to float32 (in its entry, or "
            f"--dtype); if that changes nothing, {super().overflow_hint}"
        )

    @cached_property
    def embeddings(self) -> Tensor:
        """The input embeddings [vocabulary, D], unpacked when first asked for: bfloat16, or as they are."""
        header = read_header(self._model.path)
        for tensor in header.tensors:
            if tensor.name == "token_embd.weight":
                if tensor.type == llama.F32:
                    return torch.from_numpy(float32_values(tensor)).view(tensor.shape)
                bits = read_bfloat16(header, tensor).view(np.int16)
                return torch.from_numpy(bits).view(torch.bfloat16).view(tensor.shape)
        raise ModelError(f"{self._model.path} holds no input embeddings; the engine torch has them")

    def close(self) -> None:
        """Free the model and its cache; it cannot be used any more."""
        while self._finalizers:
            self._finalizers.pop()()
        self._model.close()

    # --- calls ----------------------------------------------------------------------------------------------

    def _forward(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], keep: Sequence[int], hidden: bool
    ) -> RunnerOutput:
        if self._threads != torch.get_num_threads():
            self._threads = torch.get_num_threads()
            self._c.llama_set_n_threads(self._context, self._threads, self._threads)
        before = [len(self.cached_tokens[slot]) for slot in slots]
        try:
            output = self._forward_rows(slots, tokens, keep, hidden)
            if len(slots) > 1 and not bool(output.finite.all()):
                return self._forward_singly(slots, tokens, keep, hidden, before)
        except OutOfBlocks:  # parts of the call may have been made
            for slot, length in zip(slots, before, strict=True):
                self.truncate(slot, length)
            raise
        return output

    def _forward_singly(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        keep: Sequence[int],
        hidden: bool,
        before: list[int],
    ) -> RunnerOutput:
        """Repeat a call that gave NaN row by row: all rows read all cells, with weight 0, and 0 * NaN is NaN.

        before: tokens that each slot held. A row that gives NaN by itself is dropped from its slot at once.
        """
        for slot, length in zip(slots, before, strict=True):
            self.truncate(slot, length)
        self._zero_unused()
        parts = []
        for slot, new, last, length in zip(slots, tokens, keep, before, strict=True):
            parts.append(self._forward_rows([slot], [new], [last], hidden))
            if not bool(parts[-1].finite.all()):
                self.truncate(slot, length)
                self._zero_unused()
        return concatenate(parts, None)

    def _forward_rows(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], keep: Sequence[int], hidden: bool
    ) -> RunnerOutput:
        entries = [
            (slot, token, index >= len(new) - last)
            for slot, new, last in zip(slots, tokens, keep, strict=True)
            for index, token in enumerate(new)
        ]
        # llama.cpp gives hidden states of all tokens of a call or of none, and computes logits with them. So
        # what is only read goes first, in calls without.
        ahead = [entry for entry in entries if not entry[2]] if hidden else []
        if len(ahead) <= FEW:
            ahead = []
        else:
            entries = [entry for entry in entries if entry[2]]
        parts = [self._decode(chunk, hidden=False) for chunk in self._chunks(ahead)]
        parts += [self._decode(chunk, hidden=hidden) for chunk in self._chunks(entries)]
        logits = torch.cat([logits for logits, _ in parts])
        states = torch.cat([state for _, state in parts]) if hidden else None
        return RunnerOutput(logits, torch.isfinite(logits.sum(-1)), states)

    def _chunks(self, entries: list[tuple[int, int, bool]]) -> Iterator[list[tuple[int, int, bool]]]:
        """Entries of one call each: llama.cpp aborts the process over a call larger than it was made for."""
        first = 0
        while first < len(entries):
            last = first + self._call_tokens  # the cache may have grown meanwhile
            yield entries[first:last]
            first = last

    def _decode(self, entries: list[tuple[int, int, bool]], *, hidden: bool) -> tuple[Tensor, Tensor]:
        """One call; entries: (slot, token, whether its logits are wanted). Returns logits, hidden states."""
        wanted = [index for index, (*_, wants) in enumerate(entries) if wants]
        hidden = hidden and bool(wanted)
        if hidden != self._gives_hidden:
            self._c.llama_set_embeddings(self._context, hidden)
            self._gives_hidden = hidden
        lengths = {slot: len(self.cached_tokens[slot]) for slot, *_ in entries}
        batch = self._batch.fill(entries, dict(lengths))
        with self._library.errors() as errors:
            while (code := self._c.llama_decode(self._context, batch)) == llama.NO_ROOM:
                if not self._free_cells(set(lengths)):
                    break
        if code:
            for slot, length in lengths.items():
                self._c.llama_memory_seq_rm(self._memory, slot, length, -1)
            raise self._failure(code, errors)
        for slot, token, _ in entries:
            self.cached_tokens[slot].append(token)
        self.calls += 1
        rows = len(entries) if hidden else len(wanted)
        logits = self._read(self._c.llama_get_logits, rows, self.vocabulary)
        states = self._read(self._c.llama_get_embeddings, rows if hidden else 0, self._model.width)
        if hidden and rows > len(wanted):
            logits, states = logits[wanted], states[wanted]
        return logits, states

    def _read(self, function: Callable[[int], int], rows: int, width: int) -> Tensor:
        """A copy of float32 [rows, width] that a function returns the address of: the next call writes it."""
        if not rows:
            return torch.empty(0, width)
        buffer = (ctypes.c_float * (rows * width)).from_address(function(self._context))
        return torch.frombuffer(buffer, dtype=torch.float32).view(rows, width).clone()

    def _failure(self, code: int, errors: list[str]) -> ModelError:
        if code == llama.NO_ROOM:
            return OutOfBlocks(
                f"not enough memory for the keys and values of these texts ({self._cells:,} positions are "
                "taken); shorten the request, or give the runner fewer slots"
            )
        return ModelError(f"llama.cpp failed with code {code}: {summary(errors)}")

    # --- cache ----------------------------------------------------------------------------------------------

    @property
    def _memory(self) -> int:
        return int(self._c.llama_get_memory(self._context))

    def truncate(self, slot: int, length: int) -> None:
        if length < len(self.cached_tokens[slot]):
            self._c.llama_memory_seq_rm(self._memory, slot, length, -1)
        super().truncate(slot, length)

    def reset(self, slot: int) -> None:
        self._c.llama_memory_seq_rm(self._memory, slot, -1, -1)
        super().reset(slot)

    def reuse_prefix(self, slot: int, tokens: Sequence[int]) -> None:
        super().reuse_prefix(slot, tokens)
        self._started += 1
        self._c.llama_memory_seq_rm(self._memory, slot, len(self.cached_tokens[slot]), -1)

    def _copy_prefix(self, source: int, target: int, length: int) -> None:
        self._c.llama_memory_seq_rm(self._memory, target, -1, -1)
        if length:
            self._c.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def _wipe(self, slot: int) -> None:
        self._c.llama_memory_seq_rm(self._memory, slot, -1, -1)
        self._zero_unused()

    def _zero_unused(self) -> None:
        state = self._state()  # holds the cells in use alone
        self._c.llama_memory_clear(self._memory, True)
        self._restore(state)

    def make_room(self, lengths: Mapping[int, int]) -> bool:
        """As `Runner.make_room`; what free slots hold is dropped by the call that needs its cells.

        A prefix that texts have in common counts once, since it takes its cells once.
        """
        held = {slot: len(self.cached_tokens[slot]) for slot in range(self.slots)}
        for slot in self.free_slots:
            del held[slot]
        if not held:
            return True  # the call itself tells whether it fits
        wanted = sum(held.values())
        wanted += sum(max(0, length - held.get(slot, 0)) for slot, length in lengths.items())
        if wanted > self._cells:
            wanted -= self._shared_cells(tuple(held))
        return wanted <= self._cells or wanted <= self._attainable_cells()

    def _shared_cells(self, slots: tuple[int, ...]) -> int:
        """By how many cells the texts of these slots take less than each alone; kept while they only grow."""
        if self._shared[:2] != (slots, self._started):
            texts = sorted(self.cached_tokens[slot] for slot in slots)
            shared = sum(itertools.starmap(common_prefix_length, itertools.pairwise(texts)))
            self._shared = (slots, self._started, shared)
        return self._shared[2]

    def _attainable_cells(self) -> int:
        """Cells of the cache grown as far as memory allows, with its old and its new form side by side."""
        cells, free = self._cells, int(free_bytes() * (1 - RESERVE)) // self.position_bytes
        while cells < self._most_cells:
            larger = min(2 * cells, self._most_cells)
            if larger + cells - self._cells > free:
                break
            cells = larger
        return cells

    def _free_cells(self, busy: set[int]) -> bool:
        """Grow the cache, or else drop what the slot that has been free the longest still holds.

        busy: slots of the call. False if neither is possible.
        """
        if self._cells < self._most_cells and self._grow():
            return True
        idle = [slot for slot in self.free_slots if slot not in busy and self.cached_tokens[slot]]
        if idle:
            self.reset(idle[0])
        return bool(idle)

    def _grow(self) -> bool:
        cells = min(2 * self._cells, self._most_cells)
        if cells * self.position_bytes > free_bytes() * (1 - RESERVE):  # beside the one in use
            return False
        state = self._state()
        before = self._cells
        try:
            self._context = self._make_context(cells)
        except ModelError:
            self._cells = before
            return False
        self._finalizers.pop(-2)()  # frees the one before
        self._restore(state)
        return True

    def _state(self) -> ctypes.Array[ctypes.c_char]:
        size = self._c.llama_state_get_size(self._context)
        state = ctypes.create_string_buffer(size)
        if self._c.llama_state_get_data(self._context, state, size) == 0:
            raise ModelError("llama.cpp cannot copy its KV cache; end the texts of this model")
        return state

    def _restore(self, state: ctypes.Array[ctypes.c_char]) -> None:
        if self._c.llama_state_set_data(self._context, state, len(state)) == 0:
            for slot in range(self.slots):
                self.cached_tokens[slot] = []
            raise ModelError("llama.cpp cannot restore its KV cache; the texts of this model are lost")

    def _make_context(self, cells: int) -> int:
        """A context with an empty cache, freed with the runner."""
        values = self._c.llama_context_default_params()
        values.n_ctx, values.n_seq_max, values.kv_unified = cells, self.slots, True
        values.n_batch, values.n_ubatch = BATCH_TOKENS, min(UBATCH_TOKENS, BATCH_TOKENS)
        values.n_threads = values.n_threads_batch = self._threads
        values.pooling_type = llama.POOLING_NONE
        # Flash attention reads keys and values in half precision, whatever they are kept in.
        values.flash_attn_type = llama.FLASH_OFF if self._cache_type == llama.F32 else llama.FLASH_AUTO
        values.type_k = values.type_v = self._cache_type
        values.embeddings = self._gives_hidden
        with self._library.errors() as errors:
            made = self._c.llama_init_from_model(self._model.address, values)
        if not made:
            raise ModelError(f"llama.cpp cannot make a KV cache of {cells:,} positions: {summary(errors)}")
        self._finalizers.append(weakref.finalize(self, self._c.llama_free, made))
        self._cells = int(self._c.llama_n_ctx(made))
        # Less than the cells where these were rounded up.
        self._call_tokens = int(self._c.llama_n_batch(made))
        return int(made)


class _BatchArrays:
    """The arrays that a `llama_batch` points to, for up to `size` tokens."""

    def __init__(self, size: int) -> None:
        self.tokens, self.positions = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self.sequences, self.counts = np.zeros(size, np.int32), np.ones(size, np.int32)
        self.wanted = np.zeros(size, np.int8)
        # One sequence each: the address of its number.
        self.owners = self.sequences.ctypes.data + 4 * np.arange(size, dtype=np.uintp)

    def fill(self, entries: list[tuple[int, int, bool]], positions: dict[int, int]) -> llama.Batch:
        """positions: of the next token of each slot; counted up."""
        size = len(entries)
        self.sequences[:size], self.tokens[:size], self.wanted[:size] = zip(*entries, strict=True)
        for index, (slot, *_) in enumerate(entries):
            self.positions[index] = positions[slot]
            positions[slot] += 1
        return llama.Batch(
            size,
            self.tokens.ctypes.data,
            None,
            self.positions.ctypes.data,
            self.counts.ctypes.data,
            self.owners.ctypes.data,
            self.wanted.ctypes.data,
        )
