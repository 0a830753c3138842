"""Eager calls leave torch's dispatcher out: nobody may be able to tell by anything but the time."""

import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from ferroflash import _core, _ops, attention, flash_attn_func


def leaves(device, seqlens=(9, 13), dtype=torch.float32):
    shapes = [(2, seqlens[0], 4, 16), *[(2, seqlens[1], 2, 16)] * 2]
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


class Listening(TorchDispatchMode):
    """Hears all operators."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.heard.append(str(operator))
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def calls(monkeypatch):
    """How many calls were fast ones, and with what their backward passes were asked."""
    made = {"forward": 0, "backward": []}

    def attend(*arguments):
        outputs = _core.attend(*arguments)
        made["forward"] += outputs is not None
        return outputs

    def backward(ctx, dout, dlse, deterministic):
        made["backward"].append(deterministic)
        return _core.backward(ctx, dout, dlse, deterministic)

    class Counting:
        def __getattr__(self, name):
            return {"attend": attend, "backward": backward}.get(name) or getattr(_core, name)

    import ferroflash._attention

    monkeypatch.setattr(_ops, "_core", Counting())
    monkeypatch.setattr(ferroflash._attention, "_core", Counting())
    return made


def options(device):
    starts = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 4, 18], [0, 9, 26])]
    return {
        "plain": {},
        "causal": {"causal": True, "window_size": (5, 0), "softcap": 8.0, "softmax_scale": 1, "deterministic": True},
        "negative window": {"window_size": (-1, 3)},
        "bias": {"bias": torch.randn(1, 4, 9, 13, device=device, requires_grad=True)},
        "mask": {"mask": torch.rand(2, 1, 1, 13, device=device) < 0.7},
        "slopes": {"alibi_slopes": torch.rand(4, device=device)},
        "sinks": {"sinks": torch.randn(4, device=device, requires_grad=True)},
        "sequences": {
            "cu_seqlens_q": starts[0],
            "cu_seqlens_k": starts[1],
            "max_seqlen_q": 14,
            "max_seqlen_k": 17,
            "causal": True,
        },
        # What needs work before: these are not fast.
        "wide bias": {"bias": torch.randn(1, 4, 9, 1, device=device, requires_grad=True)},
        "bias of another dtype": {"bias": torch.randn(1, 4, 9, 13, device=device, dtype=torch.bfloat16)},
        "sinks of another dtype": {"sinks": torch.randn(4, device=device, dtype=torch.bfloat16)},
        "window in a list": {"window_size": [2, 2]},
    }


# PyTorch 2.10 and newer describe their tensors in C. Where they do not, no call is fast.
IS_READ_IN_C = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
SLOW = ("wide bias", "bias of another dtype", "sinks of another dtype", "window in a list")


@pytest.mark.parametrize("name", options("cpu"))
def test_results_are_those_of_the_operators(device, calls, name):
    chosen = options(device)[name]
    tensors = leaves(device)
    tensors = [x.flatten(0, 1).detach().requires_grad_() for x in tensors] if name == "sequences" else tensors
    wanted = [*tensors, *(x for x in chosen.values() if isinstance(x, torch.Tensor) and x.requires_grad)]

    def run():
        out, lse = attention(*tensors, **{"deterministic": True, **chosen}, return_lse=True)
        return [out, lse, *torch.autograd.grad(out.sin().sum() + lse.cos().sum(), wanted)]

    fast = run()
    assert calls["forward"] == (name not in SLOW and IS_READ_IN_C)
    assert len(calls["backward"]) == 1
    with Listening() as listening:
        heard = run()
    assert {"ferroflash.attention.default", "ferroflash.attention_backward.default"} <= set(listening.heard)
    for x, y in zip(fast, heard):
        assert torch.equal(x, y)
    with torch.no_grad():
        out, lse = attention(*tensors, **chosen, return_lse=True)
    assert torch.equal(out, fast[0]) and torch.equal(lse, fast[1]) and not out.requires_grad


def test_flash_attn_func_is_fast_too(device, calls):
    flash_attn_func(*leaves(device, dtype=torch.bfloat16), causal=True).sum().backward()
    assert calls["forward"] == IS_READ_IN_C and len(calls["backward"]) == 1


def test_deterministic_algorithms_are_asked_for_when_it_is_time(device, calls, monkeypatch):
    monkeypatch.setattr(_ops, "are_deterministic_algorithms_enabled", torch.are_deterministic_algorithms_enabled)
    torch.use_deterministic_algorithms(False)
    out = attention(*leaves(device))
    torch.use_deterministic_algorithms(True)
    out.sum().backward()
    torch.use_deterministic_algorithms(False)
    attention(*leaves(device)).sum().backward()
    assert calls["backward"] == [True, False]


def test_cuda_is_deterministic_where_torch_is_to_be(cuda, monkeypatch):
    monkeypatch.setattr(_ops, "are_deterministic_algorithms_enabled", torch.are_deterministic_algorithms_enabled)
    shape = (1, 4096, 4, 64)
    tensors = [torch.randn(shape, device=cuda, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    dout = torch.randn(shape, device=cuda, dtype=torch.bfloat16)

    def gradients(function):
        torch.use_deterministic_algorithms(True)
        return torch.autograd.grad(function(*tensors), tensors, dout)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for function in (attention, compiled, lambda *x: attention(*x, deterministic=True)):
        first = gradients(function)
        for _ in range(4):
            assert all(torch.equal(x, y) for x, y in zip(first, gradients(function)))


def test_negated_views_are_what_they_show(device):
    z = torch.randn(3, 2, 9, 2, 16, dtype=torch.complex64, device=device)
    views = [x.conj().imag for x in z]
    assert all(x.is_neg() for x in views)
    expected = attention(*(x.resolve_neg() for x in views))
    assert torch.equal(attention(*views), expected)
    q = views[0].resolve_neg().requires_grad_()
    (found,) = torch.autograd.grad(attention(q, *views[1:]), q, views[0])
    (exact,) = torch.autograd.grad(attention(q, *views[1:]), q, views[0].resolve_neg())
    assert torch.allclose(found, exact, atol=1e-6)


def test_the_profiler_sees_the_operator(device):
    with torch.profiler.profile() as profile:
        attention(*leaves(device)).sum().backward()
    names = {event.name for event in profile.events()}
    assert {"ferroflash::attention", "ferroflash::attention_backward"} <= names


def test_subclasses_see_the_operator(device):
    class Own(torch.Tensor):
        heard = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.heard.append(str(function))
            return super().__torch_function__(function, types, args, kwargs or {})

    q, k, v = (x.detach() for x in leaves(device))
    out = attention(q.as_subclass(Own), k, v)
    assert isinstance(out, Own) and any("ferroflash" in name for name in Own.heard)
    assert torch.equal(out.as_subclass(torch.Tensor), attention(q, k, v))


def test_forward_gradients_are_refused(device):
    q, k, v = (x.detach() for x in leaves(device))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        attention(forward_ad.make_dual(q, torch.ones_like(q)), k, v)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda q: attention(q, k, v), (q,), (torch.ones_like(q),))


def test_hooks_of_saved_tensors_are_called(device):
    packed = []

    def pack(x):
        packed.append(x)
        return len(packed) - 1

    tensors = leaves(device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: packed[i] * 1):
        out = attention(*tensors)
    assert len(packed) == 5
    found = torch.autograd.grad(out.sum(), tensors)
    for x, y in zip(found, torch.autograd.grad(attention(*tensors).sum(), tensors)):
        assert torch.equal(x, y)


def test_what_was_saved_must_not_change(device):
    q, k, v = leaves(device)
    out = attention(q, k, v)
    with torch.no_grad():
        k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    out = attention(q, k, v)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


def test_a_torch_that_describes_no_tensors_in_c_computes_the_same():
    program = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
torch.manual_seed(0)
from ferroflash import attention
x = [torch.randn(2, 9, 4, 16, requires_grad=True) for _ in range(3)]
out = attention(*x, causal=True)
out.sum().backward()
from ferroflash import _core
assert _core.shortcuts()[0] == hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
print(out.sum().item(), *(y.grad.norm().item() for y in x))
"""
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch is such a one")
    assert _core.shortcuts() == (True, True)
    figures = []
    for text in (program, program.replace("del torch.Tensor.__dlpack_c_exchange_api__", "")):
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
        figures.append(done.stdout)
    assert figures[0] == figures[1] != ""
