"""`torch.vmap` of the operators: attention has a batch already, of which what is mapped over becomes a part.

Where that cannot be, one call runs after the other: dropout, whose mask depends on the place in the batch, and sinks
that differ or whose gradients do, since a call has one for each head.

Each rule takes the operator itself, which it calls below what is mapped over.
"""

from typing import Any, Callable, List, Optional, Tuple

import torch
from torch import Tensor

_TENSORS = 10
Dims = Tuple[Optional[int], ...]
Operator = Callable[..., Tuple[Tensor, ...]]


class _Fold:
    """Makes what is mapped over `times` times part of the batch."""

    def __init__(
        self, times: int, q: Tensor, q_dim: Optional[int], cu_seqlens: Optional[Tensor], cu_dim: Optional[int]
    ):
        self.times = times
        self.varlen = cu_seqlens is not None
        of_cu = None if cu_seqlens is None else self.first(cu_seqlens, cu_dim)
        # Sequences, without those that are mapped over.
        self.batch = self.first(q, q_dim).shape[1] if of_cu is None else of_cu.shape[1] - 1

    def first(self, x: Tensor, dim: Optional[int]) -> Tensor:
        """With what is mapped over as the first dimension, which may be expanded."""
        return x.expand(self.times, *x.shape) if dim is None else x.movedim(dim, 0)

    def tokens(self, x: Tensor, dim: Optional[int]) -> Tensor:
        """Of (batch, seqlen, nheads, headdim) or (total, nheads, headdim)."""
        return self.first(x, dim).flatten(0, 1)

    def rows(self, x: Optional[Tensor], dim: Optional[int]) -> Optional[Tensor]:
        """Of the LSE: (batch, nheads, seqlen) or (nheads, total)."""
        if x is None:
            return None
        x = self.first(x, dim)
        return x.movedim(0, 1).flatten(1, 2) if self.varlen else x.flatten(0, 1)

    def scores(self, x: Optional[Tensor], dim: Optional[int], whole: bool = False) -> Optional[Tensor]:
        """Of (batch, nheads, seqlen_q, seqlen_k); what is the same for all stays so, unless it is asked for whole."""
        if x is None or (dim is None and x.shape[0] == 1 and not whole):
            return x
        x = self.first(x, dim)
        return x.expand(-1, self.batch, -1, -1, -1).flatten(0, 1) if x.shape[1] == 1 else x.flatten(0, 1)

    def slopes(self, x: Optional[Tensor], dim: Optional[int]) -> Optional[Tensor]:
        """Of (nheads) or (batch, nheads)."""
        if x is None or (dim is None and x.dim() == 1):
            return x
        x = self.first(x, dim)
        return (x[:, None].expand(-1, self.batch, -1) if x.dim() == 2 else x).flatten(0, 1)

    def starts(self, x: Optional[Tensor], dim: Optional[int], total: int) -> Optional[Tensor]:
        """Of `cu_seqlens`, where each of the mapped has so many tokens."""
        if x is None:
            return None
        before = torch.arange(self.times, dtype=x.dtype, device=x.device)[:, None] * total
        return torch.cat([(self.first(x, dim)[:, :-1] + before).flatten(), x.new_full((1,), self.times * total)])

    def inputs(self, arguments: Tuple[Any, ...], dims: Dims, whole_bias: bool = False) -> Tuple[Any, ...]:
        """All inputs of an operator."""
        q, k, v, bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, rng_state = arguments
        q, k, v = (self.tokens(x, dim) for x, dim in zip((q, k, v), dims))
        return (
            q,
            k,
            v,
            self.scores(bias, dims[3], whole_bias),
            self.scores(mask, dims[4]),
            self.slopes(alibi_slopes, dims[5]),
            sinks,
            self.starts(cu_seqlens_q, dims[7], q.shape[0] // max(self.times, 1)),
            self.starts(cu_seqlens_k, dims[8], k.shape[0] // max(self.times, 1)),
            rng_state,
        )

    def unfolded(self, x: Tensor) -> Tensor:
        """The reverse of `tokens`."""
        return x.unflatten(0, (self.times, x.shape[0] // max(self.times, 1)))

    def unfolded_rows(self, x: Tensor) -> Tensor:
        """The reverse of `rows`."""
        if self.varlen:
            return x.unflatten(1, (self.times, x.shape[1] // max(self.times, 1))).movedim(1, 0)
        return self.unfolded(x)


def attention(operator: Operator, info: Any, dims: Dims, *arguments: Any) -> Tuple[Tuple[Tensor, ...], Dims]:
    """The rule for `attention`."""
    if arguments[9] is not None or dims[6] is not None:
        return _one_by_one(operator, info, dims, arguments)
    fold = _Fold(info.batch_size, arguments[0], dims[0], arguments[7], dims[7])
    inputs = fold.inputs(arguments[:_TENSORS], dims)
    out, softmax_lse = operator(*inputs, *arguments[_TENSORS:])
    return (fold.unfolded(out), fold.unfolded_rows(softmax_lse)), (0, 0)


def attention_backward(operator: Operator, info: Any, dims: Dims, *arguments: Any) -> Tuple[Tuple[Tensor, ...], Dims]:
    """The rule for `attention_backward`."""
    (dout, dlse, out, softmax_lse), given = arguments[:4], arguments[4 : 4 + _TENSORS]
    numbers, (needs_dbias, needs_dsinks) = arguments[4 + _TENSORS : -2], arguments[-2:]
    of_results, of_inputs = dims[:4], dims[4 : 4 + _TENSORS]
    if given[9] is not None or of_inputs[6] is not None or needs_dsinks:
        return _one_by_one(operator, info, dims, arguments)
    fold = _Fold(info.batch_size, given[0], of_inputs[0], given[7], of_inputs[7])
    inputs = fold.inputs(given, of_inputs, needs_dbias)
    results = (
        None if dout is None else fold.tokens(dout, of_results[0]),
        fold.rows(dlse, of_results[1]),
        fold.tokens(out, of_results[2]),
        fold.rows(softmax_lse, of_results[3]),
    )
    gradients = operator(*results, *inputs, *numbers, needs_dbias, needs_dsinks)
    dq, dk, dv, dbias, dsinks = gradients
    if needs_dbias:
        dbias = fold.unfolded(dbias)
        batch = given[3].shape[0] if of_inputs[3] is None else given[3].movedim(of_inputs[3], 0).shape[1]
        if batch == 1:
            dbias = dbias.sum(1, keepdim=True)
    return (*map(fold.unfolded, (dq, dk, dv)), dbias, dsinks), (0, 0, 0, 0 if needs_dbias else None, None)


def softmax(operator: Callable[..., Tensor], info: Any, dims: Dims, x: Tensor, method: str) -> Tuple[Tensor, int]:
    """The rule for `softmax`, whose rows are the last dimension."""
    assert dims[0] is not None
    return operator(x.movedim(dims[0], 0), method), 0


def _one_by_one(
    operator: Operator, info: Any, dims: Dims, arguments: Tuple[Any, ...]
) -> Tuple[Tuple[Tensor, ...], Dims]:
    """A call for each that is mapped over."""
    results: List[Tuple[Tensor, ...]] = []
    for i in range(info.batch_size):
        results.append(operator(*(x if dim is None else x.select(dim, i) for x, dim in zip(arguments, dims))))
    outputs = tuple(map(torch.stack, zip(*results)))
    return outputs, (0,) * len(outputs)
