"""A virtual accelerator: CPU values behind tensors of the device `gpu` that refuse to mix with tensors of the CPU.

It shows every tensor, and every random generator, on the wrong device, and counts the bytes on the device. It shows
nothing of speed.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

CPU, GPU = torch.device("cpu"), "gpu"
COPIES = ("aten::copy_", "aten::_to_copy", "aten::copy")
"""Operators that may read from one device and write to another."""
INDEXING = ("aten::index.Tensor", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index")
"""Operators whose indices may be on the CPU."""
WHOLE = ("aten::matmul", "aten::linear", "aten::einsum")
"""Composite operators that are run as they are."""
_real_generator = torch.Generator
_generators: set[int] = set()
_state = {"present": False}


class _Backend(_DummyBackendModule):
    """The module `torch.gpu`; outside `virtual_accelerator` it has no device, so other tests see a machine without."""

    def is_available(self) -> bool:
        return _state["present"]

    def device_count(self) -> int:
        return int(_state["present"])

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, *_: Any) -> None: ...

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed(self, _seed: int) -> None: ...

    def empty_cache(self) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


class Bytes:
    """Bytes of the tensors on the device; tensors that share memory count once.

    What a single operator takes while it runs is not seen.
    """

    def __init__(self) -> None:
        self._tensors: dict[int, int] = {}  # key: storage
        self.now = self.peak = 0

    def add(self, tensor: torch.Tensor, held: torch.Tensor) -> None:
        storage = held.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self._tensors[key] = self._tensors.get(key, 0) + 1
        if self._tensors[key] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._tensors[key] -= 1
        if not self._tensors[key]:
            del self._tensors[key]
            self.now -= size

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now


BYTES = Bytes()
"""Bytes on the device in this process."""


class MixedDevicesError(RuntimeError):
    """An operator was given tensors of different devices."""


class _Virtual(torch.Tensor):
    """A tensor of the virtual device; `held` has its values."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real: torch.Tensor) -> _Virtual:
        if real.dtype == torch.float64:
            raise MixedDevicesError("The device has no float64, as an Apple GPU has none.")
        made = torch.Tensor._make_wrapper_subclass(
            cls, real.size(), strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            layout=real.layout, device=torch.device(GPU, 0), requires_grad=False,
        )  # fmt: skip
        made.held = real
        BYTES.add(made, real)
        return made

    def __repr__(self) -> str:
        return f"virtual{tuple(self.shape)}"

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _is_virtual(device: Any) -> bool:
    return device is not None and torch.device(device).type == GPU


def _check(name: str, args: tuple[Any, ...], tensors: list[torch.Tensor], kwargs: dict[str, Any]) -> None:
    """Refuse what CUDA refuses: operands of several devices; a number on the CPU may join tensors of the device."""
    if name.startswith(INDEXING):
        base = args[0].device
        if any(t is not None and t.device not in (CPU, base) for t in args[1]):
            raise MixedDevicesError(f"The indices of {name} are on another device than the tensor ({base}).")
    elif name not in COPIES:
        whole = {t.device for t in tensors if t.dim()}
        numbers = {t.device for t in tensors if not t.dim() and t.device != CPU}
        if len(whole | numbers) > 1:
            raise MixedDevicesError(f"{name} is given tensors of {sorted(map(str, whole | numbers))}.")
    generator = kwargs.get("generator")
    if generator is not None:
        device = kwargs.get("device") or (tensors[0].device if tensors else CPU)
        if _is_virtual(device) != (generator._cdata in _generators):
            raise MixedDevicesError(f"{name} on {device} is given the random generator of another device.")


def _leaves(values: Any) -> Iterator[Any]:
    """What stands in nested lists and tuples; several times faster than PyTorch's trees."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(change, each) for each in value])
    return change(value)


def _unwrapped(value: Any) -> Any:
    return value.held if isinstance(value, _Virtual) else value


@functools.cache
def _known(func: Any) -> tuple[str, bool]:
    """The name of an operator, and whether it is made of others."""
    name = func.name()
    return name, name not in WHOLE and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name, composite = _known(func)
    if composite:
        with _Mode():
            done = func.decompose(*args, **kwargs)
        if done is not NotImplemented:
            return done
    tensors = [t for t in _leaves((*args, *kwargs.values())) if isinstance(t, torch.Tensor)]
    if not any(isinstance(t, _Virtual) for t in tensors) and kwargs.get("device") is None:
        return func(*args, **kwargs)
    _check(name, args, tensors, kwargs)
    if name == "aten::copy_":
        virtual = _is_virtual(args[0].device)
    elif kwargs.get("device") is not None:
        virtual = _is_virtual(kwargs["device"])
    else:
        virtual = any(isinstance(t, _Virtual) for t in tensors[: 1 if name.startswith(INDEXING) else None])
    real_args = _mapped(_unwrapped, args)
    real_kwargs = {key: _mapped(_unwrapped, value) for key, value in kwargs.items()}
    if _is_virtual(kwargs.get("device")):
        real_kwargs["device"] = CPU
    out = func(*real_args, **real_kwargs)
    if not virtual:
        return out
    wrapped = _mapped(lambda t: _Virtual(t) if isinstance(t, torch.Tensor) else t, out)
    if name == "aten::_to_copy" or not any(isinstance(t, _Virtual) for t in tensors):
        return wrapped
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _generator(device: Any = "cpu") -> torch.Generator:
    """In place of `torch.Generator`: one for the virtual device draws as the CPU's does."""
    made = _real_generator()
    if _is_virtual(device):
        _generators.add(made._cdata)
    else:
        _generators.discard(made._cdata)
    return made


@contextmanager
def virtual_accelerator() -> Iterator[None]:
    """Give the machine an accelerator, `gpu`, while the context lasts."""
    before = torch.Generator
    _state["present"], torch.Generator = True, _generator  # type: ignore[assignment, misc]
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Mode():
            yield
    finally:
        _state["present"], torch.Generator = False, before  # type: ignore[misc]
        torch._C._set_only_lift_cpu_tensors(False)


_setup_privateuseone_for_python_backend(GPU, backend_module=_Backend())
