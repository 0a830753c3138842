#!/usr/bin/env python3
"""Times builds of the Python package beside each other and beside their peers, on one GPU, in one process.

    python3 benches/versions.py old=old/ferroflash-0.1.0-cp39-abi3-linux_x86_64.whl new=new/ferroflash-0.1.0-...whl
    python3 benches/versions.py new=... --backward --deterministic --headdims 128 --seqlens 512,16384

For whoever changes a kernel: `cargo xtask build-ptx --only PART --force` and `maturin build` give a wheel of the change in
minutes, and this says what it is worth. Needs PyTorch with CUDA. Peers are cuDNN and PyTorch's FlashAttention-2, and
FlashAttention-3 where its wheel `fa3-fwd` is on the path.

Problems have 16384 tokens and a hidden dimension of 2048. All get the same N(0, 1) inputs. Before anything is timed, results are
compared with those of the first that is named: who is further off than 2 % is named and not timed. Times are found as in
`benches/peers.py`: in random order, the GPU resting in between, launches queued behind a kernel that sleeps, medians of medians.
"""
import argparse
import importlib
import json
import math
import random
import statistics
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

TOKENS, HIDDEN = 16384, 2048
ALLOWED = 0.02


def load(name, wheel, folder):
    """`ferroflash.attention` of a wheel. Its operators are renamed: PyTorch allows each name once."""
    home = Path(folder) / name
    zipfile.ZipFile(wheel).extractall(home)
    for source in (home / "ferroflash").rglob("*.py"):
        text = source.read_text()
        for before in ("ferroflash::", "torch.ops.ferroflash", 'Library("ferroflash'):
            text = text.replace(before, before.replace("ferroflash", f"ferroflash_{name}"))
        source.write_text(text)
    for module in [module for module in sys.modules if module.split(".")[0] == "ferroflash"]:
        del sys.modules[module]
    sys.path.insert(0, str(home))
    importlib.invalidate_caches()
    attention = importlib.import_module("ferroflash._attention").attention
    sys.path.remove(str(home))
    return attention


def sdpa(backend):
    """PyTorch's attention by one of its backends, in (batch, seqlen, heads, headdim)."""

    def attend(q, k, v, causal):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            grouped = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)

    return attend


def flash3():
    """FlashAttention-3's forward pass."""
    function = importlib.import_module("fa3_fwd_interface").flash_attn_func

    def attend(q, k, v, causal):
        result = function(q, k, v, causal=causal)
        return result[0] if isinstance(result, tuple) else result

    return attend


def contenders(arguments, folder):
    """What is timed, by name: functions of Q, K, V and whether there is a causal mask."""
    found = {}
    for version in arguments.versions:
        name, _, wheel = version.partition("=")
        attention = load(name, wheel, folder)
        found[name] = lambda q, k, v, causal, attention=attention: attention(q, k, v, causal=causal)
        if arguments.deterministic:
            found[f"{name}, deterministic"] = lambda q, k, v, causal, attention=attention: attention(
                q, k, v, causal=causal, deterministic=True
            )
    peers = {"cuDNN": lambda: sdpa(SDPBackend.CUDNN_ATTENTION), "FA2": lambda: sdpa(SDPBackend.FLASH_ATTENTION)}
    if not arguments.backward:
        peers["FA3"] = flash3
    for name in filter(None, arguments.peers.split(",")):
        if name not in peers:
            print(f"{name} is none of {', '.join(peers)}")
            continue
        try:
            found[name] = peers[name]()
        except ImportError as error:
            print(f"{name} is not here: {error}")
    return found


def prepare(attend, tensors, d_o, causal, backward):
    """What to time, and its results."""
    if not backward:
        with torch.no_grad():
            results = (attend(*tensors, causal),)

        def forward():
            with torch.no_grad():
                attend(*tensors, causal)

        return forward, results
    leaves = [x.detach().requires_grad_() for x in tensors]
    o = attend(*leaves, causal)
    gradients = lambda: torch.autograd.grad(o, leaves, d_o, retain_graph=True)
    return gradients, gradients()


def distance(results, reference):
    """The largest relative distance of any of the results."""
    norm = lambda x: x.float().norm().item()
    return max(norm(x.float() - y.float()) / norm(y) for x, y in zip(results, reference))


def times(functions, rounds, repetitions):
    """Milliseconds by name."""
    medians = {name: [] for name in functions}
    for _ in range(rounds):
        order = list(functions)
        random.shuffle(order)
        for name in order:
            time.sleep(0.012)
            torch.cuda._sleep(3_000_000)
            functions[name]()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
            events[0].record()
            for event in events[1:]:
                functions[name]()
                event.record()
            torch.cuda.synchronize()
            medians[name].append(statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:])))
    return {name: statistics.median(values) for name, values in medians.items()}


def measure(attends, headdim, seqlen, causal, arguments):
    """TFLOP/s by name."""
    batch, heads = TOKENS // seqlen, HIDDEN // headdim
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[arguments.dtype]
    torch.manual_seed(1)
    random_tensor = lambda heads: torch.randn(batch, seqlen, heads, headdim, device="cuda", dtype=dtype)
    q, d_o = random_tensor(heads), random_tensor(heads)
    k, v = (random_tensor(max(1, heads // arguments.group)) for _ in range(2))
    functions, reference = {}, None
    for name, attend in attends.items():
        try:
            function, results = prepare(attend, (q, k, v), d_o, causal, arguments.backward)
            torch.cuda.synchronize()
        except Exception as error:
            print(f"  {name} fails: {str(error).splitlines()[0][:200]}")
            continue
        reference = reference or results
        off = distance(results, reference)
        if off <= ALLOWED:
            functions[name] = function
        else:
            print(f"  {name} is {off:.1%} off")
    flops = 4 * batch * heads * seqlen**2 * headdim * (0.5 if causal else 1) * (2.5 if arguments.backward else 1)
    measured = times(functions, arguments.rounds, arguments.repetitions)
    return {name: flops / milliseconds / 1e9 for name, milliseconds in measured.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(number) for number in text.split(",")]
    parser.add_argument("versions", nargs="+", metavar="NAME=WHEEL")
    parser.add_argument("--backward", action="store_true", help="the backward pass instead of the forward pass")
    parser.add_argument("--deterministic", action="store_true", help="of each version also the deterministic gradients")
    parser.add_argument("--headdims", type=numbers, default=[64, 128, 256])
    parser.add_argument("--seqlens", type=numbers, default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--masks", default="full,causal", help="full, causal or both")
    parser.add_argument("--group", type=int, default=1, help="heads of Q that share one of K and V")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "f16"])
    parser.add_argument("--peers", default="FA3,cuDNN")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repetitions", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no problem after so long")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    arguments = parser.parse_args()
    start, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        attends = contenders(arguments, folder)
        for headdim in arguments.headdims:
            for mask in arguments.masks.split(","):
                for seqlen in arguments.seqlens:
                    if time.monotonic() - start > arguments.seconds:
                        print(f"left out for lack of time: headdim {headdim}, {mask}, {seqlen} tokens")
                        continue
                    speeds = measure(attends, headdim, seqlen, mask == "causal", arguments)
                    rows.append({"headdim": headdim, "mask": mask, "seqlen": seqlen, "speeds": speeds})
                    figures = "  ".join(f"{name} {speed:.1f}" for name, speed in speeds.items())
                    print(f"d{headdim} {mask:6} {seqlen:6}  {figures}", flush=True)
    for version in attends:
        for other in attends:
            both = [row["speeds"] for row in rows if {version, other} <= row["speeds"].keys()]
            if other != version and both and list(attends).index(version) < list(attends).index(other):
                ratios = [speeds[version] / speeds[other] for speeds in both]
                mean = math.exp(statistics.fmean(map(math.log, ratios)))
                print(f"{version} / {other}: {mean:.3f}, {min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} problems")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
