"""Arguments, checked before PyTorch sees them: an error names the argument, what it was, and what is allowed.

How shapes, strides and numbers go together the Rust side checks, once for every caller.
"""

from typing import TYPE_CHECKING, Any, NoReturn, Optional, Tuple

import torch
from torch.compiler import is_compiling

if TYPE_CHECKING:
    from typing_extensions import TypeGuard


# What PyTorch's operators take for a whole number.
_MOST = 2**63 - 1


def refuse(name: str, found: Any, allowed: str) -> NoReturn:
    """The error of an argument whose value is not allowed."""
    raise ValueError(f"{name}: {found}; allowed: {allowed}")


def refuse_type(name: str, found: Any, allowed: str) -> NoReturn:
    """The error of an argument of a type that is not allowed."""
    raise TypeError(f"{name}: {type(found).__name__}; allowed: {allowed}")


def check_tensor(name: str, x: Any, rank: Optional[int] = None, dimensions: str = "") -> None:
    """Checks that this is a tensor with strides, of so many dimensions."""
    if not isinstance(x, torch.Tensor):
        refuse_type(name, x, "a torch.Tensor")
    if x.layout != torch.strided:
        refuse(name, f"layout {x.layout}", "torch.strided")
    if x.is_nested:
        refuse(name, "a nested tensor", "one tensor, with cu_seqlens for sequences of different lengths")
    if x.is_quantized:
        raise TypeError(f"{name}: dtype {x.dtype}; allowed: one that is not quantized")
    if rank is not None and x.dim() != rank:
        refuse(name, f"{x.dim()} dimensions", f"{rank}: {dimensions}")
    if is_plain(x):
        _check_storage(name, x)


def is_plain(x: torch.Tensor) -> bool:
    """Whether this has memory of its own, and stands for nothing else: no tracer's or transform's tensor."""
    if is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter) or x.device.type not in ("cpu", "cuda"):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _check_storage(name: str, x: torch.Tensor) -> None:
    """Checks that there is memory for all elements: torch lets storages shrink under their tensors, and does not look."""
    if x.numel() == 0:
        return
    span = sum((extent - 1) * stride for extent, stride in zip(x.shape, x.stride())) + 1
    found, needed = x.untyped_storage().nbytes(), (x.storage_offset() + span) * x.element_size()
    if found < needed:
        refuse(name, f"a storage of {found} bytes", f"{needed}, which it reaches to")


def check_optional_tensor(name: str, x: Any) -> None:
    """Checks that this is a tensor, or None."""
    if x is None:
        return
    if not isinstance(x, torch.Tensor):
        refuse_type(name, x, "a torch.Tensor, or None")
    check_tensor(name, x)


def check_device(name: str, x: Optional[torch.Tensor], q: torch.Tensor) -> None:
    """Checks that this is on the device of Q, or None."""
    if x is not None and x.device != q.device:
        refuse(name, f"on device {x.device}", f"{q.device}, where q is")


def check_flag(name: str, x: Any) -> None:
    """Checks that this is True or False."""
    if not isinstance(x, bool):
        refuse_type(name, x, "True or False")


def number(name: str, x: Any) -> float:
    """A number that is not a bool."""
    if isinstance(x, bool) or not isinstance(x, (int, float, torch.SymInt, torch.SymFloat)):
        refuse_type(name, x, "a number")
    try:
        value: float = x if isinstance(x, (float, torch.SymFloat)) else float(x)  # type: ignore[assignment]
    except OverflowError:
        refuse(name, "a whole number beyond all floats", "a number that a float holds")
    return value


def optional_number(name: str, x: Any) -> Optional[float]:
    """A number, or None."""
    return None if x is None else number(name, x)


def is_int(x: Any) -> "TypeGuard[int]":
    """Whether this is a whole number: of Python, or one that a tracer stands in for."""
    return isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool)


def optional_length(name: str, x: Any) -> Optional[int]:
    """A length, or None."""
    if x is None:
        return None
    if not is_int(x):
        refuse_type(name, x, "a whole number, or None")
    if x < 0:
        refuse(name, x, "0 or more")
    if x > _MOST:
        refuse(name, "a whole number beyond 64 bits", f"0 to {_MOST}")
    return x


def splits(name: str, x: Any) -> int:
    """Into how many parts keys are divided."""
    if not is_int(x):
        refuse_type(name, x, "a whole number")
    if not 0 <= x <= 128:
        refuse(name, x, "0 to 128")
    return x


def window(name: str, x: Any) -> Tuple[Optional[int], Optional[int]]:
    """Keys to the left and to the right; None, or as flash_attn has it a negative number, for all there are."""
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        refuse_type(name, x, "(left, right)")
    for side in x:
        if side is not None and not is_int(side):
            refuse_type(name, side, "whole numbers, or None for all keys")
    left, right = (None if side is None or side < 0 or side > _MOST else side for side in x)
    return left, right
