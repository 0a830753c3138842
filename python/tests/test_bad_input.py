"""Each argument wrong once: an error that names it, and a process that lives on."""

import math

import pytest
import torch

from ferroflash import attention, flash_attn_with_kvcache, softmax

NAN = math.nan


def good():
    return {
        "q": torch.randn(2, 5, 4, 16),
        "k": torch.randn(2, 7, 2, 16),
        "v": torch.randn(2, 7, 2, 24),
        "bias": torch.randn(2, 4, 5, 7),
        "mask": torch.ones(2, 4, 5, 7, dtype=torch.bool),
        "alibi_slopes": torch.rand(4),
        "sinks": torch.randn(4),
    }


BAD = [
    ("q", None, TypeError),
    ("q", [[1.0]], TypeError),
    ("q", torch.randn(5, 4, 16), ValueError),
    ("q", torch.randn(()), ValueError),
    ("q", torch.randn(2, 5, 4, 16).double(), TypeError),
    ("q", torch.zeros(2, 5, 4, 16, dtype=torch.int32), TypeError),
    ("q", torch.zeros(2, 5, 4, 16, dtype=torch.complex64), TypeError),
    ("k", 3, TypeError),
    ("k", torch.randn(3, 7, 2, 16), ValueError),
    ("k", torch.randn(2, 7, 2, 8), ValueError),
    ("k", torch.randn(2, 7, 2, 16).half(), TypeError),
    ("k", torch.randn(2, 7, 2, 16, device="meta"), ValueError),
    ("v", torch.randn(2, 6, 2, 24), ValueError),
    ("v", torch.randn(2, 7, 1, 24), ValueError),
    ("v", torch.randn(2, 7, 24), ValueError),
    ("v", torch.randn(2, 7, 2, 0), ValueError),
    ("bias", torch.randn(2, 3, 5, 7), ValueError),
    ("bias", torch.randn(5, 7), ValueError),
    ("bias", 1.0, TypeError),
    ("mask", torch.ones(2, 4, 5, 7), ValueError),
    ("mask", torch.ones(2, 4, 5, 8, dtype=torch.bool), ValueError),
    ("mask", True, TypeError),
    ("alibi_slopes", torch.rand(3), ValueError),
    ("alibi_slopes", torch.rand(4).half(), TypeError),
    ("alibi_slopes", torch.rand(4).requires_grad_(), ValueError),
    ("alibi_slopes", torch.rand(1, 2, 4), ValueError),
    ("sinks", torch.randn(2), ValueError),
    ("sinks", torch.randn(2, 4), ValueError),
    ("sinks", "4", TypeError),
    ("cu_seqlens_q", torch.tensor([0, 5], dtype=torch.int32), ValueError),
    ("cu_seqlens_k", [0, 5], TypeError),
    ("max_seqlen_q", "5", TypeError),
    ("max_seqlen_k", -1, ValueError),
    ("softmax_scale", NAN, ValueError),
    ("softmax_scale", 1e300, ValueError),
    ("softmax_scale", "1", TypeError),
    ("causal", 1, TypeError),
    ("causal", None, TypeError),
    ("window_size", 3, TypeError),
    ("window_size", (1, 2, 3), TypeError),
    ("window_size", (1.5, 2), TypeError),
    ("window_size", (True, 2), TypeError),
    ("softcap", 0.0, ValueError),
    ("softcap", -1.0, ValueError),
    ("softcap", NAN, ValueError),
    ("dropout_p", 1.0, ValueError),
    ("dropout_p", -0.1, ValueError),
    ("dropout_p", NAN, ValueError),
    ("dropout_p", None, TypeError),
    ("deterministic", "no", TypeError),
    ("allow_tf32", 0, TypeError),
    ("num_splits", 1.5, TypeError),
    ("num_splits", -1, ValueError),
    ("num_splits", 129, ValueError),
    ("return_lse", None, TypeError),
]


@pytest.mark.parametrize(("name", "value", "error"), BAD, ids=lambda x: str(x).splitlines()[0])
def test_each_bad_argument_is_named(name, value, error):
    expected = {"cu_seqlens_q": "(q|cu_seqlens_k)"}.get(name, name)
    with pytest.raises(error, match=rf"^{expected}: .*; allowed: "):
        attention(**{**good(), name: value})
    assert attention(**good()).isfinite().all()


def test_heads_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="^nheads is 4, which is no multiple of nheads_k = 3"):
        attention(torch.randn(1, 2, 4, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))


def test_cuda_refuses_what_only_the_cpu_has(cuda):
    q = torch.randn(1, 4, 1, 264, device=cuda)
    with pytest.raises(ValueError, match="headdim 264; allowed: up to 256"):
        attention(q, q, q)
    with pytest.raises(ValueError, match="^k: on device cpu; allowed: cuda:0, where q is"):
        attention(q[..., :8], q[..., :8].cpu(), q[..., :8])
    starts = torch.tensor([0, 4], dtype=torch.int32, device=cuda)
    with pytest.raises(ValueError, match="^max_seqlen_q: none; allowed: a number: cu_seqlens is in device memory"):
        attention(*(q[0, ..., :8],) * 3, cu_seqlens_q=starts, cu_seqlens_k=starts)
    assert attention(q[..., :8], q[..., :8], q[..., :8]).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"x": 3}, TypeError, "x"),
        ({"x": torch.randn(())}, ValueError, "x"),
        ({"x": torch.randn(3).double()}, TypeError, "x"),
        ({"x": torch.randn(3), "dim": 1}, ValueError, "dim"),
        ({"x": torch.randn(3), "dim": 0.5}, TypeError, "dim"),
        ({"x": torch.randn(3), "method": "three-pass"}, ValueError, "method"),
    ],
    ids=str,
)
def test_softmax_names_what_is_bad(arguments, error, name):
    with pytest.raises(error, match=f"^{name}: .*; allowed: "):
        softmax(**arguments)


def test_operators_refuse_what_they_are_given_directly():
    """What calls the operators without the functions' checks is refused as well."""
    q = torch.randn(1, 4, 1, 8)
    numbers = (None, None, None, False, None, None, None, 0.0, False, False, 0)
    nothing = (None,) * 7
    op = torch.ops.ferroflash.attention
    with pytest.raises(ValueError, match="^q: 3 dimensions"):
        op(q[0], q, q, *nothing, *numbers)
    with pytest.raises(ValueError, match="^v: 2 dimensions"):
        op(q, q, q[0, 0], *nothing, *numbers)
    with pytest.raises(TypeError, match="^sinks: dtype f16"):
        op(q, q, q, None, None, None, torch.zeros(1).half(), None, None, None, *numbers)


def test_nonsense_is_never_a_crash():
    """Random strides, shapes and dtypes: a result or an exception."""
    generator = torch.Generator().manual_seed(7)

    def draw(most):
        return int(torch.randint(most, (), generator=generator))

    storage = torch.randn(1 << 16)
    outcomes = set()
    for _ in range(400):

        def tensor(rank=4):
            shape = [(1, 2, 3, 4, 8, 16)[draw(6)] for _ in range(rank if draw(8) else draw(6))]
            strides = [(0, 1, 2, 8, 64, 300)[draw(6)] for _ in shape[:-1]] + [1 if draw(5) else 3]
            x = storage.as_strided(shape, strides[: len(shape)], draw(100))
            return x if draw(10) else x.to((torch.float16, torch.bfloat16, torch.int32, torch.bool)[draw(4)])

        q = tensor()
        k = tensor() if not draw(3) else q
        v = tensor() if not draw(3) else k
        options = {"causal": bool(draw(2)), "window_size": (draw(9) - 1, draw(9) - 1)}
        if not draw(4):
            options["bias"] = tensor()
        if not draw(4):
            options["sinks"] = tensor(1)
        try:
            attention(q, k, v, **options)
            outcomes.add("result")
        except (ValueError, TypeError) as error:
            assert str(error)
            outcomes.add(type(error).__name__)
    assert outcomes == {"result", "ValueError", "TypeError"}


def freed(x):
    x.untyped_storage().resize_(0)
    return x


def test_memory_that_is_gone_is_named(device):
    q = torch.randn(1, 4, 2, 16, device=device, requires_grad=True)
    gone = "a storage of 0 bytes; allowed: [0-9]+, which it reaches to|address 0x0; allowed"
    for name in ("q", "k", "v"):
        tensors = {"q": q, "k": q, "v": q, name: freed(torch.randn_like(q.detach()))}
        with pytest.raises(ValueError, match=f"^{name}: ({gone})"):
            attention(**tensors)
    out = attention(q, q, q)
    with pytest.raises(ValueError, match=f"^dout: ({gone})"):
        torch.autograd.grad(out, q, freed(torch.randn_like(out)))
    k = q.detach().clone()
    out = attention(q, k, k)
    freed(k)
    with pytest.raises(ValueError, match=f"^k: ({gone})"):
        torch.autograd.grad(out, q, torch.randn_like(out))
    cache = torch.randn(1, 8, 2, 16, device=device)
    with pytest.raises(ValueError, match=f"^k: ({gone})"):
        flash_attn_with_kvcache(q, cache, cache.clone(), freed(q.detach().clone()), q.detach(), cache_seqlens=2)


def test_more_sequences_than_memory_lists_are_no_crash():
    q, k = torch.randn(1, 0, 1, 8).expand(2**31 - 1, 0, 1, 8), torch.randn(1, 3, 1, 8).expand(2**31 - 1, 3, 1, 8)
    for keys in (q, k):
        assert attention(q, keys, keys).shape == q.shape
