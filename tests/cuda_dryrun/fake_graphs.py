# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of a GPU that is not there.

While a graph is captured, calls of operators and kernels are written down with the
memory that they read and write; a replay makes the same calls on the same memory,
whatever the host's variables hold by then. As on a GPU

- the host can neither wait for the device nor copy to or from it during a capture;
- a replay reads the memory that the capture read. If nobody kept it, that raises here;
- what the calls made belongs to the graphs: it has values after a replay only where
  somebody kept the tensor.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

_capturing: "CUDAGraph | None" = None


def capturing() -> bool:
    """Whether calls are written down instead of done for good."""
    return _capturing is not None


def written_down(
    function: Callable[..., Any], args: tuple, kwargs: dict, result: Any
) -> None:
    """Add a call to the graph that is captured, if any."""
    if _capturing is not None:
        _capturing.add(function, args, kwargs, result)


class _View(NamedTuple):
    """A tensor over some memory of the graph."""

    memory: int
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Call(NamedTuple):
    function: Callable[..., Any]
    args: tuple
    kwargs: dict
    made: list[int | None]  # memory of every tensor of the result, None: not new


class _Memory:
    """Memory that a graph uses, kept by others or not."""

    def __init__(self, storage: Any, made_here: bool) -> None:
        self.made_here = made_here
        self._weak = StorageWeakRef(storage)
        # Graphs share a pool of memory, of which nothing is given back.
        of_other_graph = not made_here and getattr(storage, "of_pool", False)
        self._kept = storage if of_other_graph else None
        if made_here:
            storage.of_pool = True

    def alive(self) -> Any:
        """The storage; None if it was freed."""
        if self._weak.expired():
            return None
        return torch.UntypedStorage._new_with_weak_ptr(self._weak.cdata)


class CUDAGraph:
    """``torch.cuda.CUDAGraph``."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._calls: list[_Call] = []
        self._memory: list[_Memory] = []
        self._index: dict[int, int] = {}

    def capture_begin(self, *_: Any, **__: Any) -> None:
        global _capturing
        assert _capturing is None, "another graph is captured"
        _capturing = self

    def capture_end(self) -> None:
        global _capturing
        _capturing = None

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]

    def pool(self) -> tuple[int, int]:
        return 0, 1

    def add(
        self, function: Callable[..., Any], args: tuple, kwargs: dict, result: Any
    ) -> None:
        arguments = self._written((args, kwargs))
        made = [self._new(tensor) for tensor in tensors_in(result)]
        self._calls.append(_Call(function, *arguments, made))

    def replay(self) -> None:
        """Make all calls again; they are not to be looked into."""
        new: dict[int, Any] = {}
        for call in self._calls:
            args, kwargs = self._read((call.args, call.kwargs), new)
            result = call.function(*args, **kwargs)
            for memory, tensor in zip(call.made, tensors_in(result), strict=True):
                if memory is None:
                    continue
                storage = tensor.untyped_storage()
                kept = self._memory[memory].alive()
                if kept is not None and storage.nbytes():
                    kept.copy_(storage)
                new[memory] = storage if kept is None else kept

    def _new(self, tensor: torch.Tensor) -> int | None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._index:
            return None
        return self._remember(storage, made_here=True)

    def _remember(self, storage: Any, made_here: bool) -> int:
        number = self._index[storage._cdata] = len(self._memory)
        self._memory.append(_Memory(storage, made_here))
        return number

    def _written(self, value: Any) -> Any:
        """Arguments with views in place of the device's tensors."""
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            if not getattr(storage, "on_gpu", False):
                return value.clone()  # a scalar of the host: its value is the graph's
            number = self._index.get(storage._cdata)
            if number is None:
                number = self._remember(storage, made_here=False)
            shape = tuple(value.shape), tuple(value.stride())
            return _View(number, value.dtype, value.storage_offset(), *shape)
        if isinstance(value, dict):
            return {key: self._written(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([self._written(item) for item in value])
        return value

    def _read(self, value: Any, new: dict[int, Any]) -> Any:
        """Arguments with the tensors that their views are of."""
        if isinstance(value, _View):
            memory = self._memory[value.memory]
            storage = new[value.memory] if memory.made_here else memory.alive()
            if storage is None:
                raise RuntimeError(
                    f"a CUDA graph reads memory that was freed after its capture, of "
                    f"{value.dtype} {list(value.size)}"
                )
            tensor = torch.empty(0, dtype=value.dtype, device="cpu")
            return tensor.set_(storage, value.offset, value.size, value.stride)
        if isinstance(value, dict):
            return {key: self._read(item, new) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([self._read(item, new) for item in value])
        return value


@contextmanager
def graph(captured: CUDAGraph, *_: Any, **__: Any) -> Iterator[None]:
    """``torch.cuda.graph``."""
    captured.capture_begin()
    try:
        yield
    finally:
        captured.capture_end()


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Of an operator's arguments or result."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
