"""Softmax over rows, by both kernels."""

import pytest
import torch
from reference import assert_accurate

from ferroflash import softmax

METHODS = ["online", "two-pass"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1,), (5, 40), (2, 3, 1500), (0, 7), (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward(device, dtype, shape, method):
    x = (3 * torch.randn(shape, device=device)).to(dtype).requires_grad_()
    y = softmax(x, method=method)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    wide = x.detach().double().requires_grad_()
    exact = torch.softmax(wide, -1)
    (exact_dx,) = torch.autograd.grad(exact, wide, dy.double())
    plain_dx = torch.autograd.grad(torch.softmax(x, -1), x, dy)[0]
    assert_accurate("y", y, exact, exact.to(dtype))
    assert_accurate("dx", dx, exact_dx, plain_dx)


@pytest.mark.parametrize("dim", [0, 1, 2, -2])
def test_any_dimension_of_any_strides(device, dim):
    x = torch.randn(4, 5, 6, device=device).transpose(0, 2)
    assert torch.allclose(softmax(x, dim), torch.softmax(x, dim), atol=1e-6)


def test_a_row_of_nothing_is_nothing(device):
    x = torch.full((2, 9), -torch.inf, device=device)
    x[1, 3] = 0
    assert torch.equal(softmax(x), torch.nn.functional.one_hot(torch.tensor([9, 3]), 10)[:, :9].float().to(device))


def test_second_derivatives(device):
    x = torch.randn(3, 7, device=device, requires_grad=True)
    weights = torch.randn(3, 7, device=device)

    def second(f):
        (dx,) = torch.autograd.grad((f(x) * weights).sum(), x, create_graph=True)
        return torch.autograd.grad((dx * dx).sum(), x)[0]

    assert torch.allclose(second(softmax), second(lambda x: torch.softmax(x, -1)), atol=1e-5)
