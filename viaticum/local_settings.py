"""How local models run on this machine, as far as somebody said so: `LocalSettings`, unset by default.

The same settings stand in a catalogue entry, in the entry of a pair and on the command line. Leaves out what
"auto" comes to, which depends on the machine (`viaticum.decoders.devices`, `viaticum.decoders.memory`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError

from viaticum.errors import InputError
from viaticum.weight_sources import FrozenModel

Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$")]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Engine = Literal["auto", "torch", "llama", "served"]
Count = Annotated[int, Field(ge=1, strict=True)]  # strict: `true` is no number
Slots = Literal["auto"] | Count
GpuMemory = Annotated[float, Field(gt=0, le=1)]

_CHOICES = {
    "device": 'is "auto", "cpu", "mps", "cuda" or "cuda:NUMBER"',
    "dtype": 'is "auto", "float32", "bfloat16" or "float16"',
    "engine": 'is "auto", "torch", "llama" or "served"',
    "slots": 'is "auto" or a number from 1 on',
    "context": "is a number of tokens from 1 on",
    "tensor_parallel": "is a number of GPUs from 1 on",
    "gpu_memory": "is a fraction above 0, at most 1",
}


class LocalFields(FrozenModel):
    """The settings themselves, as `LocalSettings` and entries of the catalogue hold them; None where unset.

    Attributes:
        device: "auto" takes a CUDA GPU, else Apple's, else the CPU; "cuda:1" is the second GPU that
            CUDA_VISIBLE_DEVICES leaves.
        dtype: of weights, activations, keys and values; "auto" takes what is fast on the device.
        engine: what computes the model.
        slots: texts that it writes at once; "auto" takes as many as the free memory holds.
        context: tokens of prompt and answer together for which this machine keeps memory; by default as many
            as the model can.
        tensor_parallel: GPUs over which the model is spread; more than one with the engine "served" alone.
        gpu_memory: fraction of a GPU's memory that may be used.
    """

    device: Device | None = None
    dtype: Dtype | None = None
    engine: Engine | None = None
    slots: Slots | None = None
    context: Count | None = None
    tensor_parallel: Count | None = None
    gpu_memory: GpuMemory | None = None


class LocalSettings(LocalFields):
    """How a local model or pair runs; None where nobody said so."""

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Settings from values, None for what is not set.

        Raises:
            InputError: a value is out of range; the message names it.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            name = str(error.errors(include_url=False)[0]["loc"][0])
            if name not in _CHOICES:
                raise InputError(f"unknown setting {name!r}; known: {', '.join(_CHOICES)}") from None
            raise InputError(f"{name} {_CHOICES[name]}, got {values[name]!r}") from None

    @property
    def given(self) -> dict[str, Any]:
        """What is set, by name."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if value is not None}

    def over(self, other: LocalSettings) -> LocalSettings:
        """These settings, and those of `other` where these are not set."""
        return type(self).model_construct(**{**other.given, **self.given})


LOCAL_FIELDS = frozenset(LocalFields.model_fields)
# Fields that change where and how fast a model runs, not what it is asked: no part of the key of an answer.
UNKEYED_FIELDS = LOCAL_FIELDS - {"context"}
NO_LOCAL_SETTINGS = LocalSettings()
