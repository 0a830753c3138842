"""Results and gradients against the definition in float64."""

import functools

import pytest
import torch
from reference import assert_attention

from ferroflash import attention
from ferroflash._reference import furthest, reference

with_lse = functools.partial(attention, return_lse=True)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tensors(device, dtype, seqlens=(40, 56), nheads=(4, 2), headdims=(32, 32), batch=2):
    (seqlen_q, seqlen_k), (heads, heads_k), (headdim, headdim_v) = seqlens, nheads, headdims
    shapes = [(seqlen_q, heads, headdim), (seqlen_k, heads_k, headdim), (seqlen_k, heads_k, headdim_v)]
    return [torch.randn(batch, *shape, device=device).to(dtype) for shape in shapes]


@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (17, 3)}, {"window_size": (9, None)}])
@pytest.mark.parametrize("seqlens", [(1, 1), (1, 77), (113, 211), (128, 128), (130, 65)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_and_masks(device, dtype, seqlens, mask):
    assert_attention(with_lse, *tensors(device, dtype, seqlens), **mask)


@pytest.mark.parametrize(
    "headdims", [(64, 64), (96, 96), (128, 128), (256, 256), (40, 40), (33, 33), (64, 32)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dimensions(device, dtype, headdims):
    assert_attention(with_lse, *tensors(device, dtype, headdims=headdims), causal=True)


@pytest.mark.parametrize("nheads", [(6, 6), (6, 2), (6, 1)], ids=str)
def test_grouped_queries(device, nheads):
    assert_attention(with_lse, *tensors(device, torch.bfloat16, nheads=nheads), causal=True)


def features(device, dtype, seqlens=(40, 56), nheads=4, batch=2):
    scores = (batch, nheads, *seqlens)
    return {
        "bias": {"bias": torch.randn(scores, device=device).to(dtype)},
        "bias of all batches": {"bias": torch.randn(1, nheads, 1, seqlens[1], device=device).to(dtype)},
        "bias of all keys": {"bias": torch.randn(batch, 1, seqlens[0], 1, device=device).to(dtype)},
        "mask": {"mask": torch.rand(scores, device=device) < 0.7},
        "key padding": {"mask": (torch.arange(seqlens[1], device=device) < seqlens[1] - 9)[None, None, None]},
        "no key": {"mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)},
        "sinks": {"sinks": torch.randn(nheads, device=device)},
        "alibi": {"alibi_slopes": torch.rand(nheads, device=device)},
        "alibi of each batch": {"alibi_slopes": torch.rand(batch, nheads, device=device)},
        "softcap": {"softcap": 5.0},
        "scale": {"softmax_scale": 0.3},
        "negative scale": {"softmax_scale": -0.3},
    }


@pytest.mark.parametrize("feature", features("cpu", torch.float32))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_features(device, dtype, feature, causal):
    options = features(device, dtype)[feature]
    assert_attention(with_lse, *tensors(device, dtype), gradient_times=3, causal=causal, **options)


def test_all_at_once(device):
    dtype = torch.bfloat16
    of = features(device, dtype)
    names = ["bias", "mask", "sinks", "alibi", "softcap"]
    options = {key: value for name in names for key, value in of[name].items()}
    assert_attention(with_lse, *tensors(device, dtype), gradient_times=3, causal=True, window_size=(30, 0), **options)


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_gradients_are_the_same_bits(device, deterministic):
    q, k, v = (x.requires_grad_() for x in tensors(device, torch.bfloat16, (300, 300), headdims=(64, 64)))
    dout = torch.randn_like(q)

    def gradients():
        return torch.autograd.grad(attention(q, k, v, causal=True, deterministic=deterministic), (q, k, v), dout)

    first = gradients()
    exact = torch.autograd.grad(reference(q, k, v, causal=True)[0], (q, k, v), dout.double())
    assert all(furthest(x, y) < 0.05 for x, y in zip(first, exact))
    if deterministic:
        for _ in range(3):
            assert all(torch.equal(x, y) for x, y in zip(gradients(), first))


@pytest.mark.parametrize("nheads", [(8, 8), (6, 2)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length, batch", [(300, 16), (1500, 12)])
@pytest.mark.parametrize("headdim", [64, 128, 256])
def test_cuda_deterministic_gradients_depend_on_nothing_else(cuda, headdim, length, batch, causal, nheads):
    """In many runs, of one sequence and of many, one after the other or in a batch; of a batch whose heads are taken whole."""
    q, k, v = tensors(cuda, torch.bfloat16, (length, length), nheads, (headdim, headdim), batch)
    dout = torch.randn_like(q)

    def gradients(q, k, v, dout, **sequences):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, causal=causal, deterministic=True, **sequences)
        return torch.autograd.grad(out, leaves, dout)

    first = gradients(q, k, v, dout)
    for _ in range(20):
        assert all(torch.equal(x, y) for x, y in zip(gradients(q, k, v, dout), first))
    for b in (0, batch - 1):
        alone = gradients(*(x[b : b + 1] for x in (q, k, v, dout)))
        assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, first))

    # Sequences of other lengths around the second, whose queries are large: they share tiles with its last rows.
    ends = [700, 700 + length, 701 + length, 9 * length]
    starts = torch.tensor([0, *ends], device=cuda, dtype=torch.int32)
    longest = max(y - x for x, y in zip([0, *ends], ends))
    tokens = [x.flatten(0, 1)[: ends[-1]] for x in (q, k, v, dout)]
    large = torch.full((ends[-1], 1, 1), 20.0, device=cuda, dtype=q.dtype)
    large[700 : 700 + length] = 1
    tokens[0] = tokens[0] * large
    several = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
    found = gradients(*tokens, **several)
    one = torch.tensor([0, length], device=cuda, dtype=torch.int32)
    single = {"cu_seqlens_q": one, "cu_seqlens_k": one, "max_seqlen_q": length, "max_seqlen_k": length}
    alone = gradients(*(x[700 : 700 + length] for x in tokens), **single)
    assert all(torch.equal(x, y[700 : 700 + length]) for x, y in zip(alone, found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_is_the_same_forward_and_backward(device, dtype):
    """V = 1 shows the row sums of P, V = I all of it; the gradients are those of the P that was kept."""
    seqlen, p = 64, 0.3
    q, k = (torch.randn(2, seqlen, 2, 32, device=device).to(dtype).requires_grad_() for _ in range(2))
    identity = torch.eye(seqlen, device=device, dtype=dtype)[None, :, None].expand(2, -1, 2, -1)
    v = identity.clone().requires_grad_()
    out = attention(q, k, v, dropout_p=p)
    dropped = (out == 0).transpose(1, 2)
    assert abs(dropped.float().mean().item() - p) < 0.03

    def definition(q, k, v):
        q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / 32**0.5).softmax(-1).masked_fill(dropped, 0) / (1 - p)
        return (weights @ v).transpose(1, 2)

    exact = definition(q, k, v)
    assert furthest(out, exact) < (1e-4 if dtype == torch.float32 else 2e-2)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), dout)
    for x, y in zip(found, torch.autograd.grad(exact, (q, k, v), dout.double())):
        assert furthest(x, y) < (1e-4 if dtype == torch.float32 else 3e-2)


def test_dropout_follows_the_seed(device):
    q, k, v = tensors(device, torch.float32)

    def drawn(seed):
        torch.manual_seed(seed)
        return attention(q, k, v, dropout_p=0.5)

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))
    assert not torch.equal(attention(q, k, v, dropout_p=0.5), attention(q, k, v, dropout_p=0.5))


def test_nothing_to_do(device):
    q, k, v = tensors(device, torch.float16)
    for seqlen_q, seqlen_k, batch in [(0, 56, 2), (40, 0, 2), (40, 56, 0)]:
        a, b, c = (x[:batch, :n].detach().requires_grad_() for x, n in ((q, seqlen_q), (k, seqlen_k), (v, seqlen_k)))
        out, lse = attention(a, b, c, return_lse=True)
        assert out.shape == (batch, seqlen_q, 4, 32) and not out.any()
        assert (lse == -torch.inf).all() or seqlen_k
        for gradient in torch.autograd.grad(out, (a, b, c), torch.ones_like(out)):
            assert not gradient.any()


def test_large_magnitudes(device):
    q, k, v = tensors(device, torch.float16)
    assert_attention(with_lse, 5 * q, 3 * k, 3 * v, causal=True, gradient_times=3)


def test_what_is_not_seen_does_not_reach_the_result(device):
    q, k, v = tensors(device, torch.float16, (8, 8))
    k[:, 5:], v[:, 5:] = torch.nan, torch.inf
    out = attention(q, k, v, causal=True)
    assert out[:, :5].isfinite().all()
    assert furthest(out[:, :5], reference(q[:, :5], k[:, :5], v[:, :5], causal=True)[0]) < 2e-3
