"""Time, memory and accuracy of one implementation on one problem."""

import math
import statistics
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from ferroflash._reference import reference
from ferroflash.bench.peers import Attention, Sequences

# The chip is power-capped: back to back, the order of the implementations would decide.
IDLE_SECONDS = 0.1
# Launches queue up behind a kernel that sleeps for so many cycles, so that what Python takes stays out.
SLEEP_CYCLES = 10_000_000


def call(
    attention: Attention,
    tensors: Tuple[Tensor, Tensor, Tensor],
    causal: bool,
    sequences: Optional[Sequences],
    backward: bool,
) -> Callable[[], object]:
    """What is measured: a forward pass, or the backward pass of one."""
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return attention(*tensors, causal, sequences)

        return forward
    q, k, v = leaves = [x.detach().requires_grad_() for x in tensors]
    out = attention(q, k, v, causal, sequences)
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def milliseconds(run: Callable[[], object], device: str, repetitions: int) -> float:
    """The median of some runs."""
    run()
    if device == "cpu":
        times = []
        for _ in range(repetitions):
            begin = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(times)
    torch.cuda.synchronize()
    time.sleep(IDLE_SECONDS)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    torch.cuda._sleep(SLEEP_CYCLES)
    for before, after in events:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events)


def megabytes(run: Callable[[], object], device: str) -> Optional[float]:
    """Device memory that a run takes at most, beyond what was there; unknown on the CPU."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def relative_errors(
    attention: Attention,
    problem: Dict[str, Any],
    causal: bool,
    dtype: torch.dtype,
    device: str,
    backward: bool,
) -> Dict[str, float]:
    """|x - reference| / |reference| of O, or of dQ, dK and dV, of 509 tokens, in as many heads as share one of K and V."""
    generator = torch.Generator(device=device).manual_seed(0)
    group = problem["nheads"] // problem["nheads_k"]
    shapes = [(509, heads, problem["headdim"]) for heads in (2 * group, 2, 2, 2 * group)]
    q, k, v, dout = (torch.randn(shape, device=device, generator=generator).to(dtype) for shape in shapes)
    lengths = [200, 309] if problem["lengths"] else [509]
    sequences = Sequences.of(lengths, device) if problem["lengths"] else None

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths))
        return torch.cat([reference(q[None], k[None], v[None], causal=causal)[0][0] for q, k, v in parts])

    def found(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if sequences is not None:
            return attention(q, k, v, causal, sequences)
        return attention(q[None], k[None], v[None], causal, None)[0]

    def results(function: Callable[..., Tensor], to: torch.dtype) -> Dict[str, Tensor]:
        leaves = [x.to(to, copy=True).requires_grad_(backward) for x in (q, k, v)]
        out = function(*leaves)
        if not backward:
            return {"o": out}
        return dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout.to(out.dtype))))

    reached, wanted = results(found, dtype), results(exact, torch.float64)
    return {name: ((reached[name].double() - x).norm() / x.norm()).item() for name, x in wanted.items()}


def lognormal(tokens: int, mean: int) -> List[int]:
    """Lengths of sequences, of so many tokens in all: as lengths of texts, their logarithms are normal, with a deviation
    of 1. The same in every run."""
    generator = torch.Generator().manual_seed(0)
    lengths: List[int] = []
    while tokens > 0:
        length = mean * math.exp(torch.randn((), generator=generator).item() - 0.5)
        lengths.append(min(max(1, round(length)), tokens))
        tokens -= lengths[-1]
    return lengths


def flops(problem: Dict[str, Any], causal: bool, backward: bool) -> float:
    """Forward 4 h d Σ s² over the sequences, half of it when causal; backward 2.5 times that."""
    squares = sum(length**2 for length in problem["lengths"] or [problem["seqlen"]] * problem["batch"])
    return 4 * problem["nheads"] * squares * problem["headdim"] * (0.5 if causal else 1) * (2.5 if backward else 1)


def ceiling(dtype: torch.dtype, device: str, repetitions: int) -> float:
    """TFLOP/s of a matrix product that suits the machine: 8192 x 8192 x 8192, on the CPU 1024 x 1024 x 1024."""
    n = 1024 if device == "cpu" else 8192
    x, y = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / milliseconds(lambda: x @ y, device, repetitions) / 1e9
