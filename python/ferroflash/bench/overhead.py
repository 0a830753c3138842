"""`python -m ferroflash.bench --overhead`: what a call costs the host.

Each figure is of a call of attention on tensors so small that the time is that of the host: Python, PyTorch, this
package, and the driver's launches. The device computes behind it; on the CPU its time is in the figures.

Forward is without gradients; forward + backward is a call and `torch.autograd.grad` of it. Replay is the time from one
replay of a CUDA graph of the same to the next, which the device takes too. Medians over rounds, in each of which all
take turns in another order; each has its tensors in the layout that it takes, and PyTorch's backends are chosen
beforehand.
"""

import contextlib
import random
import statistics
import time
from functools import partial
from typing import Any, Callable, ContextManager, Dict, List, Tuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import ferroflash

Run = Callable[[], Any]
# Within, a call is measured.
Choice = Callable[[], ContextManager[Any]]

SHAPE = (1, 128, 4, 64)
CALLS = 200


def attentions(device: str) -> "Dict[str, Tuple[Callable[[Tensor, Tensor, Tensor], Any], bool, Choice]]":
    """What is measured, whether its heads come before its tokens, and what chooses it."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ferroflash.attention(q, k, v, causal=True)

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ferroflash.flash_attn_func(q, k, v, causal=True)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    found: "Dict[str, Tuple[Callable[[Tensor, Tensor, Tensor], Any], bool, Choice]]" = {
        "ferroflash.attention": (attention, False, contextlib.nullcontext),
        "ferroflash.flash_attn_func": (flash_attn_func, False, contextlib.nullcontext),
        "torch sdpa": (sdpa, True, contextlib.nullcontext),
    }
    if device == "cuda":
        found["torch sdpa, flash"] = (sdpa, True, lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION))
        found["torch sdpa, cuDNN"] = (sdpa, True, lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION))
    return found


def runs(attention: Callable[[Tensor, Tensor, Tensor], Any], heads_first: bool, device: str) -> "Dict[str, Run]":
    """Forward, and forward and backward."""
    batch, seqlen, nheads, headdim = SHAPE
    shape = (batch, nheads, seqlen, headdim) if heads_first else SHAPE
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    leaves, dout = [x.clone().requires_grad_() for x in (q, k, v)], torch.randn_like(q)

    def forward() -> Any:
        with torch.no_grad():
            return attention(q, k, v)

    def both() -> Any:
        return torch.autograd.grad(attention(*leaves), leaves, dout)

    return {"forward": forward, "forward + backward": both}


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def microseconds(run: Run, device: str, calls: int) -> float:
    """What a call takes until it returns."""
    synchronise(device)
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls * 1e6


def captured(run: Run) -> Run:
    """The replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def replay_microseconds(replay: Run, calls: int) -> float:
    """From one replay to the next, by the device's clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    replay()
    begin.record()
    for _ in range(calls):
        replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / calls * 1e3


def measured(device: str, rounds: int, calls: int = CALLS) -> "Dict[str, Dict[str, float]]":
    """Microseconds of each, by name and by what was run."""
    timers: "List[Tuple[str, str, Choice, Callable[[], float]]]" = []
    for name, (attention, heads_first, choice) in attentions(device).items():
        try:
            with choice():
                for what, run in runs(attention, heads_first, device).items():
                    for _ in range(20):
                        run()
                    timers.append((name, what, choice, partial(microseconds, run, device, calls)))
                    if device == "cuda":
                        timer = partial(replay_microseconds, captured(run), calls)
                        timers.append((name, f"{what}, replay", choice, timer))
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0]}")
    times: "Dict[str, Dict[str, List[float]]]" = {}
    for _ in range(rounds):
        for name, what, choice, measure in random.sample(timers, len(timers)):
            with choice():
                times.setdefault(name, {}).setdefault(what, []).append(measure())
    order = list(attentions(device))
    return {
        name: {what: statistics.median(of) for what, of in times[name].items()}
        for name in sorted(times, key=order.index)
    }


def table(figures: "Dict[str, Dict[str, float]]") -> None:
    """Prints microseconds a call."""
    columns = ["forward", "forward + backward", "forward, replay", "forward + backward, replay"]
    columns = [column for column in columns if any(column in row for row in figures.values())]
    print(f"\nmicroseconds a call, (batch, seqlen, nheads, headdim) = {SHAPE}, bfloat16, causal")
    print(f"{'':28}" + "".join(f"{column:>28}" for column in columns))
    for name, row in figures.items():
        print(f"{name:28}" + "".join(f"{row[column]:28.2f}" if column in row else f"{'-':>28}" for column in columns))
