"""Time, memory and accuracy of one implementation on one problem."""

import statistics
import time
from typing import Callable, Dict, Optional, Tuple

import torch
from torch import Tensor

from ferroflash._reference import reference
from ferroflash.bench.peers import Attention

# The chip is power-capped: back to back, the order of the implementations would decide.
IDLE_SECONDS = 0.1
# Launches queue up behind a kernel that sleeps for so many cycles, so that what Python takes stays out.
SLEEP_CYCLES = 10_000_000


def call(
    attention: Attention, tensors: Tuple[Tensor, Tensor, Tensor], causal: bool, backward: bool
) -> Callable[[], object]:
    """What is measured: a forward pass, or the backward pass of one."""
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return attention(*tensors, causal)

        return forward
    q, k, v = leaves = [x.detach().requires_grad_() for x in tensors]
    out = attention(q, k, v, causal)
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


def relative_error(attention: Attention, headdim: int, causal: bool, dtype: torch.dtype, device: str) -> float:
    """|O - reference| / |reference|, of 509 tokens."""
    generator = torch.Generator(device=device).manual_seed(0)
    q, k, v = (torch.randn(1, 509, 2, headdim, device=device, generator=generator).to(dtype) for _ in range(3))
    with torch.no_grad():
        exact, _ = reference(q, k, v, causal=causal)
        return ((attention(q, k, v, causal).double() - exact).norm() / exact.norm()).item()


def flops(problem: Dict[str, int], causal: bool, backward: bool) -> float:
    """Forward 4 b h s² d, half of it when causal; backward 2.5 times that."""
    batch, seqlen, nheads, headdim = (problem[name] for name in ("batch", "seqlen", "nheads", "headdim"))
    return 4 * batch * nheads * seqlen**2 * headdim * (0.5 if causal else 1) * (2.5 if backward else 1)
