"""`python -m ferroflash.selftest`: whether results on this machine are right.

Compares O, the LSE and all gradients with float64. An error may be twice that of a plain implementation in the same
dtype (three times for gradients with a softcap), and 1e-5; that of the LSE 1e-5 of its size.
"""

import argparse
import math
import sys
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Tuple

import torch
from torch import Tensor

from ferroflash import __version__, _core, attention
from ferroflash._reference import furthest, reference

SEQLENS = (113, 203)
NHEADS, NHEADS_K = 4, 2
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Options = Dict[str, Any]


def features(device: str, dtype: torch.dtype) -> Dict[str, Options]:
    """What is tried, one after the other."""
    seqlen_q, seqlen_k = SEQLENS
    return {
        "all keys": {},
        "causal": {"causal": True},
        "window": {"window_size": (40, 8)},
        "softcap": {"softcap": 8.0},
        "ALiBi": {"alibi_slopes": torch.rand(NHEADS, device=device), "causal": True},
        "bias": {"bias": torch.randn(2, NHEADS, seqlen_q, seqlen_k, device=device).to(dtype)},
        "mask": {"mask": torch.rand(2, 1, seqlen_q, seqlen_k, device=device) < 0.8},
        "sinks": {"sinks": torch.randn(NHEADS, device=device)},
    }


def results(
    function: Callable[..., Tuple[Tensor, Tensor]], tensors: List[Tensor], options: Options
) -> Dict[str, Tensor]:
    """O, LSE, and the gradients of a loss that depends on both."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    differentiable = {name: x.detach().requires_grad_() for name, x in options.items() if name in ("bias", "sinks")}
    out, lse = function(*leaves, **{**options, **differentiable})
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).reshape(out.shape)
    loss = (out.double() * weights).sum() + lse.masked_fill(lse == -math.inf, 0).double().sum()
    gradients = torch.autograd.grad(loss, [*leaves, *differentiable.values()])
    names = ["dq", "dk", "dv", *(f"d{name}" for name in differentiable)]
    return {"out": out, "softmax_lse": lse, **dict(zip(names, gradients))}


def worst(tensors: List[Tensor], options: Options) -> Tuple[float, str]:
    """The largest error as a part of what is allowed, and of which result."""
    wide = {name: x.double() if name in ("bias", "sinks") else x for name, x in options.items()}
    exact = results(reference, [x.double() for x in tensors], wide)
    dtype = tensors[0].dtype
    plain = results(partial(reference, dtype=dtype), tensors, options)
    found = results(lambda *x, **o: attention(*x, return_lse=True, **o), tensors, options)
    parts = []
    for name, x in found.items():
        times = 3 if "softcap" in options and name.startswith("d") else 2
        allowed = times * furthest(plain[name], exact[name]) + 1e-5
        if name == "softmax_lse":
            allowed = 1e-5 * (1 + exact[name].abs().max().item())
        parts.append((furthest(x, exact[name]) / allowed, name))
    return max(parts)


def cases(device: str, quick: bool) -> Iterator[Tuple[str, List[Tensor], Options]]:
    """Names, Q, K and V, and options."""
    for dtype in DTYPES:
        for headdim in (64,) if quick else (32, 64, 96, 128, 256):
            for name, options in features(device, dtype).items():
                shapes = [(2, SEQLENS[0], NHEADS, headdim), *[(2, SEQLENS[1], NHEADS_K, headdim)] * 2]
                tensors = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
                yield f"{str(dtype)[6:]:9} headdim {headdim:3}  {name}", tensors, options


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ferroflash.selftest", description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=["cpu", "cuda"], help=f"where (default: {default})")
    parser.add_argument("--quick", action="store_true", help="one head dimension")
    arguments = parser.parse_args()
    print(f"ferroflash {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    for name, (major, minor), multiprocessors in _core.devices():
        print(f"{name}: sm_{major}{minor}, {multiprocessors} multiprocessors")
    print(f"on {arguments.device}; error as a part of what is allowed\n")
    torch.manual_seed(0)
    passed = failed = 0
    for name, tensors, options in cases(arguments.device, arguments.quick):
        part, of = worst(tensors, options)
        passed, failed = passed + (part <= 1), failed + (part > 1)
        print(f"{'ok' if part <= 1 else 'FAILED':6} {name:32} {part:5.2f} ({of})", flush=True)
    print(f"\n{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
