"""The functions of flash_attn: names, defaults, layouts, results."""

import inspect

import pytest
import torch
from reference import assert_accurate, assert_attention

import ferroflash
from ferroflash import (
    attention,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from ferroflash._reference import reference

NUMBERS = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
SEQUENCES = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
SIGNATURES = {
    "flash_attn_func": (["q", "k", "v"], NUMBERS),
    "flash_attn_kvpacked_func": (["q", "kv"], NUMBERS),
    "flash_attn_qkvpacked_func": (["qkv"], NUMBERS),
    "flash_attn_varlen_func": (["q", "k", "v", *SEQUENCES], {**NUMBERS, "block_table": None}),
    "flash_attn_varlen_kvpacked_func": (["q", "kv", *SEQUENCES], NUMBERS),
    "flash_attn_varlen_qkvpacked_func": (["qkv", "cu_seqlens", "max_seqlen"], NUMBERS),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_flash_attn(name):
    positional, defaults = SIGNATURES[name]
    parameters = inspect.signature(getattr(ferroflash, name)).parameters.values()
    assert [(p.name, p.default) for p in parameters if p.default is p.empty] == [
        (n, inspect._empty) for n in positional
    ]
    assert [(p.name, p.default) for p in parameters if p.default is not p.empty] == list(defaults.items())
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def tokens(device, *shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device=device).to(dtype)


def drop_in(q, k, v, **options):
    return flash_attn_func(q, k, v, return_attn_probs=True, **options)[:2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("nheads_k", [6, 3, 1])
@pytest.mark.parametrize("seqlens", [(113, 203), (108, 256)], ids=str)
def test_the_grid_of_flash_attn(device, seqlens, nheads_k, causal, local, dtype):
    """tests/test_flash_attn.py of flash_attn has this grid, with more heads and batches."""
    q, kv = (
        tokens(device, 1, seqlens[0], 6, 32, dtype=dtype),
        tokens(device, 1, seqlens[1], 2, nheads_k, 32, dtype=dtype),
    )
    window_size = (seqlens[1] // 5, 11) if local else (-1, -1)
    assert_attention(drop_in, q, *kv.unbind(2), gradient_times=3, causal=causal, window_size=window_size)


@pytest.mark.parametrize("options", [{"softcap": 30.0}, {"alibi_slopes": True}, {"softmax_scale": 0.2}], ids=str)
def test_numbers_are_honoured(device, options):
    q, k, v = (tokens(device, 2, 50, 4, 64) for _ in range(3))
    if "alibi_slopes" in options:
        options = {"alibi_slopes": torch.rand(4, device=device)}
    assert_attention(drop_in, q, k, v, gradient_times=3, **options)


def test_results_are_those_of_flash_attn(device):
    q, k, v = (tokens(device, 2, 50, 4, 64) for _ in range(3))
    assert isinstance(flash_attn_func(q, k, v), torch.Tensor)
    out, lse, s_dmask = flash_attn_func(q, k, v, return_attn_probs=True)
    assert (out.shape, lse.shape, s_dmask.numel()) == ((2, 50, 4, 64), (2, 4, 50), 0)
    assert lse.dtype == torch.float32


def test_packed_forms_are_the_others(device):
    qkv = tokens(device, 2, 50, 3, 4, 64).requires_grad_()
    options = {"causal": True, "window_size": (20, 0), "deterministic": True}
    dout = tokens(device, 2, 50, 4, 64)
    out = flash_attn_func(*qkv.unbind(2), **options)
    (expected,) = torch.autograd.grad(out, qkv, dout)
    packed = flash_attn_qkvpacked_func(qkv, **options)
    assert torch.equal(packed, out)
    assert torch.equal(torch.autograd.grad(packed, qkv, dout)[0], expected)
    packed = flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], **options)
    assert torch.equal(packed, out)
    assert torch.equal(torch.autograd.grad(packed, qkv, dout)[0], expected)


LENGTHS = ([3, 40, 0, 17], [9, 40, 12, 64])


def starts(device, lengths):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (7, 2)}, {"softcap": 20.0}], ids=str)
def test_sequences_of_different_lengths(device, options):
    q, k, v = (
        tokens(device, sum(lengths), nheads, 64)
        for lengths, nheads in zip((LENGTHS[0], LENGTHS[1], LENGTHS[1]), (4, 2, 2))
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    cu_q, cu_k = (starts(device, lengths) for lengths in LENGTHS)
    out, lse, _ = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 40, 64, return_attn_probs=True, **options)
    assert (out.shape, lse.shape) == ((60, 4, 64), (4, 60))
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, dout)
    for dtype in (torch.float64, torch.bfloat16):
        doubles = [x.detach().to(torch.float64 if dtype == torch.float64 else dtype).requires_grad_() for x in leaves]
        pieces = zip(*(x.split(lengths) for x, lengths in zip(doubles, (LENGTHS[0], LENGTHS[1], LENGTHS[1]))))
        results = [reference(*(x[None] for x in piece), dtype=dtype, **options) for piece in pieces]
        results = torch.cat([o[0] for o, _ in results]), torch.cat([rows[0] for _, rows in results], 1)
        gradients = torch.autograd.grad(results[0], doubles, dout.to(results[0].dtype))
        if dtype == torch.float64:
            exact = [*results, *gradients]
        else:
            plain = [*results, *gradients]
    plain[1] = exact[1] * (1 + 1e-5)
    for name, f, e, p in zip(("out", "softmax_lse", "dq", "dk", "dv"), [out, lse, *found], exact, plain):
        assert_accurate(name, f, e, p, 3)


def test_packed_sequences_are_the_others(device):
    qkv = tokens(device, 60, 3, 4, 64).requires_grad_()
    cu = starts(device, LENGTHS[0])
    dout = tokens(device, 60, 4, 64)
    out = flash_attn_varlen_func(*qkv.unbind(1), cu, cu, 40, 40, causal=True, deterministic=True)
    (expected,) = torch.autograd.grad(out, qkv, dout)
    packed = flash_attn_varlen_qkvpacked_func(qkv, cu, 40, causal=True, deterministic=True)
    assert torch.equal(packed, out)
    assert torch.equal(torch.autograd.grad(packed, qkv, dout)[0], expected)
    packed = flash_attn_varlen_kvpacked_func(qkv[:, 0], qkv[:, 1:], cu, cu, 40, 40, causal=True, deterministic=True)
    assert torch.equal(packed, out)


def test_sequences_take_bias_and_mask(device):
    """With cu_seqlens a bias is (batch, nheads, longest, longest): what is beyond a sequence nobody reads."""
    lengths = [5, 9]
    q, k, v = (tokens(device, 14, 2, 32, dtype=torch.float32) for _ in range(3))
    cu, bias = starts(device, lengths), torch.randn(2, 2, 9, 9, device=device)
    out = attention(q, k, v, bias=bias, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=9, max_seqlen_k=9)
    for i, (begin, length) in enumerate([(0, 5), (5, 9)]):
        piece = [x[None, begin : begin + length] for x in (q, k, v)]
        exact = reference(*piece, bias=bias[i, :, :length, :length])[0][0]
        assert (out[begin : begin + length] - exact).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("block_table", torch.zeros(2, 2, dtype=torch.int32), ValueError),
        ("max_seqlen_q", None, ValueError),
        ("max_seqlen_k", 2.5, TypeError),
        ("max_seqlen_q", 3, ValueError),
        ("cu_seqlens_q", None, TypeError),
        ("cu_seqlens_q", torch.tensor([0, 3, 3, 60], dtype=torch.int64), TypeError),
        ("cu_seqlens_k", torch.tensor([0, 60], dtype=torch.int32), ValueError),
        ("cu_seqlens_k", torch.tensor([0, 30, 20, 60], dtype=torch.int32), ValueError),
        ("cu_seqlens_q", torch.tensor([0, 3, 3, 61], dtype=torch.int32), ValueError),
        ("q", torch.zeros(1, 60, 4, 64), ValueError),
        ("return_attn_probs", 1, TypeError),
    ],
    ids=str,
)
def test_each_bad_argument_of_sequences_is_named(name, value, error):
    x = torch.randn(60, 4, 64)
    cu = torch.tensor([0, 3, 3, 60], dtype=torch.int32)
    arguments = {"q": x, "k": x, "v": x, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 57, "max_seqlen_k": 57}
    assert flash_attn_varlen_func(**arguments).isfinite().all()
    with pytest.raises(error, match=f"^{name}: "):
        flash_attn_varlen_func(**{**arguments, name: value})


def test_what_is_packed_wrongly_is_named():
    with pytest.raises(ValueError, match=r"^qkv: 2 parts; allowed: 3: \(batch, seqlen, 3, nheads, headdim\)"):
        flash_attn_qkvpacked_func(torch.zeros(1, 4, 2, 1, 8))
    with pytest.raises(ValueError, match=r"^kv: 4 dimensions; allowed: 5"):
        flash_attn_kvpacked_func(torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 2, 8))
    x = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match="^return_attn_probs: True with dropout_p 0.5; allowed: False"):
        flash_attn_func(x, x, x, dropout_p=0.5, return_attn_probs=True)
