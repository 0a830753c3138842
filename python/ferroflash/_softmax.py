"""Softmax by the kernels of this project."""

import torch
from torch import Tensor

from ferroflash import _ops as _ops
from ferroflash._arguments import check_tensor, is_int, refuse, refuse_type


def softmax(x: Tensor, dim: int = -1, *, method: str = "online") -> Tensor:
    """softmax(x) over one dimension; a row of nothing but -inf becomes 0. Differentiable, twice too.

    Args:
        x: Of any rank but 0; float32, float16 or bfloat16. Where `dim` is not contiguous, a copy is made.
        dim: The dimension.
        method: "online": maximum and sum in one pass over the row, the result in a second. "two-pass": the maximum
            first, then the sum, then the result.

    Raises:
        ValueError, TypeError: An argument is not allowed; the message names it, says what it was, and what is allowed.

    Source: Online normalizer calculation for softmax (1805.02867).
    """
    check_tensor("x", x)
    if not is_int(dim):
        refuse_type("dim", dim, "a whole number")
    if not isinstance(method, str):
        refuse_type("method", method, "online, two-pass")
    if method not in ("online", "two-pass"):
        refuse("method", repr(method), "online, two-pass")
    if x.dim() == 0:
        refuse("x", "0 dimensions", "1 or more")
    if not -x.dim() <= dim < x.dim():
        refuse("dim", dim, f"{-x.dim()} to {x.dim() - 1}, as x has {x.dim()} dimensions")
    return torch.ops.ferroflash.softmax(x.movedim(dim, -1), method).movedim(-1, dim)
