"""ferroflash as an implementation of torch's flash attention."""

import subprocess
import sys

import pytest
import torch
import torch.nn.attention
from torch.nn.functional import scaled_dot_product_attention

from ferroflash._reference import reference

if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
    pytest.skip("this torch knows no other implementations", allow_module_level=True)

from ferroflash.integrations.torch import Override, register

aten = torch.ops.aten


@pytest.fixture
def stands_in(device):
    """torch's operators, which it has on CUDA alone, by ferroflash's kernels."""
    override = Override(device.upper())
    yield device
    override.remove()


def qkv(device, seqlens=(12, 12), transposed=False):
    shapes = [(2, 4, seqlens[0], 16), *[(2, 2, seqlens[1], 16)] * 2]
    tensors = [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]
    return [x.transpose(1, 2).contiguous().transpose(1, 2) if transposed else x for x in tensors]


def expected(tensors, dout, **options):
    leaves = [x.detach().double().requires_grad_() for x in tensors]
    out, lse = reference(*(x.transpose(1, 2) for x in leaves), **options)
    out = out.transpose(1, 2)
    return out, lse, torch.autograd.grad(out, leaves, dout.double())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_scaled_dot_product(stands_in, causal, transposed):
    leaves = [x.requires_grad_() for x in qkv(stands_in, transposed=transposed)]
    out, lse, *_ = aten._scaled_dot_product_flash_attention(*leaves, 0.0, causal, scale=0.3)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, dout)
    exact, exact_lse, gradients = expected(leaves, dout, causal=causal, softmax_scale=0.3)
    assert torch.allclose(out.double(), exact, atol=2e-2)
    assert torch.allclose(lse.double(), exact_lse, atol=1e-2)
    for x, y, leaf in zip(found, gradients, leaves):
        assert torch.allclose(x.double(), y, atol=6e-2)
        assert x.stride() == leaf.stride()
    assert out.stride() == leaves[0].stride()


def test_results_are_as_torch_announces_them(stands_in):
    """What the compiler makes of the operator without running it."""
    from torch._subclasses import FakeTensorMode

    tensors = qkv(stands_in, (12, 20))
    found = aten._scaled_dot_product_flash_attention(*tensors)
    with FakeTensorMode() as mode:
        fake = aten._scaled_dot_product_flash_attention(*map(mode.from_tensor, tensors))
    for x, y in zip(found, fake):
        assert type(x) is type(y) or isinstance(y, torch.Tensor)
        if isinstance(x, torch.Tensor):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


def test_sequences(stands_in):
    q, k, v = ((x.transpose(1, 2).flatten(0, 1)).detach().requires_grad_() for x in qkv(stands_in))
    starts = torch.tensor([0, 5, 24], dtype=torch.int32, device=stands_in)
    rest = (starts, starts, 19, 19, 0.0, True, False)
    out, lse, *_ = aten._flash_attention_forward(q, k, v, *rest, window_size_left=7, window_size_right=0)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), dout)
    for begin, end in ((0, 5), (5, 24)):
        own = [x[None, begin:end].transpose(1, 2) for x in (q, k, v)]
        of_out = dout[None, begin:end].transpose(1, 2)
        exact, exact_lse, gradients = expected(own, of_out, causal=True, window_size=(7, 0))
        assert torch.allclose(out[begin:end].double(), exact[0].transpose(0, 1), atol=2e-2)
        assert torch.allclose(lse[:, begin:end].double(), exact_lse[0], atol=1e-2)
        for x, y in zip(found, gradients):
            assert torch.allclose(x[begin:end].double(), y[0].transpose(0, 1), atol=6e-2)


def test_what_is_not_supported_is_refused(stands_in):
    tensors = qkv(stands_in)
    with pytest.raises(ValueError, match="^dropout_p: 0.5; allowed: 0"):
        aten._scaled_dot_product_flash_attention(*tensors, 0.5)
    with pytest.raises(ValueError, match="^return_debug_mask: True; allowed: False"):
        aten._scaled_dot_product_flash_attention(*tensors, 0.0, False, True)
    tokens = [x.transpose(1, 2) for x in tensors]
    with pytest.raises(ValueError, match="^alibi_slopes: given; allowed: None"):
        slopes = torch.rand(4, device=stands_in)
        aten._flash_attention_forward(*tokens, None, None, 12, 12, 0.0, False, False, alibi_slopes=slopes)


def test_it_is_asked_for_by_name():
    assert "ferroflash" not in torch.nn.attention.list_flash_attention_impls()
    register()
    try:
        assert "ferroflash" in torch.nn.attention.list_flash_attention_impls()
        torch.nn.attention.activate_flash_attention_impl("ferroflash")
        assert torch.nn.attention.current_flash_attention_impl() == "ferroflash"
        torch.nn.attention.restore_flash_attention_impl()
        assert torch.nn.attention.current_flash_attention_impl() is None
    finally:
        torch.nn.attention._registry._FLASH_ATTENTION_IMPLS.pop("ferroflash")


def test_importing_registers_nothing():
    program = (
        "import torch, torch.nn.attention as a; before = a.list_flash_attention_impls(); import ferroflash.integrations"
        ".torch, ferroflash; ferroflash.attention; assert a.list_flash_attention_impls() == before"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_cuda_restores_torch(cuda):
    tensors = qkv(cuda, (256, 256))
    register()
    flash = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    try:
        with flash:
            own = scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
            torch.nn.attention.activate_flash_attention_impl("ferroflash")
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                ours = scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
                torch.cuda.synchronize()
            torch.nn.attention.restore_flash_attention_impl()
            assert torch.equal(own, scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True))
    finally:
        torch.nn.attention._registry._FLASH_ATTENTION_IMPLS.pop("ferroflash")
    assert torch.allclose(own.float(), ours.float(), atol=2e-2)
    assert any("flash2" in event.name or "flash3" in event.name for event in profile.events())
