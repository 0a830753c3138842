#!/usr/bin/env python3
"""Times ferroflash's flash2 beside PyTorch's FlashAttention-2 and cuDNN, on one GPU, in one process.

    cargo build --release
    python3 benches/peers.py
    python3 benches/peers.py --backward
    python3 benches/peers.py --headdim 128 --seqlens 4096,16384 --json peers.json --svg peers.svg

The kernels are those that the command `ferroflash` embeds: `ferroflash info --explain-dispatch` says which the host chooses,
`ferroflash ptx` gives their PTX and how to launch them. flash3, which the host has more to do for, is measured through the
Python package: `python -m ferroflash.bench`, and `benches/versions.py`.
Needs PyTorch with CUDA, on a GPU of compute capability 8.0 or newer; for --svg also matplotlib.

How it measures, and why:

- All implementations get the same N(0, 1) inputs, in memory as (batch, seqlen, heads, headdim).
- Before anything is timed, each is compared with f64. The rule is FlashAttention's own: the largest error is at most
  twice that of a plain implementation in the same dtype, plus 1e-5. Who breaks it is not timed. Mean errors, of O or of
  dQ, dK and dV, have a table of their own: no bound, but what the implementations can be compared by, as one element does
  not decide.
- The implementations run in a new random order in every round, and the GPU rests before each: its clock falls as it
  gets hot, so back to back, the order would decide.
- All repetitions are queued behind a kernel that sleeps: the time to launch them stays out.
- A time is the median over rounds of the median over repetitions, by CUDA's events.
- FLOPs are those of the two products, 4 batch heads seqlen^2 headdim, half of it when causal; backward 2.5 times that,
  also for who computes products twice.
- The ceiling beside them is a matrix product of 8192 x 8192 x 8192 in the same dtype, before and after.
"""
import argparse
import ctypes
import json
import math
import random
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

OURS, FA2, CUDNN = "ferroflash", "PyTorch FA2", "cuDNN"
PLAIN = "not fused"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}

# --- ferroflash's kernel, launched as it is embedded ------------------------------------------------------------------


class Tensor(ctypes.Structure):
    """`kernels::attention::Tensor`: (batch, seqlen, heads, headdim), the last contiguous. Strides count elements."""

    _fields_ = [
        ("data", ctypes.c_uint64),
        ("batch_stride", ctypes.c_uint64),
        ("row_stride", ctypes.c_uint64),
        ("head_stride", ctypes.c_uint64),
    ]

    @classmethod
    def of(cls, x):
        return cls(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


class Attention(ctypes.Structure):
    """`kernels::attention::Attention`, a `repr(C)` struct, and all that `kernels::flash2::Params` holds."""

    _fields_ = [
        ("q", Tensor),
        ("k", Tensor),
        ("v", Tensor),
        ("o", Tensor),
        ("bias", Tensor),
        ("mask", Tensor),
        ("alibi_slopes", ctypes.c_uint64),
        ("alibi_batch_stride", ctypes.c_uint64),
        ("sinks", ctypes.c_uint64),
        ("softmax_lse", ctypes.c_uint64),
        ("lse_batch_stride", ctypes.c_uint64),
        ("lse_head_stride", ctypes.c_uint64),
        ("cu_seqlens_q", ctypes.c_uint64),
        ("cu_seqlens_k", ctypes.c_uint64),
        ("dropout_seed", ctypes.c_uint64),
        ("dropout_offset", ctypes.c_uint64),
        ("dropout_keep_below", ctypes.c_uint32),
        ("dropout_scale", ctypes.c_float),
        ("batch", ctypes.c_uint32),
        ("nheads", ctypes.c_uint32),
        ("nheads_k", ctypes.c_uint32),
        ("seqlen_q", ctypes.c_uint32),
        ("seqlen_k", ctypes.c_uint32),
        ("headdim", ctypes.c_uint32),
        ("headdim_v", ctypes.c_uint32),
        ("softmax_scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("window_left", ctypes.c_uint32),
        ("window_right", ctypes.c_uint32),
        ("aligned", ctypes.c_uint32),
    ]


class Driver:
    """The few calls of the CUDA driver that a launch takes. PyTorch has made the device's primary context current."""

    MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # of CUfunction_attribute

    def __init__(self):
        self.library = ctypes.CDLL("libcuda.so.1")

    def call(self, function, *arguments):
        code = getattr(self.library, function)(*arguments)
        if code != 0:
            name = ctypes.c_char_p()
            self.library.cuGetErrorName(code, ctypes.byref(name))
            raise RuntimeError(f"{function}: {(name.value or b'unknown error').decode()} ({code})")

    def load(self, ptx, name, shared_bytes):
        """The kernel `name` of this PTX, ready for so much dynamic shared memory."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(ptx.encode()))
        self.call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        self.call("cuFuncSetAttribute", function, self.MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
        return function

    def launch(self, function, blocks, threads, shared_bytes, parameters):
        """Launches on PyTorch's current stream. The driver copies the parameters before it returns."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        grid, block = (blocks, 1, 1), (threads, 1, 1)
        self.call("cuLaunchKernel", function, *grid, *block, shared_bytes, stream, pointers, None)


class BackwardParameters(ctypes.Structure):
    """`kernels::flash2_backward::Params`."""

    _fields_ = [
        ("attention", Attention),
        ("d_o", Tensor),
        ("d_q", Tensor),
        ("d_k", Tensor),
        ("d_v", Tensor),
        ("d_lse", ctypes.c_uint64),
        ("row_sums", ctypes.c_uint64),
        ("d_bias", Tensor),
        ("bias_batch", ctypes.c_uint32),
        ("bias_heads", ctypes.c_uint32),
        ("bias_rows", ctypes.c_uint32),
        ("d_sinks", ctypes.c_uint64),
        ("statistics", ctypes.c_uint64),
        ("d_q_sums", ctypes.c_uint64),
    ]


class Kernel:
    """One entry point that ferroflash embeds, for parameters of this type."""

    # The families whose blocks of threads own keys, and rows of S whatever their head. Others own queries of a head.
    OF_KEYS = {"flash2.fused", "flash2.keys_and_values"}
    OF_ROWS = {"flash2.row_sums"}

    def __init__(self, driver, command, parameters, name):
        self.entry = answer(command, "ptx", name)
        if f"_param_0[{ctypes.sizeof(parameters)}]" not in self.entry["ptx"]:
            raise LookupError(f"{name} takes other parameters than this script knows")
        self.driver = driver
        self.function = driver.load(self.entry["ptx"], name, self.entry["shared_bytes"])

    def blocks(self, q, k):
        """Blocks of its grid, for Q and K of these shapes."""
        (batch, seqlen_q, nheads, _), (_, seqlen_k, nheads_k, _) = q, k
        if self.entry["family"] in self.OF_KEYS:
            return math.ceil(seqlen_k / self.entry["block_n"]) * nheads_k * batch
        if self.entry["family"] in self.OF_ROWS:
            return math.ceil(seqlen_q * nheads * batch / self.entry["block_m"])
        return math.ceil(seqlen_q / self.entry["block_m"]) * nheads * batch

    def launch(self, q, k, parameters):
        self.driver.launch(
            self.function, self.blocks(q, k), self.entry["threads"], self.entry["shared_bytes"], parameters
        )


def chosen(command, direction, dtype, headdim, causal, deterministic=False, arch=None):
    """The names of the entry points that ferroflash launches, in order: of flash2, "forward" or "backward", on the GPU that is
    here or on one of this architecture. Their choice does not depend on the batch, the heads or the sequence length."""
    wanted = ["--kernel", "flash2", "--dtype", dtype, "--headdim", str(headdim)]
    wanted += ["--causal"] * causal + ["--deterministic"] * deterministic
    wanted += [] if arch is None else ["--arch", arch]
    choice = answer(command, "info", "--explain-dispatch", *wanted)[direction]
    if "refused" in choice:
        raise LookupError(choice["refused"])
    return [launch["entry"] for launch in choice["launches"]]


class Flash2:
    """The family flash2, for one dtype and head dimension, causal or not."""

    def __init__(self, driver, command, dtype, headdim, causal):
        [name] = chosen(command, "forward", dtype, headdim, causal)
        self.kernel, self.causal = Kernel(driver, command, Attention, name), causal

    def __call__(self, q, k, v):
        """O, in fresh memory, as the peers return theirs."""
        o = torch.empty_like(q)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], device=q.device, dtype=torch.float32)
        self.launch(q, k, v, o, lse)
        return o

    def launch(self, q, k, v, o, lse):
        self.kernel.launch(q.shape, k.shape, self.parameters(q, k, v, o, lse))

    def parameters(self, q, k, v, o, lse):
        batch, seqlen_q, nheads, headdim = q.shape
        seqlen_k, nheads_k = k.shape[1:3]
        unbounded, keep_all = 2**32 - 1, 2**16
        return Attention(
            q=Tensor.of(q),
            k=Tensor.of(k),
            v=Tensor.of(v),
            o=Tensor.of(o),
            softmax_lse=lse.data_ptr(),
            lse_batch_stride=nheads * seqlen_q,
            lse_head_stride=seqlen_q,
            dropout_keep_below=keep_all,
            dropout_scale=1.0,
            batch=batch,
            nheads=nheads,
            nheads_k=nheads_k,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            headdim=headdim,
            headdim_v=headdim,
            softmax_scale=1 / math.sqrt(headdim),
            window_left=unbounded,
            window_right=0 if self.causal else unbounded,
            aligned=int(headdim % 8 == 0),
        )


class Flash2Backward:
    """Its backward pass, after its forward pass: S and dP computed once and dQ summed by atomic additions; or, deterministic,
    each gradient where it is owned, which gives the same bits in every run."""

    ROWS = 64  # that the places of a sequence are rounded up to

    def __init__(self, driver, command, dtype, headdim, causal, deterministic=False):
        self.forward = Flash2(driver, command, dtype, headdim, causal)
        names = chosen(command, "backward", dtype, headdim, causal, deterministic)
        self.kernels = [Kernel(driver, command, BackwardParameters, name) for name in names]

    def __call__(self, q, k, v, d_o):
        """A call that computes and returns dQ, dK and dV, after the forward pass."""
        o, (batch, seqlen_q, nheads, _) = torch.empty_like(q), q.shape
        lse = torch.empty(batch, nheads, seqlen_q, device=q.device, dtype=torch.float32)
        self.forward.launch(q, k, v, o, lse)
        # An element that is not written stays NaN, which is not within any bound.
        gradients = [torch.full_like(x, math.nan) for x in (q, k, v)]
        d_q, d_k, d_v = (Tensor.of(x) for x in gradients)
        workspace = {
            name: torch.empty(numbers, device=q.device, dtype=torch.float32)
            for name, numbers in self.workspace(q.shape).items()
        }
        parameters = BackwardParameters(
            attention=self.forward.parameters(q, k, v, o, lse),
            d_o=Tensor.of(d_o),
            d_q=d_q,
            d_k=d_k,
            d_v=d_v,
            **{name: numbers.data_ptr() for name, numbers in workspace.items()},
        )
        alive = (q, k, v, d_o, o, lse, workspace)  # as long as the call

        def call():
            assert alive
            for kernel in self.kernels:
                kernel.launch(q.shape, k.shape, parameters)
            return gradients

        return call

    def workspace(self, q):
        """How many numbers the kernels work in, for Q of this shape, by name. Sums of dQ are as long as the heads that their
        kernel is built for, which may be longer than those of Q."""
        batch, seqlen, heads, _ = q
        fused = [kernel.entry for kernel in self.kernels if kernel.entry["family"] == "flash2.fused"]
        if not fused:
            return {"row_sums": batch * seqlen * heads}
        places = batch * heads * math.ceil(seqlen / self.ROWS) * self.ROWS
        return {"statistics": 2 * places, "d_q_sums": fused[0]["headdim"] * places}


def answer(command, *arguments):
    """The JSON object that the command `ferroflash` prints."""
    done = subprocess.run([command, *arguments, "--json"], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


# --- its peers, and the truth -----------------------------------------------------------------------------------------


def sdpa(backend, causal):
    """PyTorch's scaled_dot_product_attention on this backend alone: where that cannot run, it fails."""

    def attention(q, k, v):
        with torch.no_grad(), sdpa_kernel(backend):
            o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal)
        return o.transpose(1, 2)

    return attention


def sdpa_backward(backend, causal):
    """Its gradients: a call that computes them, after the forward pass."""

    def attention(q, k, v, d_o):
        leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
        with sdpa_kernel(backend):
            o = F.scaled_dot_product_attention(*leaves, is_causal=causal)
        d_o = d_o.transpose(1, 2)
        return lambda: [x.transpose(1, 2) for x in torch.autograd.grad(o, leaves, d_o, retain_graph=True)]

    return attention


def plain(q, k, v, causal):
    """O and LSE by the definition, in the dtype of the inputs."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], device=s.device, dtype=torch.bool).triu(1), -math.inf)
    return (s.softmax(-1) @ v).transpose(1, 2), s.logsumexp(-1)


def check(attentions, dtype, headdim, causal):
    """Says how far each is from f64. Returns those that keep the rule, and the mean errors."""
    # A length that no tile divides.
    q, k, v = (torch.randn(2, 509, 4, headdim, device="cuda", dtype=dtype) for _ in range(3))
    o, lse = plain(q.double(), k.double(), v.double(), causal)
    most, plain_mean = errors(plain(q, k, v, causal)[0], o)
    bound = 2 * most + 1e-5
    say(f"  in the same dtype without fused kernels: O off by {most:.1e}, in the mean {plain_mean:.2e}")
    good, means = {}, MeanErrors(headdim, causal, "O", {PLAIN: plain_mean})
    for name, attention in runnable(attentions, q, k, v).items():
        if isinstance(attention, Flash2):
            # An element that it does not write stays NaN, which is not within any bound.
            out, out_lse = torch.full_like(q, math.nan), torch.full_like(lse, math.nan, dtype=torch.float32)
            attention.launch(q, k, v, out, out_lse)
            lse_error = ((out_lse - lse).abs() / lse.abs().clamp(min=1)).max().item()
        else:
            # PyTorch keeps the LSE to itself.
            out, lse_error = attention(q, k, v), 0.0
        error, mean = errors(out, o)
        means.of[name] = mean
        passed = error <= bound and lse_error <= 1e-5
        off = f"O off by {error:.1e} of {bound:.1e}, in the mean {mean:.2e}"
        say(f"  {name}: {off}, LSE by {lse_error:.1e} of 1.0e-05: {verdict(passed)}")
        if passed:
            good[name] = attention
    return good, [means]


def check_backward(attentions, dtype, headdim, causal):
    """Says how far the gradients of each are from f64. Returns those that keep the rule, and the mean errors."""
    q, k, v, d_o = (torch.randn(2, 509, 4, headdim, device="cuda", dtype=dtype) for _ in range(4))

    def gradients(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(plain(*leaves, causal)[0], leaves, d_o.to(dtype))

    names, exact = ("dQ", "dK", "dV"), gradients(torch.float64)
    of_plain = [errors(x, y) for x, y in zip(gradients(dtype), exact)]
    bounds = [2 * most + 1e-5 for most, _ in of_plain]
    parts = [f"{x} off by {most:.1e}, in the mean {mean:.2e}" for x, (most, mean) in zip(names, of_plain)]
    say(f"  in the same dtype without fused kernels: {'; '.join(parts)}")
    good = {}
    means = [MeanErrors(headdim, causal, x, {PLAIN: mean}) for x, (_, mean) in zip(names, of_plain)]
    for name, attention in runnable(attentions, q, k, v, d_o).items():
        found = [errors(x, y) for x, y in zip(attention(q, k, v, d_o)(), exact)]
        for of_result, (_, mean) in zip(means, found):
            of_result.of[name] = mean
        passed = all(error <= bound for (error, _), bound in zip(found, bounds))
        parts = [
            f"{x} {error:.1e} of {bound:.1e}, in the mean {mean:.2e}"
            for x, (error, mean), bound in zip(names, found, bounds)
        ]
        say(f"  {name}: {'; '.join(parts)}: {verdict(passed)}")
        if passed:
            good[name] = attention
    return good, means


@dataclass
class MeanErrors:
    """How far one result of each is from f64, in the mean. Who could not run has none."""

    headdim: int
    causal: bool
    result: str
    of: dict

    def ratio(self, peer):
        """ferroflash's mean error as a part of the peer's."""
        ours, theirs = self.of.get(OURS), self.of.get(peer)
        return ours / theirs if ours is not None and theirs else None


def errors(found, exact):
    """The largest and the mean difference."""
    differences = (found - exact).abs()
    return differences.max().item(), differences.mean().item()


def verdict(passed):
    return "ok" if passed else "WRONG, not timed"


def runnable(attentions, *inputs):
    """Those that can run these inputs."""
    able = {}
    for name, attention in attentions.items():
        try:
            attention(*inputs)
            torch.cuda.synchronize()
            able[name] = attention
        except RuntimeError as reason:
            say(f"  {name} cannot run {tuple(inputs[0].shape)}: {first_line(reason)}")
    return able


# --- the measurements -------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """The TFLOP/s of all implementations at one shape. Who could not run has none."""

    headdim: int
    causal: bool
    seqlen: int
    batch: int
    heads: int
    tflops: dict

    def ratio(self, peer):
        """ferroflash's speed as a part of the peer's."""
        ours, theirs = self.tflops.get(OURS), self.tflops.get(peer)
        return ours / theirs if ours and theirs else None


def seconds(call, repetitions, rest):
    """The median time of a call on the GPU alone."""
    call()
    torch.cuda.synchronize()
    time.sleep(rest)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    torch.cuda._sleep(10_000_000)  # cycles: some milliseconds, longer than it takes to queue the calls
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1e-3


def measure(attentions, row, dtype, options):
    """Fills in the row."""
    shape = (row.batch, row.seqlen, row.heads, row.headdim)
    inputs = [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(4 if options.backward else 3)]
    attentions = runnable(attentions, *inputs)
    if options.backward:
        calls = {name: attention(*inputs) for name, attention in attentions.items()}
    else:
        calls = {name: partial(attention, *inputs) for name, attention in attentions.items()}
    times = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name in random.sample(list(calls), len(calls)):
            times[name].append(seconds(calls[name], options.repetitions, options.rest))
    flops = 4 * row.batch * row.heads * row.seqlen**2 * row.headdim / (2 if row.causal else 1)
    flops *= 2.5 if options.backward else 1
    row.tflops = {name: flops / statistics.median(of_rounds) * 1e-12 for name, of_rounds in times.items()}


def matmul_tflops(dtype, options):
    """What the GPU's matrix units reach on a problem that suits them."""
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: x @ y, options.repetitions, options.rest) * 1e-12


def measure_all(options):
    """All rows, the mean errors, and the ceiling before and after the rows."""
    dtype, driver = DTYPES[options.dtype], Driver()
    ceiling = [matmul_tflops(dtype, options)]
    rows, means = [], []
    for headdim in options.headdim:
        for causal in options.causal:
            say(f"headdim {headdim}{', causal' if causal else ''}")
            peer, keeps_rule = sdpa, check
            ours = Flash2
            if options.backward:
                ours = partial(Flash2Backward, deterministic=options.deterministic)
                peer, keeps_rule = sdpa_backward, check_backward
            attentions = {
                OURS: ours(driver, options.ferroflash, options.dtype, headdim, causal),
                FA2: peer(SDPBackend.FLASH_ATTENTION, causal),
                CUDNN: peer(SDPBackend.CUDNN_ATTENTION, causal),
            }
            attentions, of_results = keeps_rule(attentions, dtype, headdim, causal)
            means += of_results
            for seqlen in options.seqlens:
                batch, heads = max(1, options.tokens // seqlen), max(1, options.hidden // headdim)
                row = Row(headdim, causal, seqlen, batch, heads, {})
                measure(attentions, row, dtype, options)
                rows.append(row)
    ceiling.append(matmul_tflops(dtype, options))
    return rows, means, ceiling


# --- what is said about them ------------------------------------------------------------------------------------------


def markdown(rows):
    """The rows as a table, with the geometric means of the ratios below."""
    header = ["headdim", "causal", "seqlen", "batch", "heads", OURS, FA2, CUDNN, f"/ {FA2}", f"/ {CUDNN}"]
    lines = [header, ["---:"] * len(header)]
    for row in rows:
        shape = [row.headdim, "yes" if row.causal else "no", row.seqlen, row.batch, row.heads]
        speeds = [number(row.tflops.get(name), 0) for name in (OURS, FA2, CUDNN)]
        lines.append([*shape, *speeds, number(row.ratio(FA2), 2), number(row.ratio(CUDNN), 2)])
    means = [number(geometric_mean(rows, peer), 2) for peer in (FA2, CUDNN)]
    lines.append(["geometric mean", *[""] * (len(header) - 3), *means])
    return table(lines)


def markdown_of_errors(means):
    """The mean errors as a table, with the geometric means of the ratios below."""
    names = (PLAIN, OURS, FA2, CUDNN)
    header = ["headdim", "causal", "mean error of", *names, f"/ {FA2}", f"/ {CUDNN}"]
    lines = [header, ["---:"] * len(header)]
    for row in means:
        figures = ["-" if (mean := row.of.get(name)) is None else f"{mean:.3e}" for name in names]
        ratios = [number(row.ratio(peer), 3) for peer in (FA2, CUDNN)]
        lines.append([row.headdim, "yes" if row.causal else "no", row.result, *figures, *ratios])
    ratios = [number(geometric_mean(means, peer), 3) for peer in (FA2, CUDNN)]
    lines.append(["geometric mean", *[""] * (len(header) - 3), *ratios])
    return table(lines)


def table(lines):
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def geometric_mean(rows, peer):
    """Of what ferroflash has as a part of what the peer has, over the rows that both have."""
    ratios = [ratio for row in rows if (ratio := row.ratio(peer)) is not None]
    return statistics.geometric_mean(ratios) if ratios else None


def number(x, decimals):
    return "-" if x is None else f"{x:.{decimals}f}"


def draw(rows, title, path):
    """Bars by sequence length: a panel for each head dimension, causal and not."""
    import matplotlib

    matplotlib.use("svg")
    # The same numbers make the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "ferroflash", "font.size": 9})
    from matplotlib import pyplot

    # Of Okabe and Ito's palette, whose colours all people can tell apart; grey for cuDNN.
    colours = {OURS: "#D55E00", FA2: "#0072B2", CUDNN: "#AAAAAA"}
    headdims, masks = (sorted({getattr(row, name) for row in rows}) for name in ("headdim", "causal"))
    size = (5.6 * len(masks), 2.9 * len(headdims) + 0.8)
    figure, panels = pyplot.subplots(
        len(headdims), len(masks), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for headdim, line in zip(headdims, panels):
        for causal, panel in zip(masks, line):
            of_panel = [row for row in rows if (row.headdim, row.causal) == (headdim, causal)]
            for i, (name, colour) in enumerate(colours.items()):
                places = [place + 0.28 * (i - 1) for place in range(len(of_panel))]
                speeds = [row.tflops.get(name, 0) for row in of_panel]
                bars = panel.bar(places, speeds, width=0.26, color=colour, label=name)
                panel.bar_label(bars, [f"{x:.0f}" if x else "" for x in speeds], fontsize=7, padding=1)
            panel.set_xticks(range(len(of_panel)), [str(row.seqlen) for row in of_panel])
            panel.set_title(f"headdim {headdim}{', causal' if causal else ''}")
            panel.margins(y=0.12)
            panel.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("TFLOP/s")
    for panel in panels[-1]:
        panel.set_xlabel("sequence length")
    figure.suptitle(title)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def say(line):
    """Progress, for whoever waits; stdout is for the results."""
    print(line, file=sys.stderr, flush=True)


def first_line(reason):
    return str(reason).strip().partition("\n")[0]


# --- the command ------------------------------------------------------------------------------------------------------


def positive(text):
    n = int(text)
    if n < 1:
        raise ValueError
    return n


def list_of_positive(text):
    return [positive(n) for n in text.split(",")]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    built = Path(__file__).resolve().parent.parent / "target" / "release" / "ferroflash"
    masks = {"no": [False], "yes": [True], "both": [False, True]}
    add = parser.add_argument
    add("--ferroflash", metavar="PATH", default=str(built), help="the command [target/release/ferroflash]")
    add("--headdim", metavar="D,...", type=list_of_positive, default=[64, 128], help="[64,128]")
    lengths = [1024, 2048, 4096, 8192, 16384]
    add("--seqlens", metavar="N,...", type=list_of_positive, default=lengths, help="[1024,2048,4096,8192,16384]")
    add("--tokens", metavar="N", type=positive, default=16384, help="batch x seqlen [16384]")
    add("--hidden", metavar="N", type=positive, default=2048, help="heads x headdim [2048]")
    add("--causal", choices=masks, default="both", help="[both]")
    add("--backward", action="store_true", help="time the gradients")
    add("--deterministic", action="store_true", help="ours the same bits in every run")
    add("--dtype", choices=DTYPES, default="bf16", help="[bf16]")
    add("--rounds", metavar="N", type=positive, default=3, help="[3]")
    add("--repetitions", metavar="N", type=positive, default=8, help="in each round [8]")
    add("--rest", metavar="SECONDS", type=float, default=0.1, help="before each measurement [0.1]")
    add("--seed", metavar="N", type=int, default=1, help="of the inputs and the order [1]")
    add("--json", metavar="FILE", help="write the results to this file, too")
    add("--svg", metavar="FILE", help="draw them")
    options = parser.parse_args()
    options.causal = masks[options.causal]
    return options


def main():
    options = arguments()
    if not torch.cuda.is_available():
        sys.exit("error: PyTorch finds no GPU")
    random.seed(options.seed)
    torch.manual_seed(options.seed)

    try:
        rows, means, ceiling = measure_all(options)
    except (LookupError, OSError, RuntimeError, subprocess.CalledProcessError) as reason:
        sys.exit(f"error: {first_line(reason)}")
    device = torch.cuda.get_device_name()
    print(markdown(rows))
    direction = "Backward" if options.backward else "Forward"
    print(f"\n{direction}, {options.dtype}, TFLOP/s; {device}, PyTorch {torch.__version__}.")
    print(f"Matrix product, 8192 x 8192 x 8192: {ceiling[0]:.0f} TFLOP/s before, {ceiling[1]:.0f} after.\n")
    print(markdown_of_errors(means))
    print(f"\nMean differences from f64, 2 x 509 tokens, 4 heads; {PLAIN}: by the definition, in {options.dtype}.")
    if options.json:
        ratios = {peer: geometric_mean(rows, peer) for peer in (FA2, CUDNN)}
        results = {"device": device, "torch": torch.__version__, "dtype": options.dtype, "matmul_tflops": ceiling}
        results |= {"geometric_means": ratios, "rows": [asdict(row) for row in rows]}
        results["mean_errors"] = [asdict(of_result) for of_result in means]
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    if options.svg:
        draw(rows, f"Attention {direction.lower()}, {options.dtype}, {device}", options.svg)
    if any(OURS not in row.tflops for row in rows):
        sys.exit(f"error: {OURS} was not timed at every shape")


if __name__ == "__main__":
    main()
