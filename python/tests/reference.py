"""The rule for how far from the definition in float64 a result may be."""

import math

import torch

from ferroflash._reference import furthest, reference


def assert_accurate(name, found, exact, plain, times=2):
    """At most `times` as far from the reference as a plain implementation in the same dtype, and 1e-5."""
    error, allowed = furthest(found, exact), times * furthest(plain, exact) + 1e-5
    assert error <= allowed, f"{name}: {error:.2e} from float64; allowed: {allowed:.2e}"


def assert_attention(attend, q, k, v, gradient_times=2, **options):
    """Checks O, LSE and the gradients of everything that is differentiable."""
    named = {"q": q, "k": k, "v": v, "bias": options.get("bias"), "sinks": options.get("sinks")}
    named = {name: x for name, x in named.items() if x is not None}
    rest = {name: x for name, x in options.items() if name not in named}

    def run(function, leaf=lambda x: x.detach().clone(), **extra):
        leaves = {name: leaf(x).requires_grad_() for name, x in named.items()}
        tensors = [leaves.pop(name) for name in ("q", "k", "v")]
        out, lse = function(*tensors, **leaves, **rest, **extra)
        generator = torch.Generator(device=q.device).manual_seed(1)
        dout = torch.randn(out.shape, generator=generator, device=q.device).to(q.dtype)
        dlse = torch.randn(lse.shape, generator=generator, device=q.device)
        finite = lse.masked_fill(lse == -math.inf, 0)
        loss = (out.double() * dout.double()).sum() + (finite.double() * dlse.double()).sum()
        gradients = torch.autograd.grad(loss, [*tensors, *leaves.values()])
        return [out.detach(), lse.detach(), *gradients]

    # Leaves in float64, so that gradients are not rounded on their way out.
    exact = run(reference, leaf=lambda x: x.detach().double())
    plain = run(reference, dtype=q.dtype)
    found = run(attend)
    assert found[0].dtype == q.dtype and found[1].dtype == torch.float32
    names = ["out", "softmax_lse", *(f"d{name}" for name in named)]
    for name, f, e, p in zip(names, found, exact, plain):
        assert f.shape == e.shape, name
        if name == "softmax_lse":
            p = e * (1 + 1e-5)
        assert_accurate(name, f, e, p, gradient_times if name.startswith("d") else 2)
