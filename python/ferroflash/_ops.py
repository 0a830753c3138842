"""Attention and softmax as operators of PyTorch: `torch.ops.ferroflash`.

Each allocates what it returns, and what it works in, from torch's allocator, and launches on the current stream of Q's
device. None synchronises, so that CUDA graphs can capture them. Tracers see their shapes through fake implementations.

Operators that are written in Python go through torch's dispatcher several times, which takes longer than a small
kernel. So `attention` takes the same functions without it where nobody listens.
"""

from typing import Any, Callable, List, Optional, Tuple

import torch
from torch import Tensor

from ferroflash import _core
from ferroflash._arguments import check_tensor, refuse

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? rng_state"
)
_OPTIONS = (
    "SymInt? max_seqlen_q, SymInt? max_seqlen_k, float? softmax_scale, bool causal, SymInt? window_left, "
    "SymInt? window_right, float? softcap, float dropout_p, bool deterministic, bool allow_tf32"
)

_library = torch.library.Library("ferroflash", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(f"attention({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor softmax_lse)", tags=_tags)
_library.define(
    f"attention_backward(Tensor? dout, Tensor? dlse, Tensor out, Tensor softmax_lse, {_INPUTS}, {_OPTIONS}, "
    "bool needs_dbias, bool needs_dsinks) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
    tags=_tags,
)
_library.define("softmax(Tensor x, str method) -> Tensor", tags=_tags)


def _place(x: Tensor) -> Optional[Tuple[int, int]]:
    """The device and torch's current stream there; None for the CPU."""
    if not x.is_cuda:
        return None
    # The stream alone, without an object for it, as torch's own compiler asks for it.
    return x.device.index, torch._C._cuda_getCurrentRawStream(x.device.index)


def _allocate_beside(x: Tensor) -> Callable[[int], Tensor]:
    """A function that allocates bytes where x is."""
    return lambda size: torch.empty(size, dtype=torch.uint8, device=x.device)


def _with_rows(x: Optional[Tensor]) -> Optional[Tensor]:
    """The tensor with its last dimension contiguous, as kernels need it: itself, or a copy."""
    if x is None or x.dim() == 0 or x.shape[-1] <= 1 or x.stride(-1) == 1:
        return x
    return x.contiguous()


def _options(
    rng_state: Optional[Tensor],
    max_seqlen_q: Optional[int],
    max_seqlen_k: Optional[int],
    softmax_scale: Optional[float],
    causal: bool,
    window_left: Optional[int],
    window_right: Optional[int],
    softcap: Optional[float],
    dropout_p: float,
    deterministic: bool,
    allow_tf32: bool,
) -> Tuple[Any, ...]:
    """The numbers of a call, as the Rust side takes them."""
    seed, offset = (0, 0) if rng_state is None else rng_state.tolist()
    window = (window_left, window_right)
    numbers = (max_seqlen_q, max_seqlen_k, softmax_scale, causal, *window, softcap, dropout_p)
    return (*numbers, (seed, offset), deterministic, allow_tf32)


def _outputs(q: Tensor, v: Tensor, varlen: bool) -> Tuple[Tensor, Tensor]:
    """O and LSE, not yet written."""
    rank, dimensions = (3, "(total, nheads, headdim)") if varlen else (4, "(batch, seqlen, nheads, headdim)")
    check_tensor("q", q, rank, dimensions)
    check_tensor("v", v, rank, dimensions)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    tokens, heads = q.shape[-3], q.shape[-2]
    rows = (heads, tokens) if varlen else (q.shape[0], heads, tokens)
    return out, q.new_empty(rows, dtype=torch.float32)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Optional[Tensor],
    mask: Optional[Tensor],
    alibi_slopes: Optional[Tensor],
    sinks: Optional[Tensor],
    cu_seqlens_q: Optional[Tensor],
    cu_seqlens_k: Optional[Tensor],
    rng_state: Optional[Tensor],
    *options: Any,
) -> Tuple[Tensor, Tensor]:
    out, softmax_lse = _outputs(q, v, cu_seqlens_q is not None)
    place = _place(q)
    if rng_state is not None and place is not None and torch.cuda.is_current_stream_capturing():
        refuse("dropout_p", options[7], "0 in a CUDA graph, which would drop the same elements in every replay")
    optional = (bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k)
    tensors = tuple(_with_rows(x) for x in (q, k, v, *optional))
    _core.attention(tensors, out, softmax_lse, _options(rng_state, *options), place, _allocate_beside(q))
    return out, softmax_lse


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tuple[Tensor, Tensor]:
    return _outputs(q, v, rest[4] is not None)


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Optional[Tensor],
    sinks: Optional[Tensor],
    needs_dbias: bool,
    needs_dsinks: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients, not yet written; without elements, where they are not wanted."""
    dbias = q.new_empty(bias.shape if needs_dbias and bias is not None else (0,))
    dsinks = q.new_empty(sinks.shape if needs_dsinks and sinks is not None else (0,), dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias, dsinks


def _attention_backward(
    dout: Optional[Tensor],
    dlse: Optional[Tensor],
    out: Tensor,
    softmax_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Optional[Tensor],
    mask: Optional[Tensor],
    alibi_slopes: Optional[Tensor],
    sinks: Optional[Tensor],
    cu_seqlens_q: Optional[Tensor],
    cu_seqlens_k: Optional[Tensor],
    rng_state: Optional[Tensor],
    *options: Any,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *options, needs_dbias, needs_dsinks = options
    gradients = _gradients(q, k, v, bias, sinks, needs_dbias, needs_dsinks)
    dq, dk, dv, dbias, dsinks = gradients
    optional = (bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k)
    tensors = tuple(_with_rows(x) for x in (q, k, v, *optional))
    dout = torch.zeros_like(out) if dout is None else _with_rows(dout)
    results = (_with_rows(out), softmax_lse.contiguous(), dout, None if dlse is None else dlse.contiguous())
    wanted = (dq, dk, dv, dbias if needs_dbias else None, dsinks if needs_dsinks else None)
    _core.attention_backward(tensors, results, wanted, _options(rng_state, *options), _place(q), _allocate_beside(q))
    return gradients


def _attention_backward_fake(
    dout: Optional[Tensor],
    dlse: Optional[Tensor],
    out: Tensor,
    softmax_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradients(q, k, v, rest[0], rest[3], rest[-2], rest[-1])


def _is_unobserved(*tensors: Optional[Tensor]) -> bool:
    """Whether no compiler, mode, transform or subclass of tensors has to see an operator."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active():
        return False
    return all(x is None or type(x) in (Tensor, torch.nn.Parameter) for x in tensors)


def attention(*arguments: Any) -> Tuple[Tensor, Tensor]:
    """The operator `attention`: O and LSE, differentiable."""
    if _is_unobserved(*arguments[:_TENSORS]):
        return _Attention.apply(*arguments)
    return torch.ops.ferroflash.attention(*arguments)


_TENSORS = 10
_NUMBERS = 10


class _Attention(torch.autograd.Function):
    """What the operators and their registrations do, in one step."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tuple[Tensor, Tensor]:
        output = _attention(*arguments)
        _keep(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        return _differentiate(ctx, *gradients)


def _keep(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[Tensor, Tensor]) -> None:
    """Keeps for the backward pass what it takes."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:]


def _differentiate(ctx: Any, dout: Optional[Tensor], dlse: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
    """The gradients of all arguments."""
    needs_dbias, needs_dsinks = ctx.needs_input_grad[3], ctx.needs_input_grad[6]
    arguments = (dout, dlse, *ctx.saved_tensors, *ctx.options, needs_dbias, needs_dsinks)
    # A graph of the gradients is to hold the operator, which refuses to be differentiated.
    is_alone = not torch.is_grad_enabled() and _is_unobserved(*arguments[: 4 + _TENSORS])
    run = _attention_backward if is_alone else torch.ops.ferroflash.attention_backward
    dq, dk, dv, dbias, dsinks = run(*arguments)
    of_inputs: List[Optional[Tensor]] = [dq, dk, dv, dbias if needs_dbias else None, None, None]
    of_inputs += [dsinks if needs_dsinks else None, None, None, None]
    return (*of_inputs, *[None] * _NUMBERS)


def _refuse_double_backward(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("ferroflash has no second derivatives: the backward pass of attention cannot be differentiated")


def _softmax(x: Tensor, method: str) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    _core.softmax(x, y, method, _place(x))
    return y


def _softmax_fake(x: Tensor, method: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_softmax(ctx: Any, inputs: Tuple[Tensor, str], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _differentiate_softmax(ctx: Any, dy: Tensor) -> Tuple[Tensor, None]:
    """dx = y ∘ (dy - rowsum(y ∘ dy)), in one kernel of torch's."""
    (y,) = ctx.saved_tensors
    return torch.ops.aten._softmax_backward_data(dy, y, y.dim() - 1, y.dtype), None


for _name, _run, _fake in [
    ("attention", _attention, _attention_fake),
    ("attention_backward", _attention_backward, _attention_backward_fake),
    ("softmax", _softmax, _softmax_fake),
]:
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _run, _key)
    torch.library.register_fake(f"ferroflash::{_name}", _fake, lib=_library)

torch.library.register_autograd("ferroflash::attention", _differentiate, setup_context=_keep, lib=_library)
torch.library.register_autograd("ferroflash::attention_backward", _refuse_double_backward, lib=_library)
torch.library.register_autograd(
    "ferroflash::softmax", _differentiate_softmax, setup_context=_keep_softmax, lib=_library
)
