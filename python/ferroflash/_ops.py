"""Attention and softmax as operators of PyTorch: `torch.ops.ferroflash`.

Each allocates what it returns, and what it works in, from torch's allocator, and launches on the current stream of Q's
device. None synchronises, so that CUDA graphs can capture them. Tracers see their shapes through fake implementations.

Operators that are written in Python go through torch's dispatcher several times, which takes longer than a small
kernel. So where nobody listens `attention` takes the same functions without it.
"""

from functools import partial
from typing import Any, Callable, List, Optional, Tuple

import torch
from torch import Tensor, are_deterministic_algorithms_enabled
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from ferroflash import _core, _vmap
from ferroflash._arguments import check_tensor, refuse

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? rng_state"
)
_OPTIONS = (
    "SymInt? max_seqlen_q, SymInt? max_seqlen_k, float? softmax_scale, bool causal, SymInt? window_left, "
    "SymInt? window_right, float? softcap, float dropout_p, bool deterministic, bool allow_tf32, "
    "int num_splits"
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


def _options(arguments: Tuple[Any, ...]) -> "_core.Options":
    """The numbers of a call of an operator with these inputs, of which the first is Q and the tenth the seed and the
    offset of dropout, if there is any."""
    q, rng_state, numbers = arguments[0], arguments[9], arguments[10:]
    if rng_state is None:
        return _core.Options(*numbers)
    if rng_state.dtype != torch.int64 or rng_state.shape != (2,):
        refuse("rng_state", f"{rng_state.dtype}, shape {tuple(rng_state.shape)}", "torch.int64, (2,): seed and offset")
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        refuse("dropout_p", numbers[7], "0 in a CUDA graph, which would drop the same elements in every replay")
    seed, offset = rng_state.tolist()
    return _core.Options(*numbers, rng_state=(seed, offset))


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
    return _core.attention(arguments[:9], _options(arguments))


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
    results, inputs, needs = arguments[:4], arguments[4:-2], arguments[-2:]
    # As torch's own backward passes, asked when it runs.
    deterministic = are_deterministic_algorithms_enabled()
    gradients = _core.attention_backward(results, inputs[:9], _options(inputs), deterministic, *needs)
    dq, dk, dv, dbias, dsinks = gradients
    dbias = dq.new_empty(0) if dbias is None else dbias
    dsinks = dq.new_empty(0, dtype=torch.float32) if dsinks is None else dsinks
    return dq, dk, dv, dbias, dsinks


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


def attention(*arguments: Any) -> Tuple[Tensor, Tensor]:
    """The operator `attention`: O and LSE, differentiable."""
    if is_unobserved() and all(map(_is_own, arguments[:9])):
        return differentiable(_options(arguments), *arguments[:9])
    if not is_compiling() and _are_functorch_transforms_active():
        return _Transformed.apply(*arguments)
    if not is_compiling() and any(map(_has_tangent, arguments[:9])):
        raise RuntimeError("ferroflash has no forward-mode derivatives: attention has no jvp")
    return torch.ops.ferroflash.attention(*arguments)


def attention_backward(*arguments: Any) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator `attention_backward`."""
    if not is_compiling() and _are_functorch_transforms_active():
        return _TransformedBackward.apply(*arguments)
    return torch.ops.ferroflash.attention_backward(*arguments)


def _is_own(x: Optional[Tensor]) -> bool:
    """Whether this is a tensor of torch's own type, and no negated view, which the dispatcher would copy."""
    return x is None or (type(x) in (Tensor, torch.nn.Parameter) and not x.is_neg())


def _has_tangent(x: Optional[Tensor]) -> bool:
    """Whether this has a gradient of forward mode, which an operator would forget."""
    return forward_ad._current_level >= 0 and x is not None and forward_ad.unpack_dual(x).tangent is not None


_TENSORS = 10
_NUMBERS = 11


class _Attention(torch.autograd.Function):
    """What the operators and their registrations do, in one step."""

    forward = staticmethod(_core.forward)

    @staticmethod
    def backward(ctx: Any, dout: Optional[Tensor], dlse: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        (out, softmax_lse), tensors = _core.saved(ctx)
        state = ctx.options.rng_state()
        rng_state = None if state is None else torch.tensor(state)
        needs_input_grad = (*ctx.needs_input_grad, *[False] * 6)
        needs = (needs_input_grad[4], needs_input_grad[7])
        results, inputs = (dout, dlse, out, softmax_lse), (*tensors, rng_state, *ctx.options.numbers())
        dq, dk, dv, dbias, dsinks = _backward_observed(results, inputs, needs)
        return None, dq, dk, dv, dbias, None, None, dsinks, None, None


def _apply_backward(ctx: Any, dout: Optional[Tensor], dlse: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
    """What autograd calls: `_Attention.backward`, or the same in one step, without its dispatcher and torch's own frames."""
    # A graph of the gradients is to hold the operator, which refuses to be differentiated.
    if not torch.is_grad_enabled() and is_unobserved():
        gradients = _core.backward(ctx, dout, dlse, are_deterministic_algorithms_enabled())
        if gradients is not None:
            return gradients
    return _Attention.backward(ctx, dout, dlse)


_Attention._backward_cls.apply = _apply_backward  # type: ignore[attr-defined]

# `_Attention.apply`, without its question for transforms, of which there are none while `is_unobserved`.
differentiable = torch._C._FunctionBase.__dict__["apply"].__get__(None, _Attention)


def _keep(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[Tensor, Tensor]) -> None:
    """Keeps for the backward pass of the operator what it takes."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:]


def _differentiate(ctx: Any, dout: Optional[Tensor], dlse: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
    """The gradients of all arguments of the operator."""
    out, softmax_lse, *inputs = ctx.saved_tensors
    needs = (ctx.needs_input_grad[3], ctx.needs_input_grad[6])
    dq, dk, dv, dbias, dsinks = _backward_observed((dout, dlse, out, softmax_lse), (*inputs, *ctx.options), needs)
    return dq, dk, dv, dbias, None, None, dsinks, None, None, None, *[None] * _NUMBERS


def _backward_observed(
    results: Tuple[Optional[Tensor], Optional[Tensor], Tensor, Tensor],
    inputs: Tuple[Any, ...],
    needs: Tuple[bool, bool],
) -> "_core.Gradients":
    """The gradients, by the operator."""
    dq, dk, dv, dbias, dsinks = attention_backward(*results, *inputs, *needs)
    needs_dbias, needs_dsinks = needs
    return dq, dk, dv, dbias if needs_dbias else None, dsinks if needs_dsinks else None


def _refuse_double_backward(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("ferroflash has no second derivatives: the backward pass of attention cannot be differentiated")


class _Transformed(torch.autograd.Function):
    """The operator `attention` under transforms of `torch.func`, which take no other formulas of gradients."""

    forward = staticmethod(attention)
    setup_context = staticmethod(_keep)
    backward = staticmethod(_differentiate)
    vmap = staticmethod(partial(_vmap.attention, attention))


class _TransformedBackward(torch.autograd.Function):
    """The operator `attention_backward`, likewise."""

    forward = staticmethod(attention_backward)
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(_refuse_double_backward)
    vmap = staticmethod(partial(_vmap.attention_backward, attention_backward))


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


_operators: "List[Tuple[str, Callable[..., Any], Callable[..., Any], Callable[..., Any]]]" = [
    ("attention", _attention, _attention_fake, partial(_vmap.attention, attention)),
    (
        "attention_backward",
        _attention_backward,
        _attention_backward_fake,
        partial(_vmap.attention_backward, attention_backward),
    ),
    ("softmax", _softmax, _softmax_fake, partial(_vmap.softmax, torch.ops.ferroflash.softmax)),
]
for _name, _run, _fake, _map in _operators:
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _run, _key)
    torch.library.register_fake(f"ferroflash::{_name}", _fake, lib=_library)
    if hasattr(torch.library, "register_vmap"):
        torch.library.register_vmap(f"ferroflash::{_name}", _map, lib=_library)

torch.library.register_autograd("ferroflash::attention", _differentiate, setup_context=_keep, lib=_library)
torch.library.register_autograd("ferroflash::attention_backward", _refuse_double_backward, lib=_library)
torch.library.register_autograd(
    "ferroflash::softmax", _differentiate_softmax, setup_context=_keep_softmax, lib=_library
)
