"""A good citizen of PyTorch: operators, compilers, autocast, threads, streams, graphs."""

import subprocess
import sys
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ferroflash
from ferroflash import attention, flash_attn_func, flash_attn_varlen_func, softmax
from operators import OPERATOR_NUMBERS


def leaves(device, dtype=torch.float32, seqlens=(24, 40), nheads=(4, 2), headdim=32):
    shapes = [(2, seqlens[0], nheads[0], headdim), *[(2, seqlens[1], nheads[1], headdim)] * 2]
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_needs_neither_torch_nor_a_gpu():
    code = """
import sys
sys.modules["torch"] = None
import ferroflash
print(ferroflash.__version__, len(dir(ferroflash)))
try:
    ferroflash.attention
except ModuleNotFoundError as error:
    print(error)
try:
    ferroflash.nothing
except AttributeError as error:
    print(error)
"""
    version, needs, unknown = run_python(code).splitlines()
    assert version == f"{ferroflash.__version__} {len(ferroflash.__all__)}"
    assert needs == "ferroflash.attention needs PyTorch 2.4 or newer: pip install torch"
    assert unknown == "module 'ferroflash' has no attribute 'nothing'"


def test_importing_is_quick_and_leaves_torch_alone():
    code = """
import sys, time
begin = time.perf_counter()
import ferroflash
print(time.perf_counter() - begin, "torch" in sys.modules)
"""
    seconds, has_torch = run_python(code).split()
    assert float(seconds) < 0.2 and has_torch == "False"


OPERATOR_OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_left": 9, "window_right": 3, "softcap": 8.0, "softmax_scale": 0.2},
    "bias and sinks": {"bias": True, "sinks": True},
    "mask": {"mask": True, "alibi_slopes": True},
    "dropout": {"dropout_p": 0.25, "rng_state": True},
}


def operator_arguments(device, **options):
    q, k, v = leaves(device)
    tensors = {
        "bias": torch.randn(1, 4, 24, 40, device=device, requires_grad=True),
        "mask": torch.rand(2, 1, 24, 40, device=device) < 0.8,
        "alibi_slopes": torch.rand(4, device=device),
        "sinks": torch.randn(4, device=device, requires_grad=True),
        "cu_seqlens_q": None,
        "cu_seqlens_k": None,
        "rng_state": torch.tensor([3, 5]),
    }
    chosen = [x if options.get(name) else None for name, x in tensors.items()]
    numbers = {name: options.get(name, x) for name, x in OPERATOR_NUMBERS.items()}
    return (q, k, v, *chosen, *numbers.values())


@pytest.mark.parametrize("options", OPERATOR_OPTIONS)
def test_operators_are_registered_as_torch_wants_them(device, options):
    arguments = operator_arguments(device, **OPERATOR_OPTIONS[options])
    torch.library.opcheck(torch.ops.ferroflash.attention.default, arguments)
    with torch.no_grad():
        out, lse = torch.ops.ferroflash.attention(*arguments)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    wanted = (detached[3] is not None, detached[6] is not None)
    backward = (torch.randn_like(out), torch.randn_like(lse), out, lse, *detached, *wanted)
    torch.library.opcheck(torch.ops.ferroflash.attention_backward.default, backward)


def test_softmax_is_registered_as_torch_wants_it(device):
    x = torch.randn(3, 5, 7, device=device, requires_grad=True)
    for y in (x, x.transpose(0, 1)):
        torch.library.opcheck(torch.ops.ferroflash.softmax.default, (y, "online"))


def gradients(function, tensors):
    out = function(*tensors)
    dout = torch.ones_like(out) / 3
    return [out, *torch.autograd.grad(out, tensors, dout)]


def assert_same(function, other, tensors, atol=1e-6):
    for x, y in zip(gradients(function, tensors), gradients(other, tensors)):
        assert torch.allclose(x, y, atol=atol)


COMPILED = {
    "attention": lambda q, k, v: attention(q, k, v, causal=True, window_size=(9, 0)).sin(),
    "lse": lambda q, k, v: attention(q, k, v, return_lse=True)[1].sin(),
    "flash_attn_func": lambda q, k, v: flash_attn_func(q * 2, k, v, causal=True, softcap=9.0),
    "transposed": lambda q, k, v: attention(*((x * 2).transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))),
    "softmax": lambda q, k, v: softmax(q * 2, dim=1).sum() + softmax(k, dim=3).sin().mean() + v.mean(),
    "from the package": lambda q, k, v: ferroflash.attention(q, k, v).sin(),
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(device, name, dynamic):
    function = COMPILED[name]
    # Inductor's own compiler of C++ takes a minute for each on two cores; what it is given is the same.
    backend = "inductor" if device == "cuda" else "aot_eager"
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    for seqlens in [(24, 40), (16, 24)]:
        tensors = leaves(device, seqlens=seqlens)
        assert_same(compiled, function, tensors, 1e-5)


def test_dropout_compiles_and_follows_the_seed(device):
    torch._dynamo.reset()
    function = torch.compile(lambda q, k, v: attention(q, k, v, dropout_p=0.3), fullgraph=True, backend="aot_eager")
    q, k, v = leaves(device)
    torch.manual_seed(1)
    first = function(q, k, v)
    assert not torch.equal(function(q, k, v), first)
    torch.manual_seed(1)
    assert torch.equal(function(q, k, v), first)


def test_exports(device):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, causal=True)

    tensors = [x.detach() for x in leaves(device)]
    seqlen = torch.export.Dim("seqlen", min=2, max=4096)
    shapes = ({}, {1: seqlen}, {1: seqlen})
    program = torch.export.export(Module(), tuple(tensors), dynamic_shapes=shapes)
    longer = [x.detach() for x in leaves(device, seqlens=(24, 56))]
    for inputs in (tensors, longer):
        assert torch.equal(program.module()(*inputs), Module()(*inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device, dtype):
    q, k, v = leaves(device)
    bias = torch.randn(1, 1, 24, 40, device=device)
    with torch.autocast(device, dtype):
        out = attention(q, k, v.to(torch.bfloat16), bias=bias)
        assert softmax(q).dtype == torch.float32
    assert out.dtype == dtype
    plain = attention(q.to(dtype), k.to(dtype), v.to(torch.bfloat16).to(dtype), bias=bias.to(dtype))
    assert torch.equal(out, plain)
    out.sum().backward()
    assert q.grad.dtype == torch.float32


def test_any_strides(device):
    q, k, v = (x.detach() for x in leaves(device))
    expected = attention(q, k, v)
    layouts = {
        "(batch, nheads, seqlen, headdim)": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "headdim first": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        "within another": lambda x: torch.cat([x, x, x], -1)[..., 32:64],
        "unaligned": lambda x: torch.cat([x, x, x], -1)[..., 31:64][..., 1:],
        "every other": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    }
    dout = torch.randn_like(expected)
    for name, layout in layouts.items():
        tensors = [layout(x).requires_grad_() for x in (q, k, v)]
        out = attention(*tensors)
        assert torch.allclose(out, expected, atol=1e-6), name
        reference = torch.autograd.grad(attention(*(x.contiguous() for x in tensors)), tensors, dout)
        for found, exact in zip(torch.autograd.grad(out, tensors, layout(dout)), reference):
            assert torch.allclose(found, exact, atol=1e-5), name
    expanded = [x[:1, :1].expand(2, 6, -1, -1) for x in (q, k, v)]
    assert torch.allclose(attention(*expanded), attention(*(x.contiguous() for x in expanded)), atol=1e-6)
    (dq,) = torch.autograd.grad(attention(q.requires_grad_(), k, v).sum(), q)
    assert dq.isfinite().all()


def test_second_derivatives_are_refused(device):
    q, k, v = leaves(device)
    (dq,) = torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="ferroflash has no second derivatives"):
        dq.sum().backward()


def test_only_what_needs_gradients_gets_them(device):
    q, k, v = leaves(device)
    attention(q, k.detach(), v.detach()).sum().backward()
    assert q.grad is not None and k.grad is None
    with torch.no_grad():
        assert not attention(q, k, v).requires_grad
    with torch.inference_mode():
        assert attention(q, k, v).is_inference()


def test_checkpointing_drops_the_same(device):
    q, k, v = leaves(device)

    def function(q, k, v):
        return attention(q, k, v, dropout_p=0.4)

    torch.manual_seed(5)
    expected = torch.autograd.grad(function(q, k, v).square().sum(), (q, k, v))
    torch.manual_seed(5)
    found = torch.autograd.grad(checkpoint(function, q, k, v, use_reentrant=False).square().sum(), (q, k, v))
    for x, y in zip(found, expected):
        assert torch.allclose(x, y, atol=1e-5)


def test_operators_are_what_runs_without_them(device):
    """Eager calls leave the dispatcher out; what a mode sees, and what it computes, is the same."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Listening(TorchDispatchMode):
        heard = []

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.heard.append(str(operator))
            return operator(*args, **(kwargs or {}))

    tensors = leaves(device)
    silent = gradients(lambda *x: attention(*x, deterministic=True), tensors)
    with Listening():
        heard = gradients(lambda *x: attention(*x, deterministic=True), tensors)
    assert all(torch.equal(x, y) for x, y in zip(silent, heard))
    assert {"ferroflash.attention.default", "ferroflash.attention_backward.default"} <= set(Listening.heard)


def test_threads(device):
    tensors = leaves(device, seqlens=(150, 150))
    expected = gradients(attention, tensors)
    failures = []

    def work():
        for _ in range(5):
            for x, y in zip(gradients(attention, tensors), expected):
                if not torch.allclose(x, y, atol=1e-5):
                    failures.append((x, y))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_gradients_like_those_of_differences(device):
    """Central differences of a random projection, along random directions, in float32."""
    q, k, v = leaves(device, seqlens=(9, 11), headdim=16)
    bias = torch.randn(2, 4, 9, 11, device=device, requires_grad=True)
    sinks = torch.randn(4, device=device, requires_grad=True)
    weights, of_lse = torch.randn(2, 9, 4, 16, device=device), torch.randn(2, 4, 9, device=device)

    def loss(q, k, v, bias, sinks):
        out, lse = attention(q, k, v, bias=bias, sinks=sinks, causal=True, softcap=5.0, return_lse=True)
        return (out.double() * weights).sum() + (lse.double() * of_lse).sum()

    tensors = [q, k, v, bias, sinks]
    found = torch.autograd.grad(loss(*tensors), tensors)
    step = 1e-2
    for i, (x, gradient) in enumerate(zip(tensors, found)):
        direction = torch.randn_like(x)
        moved = [[y + sign * step * direction if i == j else y for j, y in enumerate(tensors)] for sign in (1, -1)]
        with torch.no_grad():
            difference = (loss(*moved[0]) - loss(*moved[1])) / (2 * step)
        assert abs(difference - (gradient.double() * direction).sum()) < 2e-2 * (1 + abs(difference)), i


def test_cuda_works_on_the_current_stream(cuda):
    q, k, v = leaves(cuda, torch.bfloat16, (2048, 2048), (8, 8), 64)
    expected = gradients(attention, (q, k, v))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    for _ in range(10):
        with torch.cuda.stream(stream):
            late = []
            for x in (q, k, v):
                y = torch.zeros_like(x)
                torch.cuda._sleep(2_000_000)
                late.append(y.copy_(x.detach()).requires_grad_())
            found = gradients(lambda *x: attention(*x, deterministic=True), late)
        stream.synchronize()
        for x, y in zip(found, expected):
            assert torch.allclose(x.float(), y.float(), atol=3e-2)


@pytest.mark.filterwarnings("error")
def test_cuda_graphs_capture_forward_and_backward(cuda):
    inputs = [x.detach() for x in leaves(cuda, torch.bfloat16, (256, 256), (4, 4), 64)]

    def step():
        # Fresh leaves, that autograd remembers no stream of.
        own = [x.detach().requires_grad_() for x in inputs]
        return [x.detach() for x in gradients(lambda *x: attention(*x, causal=True, deterministic=True), own)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    earlier = None
    for seed in (1, 2):
        torch.manual_seed(seed)
        for x in inputs:
            x.copy_(torch.randn_like(x))
        # What is found afterwards the replay has written, from these inputs.
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        found, expected = [x.clone() for x in captured], step()
        for x, y in zip(found, expected):
            assert torch.equal(x, y)
        if earlier is not None:
            assert not any(torch.equal(x, y) for x, y in zip(found, earlier))
        earlier = found
    refused = pytest.raises(ValueError, match="^dropout_p: 0.5; allowed: 0 in a CUDA graph")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        # A graph without any node is worth a warning to PyTorch.
        inputs[0].add(1)
        attention(*inputs, dropout_p=0.5)


def test_cuda_graphs_of_the_compiler(cuda):
    torch._dynamo.reset()
    function = torch.compile(
        lambda q, k, v: attention(q, k, v, causal=True).sin(), mode="reduce-overhead", fullgraph=True
    )
    q, k, v = (x.detach() for x in leaves(cuda, torch.bfloat16, (256, 256), (4, 4), 64))
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        out = function(q, k, v).clone()
    assert torch.allclose(out, attention(q, k, v, causal=True).sin(), atol=1e-2)


def test_cuda_takes_its_memory_from_torch(cuda):
    q, k, v = leaves(cuda, torch.bfloat16, (4096, 4096), (8, 8), 128)
    gradients(attention, (q, k, v))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    for _ in range(3):
        gradients(attention, (q, k, v))
    torch.cuda.synchronize()
    torch_grew = torch.cuda.memory_reserved() - reserved
    assert free - torch.cuda.mem_get_info()[0] <= torch_grew + (2 << 20)


def test_cuda_and_cpu_agree(cuda):
    tensors = leaves("cpu")
    assert_same(
        lambda *x: attention(*x, causal=True),
        lambda *x: attention(*(y.to(cuda) for y in x), causal=True).cpu(),
        tensors,
        1e-5,
    )


def test_sequences_compile(device):
    starts = torch.tensor([0, 10, 24], dtype=torch.int32, device=device)

    def function(q, k, v):
        return flash_attn_varlen_func(q[0], k[0], v[0], starts, starts, 14, 14, causal=True)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(compiled, function, leaves(device, seqlens=(24, 24)), 1e-5)
