"""Attention, with all that scores and masks may take."""

from typing import TYPE_CHECKING, Any, Optional, Tuple, TypedDict, Union, overload

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled

from ferroflash import _core, _ops
from ferroflash._arguments import (
    check_device,
    check_flag,
    check_optional_tensor,
    check_tensor,
    number,
    optional_length,
    optional_number,
    refuse,
    splits,
    window,
)

if TYPE_CHECKING:
    from typing_extensions import Literal, Unpack


class Options(TypedDict, total=False):
    """What `attention` takes besides Q, K, V and `return_lse`."""

    bias: Optional[Tensor]
    mask: Optional[Tensor]
    alibi_slopes: Optional[Tensor]
    sinks: Optional[Tensor]
    cu_seqlens_q: Optional[Tensor]
    cu_seqlens_k: Optional[Tensor]
    max_seqlen_q: Optional[int]
    max_seqlen_k: Optional[int]
    softmax_scale: Optional[float]
    causal: bool
    window_size: Tuple[Optional[int], Optional[int]]
    softcap: Optional[float]
    dropout_p: float
    deterministic: bool
    allow_tf32: bool
    num_splits: int


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: "Literal[False]" = False, **options: "Unpack[Options]"
) -> Tensor: ...


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: "Literal[True]", **options: "Unpack[Options]"
) -> Tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
    alibi_slopes: Optional[Tensor] = None,
    sinks: Optional[Tensor] = None,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: Tuple[Optional[int], Optional[int]] = (None, None),
    softcap: Optional[float] = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    allow_tf32: bool = False,
    num_splits: int = 0,
    return_lse: bool = False,
) -> Union[Tensor, Tuple[Tensor, Tensor]]:
    """O = softmax(softmax_scale · Q Kᵀ + bias + mask) V, exactly, without S and P ever being whole in memory.

    Differentiable in Q, K, V, bias and sinks; the LSE, too, may be part of a loss. A row that sees no key has O = 0 and
    LSE = -inf. On CUDA the call only launches, on torch's current stream; on the CPU it computes on all cores. Under
    `torch.autocast` Q, K, V and the bias are cast to its dtype.

    Args:
        q: (batch, seqlen_q, nheads, headdim), or with `cu_seqlens_q` (total_q, nheads, headdim); float32, float16 or
            bfloat16. Any strides; where the last is not 1, a copy is made. headdim is at most 256 on CUDA.
        k: (batch, seqlen_k, nheads_k, headdim), or (total_k, nheads_k, headdim). nheads is a multiple of nheads_k.
        v: (batch, seqlen_k, nheads_k, headdim_v), or (total_k, nheads_k, headdim_v).
        bias: Added to the scores: (batch, nheads, seqlen_q, seqlen_k), each of which may be 1. Cast to the dtype of Q.
        mask: bool, True where a query sees a key; shaped like a bias. A key-padding mask is (batch, 1, 1, seqlen_k).
        alibi_slopes: float32, (nheads) or (batch, nheads): -slope · |i + seqlen_k - seqlen_q - j| is added to the score
            of query i and key j. It has no gradient.
        sinks: (nheads): a logit that takes part in the softmax of every row of a head, and has no value.
        cu_seqlens_q: int32, (batch + 1): where each sequence of Q begins, from 0 to total_q. On CUDA nobody checks
            what is in it.
        cu_seqlens_k: The same for K and V.
        max_seqlen_q: With `cu_seqlens_q`, the length of the longest sequence; on the CPU it may be None.
        max_seqlen_k: The same for K and V.
        softmax_scale: What Q Kᵀ is multiplied with; 1/√headdim if None.
        causal: Whether query i sees only the keys j <= i + seqlen_k - seqlen_q.
        window_size: Keys that query i sees to the left and to the right of i + seqlen_k - seqlen_q; None, or a negative
            number, for all.
        softcap: The scores S become softcap · tanh(S / softcap).
        dropout_p: The probability that an element of P becomes 0. The seed comes from torch's CPU generator.
        deterministic: Whether gradients must be the same bits in every run and in every batch; an eighth slower at most on
            Hopper, more elsewhere.
        allow_tf32: Whether products of float32 tensors may be computed in tf32 on CUDA.
        num_splits: Into how many parts keys are divided among a GPU's multiprocessors, by kernels that can: 0 for as
            many as seems best, 1 for no division, at most 128. It changes the last bits of results.
        return_lse: Whether to return the LSE too.

    Returns:
        O, (batch, seqlen_q, nheads, headdim_v) or (total_q, nheads, headdim_v), in the dtype of Q. With `return_lse`
        also the LSE, log Σ e^score, float32, (batch, nheads, seqlen_q) or (nheads, total_q).

    Raises:
        ValueError, TypeError: An argument is not allowed; the message names it, says what it was, and what is allowed.
        RuntimeError: The GPU cannot run the kernels.

    Source: FlashAttention (2205.14135), FlashAttention-2 (2307.08691).
    """
    if return_lse is not True and return_lse is not False:
        check_flag("return_lse", return_lse)
    tensors = (q, k, v, bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k)
    numbers = (max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, softcap)
    out, softmax_lse = attend(tensors, (*numbers, dropout_p, deterministic, allow_tf32, num_splits))
    return (out, softmax_lse) if return_lse else out


def attend(tensors: "_core.Inputs", numbers: Tuple[Any, ...]) -> Tuple[Tensor, Tensor]:
    """O and LSE. The numbers are the longest lengths, softmax_scale, causal, window_size, softcap, dropout_p,
    deterministic, allow_tf32 and num_splits of `attention`."""
    outputs = None
    if _ops.is_unobserved() and not _is_any_autocast_enabled():
        # A call that nothing has to be done for goes no further.
        outputs = _core.attend(tensors, numbers, _ops.differentiable)
    return _attend_checked(*tensors, *numbers) if outputs is None else outputs


def _attend_checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Optional[Tensor],
    mask: Optional[Tensor],
    alibi_slopes: Optional[Tensor],
    sinks: Optional[Tensor],
    cu_seqlens_q: Optional[Tensor],
    cu_seqlens_k: Optional[Tensor],
    max_seqlen_q: Optional[int],
    max_seqlen_k: Optional[int],
    softmax_scale: Optional[float],
    causal: bool,
    window_size: Tuple[Optional[int], Optional[int]],
    softcap: Optional[float],
    dropout_p: float,
    deterministic: bool,
    allow_tf32: bool,
    num_splits: int,
) -> Tuple[Tensor, Tensor]:
    """The same of any arguments: checks each, and casts and expands tensors as kernels read them."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        check_device(name, x, q)
    optional: Tuple[Tuple[str, Optional[Tensor]], ...] = (
        ("bias", bias),
        ("mask", mask),
        ("alibi_slopes", alibi_slopes),
        ("sinks", sinks),
        ("cu_seqlens_q", cu_seqlens_q),
        ("cu_seqlens_k", cu_seqlens_k),
    )
    for name, tensor in optional:
        check_optional_tensor(name, tensor)
        check_device(name, tensor, q)
    for name, flag in (("causal", causal), ("deterministic", deterministic), ("allow_tf32", allow_tf32)):
        check_flag(name, flag)
    softmax_scale = optional_number("softmax_scale", softmax_scale)
    softcap = optional_number("softcap", softcap)
    dropout_p = number("dropout_p", dropout_p)
    max_seqlen_q = optional_length("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = optional_length("max_seqlen_k", max_seqlen_k)
    left, right = window("window_size", window_size)
    num_splits = splits("num_splits", num_splits)
    if not 0 <= dropout_p < 1:
        refuse("dropout_p", dropout_p, "at least 0, below 1")
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        refuse("alibi_slopes", "requires_grad", "a tensor without: ALiBi's slopes have no gradient here")

    device = q.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if bias is not None:
        bias = _over_all_keys(bias, k, max_seqlen_k if cu_seqlens_k is not None else None).to(q.dtype)
    if mask is not None:
        if mask.dtype != torch.bool:
            refuse("mask", f"dtype {mask.dtype}", "torch.bool, True where a query sees a key")
        mask = _over_all_keys(mask, k, max_seqlen_k if cu_seqlens_k is not None else None)
    if sinks is not None:
        sinks = sinks.float()
    return _ops.attention(
        q,
        k,
        v,
        bias,
        mask,
        alibi_slopes,
        sinks,
        cu_seqlens_q,
        cu_seqlens_k,
        _rng_state(dropout_p),
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        left,
        right,
        softcap,
        dropout_p,
        deterministic,
        allow_tf32,
        num_splits,
    )


def _rng_state(dropout_p: float) -> Optional[Tensor]:
    """Seed and offset of dropout, if there is any."""
    if dropout_p <= 0:
        return None
    # In host memory, so that nobody waits for the device to read it.
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device="cpu")


def _over_all_keys(scores: Tensor, k: Tensor, longest: Optional[int]) -> Tensor:
    """A tensor of scores with a row of keys for each query, as kernels read it."""
    if scores.dim() != 4 or scores.shape[-1] != 1 or k.dim() < 3:
        return scores
    seqlen_k = k.shape[-3] if longest is None else longest
    return scores if seqlen_k == 1 else scores.expand(*scores.shape[:-1], seqlen_k)
