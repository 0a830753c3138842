"""Attention and softmax as operators of PyTorch: `torch.ops.ferroflash`.

Each allocates what it returns, and what it works in, from torch's allocator, and launches on the current stream of Q's
device. None synchronises, so that CUDA graphs can capture them. Tracers see their shapes through fake implementations.

Operators that are written in Python go through torch's dispatcher several times, which takes longer than a small
kernel. So `run` takes the same functions without it where nobody listens.
"""

from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling

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

# Q, K, V, bias, mask, slopes, sinks, and where sequences begin.
Inputs = Tuple[
    Tensor,
    Tensor,
    Tensor,
    Optional[Tensor],
    Optional[Tensor],
    Optional[Tensor],
    Optional[Tensor],
    Optional[Tensor],
    Optional[Tensor],
]

_library = torch.library.Library("ferroflash", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(f"attention({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor softmax_lse)", tags=_tags)
_library.define(
    f"attention_backward(Tensor? dout, Tensor? dlse, Tensor out, Tensor softmax_lse, {_INPUTS}, {_OPTIONS}, "
    "bool needs_dbias, bool needs_dsinks) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
    tags=_tags,
)
_library.define("softmax(Tensor x, str method) -> Tensor", tags=_tags)


def _state(rng_state: Optional[Tensor], q: Tensor, dropout_p: float) -> Optional[Tuple[int, int]]:
    """Seed and offset of dropout."""
    if rng_state is None:
        return None
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        refuse("dropout_p", dropout_p, "0 in a CUDA graph, which would drop the same elements in every replay")
    seed, offset = rng_state.tolist()
    return seed, offset


def _outputs(q: Tensor, v: Tensor, varlen: bool) -> Tuple[Tensor, Tensor]:
    """O and LSE, not yet written."""
    rank, dimensions = (3, "(total, nheads, headdim)") if varlen else (4, "(batch, seqlen, nheads, headdim)")
    check_tensor("q", q, rank, dimensions)
    check_tensor("v", v, rank, dimensions)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    tokens, heads = q.shape[-3], q.shape[-2]
    rows = (heads, tokens) if varlen else (q.shape[0], heads, tokens)
    return out, q.new_empty(rows, dtype=torch.float32)


def _attention(*arguments: Any) -> Tuple[Tensor, Tensor]:
    return forward(arguments[:9], arguments[9], _core.Options(*arguments[_TENSORS:]))


def forward(tensors: Inputs, rng_state: Optional[Tensor], options: _core.Options) -> Tuple[Tensor, Tensor]:
    """O and LSE, which autograd knows nothing of."""
    return _core.attention(tensors, _state(rng_state, tensors[0], options.dropout_p), options)


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


def _attention_backward(*arguments: Any) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    results, rest = arguments[:4], arguments[4:]
    options = _core.Options(*rest[_TENSORS:-2])
    return backward(results, rest[:9], rest[9], options, *rest[-2:])


def backward(
    results: Tuple[Optional[Tensor], Optional[Tensor], Tensor, Tensor],
    tensors: Inputs,
    rng_state: Optional[Tensor],
    options: _core.Options,
    needs_dbias: bool,
    needs_dsinks: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients, from dO, dLSE, O and LSE."""
    state = _state(rng_state, tensors[0], options.dropout_p)
    # As torch's own backward passes, at the time when they run.
    deterministic = torch.are_deterministic_algorithms_enabled()
    return _core.attention_backward(results, tensors, state, options, deterministic, needs_dbias, needs_dsinks)


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


def is_unobserved() -> bool:
    """Whether no compiler, tracer, mode, transform, profiler or dual level has to see an operator."""
    # The compiler takes the first for true, and looks no further.
    return not (
        is_compiling()
        or _is_tracing()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _are_functorch_transforms_active()
        or _profiler_enabled()
        or forward_ad._current_level >= 0
    )


def _is_own(x: Optional[Tensor]) -> bool:
    """Whether this is a tensor of torch's own type, and no negated view, which the dispatcher would copy."""
    return x is None or (type(x) in _OWN and not x.is_neg())


def run(tensors: Inputs, rng_state: Optional[Tensor], options: _core.Options) -> Tuple[Tensor, Tensor]:
    """What the operator `attention` does, differentiable, while `is_unobserved`, of torch's own tensors."""
    q, k, v, bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k = tensors
    if torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (bias is not None and bias.requires_grad)
        or (sinks is not None and sinks.requires_grad)
    ):
        return _differentiable(
            q, k, v, bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, rng_state, options
        )
    return forward(tensors, rng_state, options)


def attention(*arguments: Any) -> Tuple[Tensor, Tensor]:
    """The operator `attention`: O and LSE, differentiable."""
    tensors = arguments[:9]
    if is_unobserved() and all(map(_is_own, tensors)):
        return run(tensors, arguments[9], _core.Options(*arguments[_TENSORS:]))
    return torch.ops.ferroflash.attention(*arguments)


_OWN = (Tensor, torch.nn.Parameter)
_TENSORS = 10
_NUMBERS = 10


class _Attention(torch.autograd.Function):
    """What the operators and their registrations do, in one step."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tuple[Tensor, Tensor]:
        options = arguments[_TENSORS]
        output = forward(arguments[:9], arguments[9], options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *arguments[:_TENSORS])
        ctx.options = options
        return output

    @staticmethod
    def backward(ctx: Any, dout: Optional[Tensor], dlse: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        out, softmax_lse, *inputs = ctx.saved_tensors
        needs = ctx.needs_input_grad
        needs_dbias, needs_dsinks = needs[3], needs[6]
        # A graph of the gradients is to hold the operator, which refuses to be differentiated.
        if torch.is_grad_enabled() or not (is_unobserved() and _is_own(dout) and _is_own(dlse)):
            gradients = torch.ops.ferroflash.attention_backward(
                dout, dlse, out, softmax_lse, *inputs, *ctx.options.numbers(), needs_dbias, needs_dsinks
            )
        else:
            results = (dout, dlse, out, softmax_lse)
            gradients = backward(results, tuple(inputs[:9]), inputs[9], ctx.options, needs_dbias, needs_dsinks)
        dq, dk, dv, dbias, dsinks = gradients
        dbias, dsinks = dbias if needs_dbias else None, dsinks if needs_dsinks else None
        return dq, dk, dv, dbias, None, None, dsinks, None, None, None, None


# Without the part of `Function.apply` that asks for transforms, of which there are none while `is_unobserved`.
_differentiable = torch._C._FunctionBase.__dict__["apply"].__get__(None, _Attention)


def _keep(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[Tensor, Tensor]) -> None:
    """Keeps for the backward pass of the operator what it takes."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:]


def _differentiate(ctx: Any, dout: Optional[Tensor], dlse: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
    """The gradients of all arguments of the operator."""
    needs_dbias, needs_dsinks = ctx.needs_input_grad[3], ctx.needs_input_grad[6]
    dq, dk, dv, dbias, dsinks = torch.ops.ferroflash.attention_backward(
        dout, dlse, *ctx.saved_tensors, *ctx.options, needs_dbias, needs_dsinks
    )
    of_inputs: List[Optional[Tensor]] = [dq, dk, dv, dbias if needs_dbias else None, None, None]
    of_inputs += [dsinks if needs_dsinks else None, None, None, None]
    return (*of_inputs, *[None] * _NUMBERS)


def _refuse_double_backward(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("ferroflash has no second derivatives: the backward pass of attention cannot be differentiated")


def _softmax(x: Tensor, method: str) -> Tensor:
    return _core.softmax(x, method)


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
