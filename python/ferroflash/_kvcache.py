"""Attention to a cache of keys and values that grows: flash_attn 2.8's `flash_attn_with_kvcache`."""

from typing import Any, Optional, Tuple, Union

import torch
from torch import Tensor

from ferroflash._arguments import (
    check_device,
    check_flag,
    check_optional_tensor,
    check_tensor,
    is_int,
    is_plain,
    number,
    refuse,
    splits,
)
from ferroflash._attention import attend

_CACHE = "(batch_cache, seqlen_cache, nheads_k, headdim)"
_NEW = "(batch, seqlen_new, nheads_k, headdim)"


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Optional[Tensor] = None,
    v: Optional[Tensor] = None,
    rotary_cos: Optional[Tensor] = None,
    rotary_sin: Optional[Tensor] = None,
    cache_seqlens: Optional[Union[int, Tensor]] = None,
    cache_batch_idx: Optional[Tensor] = None,
    cache_leftpad: Optional[Tensor] = None,
    block_table: Optional[Tensor] = None,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: Tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Optional[Tensor] = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Union[Tensor, Tuple[Tensor, Tensor]]:
    """O of Q (batch, seqlen_q, nheads, headdim) and the keys and values of a cache; no gradients.

    First `k` and `v` are written to the cache, in place, behind the `cache_seqlens` keys that are there. Query i then
    sees keys as in `flash_attn_func`, with as many keys as its sequence has by now. The cache is read where it lies,
    except with `cache_batch_idx`, which copies the sequences that are read. Nothing waits for the device.

    Args:
        q: (batch, seqlen_q, nheads, headdim).
        k_cache: (batch_cache, seqlen_cache, nheads_k, headdim); batch_cache is batch without `cache_batch_idx`.
        v_cache: The same for the values.
        k: (batch, seqlen_new, nheads_k, headdim), keys that follow those in the cache; with `v`.
        v: The values of `k`.
        cache_seqlens: How many keys are in the cache: for all sequences, or int32 of shape (batch). On CUDA nobody
            checks what is in it. None: seqlen_cache, and `k` must be None.
        cache_batch_idx: Which sequences of the cache belong to those of Q: of shape (batch), whole numbers. On CUDA
            nobody checks what is in it.
        softmax_scale, causal, window_size, softcap, alibi_slopes: As in `flash_attn_func`.
        num_splits: Into how many parts keys are divided among a GPU's multiprocessors, by kernels that can: 0 for as
            many as seems best, 1 for no division, at most 128. It changes the last bits of results.
        return_softmax_lse: Whether to return the LSE too.
        rotary_cos, rotary_sin, cache_leftpad, block_table: None: rotary embeddings are applied before the call, and
            padded or paged caches are not supported.

    Returns:
        O, (batch, seqlen_q, nheads, headdim); with `return_softmax_lse` also the LSE, float32, (batch, nheads,
        seqlen_q).

    Raises:
        ValueError, TypeError: An argument is not allowed; the message names it, says what it was, and what is allowed.
    """
    for name, x in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
        if x is not None:
            refuse(name, "a tensor", "None: apply rotary embeddings to q and k before the call")
    for name, x, what in (("cache_leftpad", cache_leftpad, "padded"), ("block_table", block_table, "paged")):
        if x is not None:
            refuse(name, "a tensor", f"None: {what} caches are not supported")
    check_tensor("q", q, 4, "(batch, seqlen_q, nheads, headdim)")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, x, 4, _CACHE)
        check_device(name, x, q)
    check_optional_tensor("alibi_slopes", alibi_slopes)
    check_flag("return_softmax_lse", return_softmax_lse)
    num_splits = splits("num_splits", num_splits)
    batch, (slots, seqlen_cache) = q.shape[0], k_cache.shape[:2]
    _check_indices("cache_batch_idx", cache_batch_idx, q)
    if cache_batch_idx is None and slots != batch:
        refuse("k_cache", f"batch {slots}", f"{batch}, as of q, without cache_batch_idx")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        refuse("v_cache", f"shape {tuple(v_cache.shape)}", f"{(*k_cache.shape[:3], 'any headdim')}, as of k_cache")
    if is_int(cache_seqlens):
        if not 0 <= cache_seqlens <= seqlen_cache:
            refuse("cache_seqlens", cache_seqlens, f"0 to {seqlen_cache}, as the cache has room for so many")
    else:
        _check_indices("cache_seqlens", cache_seqlens, q, (torch.int32,))
    seqlens = seqlen_cache if cache_seqlens is None else cache_seqlens
    if k is not None or v is not None:
        if cache_seqlens is None:
            refuse("cache_seqlens", None, "a whole number, or a tensor: where k and v are to be written")
        for name, x in (("k", k), ("v", v)):
            check_tensor(name, x, 4, _NEW)
    _check_values("cache_batch_idx", cache_batch_idx, slots - 1)
    _check_values("cache_seqlens", cache_seqlens, seqlen_cache if k is None else seqlen_cache - k.shape[1])
    if k is not None and v is not None:
        seqlens = seqlens + _append(k_cache, v_cache, k, v, seqlens, cache_batch_idx, batch)
    if cache_batch_idx is not None:
        k_cache, v_cache = k_cache.index_select(0, cache_batch_idx), v_cache.index_select(0, cache_batch_idx)
    softcap = number("softcap", softcap)
    numbers = (softmax_scale, causal, window_size, None if softcap == 0 else softcap, 0.0, False, False, num_splits)
    if isinstance(seqlens, Tensor):
        out, softmax_lse = _ragged(q, k_cache, v_cache, seqlens, alibi_slopes, numbers)
    else:
        tensors = (q, k_cache[:, :seqlens], v_cache[:, :seqlens], None, None, alibi_slopes, None, None, None)
        out, softmax_lse = attend(tensors, (None, None, *numbers))
    return (out, softmax_lse) if return_softmax_lse else out


def _check_indices(name: str, x: Any, q: Tensor, dtypes: Tuple[torch.dtype, ...] = (torch.int32, torch.int64)) -> None:
    """Checks that this is a whole number for each sequence of Q, or None."""
    check_optional_tensor(name, x)
    check_device(name, x, q)
    if x is None:
        return
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: dtype {x.dtype}; allowed: {', '.join(map(str, dtypes))}")
    if x.shape != (q.shape[0],):
        refuse(name, f"shape {tuple(x.shape)}", f"({q.shape[0]},): one for each sequence of q")


def _check_values(name: str, x: Any, most: int) -> None:
    """Checks whole numbers in a tensor in host memory, which nobody has to wait for."""
    if not isinstance(x, Tensor) or x.device.type != "cpu" or not is_plain(x):
        return
    for value in x.tolist():
        if not 0 <= value <= most:
            refuse(name, value, f"0 to {most}, as the cache has room for so many")


def _append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens: Union[int, Tensor],
    cache_batch_idx: Optional[Tensor],
    batch: int,
) -> int:
    """Writes new keys and values behind those in the cache. How many."""
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        check_device(name, x, cache)
        if x.dtype != cache.dtype:
            raise TypeError(f"{name}: dtype {x.dtype}; allowed: {cache.dtype}, as of the cache")
    new = k.shape[1]
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        allowed = (batch, new, *cache.shape[2:])
        if x.shape != allowed:
            refuse(name, f"shape {tuple(x.shape)}", f"{allowed}, as of q, k and the cache")
    if not isinstance(seqlens, Tensor) and seqlens + new > k_cache.shape[1]:
        refuse("k", f"{new} keys behind {seqlens}", f"{k_cache.shape[1]} in all, as the cache has room for so many")
    if not isinstance(seqlens, Tensor) and cache_batch_idx is None:
        k_cache[:, seqlens : seqlens + new] = k
        v_cache[:, seqlens : seqlens + new] = v
        return new
    slots = torch.arange(batch, device=k.device) if cache_batch_idx is None else cache_batch_idx.long()
    begin = seqlens.long()[:, None] if isinstance(seqlens, Tensor) else seqlens
    places = (slots[:, None], begin + torch.arange(new, device=k.device)[None])
    k_cache.index_put_(places, k)
    v_cache.index_put_(places, v)
    return new


def _ragged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens: Tensor,
    alibi_slopes: Optional[Tensor],
    numbers: Tuple[Any, ...],
) -> Tuple[Tensor, Tensor]:
    """O and LSE, where sequences of different lengths lie in a cache with gaps between them.

    To the kernels gaps are sequences, too, without queries: 2b is sequence b of the cache, 2b + 1 what follows it.
    """
    (batch, seqlen_q), seqlen_cache = q.shape[:2], k_cache.shape[1]
    place = torch.arange(2 * batch + 1, dtype=torch.int32, device=q.device)
    cu_seqlens_q = (place + 1) // 2 * seqlen_q
    cu_seqlens_k = place // 2 * seqlen_cache
    cu_seqlens_k[1::2] += seqlens
    if alibi_slopes is not None and alibi_slopes.dim() == 2:
        alibi_slopes = alibi_slopes.repeat_interleave(2, 0)
    q, k, v = (x.flatten(0, 1) for x in (q, k_cache, v_cache))
    tensors = (q, k, v, None, None, alibi_slopes, None, cu_seqlens_q, cu_seqlens_k)
    out, softmax_lse = attend(tensors, (seqlen_q, seqlen_cache, *numbers))
    return out.unflatten(0, (batch, seqlen_q)), softmax_lse.unflatten(1, (batch, seqlen_q)).transpose(0, 1)
