"""Attention as its definition says it, in float64, and the rule for how far from it a result may be."""

import math

import torch


def reference(q, k, v, dtype=torch.float64, bias=None, mask=None, alibi_slopes=None, sinks=None, causal=False,
              window_size=(None, None), softcap=None, softmax_scale=None):
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


def furthest(x, y):
    """max |x - y|, where equal infinities are 0 apart and a NaN is infinitely far."""
    x, y = x.double(), y.double()
    distance = torch.where(x == y, torch.zeros_like(x), (x - y).abs())
    return distance.nan_to_num(nan=math.inf, posinf=math.inf).max().item() if distance.numel() else 0.0


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
