"""CUDA without a GPU: tensors that say they are on "cuda:N", with their numbers in host memory.

Every operation runs on the CPU, under the rules that a GPU has and a CPU has not:

- An operation on tensors of several devices is an error, but for copies, and for single numbers and indices
  of the host.
- While a graph is captured, nothing may be read by the host, nor uploaded from memory that is not pinned.
- Streams and events belong to the current device unless another is named; a capture on a stream of another
  device than the tensors' records nothing, and torch captures on the device that was current at first.
- A graph is a list of kernels with fixed addresses: a replay runs them again on the same memory, and what it
  computed besides is NaN afterwards, since all graphs share their memory.
- An upload from pinned memory that does not wait happens later: the memory must not change before the host
  has waited for the device.

`waits` and `kernels` count what the host waited for and what was launched (views are free). Leaves out
streams that overlap, times, and the rounding of real kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from host_reads import READS
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
CPU = torch.device("cpu")
COPIES = {"copy_", "_to_copy"}
INDEXED = {"index", "index_put_", "_index_put_impl_"}
MIXES = COPIES | INDEXED  # may take tensors of the host


class OnDevice(Tensor):
    """A tensor of the emulated device; `numbers` holds its values."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, device: torch.device) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=device,
        )
        made.numbers = numbers
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.numbers!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on the emulated device, outside of `emulated_cuda`")


class Graph:
    """What `torch.cuda.CUDAGraph` is: kernels on fixed memory."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.kernels: list[tuple[Any, Any, Any, Any]] = []
        self.captured = False
        self._own: set[int] = set()  # addresses of memory that a result is the first to use
        self._inner: list[Tensor] = []  # what lies there
        self._before: dict[int, tuple[Any, Any]] = {}  # memory that is written to, and what it held

    def keep(self, storage: Any) -> None:
        if storage.data_ptr() not in self._before:
            self._before[storage.data_ptr()] = (storage, storage.clone())

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        assert self.captured, "the graph was not captured"
        self._device.replays += 1
        for func, args, kwargs, results in self.kernels:
            found = func(*args, **kwargs)
            for kept, new in zip(results, tree_flatten(found)[0], strict=True):
                if isinstance(new, Tensor) and not _same_memory(kept, new):
                    kept.copy_(new)
        self.forget()

    def end(self) -> None:
        """End the capture, which computed nothing."""
        self.captured = True
        for storage, held in self._before.values():
            storage.copy_(held)
        self._before.clear()
        seen: set[int] = set()
        for _, args, kwargs, results in self.kernels:
            seen |= {_address(each) for each in _tensors((args, kwargs))} - self._own
            self._own |= {_address(each) for each in _tensors(results)} - seen
        made = {id(each): each for *_, results in self.kernels for each in _tensors(results)}
        self._inner = [
            each for each in made.values() if _address(each) in self._own and each.dtype.is_floating_point
        ]
        self.forget()

    def forget(self) -> None:
        """What the graph computed within its own memory is gone: other graphs use it too."""
        for each in self._inner:
            each.fill_(float("nan"))


class Device(TorchDispatchMode):
    """Runs operations on the emulated device."""

    def __init__(self) -> None:
        super().__init__()
        self.current = 0  # the device of what names none
        self.first_stream: int | None = None  # the device that torch captures on by default
        self.waits: list[str] = []
        self.kernels = 0
        self.replays = 0
        self.graphs: list[Graph] = []
        self._capturing: Graph | None = None
        self._capture_index = 0
        self.uploads: list[tuple[int, Tensor, Tensor]] = []  # device, pinned memory, and what it held
        self._pinned: set[int] = set()
        self._kept: list[Tensor] = []
        self._methods = _Methods(self)

    def __enter__(self) -> Device:
        self._methods.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def wait(self, why: str, index: int | None = None, before: int | None = None) -> None:
        """The host waits until all that was launched on a device, or the first uploads of all, are done."""
        index = self.current if index is None else index
        if self._capturing is not None and index == self._capture_index:
            raise RuntimeError(f"{why}: operation not permitted when stream is capturing")
        self.waits.append(why)
        done = [each for each in self.uploads[:before] if each[0] == index]
        self.uploads = [each for each in self.uploads if not any(each is other for other in done)]
        for _, memory, held in done:
            if not torch.equal(memory, held):
                raise AssertionError("pinned memory was written before its upload was waited for")

    def pin(self, memory: Tensor) -> Tensor:
        self._pinned.add(_address(memory))
        self._kept.append(memory)  # so that no other memory gets its address
        return memory

    @contextmanager
    def capture(self, graph: Graph, index: int) -> Iterator[None]:
        """Record on a stream of the device with this index."""
        self._capturing, self._capture_index = graph, index
        try:
            yield
        finally:
            self._capturing = None
        graph.end()
        self.graphs.append(graph)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        given = _tensors((args, kwargs))
        target = kwargs.get("device")
        on_device = any(isinstance(each, OnDevice) for each in given)
        if not on_device and (target is None or torch.device(target).type != "cuda"):
            if kwargs.pop("pin_memory", None):
                return self.pin(func(*args, **kwargs))
            return func(*args, **kwargs)
        index = self._index(name, given, target)
        to_host = name == "_to_copy" and target is not None and torch.device(target).type == "cpu"
        self._note_transfers(name, args, kwargs, to_host, index)
        if "device" in kwargs:
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        plain_args, plain_kwargs = tree_map(_numbers, (args, kwargs))
        plain_kwargs.pop("non_blocking", None)
        captures = self._capturing is not None and index == self._capture_index
        if captures:
            self._keep_memory(func, plain_args)
        found = func(*plain_args, **plain_kwargs)
        if name == "_to_copy" and not to_host and found is plain_args[0]:
            found = found.clone()
        self._record(func, plain_args, plain_kwargs, found, captures)
        if to_host or name in READS or (name == "copy_" and not isinstance(args[0], OnDevice)):
            return args[0] if name == "copy_" else found
        by_memory = {id(_numbers(each)): each for each in given}
        device = torch.device("cuda", index)
        return tree_map(lambda each: _wrapped(each, by_memory, device), found)

    def _index(self, name: str, given: list[Tensor], target: Any) -> int:
        """The index of the device that an operation runs on."""
        found = [each.device.index for each in given if isinstance(each, OnDevice)]
        host = [each for each in given if not isinstance(each, OnDevice) and each.dim()]
        if name not in COPIES and (len(set(found)) > 1 or (found and host and name not in MIXES)):
            places = sorted({str(each.device) for each in given})
            raise RuntimeError(f"{name}: expected all tensors on one device, found {', '.join(places)}")
        if target is not None and torch.device(target).type == "cuda":
            index = torch.device(target).index
            return self.current if index is None else index
        return found[0]

    def _note_transfers(self, name: str, args: Any, kwargs: Any, to_host: bool, index: int) -> None:
        """Count what the host waits for, and check what may not happen now."""
        indices = args[1] if name in INDEXED else ()
        flags = any(each is not None and each.dtype == torch.bool for each in indices)
        if name in READS or to_host or flags or (name == "where" and len(args) == 1):
            self.wait(name, index)
        elif name == "copy_" and not isinstance(args[0], OnDevice):
            self.wait("copy to the host", index)
        elif name in MIXES:
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,)))
            for source in _tensors(args[1:] if name == "copy_" else args):
                if not isinstance(source, OnDevice) and (source.dim() or name != "copy_"):
                    self._upload(source, waits, index)

    def _upload(self, source: Tensor, waits: bool, index: int) -> None:
        if _address(source) in self._pinned and not waits:
            self.uploads.append((index, source, source.clone()))
        else:
            self.wait("upload", index)

    def _keep_memory(self, func: Any, args: Any) -> None:
        """Note what memory held before a capture writes to it."""
        assert self._capturing is not None
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                self._capturing.keep(value.untyped_storage())

    def _record(self, func: Any, args: Any, kwargs: Any, found: Any, captures: bool) -> None:
        given = {_address(each) for each in _tensors((args, kwargs))}
        results = [each if isinstance(each, Tensor) else None for each in tree_flatten(found)[0]]
        view = all(each is None or _address(each) in given for each in results)
        self.kernels += not view or func._schema.is_mutable
        if captures and self._capturing is not None:
            self._capturing.kernels.append((func, args, kwargs, results))


class _Methods(TorchFunctionMode):
    """Methods whose code in C++ asks for the real device before it dispatches, as plain operations."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and "device" in kwargs:
            device = kwargs.pop("device")
            return _to(torch.tensor(*args, **kwargs), device)
        if func is Tensor.to:
            return _to(*args, **kwargs)
        if func is Tensor.pin_memory:
            return self._device.pin(args[0].clone())
        if not any(isinstance(each, OnDevice) for each in tree_flatten((args, kwargs))[0]):
            return func(*args, **kwargs)
        plain = METHODS.get(getattr(func, "__name__", ""))
        return (func if plain is None else plain)(*args, **kwargs)


def _to(tensor: Tensor, *args: Any, non_blocking: bool = False, copy: bool = False, **kwargs: Any) -> Tensor:
    for each in args:
        if isinstance(each, torch.dtype):
            kwargs["dtype"] = each
        elif isinstance(each, (str, torch.device)):
            kwargs["device"] = each
        elif isinstance(each, Tensor):
            kwargs |= {"dtype": each.dtype, "device": each.device}
        elif each is True:
            non_blocking = True
    device = torch.device(kwargs.get("device") or tensor.device)
    dtype = kwargs.get("dtype") or tensor.dtype
    there = device.type == tensor.device.type and device.index in (None, tensor.device.index)
    if not copy and there and dtype == tensor.dtype:
        return tensor
    return aten._to_copy(tensor, dtype=dtype, device=device, non_blocking=non_blocking)


def _take(tensor: Tensor, index: Any) -> Tensor:
    """tensor[index], by views and at most one gather."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [each if each is Ellipsis else None for each in parts]:
        at = next(i for i, each in enumerate(parts) if each is Ellipsis)
        taken = sum(each is not None for each in parts) - 1
        parts[at : at + 1] = [slice(None)] * (tensor.dim() - taken)
    dim, gathers = 0, {}
    for each in parts:
        if each is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif isinstance(each, slice):
            if each != slice(None):
                tensor = aten.slice(tensor, dim, each.start, each.stop, each.step or 1)
            dim += 1
        elif isinstance(each, (Tensor, list)):
            gathers[dim] = each if isinstance(each, Tensor) else torch.tensor(each)
            dim += 1
        else:
            tensor = aten.select(tensor, dim, int(each))
    if gathers:
        return aten.index(tensor, [gathers.get(i) for i in range(max(gathers) + 1)])
    return tensor


def _put(tensor: Tensor, index: Any, value: Any) -> None:
    """tensor[index] = value."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(each, (Tensor, list)) for each in parts):
        at = [each if isinstance(each, Tensor) else torch.tensor(each) for each in parts]
        values = value if isinstance(value, Tensor) else torch.tensor(value, dtype=tensor.dtype)
        aten.index_put_(tensor, at, aten._to_copy(values, device=tensor.device))
        return
    part = _take(tensor, index)
    if isinstance(value, Tensor):
        aten.copy_(part, value)
    else:
        aten.fill_(part, value)


def _number(tensor: Tensor) -> Any:
    return aten._local_scalar_dense(tensor.reshape(()))


METHODS: dict[str, Any] = {
    "__getitem__": _take,
    "__setitem__": _put,
    "__invert__": aten.bitwise_not,
    "copy_": aten.copy_,
    "contiguous": aten.contiguous,
    "cpu": lambda tensor: aten._to_copy(tensor, device=CPU),
    "tolist": lambda tensor: aten._to_copy(tensor, device=CPU).tolist(),
    "item": _number,
    "__bool__": lambda tensor: bool(_number(tensor)),
    "__int__": lambda tensor: int(_number(tensor)),
    "__index__": lambda tensor: int(_number(tensor)),
    "__float__": lambda tensor: float(_number(tensor)),
    **{
        name: lambda tensor, dtype=dtype: _to(tensor, dtype)
        for name, dtype in {
            "float": torch.float32,
            "double": torch.float64,
            "long": torch.int64,
            "int": torch.int32,
            "bool": torch.bool,
        }.items()
    },
}


def _numbers(value: Any) -> Any:
    return value.numbers if isinstance(value, OnDevice) else value


def _wrapped(value: Any, by_memory: dict[int, Tensor], device: torch.device) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, OnDevice):
        return value
    return by_memory[id(value)] if id(value) in by_memory else OnDevice(value, device)


def _tensors(tree: Any) -> list[Tensor]:
    return [each for each in tree_flatten(tree)[0] if isinstance(each, Tensor)]


def _address(tensor: Tensor) -> int:
    return int(_numbers(tensor).untyped_storage().data_ptr())


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.stride() == other.stride()


class Event:
    """`torch.cuda.Event`, recorded on a stream, of the current device unless one is given."""

    def __init__(self, device: Device) -> None:
        self._device, self._index = device, 0
        self._uploads = 0

    def record(self, stream: Stream | None = None) -> None:
        self._index = self._device.current if stream is None else stream.index
        self._uploads = len(self._device.uploads)

    def synchronize(self) -> None:
        self._device.wait("event", self._index, self._uploads)


class Stream:
    """`torch.cuda.Stream`, of the current device unless one is named."""

    def __init__(self, device: Device, name: Any = None) -> None:
        index = None if name is None else torch.device(name).index
        self.index = device.current if index is None else index

    def wait_stream(self, other: Any) -> None:
        pass


class _Capture:
    """`torch.cuda.graph`: without a stream on one that all captures share, of the device current at first."""

    def __init__(
        self, device: Device, graph: Graph, pool: Any = None, stream: Stream | None = None, **_: Any
    ) -> None:
        if stream is None and device.first_stream is None:
            device.first_stream = device.current
        index = device.first_stream if stream is None else stream.index
        assert index is not None
        self._capture = device.capture(graph, index)

    def __enter__(self) -> None:
        self._capture.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._capture.__exit__(*error)


@contextmanager
def emulated_cuda(monkeypatch: Any, count: int = 1) -> Iterator[Device]:
    """So many emulated devices as those of torch; the first is the current one."""
    device = Device()

    @contextmanager
    def current(name: Any) -> Iterator[None]:
        before, device.current = device.current, Stream(device, name).index
        try:
            yield
        finally:
            device.current = before

    for name, stand_in in {
        "Event": lambda: Event(device),
        "Stream": partial(Stream, device),
        "stream": lambda *_: nullcontext(),
        "current_stream": partial(Stream, device),
        "device": current,
        "CUDAGraph": lambda: Graph(device),
        "graph": partial(_Capture, device),
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: count,
        "mem_get_info": lambda *_: (64 << 30, 80 << 30),
        "max_memory_allocated": lambda *_: 0,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "emulated",
        "empty_cache": lambda: None,
        "synchronize": lambda *_: device.wait("synchronize"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    with device:
        yield device


def on_device(model: nn.Module, index: int = 0) -> Any:
    """Move a model's parameters and buffers to the emulated device, in place."""
    device = torch.device("cuda", index)
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                there = OnDevice(value.detach(), device)
                module._parameters[name] = nn.Parameter(there, requires_grad=False)
        for name, value in list(module._buffers.items()):
            if value is not None:
                module._buffers[name] = OnDevice(value, device)
    return model
