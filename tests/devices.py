"""Several accelerators without any: tensors in host memory that say that they are on `cuda:0`, `cuda:1`, ...

An operation with tensors of several devices fails, as it does on real ones. What one call of a Python function does
inside is not watched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

_CPU = torch.device("cpu")
_ANYWHERE: tuple[Any, ...] = (
    Tensor.to,
    Tensor.copy_,
    Tensor.set_,
    Tensor.data.__set__,  # type: ignore[attr-defined]
    torch._has_compatible_shallow_copy_type,
)
_INDEXED: tuple[Any, ...] = (Tensor.__getitem__, Tensor.__setitem__)  # also by what is on the host


class Emulated(Tensor):
    """A tensor that says where it is: `place`. So does a parameter that has been moved."""


class EmulatedDevices(TorchFunctionMode):
    """While entered, devices of a type are emulated."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch, if its tensors are on one device."""
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return _find(args[0])
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        places = {_find(tensor) for tensor in tensors}
        accelerators = {place for place in places if place.type == self._kind}
        hosted = any(leaf.dim() and _find(leaf) == _CPU for leaf in tensors)
        strange = len(accelerators) > 1 or (accelerators and hosted and func not in _INDEXED)
        if strange and func not in _ANYWHERE:
            raise RuntimeError(f"{func.__name__}: the tensors are on {', '.join(sorted(map(str, places)))}")
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.to:
                return self._move(*args, **kwargs)
            if func == Tensor.data.__set__:  # type: ignore[attr-defined]
                args[0].place = _find(args[1])
            if func is Tensor.numpy and accelerators:
                raise TypeError("a tensor on a device is no array of numpy's; copy it to the host first")
            if "device" in kwargs:
                place = self._parse(kwargs.pop("device"))
                kwargs.pop("pin_memory", None)
            else:
                place = _CPU if func is Tensor.cpu else next(iter(accelerators), _CPU)
            result = func(*args, **kwargs)
            holds = any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))  # a size stays a size
            return tree_map_only(Tensor, lambda value: _put(value, place), result) if holds else result

    def _move(self, tensor: Tensor, *how: Any, **named: Any) -> Tensor:
        """What `Tensor.to` does."""
        dtype, place = named.get("dtype"), named.get("device")
        for one in how:
            if isinstance(one, torch.dtype):
                dtype = one
            elif isinstance(one, torch.device | str):
                place = one
        place = _find(tensor) if place is None else self._parse(place)
        moved = tensor if dtype is None else tensor.to(dtype)
        return tensor if moved is tensor and place == _find(tensor) else _put(moved.clone(), place)

    def _parse(self, device: Any) -> torch.device:
        place = _CPU if device is None else torch.device(device)
        return torch.device(self._kind, place.index or 0) if place.type == self._kind else place


def _find(tensor: Tensor) -> torch.device:
    place: torch.device = getattr(tensor, "place", _CPU)
    return place


def _put(tensor: Tensor, place: torch.device) -> Tensor:
    if _find(tensor) == place:
        return tensor
    put: Any = tensor.as_subclass(Emulated)
    put.place = place
    return put
