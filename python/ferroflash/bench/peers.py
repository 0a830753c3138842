"""The implementations: functions of Q, K, V (batch, seqlen, nheads, headdim) and of whether the mask is causal."""

import importlib
from typing import Any, Callable, Dict, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def ferroflash() -> Attention:
    from ferroflash import attention

    return lambda q, k, v, causal: attention(q, k, v, causal=causal)


def sdpa(backend: SDPBackend) -> Callable[[], Attention]:
    """One of torch's own."""

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    return lambda: attention


def package(name: str) -> Callable[[], Attention]:
    """A package with flash_attn's function."""

    def load() -> Attention:
        function = importlib.import_module(name).flash_attn_func

        def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
            out = function(q, k, v, causal=causal)
            return out[0] if isinstance(out, tuple) else out

        return attention

    return load


def flex() -> Attention:
    """torch's FlexAttention, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    masks: Dict[Tuple[int, int], Any] = {}

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        lengths = (q.shape[1], k.shape[1])
        if causal and lengths not in masks:
            masks[lengths] = create_block_mask(lambda b, h, i, j: i >= j, None, None, *lengths, device=q.device)
        mask = masks[lengths] if causal else None
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = compiled(q, k, v, block_mask=mask)
        return out.transpose(1, 2)

    return attention


PEERS: Dict[str, Callable[[], Attention]] = {
    "ferroflash": ferroflash,
    "torch flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "torch cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    "torch efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "torch math": sdpa(SDPBackend.MATH),
    "flash_attn": package("flash_attn"),
    "flash_attn 3": package("flash_attn_interface"),
    "flex": flex,
}
