"""`torch.vmap`: the same as a call for each."""

import pytest
import torch
from torch.func import grad

from ferroflash import attention, flash_attn_varlen_func, softmax

TIMES = 3


def qkv(device, *more, seqlens=(9, 13), dtype=torch.float32):
    shapes = [(*more, 2, seqlens[0], 4, 16), *[(*more, 2, seqlens[1], 2, 16)] * 2]
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def each(function, dims, *tensors):
    """What vmap does, by its definition."""
    results = []
    for i in range(TIMES):
        results.append(function(*(x if dim is None else x.select(dim, i) for x, dim in zip(tensors, dims))))
    if isinstance(results[0], tuple):
        return tuple(torch.stack(x) for x in zip(*results))
    return torch.stack(results)


def assert_mapped(function, dims, *tensors, **options):
    found = torch.vmap(function, in_dims=dims, **options)(*tensors)
    expected = each(function, dims, *tensors)
    for x, y in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (found, expected))):
        assert x.shape == y.shape
        assert torch.allclose(x, y, atol=2e-6)


def with_lse(q, k, v, **options):
    return attention(q, k, v, return_lse=True, **options)


@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, None), (None, 1, 3), (4, 0, 0)], ids=str)
def test_any_tensor_may_be_mapped_over_any_dimension(device, dims):
    tensors = [x[0] if dim is None else x.movedim(0, dim) for x, dim in zip(qkv(device, TIMES), dims)]
    assert_mapped(lambda q, k, v: with_lse(q, k, v, causal=True, window_size=(5, 0)), dims, *tensors)


@pytest.mark.parametrize("dim", [0, None])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("bias", (2, 4, 9, 13)),
        ("bias", (1, 4, 9, 13)),
        ("bias", (1, 1, 1, 13)),
        ("mask", (2, 1, 1, 13)),
        ("mask", (1, 4, 9, 13)),
        ("alibi_slopes", (4,)),
        ("alibi_slopes", (2, 4)),
        ("sinks", (4,)),
    ],
)
def test_what_scores_take_may_be_mapped_too(device, name, shape, dim):
    x = torch.rand(shape if dim is None else (TIMES, *shape), device=device)
    x = x > 0.3 if name == "mask" else x
    assert_mapped(
        lambda q, k, v, x: with_lse(q, k, v, **{name: x}), (0, 0, None, dim), *qkv(device, TIMES)[:2], qkv(device)[2], x
    )


@pytest.mark.parametrize("name", ["plain", "bias", "sinks"])
@pytest.mark.parametrize("dim", [0, None])
def test_gradients_for_each(device, name, dim):
    q, k, v = qkv(device, TIMES)
    shape = {"plain": (1,), "bias": (1, 4, 9, 13), "sinks": (4,)}[name]
    x = torch.rand(shape if dim is None else (TIMES, *shape), device=device)

    def loss(q, k, v, x):
        out, lse = with_lse(q, k, v, causal=True, **({} if name == "plain" else {name: x}))
        return out.sin().sum() + lse.cos().sum() + x.sum()

    function = grad(loss, argnums=(0, 1, 2, 3))
    assert_mapped(function, (0, 0, 0, dim), q, k, v, x)
    assert_mapped(function, (0, None, 0, dim), q, k[0], v, x)


def test_gradients_of_what_was_mapped(device):
    q, k, v = (x.requires_grad_() for x in qkv(device, TIMES))
    found = torch.autograd.grad(torch.vmap(attention)(q, k, v).square().sum(), (q, k, v))
    expected = torch.autograd.grad(each(attention, (0, 0, 0), q, k, v).square().sum(), (q, k, v))
    for x, y in zip(found, expected):
        assert torch.allclose(x, y, atol=1e-5)


def test_maps_of_maps(device):
    q, k, v = qkv(device, TIMES, 2)
    found = torch.vmap(torch.vmap(attention))(q, k, v)
    assert torch.allclose(found, each(torch.vmap(attention), (0, 0, 0), q, k, v), atol=1e-6)


@pytest.mark.parametrize("dim", [0, None])
def test_sequences(device, dim):
    q, k, v = (x.flatten(1, 2) for x in qkv(device, TIMES, seqlens=(12, 12)))
    starts = torch.tensor([[0, 5, 24], [0, 0, 24], [0, 20, 24]], dtype=torch.int32, device=device)
    starts = starts if dim == 0 else starts[0]

    def function(q, k, v, starts):
        out, lse, _ = flash_attn_varlen_func(q, k, v, starts, starts, 24, 24, causal=True, return_attn_probs=True)
        return out, lse

    assert_mapped(function, (0, 0, 0, dim), q, k, v, starts)

    def loss(q, k, v, starts):
        out, lse = function(q, k, v, starts)
        return out.sin().sum() + lse.cos().sum()

    assert_mapped(grad(loss, argnums=(0, 1, 2)), (0, 0, 0, dim), q, k, v, starts)


def test_dropout_differs_or_not_as_asked(device):
    q, k, v = qkv(device)
    q, k, v = (x.expand(TIMES, *x.shape) for x in (q, k, v))
    same = torch.vmap(lambda *x: attention(*x, dropout_p=0.5), randomness="same")(q, k, v)
    assert torch.equal(same[0], same[1])
    different = torch.vmap(lambda *x: attention(*x, dropout_p=0.5), randomness="different")(q, k, v)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda *x: attention(*x, dropout_p=0.5))(q, k, v)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_softmax(device, dim):
    x = torch.randn(TIMES, 5, 7, device=device).movedim(0, dim)
    assert_mapped(softmax, (dim,), x)
    assert_mapped(lambda x: softmax(x, dim=0), (dim,), x)
