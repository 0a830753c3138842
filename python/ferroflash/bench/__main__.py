"""`python -m ferroflash.bench`: ferroflash beside every other implementation of attention that is installed.

All get the same inputs in one process, in another order in each round; a figure is the median over the rounds of the
median of the repetitions. FLOPs are 4 b h s² d forward, half of it when causal, and 2.5 times that backward. Beside
them stands what a matrix product reaches on this machine, before and after; and how far results are from float64.

With --overhead instead what a call costs the host, beside torch's scaled_dot_product_attention.
"""

import argparse
import json
import random
import statistics
import sys
from functools import partial
from typing import Any, Callable, Dict, List, Optional

import torch

from ferroflash import __version__, _core
from ferroflash.bench import overhead, page
from ferroflash.bench.measure import call, ceiling, flops, lognormal, megabytes, milliseconds, relative_errors
from ferroflash.bench.peers import PEERS, Attention, Sequences, ferroflash


def numbers(text: str) -> List[int]:
    return [int(word) for word in text.split(",")]


def words(text: str) -> List[str]:
    return text.split(",")


def options() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m ferroflash.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--peers", type=words, default=list(PEERS), help=f"of: {', '.join(PEERS)}")
    parser.add_argument("--directions", type=words, default=["forward", "backward"])
    parser.add_argument("--headdims", type=numbers, default=[64, 128])
    parser.add_argument(
        "--seqlens", type=numbers, default=[512, 1024, 2048, 4096, 8192, 16384] if on_gpu else [256, 512]
    )
    parser.add_argument("--causal", type=numbers, default=[0, 1], help="0, 1 or 0,1")
    parser.add_argument("--tokens", type=int, default=16384 if on_gpu else 512, help="batch x seqlen")
    parser.add_argument("--hidden", type=int, default=2048 if on_gpu else 256, help="nheads x headdim")
    parser.add_argument("--heads-k", type=int, metavar="N", help="heads of K and V, a divisor of those of Q [as many]")
    varlen = "sequences of different lengths, lognormal, --seqlens their means"
    parser.add_argument("--varlen", action="store_true", help=varlen)
    parser.add_argument("--deterministic", action="store_true", help="ferroflash: the same bits in every run")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=8)
    parser.add_argument("--overhead", action="store_true", help="what a call costs the host, and a CUDA graph's replay")
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    parser.add_argument("--html", metavar="FILE", help="write a page of plots")
    chosen = parser.parse_args()
    if chosen.heads_k is not None:
        for headdim in chosen.headdims:
            nheads = max(1, chosen.hidden // headdim)
            if chosen.heads_k < 1 or nheads % chosen.heads_k != 0:
                parser.error(f"--heads-k: {chosen.heads_k}; allowed: a divisor of {nheads}, hidden / headdim")
    for name in ("peers", "directions"):
        allowed = list(PEERS) if name == "peers" else ["forward", "backward"]
        for word in getattr(chosen, name):
            if word not in allowed:
                parser.error(f"--{name}: {word!r}; allowed: {', '.join(allowed)}")
    return chosen


def installed(chosen: argparse.Namespace) -> Dict[str, Attention]:
    """The implementations that are here; of the others, why not."""
    loaders: Dict[str, Callable[[], Attention]] = {**PEERS, "ferroflash": partial(ferroflash, chosen.deterministic)}
    found = {}
    for name in chosen.peers:
        try:
            found[name] = loaders[name]()
        except Exception as error:
            print(f"{name}: not here ({type(error).__name__}: {error})")
    return found


def measured(
    chosen: argparse.Namespace, peers: Dict[str, Attention], problem: Dict[str, Any], causal: bool, direction: str
) -> List[Dict[str, Any]]:
    """A row for each implementation of one problem."""
    dtype, device, backward = getattr(torch, chosen.dtype), chosen.device, direction == "backward"
    lengths = problem["lengths"]
    tokens = [sum(lengths)] if lengths else [problem["batch"], problem["seqlen"]]
    sequences: Optional[Sequences] = Sequences.of(lengths, device) if lengths else None
    shapes = [(*tokens, heads, problem["headdim"]) for heads in (problem["nheads"], *[problem["nheads_k"]] * 2)]
    q, k, v = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    calls: Dict[str, Callable[[], object]] = {}
    rows: List[Dict[str, Any]] = []
    for name, attention in peers.items():
        row: Dict[str, Any] = {"name": name, "direction": direction, "causal": causal, **problem}
        unknown = ("milliseconds", "tflops", "megabytes", "relative_errors", "refused")
        rows.append({**row, **dict.fromkeys(unknown)})
        try:
            run = call(attention, (q, k, v), causal, sequences, backward)
            rows[-1]["megabytes"] = megabytes(run, device)
            rows[-1]["relative_errors"] = relative_errors(attention, problem, causal, dtype, device, backward)
            calls[name] = run
        except Exception as error:
            rows[-1]["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    times: Dict[str, List[float]] = {name: [] for name in calls}
    for _ in range(chosen.rounds):
        for name in random.sample(list(calls), len(calls)):
            times[name].append(milliseconds(calls[name], device, chosen.repetitions))
    for row in rows:
        if row["name"] in times:
            row["milliseconds"] = statistics.median(times[row["name"]])
            row["tflops"] = flops(problem, causal, backward) / row["milliseconds"] / 1e9
    return rows


def progress(done: int, of: int) -> None:
    """A bar on the terminal, if there is one."""
    if sys.stderr.isatty():
        width = 40 * done // of
        sys.stderr.write(f"\r[{'#' * width}{'.' * (40 - width)}] {done}/{of}{chr(10) if done == of else ''}")
        sys.stderr.flush()


def table(rows: List[Dict[str, Any]], seqlens: List[int]) -> None:
    """Prints TFLOP/s, a row for each implementation."""
    groups = dict.fromkeys((row["direction"], row["headdim"], row["causal"]) for row in rows)
    for direction, headdim, causal in groups:
        print(f"\n{direction}, headdim {headdim}{', causal' if causal else ''}: TFLOP/s")
        print(f"{'seqlen':17}" + "".join(f"{seqlen:9}" for seqlen in seqlens) + "   relative errors")
        group = [
            row for row in rows if (row["direction"], row["headdim"], row["causal"]) == (direction, headdim, causal)
        ]
        for name in dict.fromkeys(row["name"] for row in group):
            own = [row for row in group if row["name"] == name]
            figures = "".join(f"{row['tflops']:9.3g}" if row["tflops"] else f"{'-':>9}" for row in own)
            errors = next((row["relative_errors"] for row in own if row["relative_errors"]), None)
            said = own[0]["refused"] if errors is None else ", ".join(f"{x} {e:.1e}" for x, e in errors.items())
            print(f"{name:17}{figures}   {said}")


def report_overhead(chosen: argparse.Namespace, about: str) -> None:
    """Measures and prints what a call costs."""
    print(about)
    print(overhead.__doc__.partition("\n\n")[2] if overhead.__doc__ else "")
    for what, is_so in zip(("read", "allocated"), _core.shortcuts()):
        print(f"tensors are {what} {'in C' if is_so else 'through Python: this torch has no function for it in C'}")
    figures = overhead.measured(chosen.device, chosen.rounds, overhead.CALLS if chosen.device == "cuda" else 20)
    overhead.table(figures)
    if chosen.json:
        with open(chosen.json, "w", encoding="utf-8") as file:
            json.dump({"about": about, "microseconds": figures}, file, indent=1)


def main() -> None:
    chosen = options()
    device = torch.cuda.get_device_name() if chosen.device == "cuda" else "CPU"
    about = f"ferroflash {__version__}, torch {torch.__version__}, {device}"
    if chosen.overhead:
        report_overhead(chosen, about)
        return
    about += f", {chosen.dtype}, {chosen.tokens} tokens, hidden {chosen.hidden}"
    about += ", deterministic" if chosen.deterministic else ""
    print(about)
    peers = installed(chosen)
    problems = [
        (
            {
                "batch": max(1, chosen.tokens // seqlen),
                "seqlen": seqlen,
                "nheads": max(1, chosen.hidden // headdim),
                "nheads_k": chosen.heads_k or max(1, chosen.hidden // headdim),
                "headdim": headdim,
                "lengths": lognormal(chosen.tokens, seqlen) if chosen.varlen else None,
            },
            bool(causal),
            direction,
        )
        for direction in chosen.directions
        for headdim in chosen.headdims
        for causal in chosen.causal
        for seqlen in chosen.seqlens
    ]
    product = partial(ceiling, getattr(torch, chosen.dtype), chosen.device, chosen.repetitions)
    rows: List[Dict[str, Any]] = []
    before = product()
    for done, problem in enumerate(problems):
        progress(done, len(problems))
        rows += measured(chosen, peers, *problem)
    progress(len(problems), len(problems))
    matmul = [before, product()]
    table(rows, chosen.seqlens)
    print(f"\nmatrix product: {matmul[0]:.3g} TFLOP/s before, {matmul[1]:.3g} after")
    if chosen.json:
        with open(chosen.json, "w", encoding="utf-8") as file:
            json.dump({"about": about, "matmul_tflops": matmul, "rows": rows}, file, indent=1)
    if chosen.html:
        page.write(chosen.html, rows, about)


if __name__ == "__main__":
    main()
