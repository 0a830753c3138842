"""Attention as its definition says it: what results are compared with."""

import math
from typing import Optional, Tuple

import torch
from torch import Tensor


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dtype: torch.dtype = torch.float64,
    bias: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
    alibi_slopes: Optional[Tensor] = None,
    sinks: Optional[Tensor] = None,
    causal: bool = False,
    window_size: Tuple[Optional[int], Optional[int]] = (None, None),
    softcap: Optional[float] = None,
    softmax_scale: Optional[float] = None,
) -> Tuple[Tensor, Tensor]:
    """O and LSE, computed in `dtype`. Differentiable, also where a row sees no key."""
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    scale = softmax_scale if softmax_scale is not None else 1 / math.sqrt(q.shape[-1])
    s = (q * scale) @ k.transpose(-1, -2)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    place = torch.arange(seqlen_q, device=q.device)[:, None] + seqlen_k - seqlen_q
    key = torch.arange(seqlen_k, device=q.device)
    if bias is not None:
        s = s + bias.to(dtype)
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(dtype)[..., None, None] * (place - key).abs()
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
    left, right = (None if side is None or side < 0 else side for side in window_size)
    right = 0 if causal else right
    if left is not None:
        seen &= key >= place - left
    if right is not None:
        seen &= key <= place + right
    seen = seen if mask is None else seen & mask
    s = s.masked_fill(~seen, -math.inf)
    sink = None if sinks is None else sinks.to(dtype)[:, None, None]
    top = s.detach().amax(-1, keepdim=True) if seqlen_k else s.new_full((*s.shape[:-1], 1), -math.inf)
    top = top if sink is None else torch.maximum(top, sink.detach())
    top = top.masked_fill(top == -math.inf, 0)
    p = torch.exp(s - top)
    total = p.sum(-1, keepdim=True)
    total = total if sink is None else total + torch.exp(sink - top)
    safe = total.masked_fill(total == 0, 1)
    lse = (safe.log() + top).masked_fill(total == 0, -math.inf).squeeze(-1)
    return ((p / safe) @ v).transpose(1, 2), lse


def furthest(x: Tensor, y: Tensor) -> float:
    """max |x - y|, where equal infinities are 0 apart and a NaN is infinitely far."""
    x, y = x.double(), y.double()
    distance = torch.where(x == y, torch.zeros_like(x), (x - y).abs())
    return distance.nan_to_num(nan=math.inf, posinf=math.inf).max().item() if distance.numel() else 0.0
