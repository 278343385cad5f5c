# SPDX-License-Identifier: Apache-2.0
"""A GPU that is not there: CUDA tensors live in host memory and are marked.

:func:`install` makes torch of a CPU build say that it has one CUDA device. What is
asked to be on ``cuda`` is computed by the CPU, but

- ``tensor.device`` says ``cuda:0``, so that code takes the branches it takes on a GPU;
- an operator that gets tensors of both sides raises, and so does ``numpy()``;
- waits of the host for the device are counted, by kind and place: ``transfers``;
- CUDA graphs are captured and replayed: ``fake_graphs``.

It replaces parts of torch for good: only for processes of their own.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import fake_graphs
import torch
from fake_graphs import tensors_in
from fake_transfers import caller, transfers
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CAPABILITY = [9, 0]  # an H100; may be changed before vLLM is imported
CUDA = torch.device("cuda", 0)
_HOST = torch.device("cpu")
_native = {name: getattr(torch.Tensor, name) for name in ("device", "to", "numpy")}


kernels: dict[Any, Any] = {}
"""What stands for an operator's CUDA kernel, by operator."""
looked_into: dict[Any, Any] = {}
"""What an operator that has no kernel does, by operator."""


_marks_are_seen = True


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether the tensor would be in the GPU's memory."""
    return _marks_are_seen and getattr(_storage(tensor), "on_gpu", False)


def _storage(tensor: torch.Tensor) -> Any:
    """The object that the marks are on; views of a tensor share it."""
    return None if tensor.is_meta else tensor.untyped_storage()


def _mark(tensor: torch.Tensor) -> None:
    if (storage := _storage(tensor)) is not None:
        storage.on_gpu = True


def mapped(host: torch.Tensor) -> torch.Tensor:
    """The device's view of pinned host memory (unified virtual addressing)."""
    view = torch.from_numpy(_native["numpy"](host))
    _mark(view)
    return view


def _is_pinned(tensor: torch.Tensor) -> bool:
    return getattr(_storage(tensor), "pinned", False)


def _device_type(device: Any) -> str:
    """Of a device, its name or its number."""
    return "cuda" if isinstance(device, int) else torch.device(device).type


# Operators whose result's shape depends on values.
_SHAPE_FROM_VALUES = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
}
_TO_HOST = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"}


class _FakeGpu(TorchDispatchMode):
    """Sees every operator call."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        inputs = [*tensors_in(args), *tensors_in(list(kwargs.values()))]
        wanted = None
        if kwargs.get("device") is not None:
            wanted = _device_type(kwargs["device"])
            if wanted == "cuda":
                kwargs["device"] = _HOST
        if wanted == "meta" or any(t.is_meta for t in inputs):
            return func(*args, **kwargs)
        pinned = bool(kwargs.pop("pin_memory", False))
        marked = [on_gpu(t) for t in inputs]
        name = func._schema.name
        if name in ("aten::copy_", "aten::_to_copy"):
            self._copy(name, inputs, marked, wanted, args, kwargs)
        else:
            self._check(name, inputs, marked, args, kwargs)
        known = {t.untyped_storage()._cdata for t in inputs}
        if any(marked) and func in kernels:
            result = launch(kernels[func], *args, **kwargs)
        elif any(marked) and func in looked_into:
            with self:
                result = looked_into[func](*args, **kwargs)
        else:
            result = func(*args, **kwargs)
            # What vLLM writes in Python was looked into.
            if func.namespace != "vllm" and (any(marked) or wanted == "cuda"):
                fake_graphs.written_down(func, args, kwargs, result)
        for tensor in tensors_in(result):
            if tensor.untyped_storage()._cdata not in known:
                if wanted == "cuda" if wanted else any(marked):
                    _mark(tensor)
                _storage(tensor).pinned = pinned
        return result

    def _copy(
        self,
        name: str,
        inputs: list[torch.Tensor],
        marked: list[bool],
        wanted: str | None,
        args: tuple,
        kwargs: dict,
    ) -> None:
        if name == "aten::copy_":
            to_gpu, from_gpu = marked[0], marked[-1]
            positional = args[2] if len(args) > 2 else False
            blocking = not (positional or kwargs.get("non_blocking"))
            host = inputs[1] if to_gpu else inputs[0]
        else:
            from_gpu = marked[0]
            to_gpu = wanted == "cuda" if wanted else from_gpu
            blocking = not kwargs.get("non_blocking")
            host = inputs[0]
        if to_gpu == from_gpu:
            return
        direction = "to the device" if to_gpu else "to the host"
        if blocking or fake_graphs.capturing():
            transfers.add("wait", f"copy {direction}")
        elif to_gpu and not _is_pinned(host):
            transfers.add("staged", f"copy {direction}")

    def _check(
        self,
        name: str,
        inputs: list[torch.Tensor],
        marked: list[bool],
        args: tuple,
        kwargs: dict,
    ) -> None:
        if name in _TO_HOST and any(marked):
            transfers.add("wait", "value")
        elif name in _SHAPE_FROM_VALUES and any(marked):
            transfers.add("wait", name)
        elif name == "aten::repeat_interleave" and any(marked):
            by_number = len(args) > 1 and isinstance(args[1], int)
            if kwargs.get("output_size") is None and not by_number:
                transfers.add("wait", name)
        elif "index" in name and isinstance(args[1], list | tuple):
            self._check_index(name, args)
            return
        # Scalars of the host may meet tensors of the device.
        sides = {side for side, t in zip(marked, inputs, strict=True) if t.dim()}
        if len(sides) > 1:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} got "
                f"{[str(t.device) for t in inputs]} at {caller()}"
            )

    def _check_index(self, name: str, args: tuple) -> None:
        indices = [index for index in args[1] if index is not None]
        if on_gpu(args[0]):
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                transfers.add("wait", f"{name} by a mask")
            elif not all(on_gpu(i) for i in indices):
                transfers.add("wait", f"{name} by indices of the host")
        values = args[2] if len(args) > 2 else args[0]
        if (not on_gpu(args[0]) and any(on_gpu(i) for i in indices)) or (
            values.dim() and on_gpu(values) != on_gpu(args[0])
        ):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} got "
                f"{[str(t.device) for t in tensors_in(args)]} at {caller()}"
            )


MODE = _FakeGpu()


@contextmanager
def inside_a_kernel() -> Iterator[None]:
    """What is done here is done by the device: nothing is checked or counted."""
    if fake_graphs.capturing():
        raise RuntimeError("this would be in no CUDA graph: use launch")
    with _unseen():
        yield


def launch(kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run what stands for a kernel."""
    with _unseen():
        result = kernel(*args, **kwargs)
    fake_graphs.written_down(kernel, args, kwargs, result)
    return result


@contextmanager
def _unseen() -> Iterator[None]:
    global _marks_are_seen
    before, _marks_are_seen = _marks_are_seen, False
    try:
        with _disable_current_modes():
            yield
    finally:
        _marks_are_seen = before


# Methods of tensors that never get to the dispatcher.


def _device(self: torch.Tensor) -> torch.device:
    device = _native["device"].__get__(self)
    return CUDA if device.type == "cpu" and on_gpu(self) else device


def _to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``to``, which may be given a device, a dtype, or a tensor that has both."""
    rest, device = list(args), kwargs.pop("device", None)
    if rest and isinstance(rest[0], torch.Tensor):
        device, rest[0] = rest[0].device, rest[0].dtype
    elif rest and isinstance(rest[0], torch.device | str | int):
        device = rest.pop(0)
    here = "cuda" if on_gpu(self) else _native["device"].__get__(self).type
    there = here if device is None else _device_type(device)
    if "meta" in (here, there):
        return _native["to"](self, *rest, device=there, **kwargs)
    if here == there:
        return _native["to"](self, *rest, **kwargs) if rest or kwargs else self
    if rest and isinstance(rest[0], torch.dtype):
        kwargs["dtype"] = rest.pop(0)
    return torch.ops.aten._to_copy.default(
        self,
        dtype=kwargs.get("dtype"),
        device=torch.device(there),
        non_blocking=bool(rest[0] if rest else kwargs.get("non_blocking")),
    )


def _reading(name: str) -> Any:
    """A method that gives values to Python; the dispatcher sees it sometimes only."""
    native = getattr(torch.Tensor, name)

    @functools.wraps(native)
    def read(self: torch.Tensor) -> Any:
        if on_gpu(self):
            transfers.add("wait", name)
        counting, transfers.counting = transfers.counting, False
        try:
            return native(self)
        finally:
            transfers.counting = counting

    return read


def _numpy(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if on_gpu(self):
        raise TypeError(
            f"can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to "
            f"copy the tensor to host memory first. At {caller()}"
        )
    return _native["numpy"](self, *args, **kwargs)


def _pin_memory(self: torch.Tensor, *_: Any) -> torch.Tensor:
    if _is_pinned(self):
        return self
    transfers.add("pin", "pin_memory")
    copy = self.clone()
    _storage(copy).pinned = True
    return copy


def _install_tensor_methods() -> None:
    tensor = torch.Tensor
    tensor.device = property(_device)
    tensor.is_cuda = property(on_gpu)
    tensor.is_cpu = property(lambda self: self.device.type == "cpu")
    tensor.get_device = lambda self: 0 if on_gpu(self) else -1
    tensor.to, tensor.numpy = _to, _numpy
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__"):
        setattr(tensor, name, _reading(name))
    tensor.cpu = lambda self, **_: self.to("cpu")
    tensor.cuda = lambda self, *_, non_blocking=False, **__: self.to(
        "cuda", non_blocking=non_blocking
    )
    tensor.pin_memory = _pin_memory
    tensor.is_pinned = lambda self, *_: _is_pinned(self)
    tensor.record_stream = lambda *_: None
    for name in ("tensor", "as_tensor", "asarray"):
        setattr(torch, name, _constructor(getattr(torch, name)))


def _constructor(native: Any) -> Any:
    """``torch.tensor`` and the like, which ask for the device's memory directly."""

    @functools.wraps(native)
    def construct(
        data: Any, *, device: Any = None, pin_memory: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        if device is None:
            is_tensor = isinstance(data, torch.Tensor)
            device = data.device if is_tensor else torch.empty(0).device
        tensor = native(data, device="cpu", **kwargs)
        if pin_memory:
            _storage(tensor).pinned = True
        return tensor.to(device)

    return construct


class _Graph(fake_graphs.CUDAGraph):
    def replay(self) -> None:
        with inside_a_kernel():
            super().replay()


class _Event:
    """Recorded and waited for at once."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        transfers.add("wait", "event")

    def elapsed_time(self, _: Any) -> float:
        return 1.0


class _Stream:
    device, cuda_stream, stream_id, device_index = CUDA, 0, 0, 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None:
        transfers.add("wait", "stream")

    def query(self) -> bool:
        return True

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: Any) -> None: ...


class _Generator(torch._C.Generator):
    """Draws on the host for either device."""

    def __new__(cls, device: Any = None) -> Any:
        return super().__new__(cls, "cpu")

    def __init__(self, *_: Any, **__: Any) -> None:
        self._offset = 0

    device = property(lambda self: CUDA)

    def get_offset(self) -> int:
        return self._offset

    def set_offset(self, offset: int) -> None:
        self._offset = offset


class _Properties:
    name, uuid = "NVIDIA H100", "0"
    total_memory, multi_processor_count, warp_size = 80 << 30, 132, 32
    L2_cache_size, regs_per_multiprocessor = 50 << 20, 65536
    shared_memory_per_block_optin, shared_memory_per_multiprocessor = 232448, 233472
    max_threads_per_multi_processor, is_integrated = 2048, 0
    major = property(lambda self: CAPABILITY[0])
    minor = property(lambda self: CAPABILITY[1])


def _always(value: Any) -> Any:
    """A function that returns ``value``; a new one, as Dynamo wants for every name."""
    return lambda *_, **__: value


def _install_cuda() -> None:
    stream = _Stream()
    memory = 80 << 30, 80 << 30  # free, total
    for module in (torch.cuda, torch.accelerator):
        for name, value in {
            "is_available": True,
            "device_count": 1,
            "empty_cache": None,
            "memory_stats": defaultdict(int),
            "memory_reserved": 0,
            "memory_allocated": 0,
            "max_memory_allocated": 0,
            "reset_peak_memory_stats": None,
            "current_stream": stream,
            "set_stream": None,
        }.items():
            setattr(module, name, _always(value))
        module.synchronize = lambda *_: transfers.add("wait", "device")
    for name, value in {
        "current_device": 0,
        "set_device": None,
        "get_device_properties": _Properties(),
        "get_device_capability": tuple(CAPABILITY),
        "get_device_name": _Properties.name,
        "mem_get_info": memory,
        "default_stream": stream,
        "stream": nullcontext(),
        "device": nullcontext(),
        "is_initialized": True,
        "_lazy_init": None,
        "init": None,
        "manual_seed": None,
        "manual_seed_all": None,
        "graph_pool_handle": (0, 1),
    }.items():
        setattr(torch.cuda, name, _always(value))
    for name, value in {
        "set_device_index": None,
        "current_device_index": 0,
        "device_index": nullcontext(),
        "empty_host_cache": None,
        "get_memory_info": memory,
        "current_accelerator": torch.device("cuda"),
    }.items():
        setattr(torch.accelerator, name, _always(value))
    torch.cuda.memory.get_allocator_backend = _always("fake")
    torch.cuda.Stream, torch.cuda.Event = _Stream, _Event
    torch.cuda.CUDAGraph, torch.cuda.graph = _Graph, fake_graphs.graph
    torch.cuda.is_current_stream_capturing = fake_graphs.capturing
    torch.Stream, torch.Event, torch.Generator = _Stream, _Event, _Generator
    torch.version.cuda = "13.0"


def install() -> None:
    """Turn this process's torch into one with a GPU."""
    torch.set_num_threads(1)
    _install_tensor_methods()
    _install_cuda()
    MODE.__enter__()
