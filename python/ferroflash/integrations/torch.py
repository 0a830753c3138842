"""ferroflash behind `torch.nn.functional.scaled_dot_product_attention`, for those who ask for it.

    import ferroflash.integrations.torch
    from torch.nn.attention import activate_flash_attention_impl

    ferroflash.integrations.torch.register()
    activate_flash_attention_impl("ferroflash")

Then every call that PyTorch gives to its flash backend on CUDA, which it chooses as before, is computed by the kernels
of this project, and `torch.nn.attention.varlen` too. `restore_flash_attention_impl()` gives PyTorch its own back.
"""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from ferroflash import _core
from ferroflash._arguments import refuse

__all__ = ["NAME", "register"]

NAME = "ferroflash"


def register() -> None:
    """Makes "ferroflash" known to `torch.nn.attention.activate_flash_attention_impl`. Nothing else changes.

    Raises:
        RuntimeError: This PyTorch knows no other implementations than its own.
    """
    import torch.nn.attention

    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        raise RuntimeError(f"torch: {torch.__version__}; allowed: 2.11 or newer, with register_flash_attention_impl")
    torch.nn.attention.register_flash_attention_impl(NAME, register_fn=Override)


class Override:
    """While it lives, and until `remove`, PyTorch's operators of flash attention on a kind of device are those here."""

    def __init__(self, key: str = "CUDA") -> None:
        library: torch.library.Library = torch.library.Library("aten", "IMPL", key)
        for name, function in (
            ("_scaled_dot_product_flash_attention", _scaled_dot_product),
            ("_scaled_dot_product_flash_attention_backward", _scaled_dot_product_backward),
            ("_flash_attention_forward", _forward),
            ("_flash_attention_backward", _backward),
        ):
            library.impl(name, function)
        self._library: Optional[torch.library.Library] = library

    def remove(self) -> None:
        """Gives PyTorch its own operators back."""
        if self._library is not None:
            self._library._destroy()
        self._library = None


def _options(
    lengths: Tuple[Optional[int], Optional[int]],
    scale: Optional[float],
    is_causal: bool,
    window: Tuple[Optional[int], Optional[int]],
) -> "_core.Options":
    left, right = (None if side is None or side < 0 else side for side in window)
    return _core.Options(*lengths, scale, is_causal, left, right, None, 0.0, False, False, 0)


def _tensors(q: Tensor, k: Tensor, v: Tensor, cum_seq_q: Optional[Tensor], cum_seq_k: Optional[Tensor]) -> Any:
    return q, k, v, None, None, None, None, cum_seq_q, cum_seq_k


def _no_state(q: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """The state of dropout, of which there is none, and the mask for debugging, likewise."""
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    return state, torch.empty((), dtype=torch.uint64, device=q.device), q.new_empty(0)


def _check(dropout_p: float, return_debug_mask: bool) -> None:
    if dropout_p != 0:
        refuse("dropout_p", dropout_p, "0 while ferroflash stands in for torch's flash attention")
    if return_debug_mask:
        refuse("return_debug_mask", True, "False: the probabilities are never in memory")


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Optional[Tensor],
    cum_seq_k: Optional[Tensor],
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: Optional[float] = None,
    window_size_left: Optional[int] = None,
    window_size_right: Optional[int] = None,
    seqused_k: Optional[Tensor] = None,
    alibi_slopes: Optional[Tensor] = None,
    **rest: Any,
) -> Tuple[Tensor, ...]:
    """`aten::_flash_attention_forward`, of (batch, seqlen, nheads, headdim) or (total, nheads, headdim)."""
    _check(dropout_p, return_debug_mask)
    # torch's formula of the gradients leaves the slopes out.
    for name, x in (("seqused_k", seqused_k), ("alibi_slopes", alibi_slopes), *rest.items()):
        if x is not None:
            refuse(name, "given", "None while ferroflash stands in for torch's flash attention")
    lengths = (None, None) if cum_seq_q is None else (max_q, max_k)
    options = _options(lengths, scale, is_causal, (window_size_left, window_size_right))
    tensors, out = _tensors(query, key, value, cum_seq_q, cum_seq_k), torch.empty_like(query)
    _, softmax_lse = _core.attention(tensors, options, out)
    return (out, softmax_lse, *_no_state(query))


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Optional[Tensor],
    cum_seq_k: Optional[Tensor],
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: Optional[float] = None,
    window_size_left: Optional[int] = None,
    window_size_right: Optional[int] = None,
) -> Tuple[Tensor, Tensor, Tensor]:
    """`aten::_flash_attention_backward`."""
    _check(dropout_p, False)
    lengths = (None, None) if cum_seq_q is None else (max_q, max_k)
    options = _options(lengths, scale, is_causal, (window_size_left, window_size_right))
    tensors = _tensors(query, key, value, cum_seq_q, cum_seq_k)
    gradients = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
    results = (grad_out, None, out, logsumexp)
    deterministic = torch.are_deterministic_algorithms_enabled()
    _core.attention_backward(results, tensors, options, deterministic, False, False, gradients)
    return gradients


def _transposed(*tensors: Tensor) -> Tuple[Tensor, ...]:
    """(batch, seqlen, nheads, headdim) of (batch, nheads, seqlen, headdim), or the reverse."""
    return tuple(x.transpose(1, 2) for x in tensors)


def _scaled_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: Optional[float] = None,
) -> Tuple[Any, ...]:
    """`aten::_scaled_dot_product_flash_attention`, of (batch, nheads, seqlen, headdim)."""
    lengths = (query.shape[2], key.shape[2])
    q, k, v = _transposed(query, key, value)
    rest = (*lengths, dropout_p, is_causal, return_debug_mask)
    out, softmax_lse, *state = _forward(q, k, v, None, None, *rest, scale=scale)
    return (out.transpose(1, 2), softmax_lse, None, None, *lengths, *state)


def _scaled_dot_product_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Optional[Tensor],
    cum_seq_k: Optional[Tensor],
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: Optional[float] = None,
) -> Tuple[Tensor, ...]:
    """`aten::_scaled_dot_product_flash_attention_backward`."""
    dout, q, k, v, o = _transposed(grad_out, query, key, value, out)
    rest = (max_q, max_k, dropout_p, is_causal, philox_seed, philox_offset)
    return _transposed(*_backward(dout, q, k, v, o, logsumexp, cum_seq_q, cum_seq_k, *rest, scale=scale))
