"""The functions of flash_attn 2.8: its names, defaults, layouts and results. `from ferroflash import flash_attn_func`.

What differs: gradients flow through `softmax_lse` too; float32 and a head dimension of V unlike that of Q are allowed;
S_dmask, which flash_attn returns for its own tests, is never computed. Arguments that are not supported are refused by
name.
"""

from typing import Any, Optional, Tuple, Union

from torch import Tensor

from ferroflash._arguments import check_flag, check_tensor, number, refuse
from ferroflash._attention import attend
from ferroflash._kvcache import flash_attn_with_kvcache as flash_attn_with_kvcache

Window = Tuple[int, int]
Result = Union[Tensor, Tuple[Tensor, Tensor, Tensor]]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """O of Q (batch, seqlen_q, nheads, headdim), K and V (batch, seqlen_k, nheads_k, headdim).

    `window_size` is (left, right), -1 for all keys; `softcap` 0.0 is none. The rest as `ferroflash.attention`.

    Returns:
        O, (batch, seqlen_q, nheads, headdim). With `return_attn_probs` (O, softmax_lse, S_dmask): the second (batch,
        nheads, seqlen_q) in float32, the third without elements, as flash_attn has it without dropout.
    """
    return _result(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """As `flash_attn_func`, of K and V in one tensor (batch, seqlen_k, 2, nheads_k, headdim)."""
    k, v = _unpacked("kv", kv, 2, "(batch, seqlen_k, 2, nheads_k, headdim)")
    return _result(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """As `flash_attn_func`, of Q, K and V in one tensor (batch, seqlen, 3, nheads, headdim)."""
    q, k, v = _unpacked("qkv", qkv, 3, "(batch, seqlen, 3, nheads, headdim)")
    return _result(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Optional[Tensor] = None,
) -> Result:
    """O of sequences of different lengths: Q (total_q, nheads, headdim), K and V (total_k, nheads_k, headdim).

    `cu_seqlens_q` and `cu_seqlens_k`, int32 of shape (batch + 1), say where each begins; `max_seqlen_q` and
    `max_seqlen_k` how long the longest are. A paged cache (`block_table`) is not supported.

    Returns:
        O, (total_q, nheads, headdim). With `return_attn_probs` (O, softmax_lse, S_dmask): the second (nheads, total_q)
        in float32, the third without elements.
    """
    if block_table is not None:
        refuse("block_table", "a tensor", "None: paged caches are not supported")
    sequences = _sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    numbers = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _result(q, k, v, *numbers, *sequences)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """As `flash_attn_varlen_func`, of K and V in one tensor (total_k, 2, nheads_k, headdim)."""
    k, v = _unpacked("kv", kv, 2, "(total_k, 2, nheads_k, headdim)")
    sequences = _sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    numbers = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _result(q, k, v, *numbers, *sequences)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """As `flash_attn_varlen_func`, of Q, K and V in one tensor (total, 3, nheads, headdim)."""
    q, k, v = _unpacked("qkv", qkv, 3, "(total, 3, nheads, headdim)")
    check_tensor("cu_seqlens", cu_seqlens)
    if max_seqlen is None:
        refuse("max_seqlen", None, "a whole number")
    sequences = _sequences(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    numbers = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _result(q, k, v, *numbers, *sequences)


def _sequences(cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any) -> Tuple[Any, ...]:
    """Where sequences begin, none of which may be left out."""
    check_tensor("cu_seqlens_q", cu_seqlens_q)
    check_tensor("cu_seqlens_k", cu_seqlens_k)
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if longest is None:
            refuse(name, None, "a whole number")
    return cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k


def _unpacked(name: str, packed: Any, parts: int, dimensions: str) -> "tuple[Tensor, ...]":
    """The tensors that follow each other in the dimension before the heads."""
    check_tensor(name, packed, dimensions.count(",") + 1, dimensions)
    if packed.shape[-3] != parts:
        refuse(name, f"{packed.shape[-3]} parts", f"{parts}: {dimensions}")
    unpacked: Tuple[Tensor, ...] = packed.unbind(-3)
    return unpacked


def _result(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    alibi_slopes: Any,
    deterministic: Any,
    return_attn_probs: Any,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
) -> Result:
    if return_attn_probs is not True and return_attn_probs is not False:
        check_flag("return_attn_probs", return_attn_probs)
    softcap, dropout_p = number("softcap", softcap), number("dropout_p", dropout_p)
    if return_attn_probs and dropout_p > 0:
        refuse("return_attn_probs", f"True with dropout_p {dropout_p}", "False: the probabilities are never in memory")
    tensors = (q, k, v, None, None, alibi_slopes, None, cu_seqlens_q, cu_seqlens_k)
    softcap = None if softcap == 0 else softcap
    numbers = (max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, softcap, dropout_p, deterministic)
    out, softmax_lse = attend(tensors, (*numbers, False, 0))
    return (out, softmax_lse, out.new_empty(0)) if return_attn_probs else out
