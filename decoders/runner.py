"""One causal language model with its KV cache in fixed slots.

`read` feeds ragged new tokens to some slots and returns the logits after the last ones: one token is
decoding, a few are catching up with the other model or a draft to verify, many are a prefill (done in
chunks). Any decoder-only family of transformers works, since only the cache and the attention function are ours.
Knows nothing of sampling, routing, text or requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel

from viaticum.decoders.attention import NAME as ATTENTION
from viaticum.decoders.attention import attending, spans
from viaticum.decoders.fused_layers import fused_layers
from viaticum.decoders.linear import Weights, pack, weight_bytes
from viaticum.decoders.memory import free_bytes, out_of_memory, plan_slots
from viaticum.errors import InputError, ModelError, PromptTooLong

PREFILL_TOKENS = 1024  # new tokens in one model call, over all rows: bounds the memory of activations
FIRST_CAPACITY = 512  # positions allocated at first; doubled when a sequence needs more


@dataclass(frozen=True, slots=True)
class _Batch:
    """Where the tokens of one model call live: slots and positions [N] of them all.

    alone: of a single row its slot, all heads, its new positions. keys: those of the longest row.
    """

    token_slots: Tensor
    token_positions: Tensor
    alone: tuple[int, slice, slice] | None
    keys: int


class SlotCache(Cache):
    """Keys and values of every layer, [slots, kv_heads, capacity, head_dim], zero where nothing was written.

    transformers calls `update` once a layer; it writes the new tokens of the current batch and returns the keys and
    values of all slots: attention knows its rows. Zeros matter: a masked position still enters the product as 0 * v.
    """

    def __init__(self, slots: int) -> None:
        super().__init__(layers=[])  # transformers' own layers stay unused: `update` below replaces them
        self.slots = slots
        self.capacity = FIRST_CAPACITY
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.batch: _Batch | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        batch = self.batch
        assert batch is not None, "extend sets the batch before it calls the model"
        while len(self.keys) <= layer_idx:
            self.keys.append(self._empty(key_states))
            self.values.append(self._empty(value_states))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if batch.alone is not None:  # a plain copy is much cheaper than writing by index
            keys[batch.alone], values[batch.alone] = key_states[0], value_states[0]
        else:
            where = (batch.token_slots, slice(None), batch.token_positions)
            keys[where], values[where] = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        return keys, values

    def grow(self, positions: int) -> None:
        """Make room for at least so many positions in every slot."""
        if positions <= self.capacity:
            return
        while self.capacity < positions:
            self.capacity *= 2
        for store in (self.keys, self.values):
            for layer, old in enumerate(store):
                if old.shape[2] < self.capacity:  # else an earlier growth got so far
                    store[layer] = self._empty(old)
                    store[layer][:, :, : old.shape[2]] = old

    def shrink(self, capacity: int, *, whole: bool) -> None:
        """After a failed allocation: tell what there is. whole: whether every layer had been allocated before."""
        if not whole:
            self.keys, self.values = [], []
        self.capacity = min((layer.shape[2] for layer in (*self.keys, *self.values)), default=capacity)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        for store in (self.keys, self.values):
            for layer in store:
                layer[target, :, :length] = layer[source, :, :length]

    def wipe(self, slot: int) -> None:
        for store in (self.keys, self.values):
            for layer in store:
                layer[slot] = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.batch is None else self.batch.keys

    @property
    def is_compileable(self) -> bool:
        return False

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.slots, like.shape[1], self.capacity, like.shape[-1])


@dataclass(frozen=True, slots=True)
class RunnerOutput:
    """What a model says after the positions asked for: rows in their order, each row's positions in theirs.

    logits: float32 [N, vocabulary]; finite: bool [N], whether all logits of a position are; hidden: the last
    hidden state [N, D] where it was asked for. N is the sum of `keep`; nothing has left the device.
    tokens: the first of the likeliest tokens, int64 [N], and entropy: normalised, float32 [N], where the call has
    worked them out already (see `decoders.graphs`), else None.
    """

    logits: Tensor
    finite: Tensor
    hidden: Tensor | None = None
    tokens: Tensor | None = None
    entropy: Tensor | None = None


class Runner:
    """A causal LM and the slots of its sequences.

    held[slot] are the tokens whose keys and values the slot holds; what lies beyond them in the cache is
    never read. A sequence that ended stays in its slot until another starts there, so that prompts which
    begin alike (a strategy's examples, a chat) are read once.

    model: a transformers causal LM loaded with `attn_implementation=ATTENTION` (see `load`);
    slots: sequences held at once; context: most positions of one sequence.
    """

    def __init__(self, model: PreTrainedModel, *, slots: int = 1, context: int | None = None) -> None:
        if slots < 1:
            raise InputError(f"a runner needs at least one slot, got {slots}")
        model.train(False)
        self.model = model
        self.model.set_attn_implementation(ATTENTION)
        self.device = model.device
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.context = _context(model.config, context)
        self._varies_beyond = rotation_varies_beyond(model.config)
        self.weight_bytes = weight_bytes(model)
        self.slots = slots
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self._reached = [0] * slots  # the most tokens that the text of each slot has had
        self.free = list(range(slots))  # slots that no text is being written in, free for longest first
        self.calls = 0
        self._cache = SlotCache(slots)
        # What transformers passes on unread: attention masks by spans.
        self._no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        slots: int | Literal["auto"] = 1,
        context: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
        weights: Weights = "auto",
        graphs: bool | None = None,
    ) -> Runner:
        """Read a model from a folder (config.json and safetensors); never touches the network.

        weights: how linear layers hold theirs (see `decoders.linear`). "plain": as transformers does, in dtype.
        "bfloat16": the same numbers in the kernel's own order, about twice as fast. "low-bit": also in 4 and
        8 bits, for calls of few rows; 2.6 to 3 bytes a weight in all. "auto": the last of these that the machine,
        the dtype and the folder allow, low-bit only where a quantised model.gguf lies beside the weights.

        slots: "auto" takes as many as fit the memory that is free once the weights are loaded (see
        `plan_slots`, which raises `ModelError` where not one fits); of two models, load the other one first.

        graphs: make calls of few tokens in static shapes, as CUDA graphs (`GraphRunner`). The cache then takes its
        memory for the whole context at once. None: on CUDA alone.
        """
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=ATTENTION, local_files_only=True
        )
        model = model.to(torch.device(device))  # type: ignore[arg-type]
        if pack(model, Path(path), weights):
            fused_layers(model)
        if slots == "auto":
            slots = plan_slots(
                model.config,
                _context(model.config, context),
                free_bytes(device),
                dtype=dtype,
                prefill_tokens=PREFILL_TOKENS,
                first_capacity=FIRST_CAPACITY,
            )
        if torch.device(device).type == "cuda" if graphs is None else graphs:
            from viaticum.decoders.graphs import GraphRunner  # which is a Runner itself

            return GraphRunner(model, slots=slots, context=context)
        return cls(model, slots=slots, context=context)

    @property
    def capacity(self) -> int:
        """Positions that every slot has memory for now; `read` grows it up to the context."""
        return self._cache.capacity

    @property
    def embeddings(self) -> Tensor:
        """What the model's tokens enter it as: [vocabulary, D]."""
        found: Any = self.model.get_input_embeddings().weight
        weights: Tensor = found.detach()
        return weights

    def extend(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """`read`, the logits after each row's last token alone: float32 [B, vocabulary].

        Raises `ModelError` where a row's logits are not finite (those slots are then empty).
        """
        heads = self.read(slots, tokens)
        if not bool(heads.finite.all()):
            bad = [slot for slot, good in zip(slots, heads.finite.tolist(), strict=True) if not good]
            for slot in bad:
                self.discard(slot)
            raise ModelError(f"logits are not finite in slots {bad}; the weights or the input are damaged")
        return heads.logits

    @torch.inference_mode()
    def read(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        keep: Sequence[int] | None = None,
        *,
        hidden: bool = False,
    ) -> RunnerOutput:
        """Append `tokens[i]` to `slots[i]` and return what the model says after the last `keep[i]` of them.

        slots: B different slots; tokens: B non-empty lists of token ids; keep: 1 for every row where it is
        left out. A slot whose logits are not finite should be discarded: what it holds is damaged.
        Raises `PromptTooLong` where a row would pass the context (nothing is then changed) and `ModelError`
        where the memory is not enough: `held` then says which tokens were read before.
        """
        keep = [1] * len(slots) if keep is None else keep
        for slot, new, last in zip(slots, tokens, keep, strict=True):
            if not 1 <= last <= len(new):
                raise InputError(
                    f"slot {slot}: {len(new)} tokens to read, logits wanted after {last} of them"
                )
            if len(self.held[slot]) + len(new) > self.context:
                raise PromptTooLong(
                    f"{len(self.held[slot]) + len(new)} tokens do not fit the context of {self.context}; "
                    "shorten the prompt or lower max_new_tokens"
                )
        longest = max(len(self.held[slot]) + len(new) for slot, new in zip(slots, tokens, strict=True))
        capacity = self.capacity
        try:
            self._cache.grow(longest)
            return self._read(slots, tokens, keep, hidden)
        except (MemoryError, RuntimeError) as error:
            failure = out_of_memory(error)
        self._cache.shrink(capacity, whole=self.calls > 0)
        # Raised out here: an error that carries the failed frames would keep their tensors alive.
        raise ModelError(failure)

    def _read(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], keep: Sequence[int], hidden: bool
    ) -> RunnerOutput:
        order = sorted(range(len(slots)), key=lambda row: (len(tokens[row]), slots[row]))  # neighbours join
        together = self._together(order, slots, tokens)
        parts: list[RunnerOutput] = []
        for rows in together:
            for chunk in _chunks([len(tokens[row]) for row in rows], [keep[row] for row in rows]):
                part = self._call(
                    [slots[rows[at]] for at, *_ in chunk],
                    [list(tokens[rows[at]][begin:end]) for at, begin, end, _ in chunk],
                    [last for *_, last in chunk],
                    hidden=hidden,
                )
                if part is not None:
                    parts.append(part)
        return joined(parts, in_order([row for rows in together for row in rows], keep))

    def _together(
        self, order: list[int], slots: Sequence[int], tokens: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """Which rows may be read in one call: where the rotation depends on the longest text of a call, one
        beyond the length from which it does is read alone."""
        if self._varies_beyond is None:
            return [order]
        within = [row for row in order if self.rotates_alike(len(self.held[slots[row]]) + len(tokens[row]))]
        beyond = [[row] for row in order if row not in within]
        return [within, *beyond] if within else beyond

    def truncate(self, slot: int, length: int) -> None:
        """Forget what the slot holds beyond `length` tokens, e.g. a draft that was not accepted."""
        del self.held[slot][length:]

    @torch.inference_mode()
    def discard(self, slot: int) -> None:
        """Forget the slot's sequence and wipe it: a NaN left behind would spread, for 0 * NaN is NaN."""
        self._cache.wipe(slot)
        self.reset(slot)

    def reset(self, slot: int) -> None:
        """Forget the slot's sequence."""
        self.held[slot] = []
        self._reached[slot] = 0

    def shared(self, slot: int, tokens: Sequence[int]) -> int:
        """How many tokens `slot` and `tokens` have in common at their beginnings, with the same keys.

        0 where one of them has passed the length from which the rotation depends on the longest text of a call.
        """
        if not self.rotates_alike(max(self._reached[slot], len(tokens))):
            return 0
        return shared_length(self.held[slot], tokens)

    def rotates_alike(self, length: int) -> bool:
        """Whether the keys of a text of so many tokens are those of any other that begins alike."""
        return self._varies_beyond is None or length <= self._varies_beyond

    @torch.inference_mode()
    def start(self, slot: int, tokens: Sequence[int]) -> None:
        """Let `slot` hold as much of the beginning of `tokens` as some slot does, without computing it again.

        The last token is never taken over: reading it gives the logits of the next.
        """
        source = max(range(self.slots), key=lambda other: (self.shared(other, tokens), other == slot))
        length = min(self.shared(source, tokens), len(tokens) - 1)
        if source != slot:
            self._cache.copy_prefix(source, slot, length)
        self.held[slot] = list(tokens[:length])
        self._reached[slot] = length

    def _call(
        self, slots: list[int], tokens: list[list[int]], keep: list[int], *, hidden: bool
    ) -> RunnerOutput | None:
        """One model call, the new tokens of all rows in one line: nothing is padded.

        Tells what follows the last keep[i] tokens of each row (none of some); None where nothing is wanted of any row.
        """
        starts = [len(self.held[slot]) for slot in slots]
        keys = max(start + len(new) for start, new in zip(starts, tokens, strict=True))
        self._cache.grow(keys)
        ends = list(itertools.accumulate(map(len, tokens)))
        wanted = [place for end, last in zip(ends, keep, strict=True) for place in range(end - last, end)]
        ids = torch.tensor([[token for new in tokens for token in new]], device=self.device)
        positions = torch.tensor(
            [
                place
                for start, new in zip(starts, tokens, strict=True)
                for place in range(start, start + len(new))
            ],
            device=self.device,
        )
        alone = len(slots) == 1
        self._cache.batch = _Batch(
            token_slots=torch.tensor(
                [slot for slot, new in zip(slots, tokens, strict=True) for _ in new], device=self.device
            ),
            token_positions=positions,
            alone=(slots[0], slice(None), slice(starts[0], keys)) if alone else None,
            keys=keys,
        )
        if self._varies_beyond is not None:
            forget_lengths(self.model)
        states: list[Tensor] = []
        head: torch.nn.Module = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        whose = spans(slots, starts, list(map(len, tokens)), self.device, gather=self.device.type != "cpu")
        with (
            head.register_forward_pre_hook(lambda _, inputs: states.extend(inputs if hidden else ())),
            attending(whose, self.model),
        ):
            out = self.model(
                input_ids=ids,
                attention_mask=self._no_mask,
                position_ids=positions[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=torch.tensor(wanted or [len(ids[0]) - 1], device=self.device),
            )
        for slot, new in zip(slots, tokens, strict=True):
            self.held[slot].extend(new)
            self._reached[slot] = max(self._reached[slot], len(self.held[slot]))
        self.calls += 1
        if not wanted:
            return None
        logits = out.logits[0].float()
        finite = torch.isfinite(logits.sum(-1))  # a sum is finite only if every term is
        return RunnerOutput(logits, finite, states[0][0] if hidden else None)


def _chunks(lengths: list[int], keep: list[int]) -> Iterator[list[tuple[int, int, int, int]]]:
    """The rows' new tokens in calls of at most `PREFILL_TOKENS`: (row, first, end, how many of its last are wanted)."""
    chunk: list[tuple[int, int, int, int]] = []
    room = PREFILL_TOKENS
    for row, (length, last) in enumerate(zip(lengths, keep, strict=True)):
        begin = 0
        while begin < length:
            end = min(length, begin + room)
            chunk.append((row, begin, end, max(0, min(end - begin, end - length + last))))
            room -= end - begin
            begin = end
            if not room:
                yield chunk
                chunk, room = [], PREFILL_TOKENS
    if chunk:
        yield chunk


def shared_length(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginnings; comparing whole slices is what is fast."""
    low, high = 0, min(len(ours), len(theirs))
    if not high or ours[0] != theirs[0]:
        return 0
    ours, theirs = list(ours[:high]), list(theirs[:high])
    if ours == theirs:
        return high
    while high - low > 1:  # the first `low` are shared, the first `high` are not
        middle = (low + high) // 2
        low, high = (middle, high) if ours[low:middle] == theirs[low:middle] else (low, middle)
    return low


def in_order(rows: Sequence[int], keep: Sequence[int]) -> list[int] | None:
    """Where the vectors of each row are among those of `rows`, in the order of the rows; None where it is theirs."""
    owners = [row for row in rows for _ in range(keep[row])]
    back = sorted(range(len(owners)), key=owners.__getitem__)  # stable: those of a row stay in order
    return None if back == list(range(len(owners))) else back


def joined(parts: list[RunnerOutput], order: list[int] | None) -> RunnerOutput:
    """What several calls say as one, in another order of all their vectors."""
    if len(parts) == 1 and order is None:
        return parts[0]

    def every(name: str) -> Tensor | None:
        found = [value for part in parts if (value := getattr(part, name)) is not None]
        if len(found) < len(parts):
            return None
        whole = torch.cat(found) if len(found) > 1 else found[0]
        return whole if order is None else whole[order]

    logits, finite = every("logits"), every("finite")
    assert logits is not None
    assert finite is not None
    return RunnerOutput(logits, finite, every("hidden"), every("tokens"), every("entropy"))


def rotation_varies_beyond(config: Any) -> int | None:
    """The length of a text from which its positions are rotated by the longest text of a call ("dynamic", "longrope"); None: never."""
    text = config.get_text_config()

    def found(value: Any) -> Iterator[int]:
        if not isinstance(value, dict):
            return
        if value.get("rope_type") in ("dynamic", "longrope"):
            yield int(value.get("original_max_position_embeddings") or text.max_position_embeddings)
        for each in value.values():
            yield from found(each)

    return min(found(getattr(text, "rope_parameters", None)), default=None)


def forget_lengths(model: torch.nn.Module) -> None:
    """Let positions be rotated by the call at hand: transformers goes on with the longest text that it has seen."""
    for module in model.modules():
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, 0)


def _context(config: Any, asked: int | None) -> int:
    """The positions of one sequence: what was asked for, within what the model can tell apart."""
    longest = int(getattr(config.get_text_config(), "max_position_embeddings", 1 << 20))
    return min(asked or longest, longest)
