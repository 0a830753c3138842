"""The implementations: functions of Q, K, V (batch, seqlen, nheads, headdim) and of whether the mask is causal.

With sequences of different lengths Q, K and V are (total, nheads, headdim). K and V may have fewer heads than Q.
"""

import importlib
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Sequences:
    """Where each sequence begins, int32 (batch + 1), and how long they are."""

    starts: Tensor
    lengths: List[int]

    @classmethod
    def of(cls, lengths: List[int], device: str) -> "Sequences":
        """One after the other."""
        starts = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        return cls(starts, lengths)

    @property
    def places(self) -> Tuple[Tensor, Tensor, int, int]:
        """What flash_attn's functions take for them, of Q and of K."""
        longest = max(self.lengths)
        return self.starts, self.starts, longest, longest


Attention = Callable[[Tensor, Tensor, Tensor, bool, Optional[Sequences]], Tensor]


def ferroflash(deterministic: bool = False) -> Attention:
    from ferroflash import flash_attn_func, flash_attn_varlen_func

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, sequences: Optional[Sequences]) -> Tensor:
        out: Any
        if sequences is None:
            out = flash_attn_func(q, k, v, causal=causal, deterministic=deterministic)
        else:
            out = flash_attn_varlen_func(q, k, v, *sequences.places, causal=causal, deterministic=deterministic)
        return out

    return attention


def sdpa(backend: Optional[SDPBackend]) -> Callable[[], Attention]:
    """One of torch's own; without a name that which torch chooses."""

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, sequences: Optional[Sequences]) -> Tensor:
        if sequences is not None:
            return _varlen(backend, q, k, v, causal, sequences)
        grouped: Dict[str, Any] = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, **grouped).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, **grouped).transpose(1, 2)

    return lambda: attention


def _varlen(
    backend: Optional[SDPBackend], q: Tensor, k: Tensor, v: Tensor, causal: bool, sequences: Sequences
) -> Tensor:
    """torch's function for sequences of different lengths, which FlashAttention computes."""
    if backend != SDPBackend.FLASH_ATTENTION:
        raise NotImplementedError("one length for all sequences")
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    window = {"window_size": (-1, 0)} if causal else {}
    out: Tensor = function(q, k, v, *sequences.places, **window)
    return out


def package(name: str) -> Callable[[], Attention]:
    """A package with flash_attn's functions."""

    def load() -> Attention:
        module = importlib.import_module(name)

        def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, sequences: Optional[Sequences]) -> Tensor:
            if sequences is None:
                out = module.flash_attn_func(q, k, v, causal=causal)
            else:
                names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
                out = module.flash_attn_varlen_func(q, k, v, **dict(zip(names, sequences.places)), causal=causal)
            return out[0] if isinstance(out, tuple) else out

        return attention

    return load


def flex() -> Attention:
    """torch's FlexAttention, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    masks: Dict[Tuple[Any, ...], Any] = {}

    def mask_of(tokens: int, causal: bool, sequences: Optional[Sequences], device: torch.device) -> Any:
        if not causal and sequences is None:
            return None
        lengths = None if sequences is None else tuple(sequences.lengths)
        key = (tokens, causal, lengths)
        if key not in masks:
            document = torch.zeros(tokens, dtype=torch.int32, device=device)
            if lengths is not None:
                document = torch.arange(len(lengths), device=device).repeat_interleave(
                    torch.tensor(lengths, device=device)
                )

            def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                same = document[i] == document[j]
                return same & (i >= j) if causal else same

            masks[key] = create_block_mask(sees, None, None, tokens, tokens, device=str(device))
        return masks[key]

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, sequences: Optional[Sequences]) -> Tensor:
        batched = [x if sequences is None else x[None] for x in (q, k, v)]
        mask = mask_of(batched[0].shape[1], causal, sequences, q.device)
        grouped = {"enable_gqa": True} if q.shape[-2] != k.shape[-2] else {}
        out: Tensor = compiled(*(x.transpose(1, 2) for x in batched), block_mask=mask, **grouped).transpose(1, 2)
        return out if sequences is None else out[0]

    return attention


PEERS: Dict[str, Callable[[], Attention]] = {
    "ferroflash": ferroflash,
    "torch sdpa": sdpa(None),
    "torch flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "torch cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    "torch efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "torch math": sdpa(SDPBackend.MATH),
    "flash_attn": package("flash_attn"),
    "flash_attn 3": package("flash_attn_interface"),
    "flash_attn 3 fwd": package("fa3_fwd_interface"),
    "flex": flex,
}
