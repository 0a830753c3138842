#!/usr/bin/env python3
"""Times what scores and masks may take: ferroflash's `attention` beside PyTorch's scaled_dot_product_attention, on one GPU.

    python3 benches/features.py
    python3 benches/features.py --headdim 64 --seqlens 2048,8192 --json features.json

A feature a row: a bias of each head with its gradient, a boolean mask, ALiBi, dropout. PyTorch's FlashAttention-2 knows dropout
alone of these; for the others its memory-efficient attention is the peer, which takes ALiBi as a bias.
Needs the Python package of ferroflash and PyTorch with CUDA, on a GPU of compute capability 8.0 or newer.

Before anything is timed, O and the gradients of both are compared: their largest difference is at most a fiftieth of the largest
element; of ALiBi, which is rounded where it is a bias in bf16, a tenth. With dropout, whose random numbers are each one's own,
nothing can be compared.
Times are found as in `benches/peers.py`.
"""
import argparse
import json
import random
import statistics

import ferroflash
import torch
import torch.nn.functional as F
from peers import list_of_positive, positive, seconds
from torch.nn.attention import SDPBackend, sdpa_kernel

DROPOUT = 0.1
# Seconds that the GPU rests before each measurement.
REST = 0.1
OURS, PEER = "ferroflash", "PyTorch"
FEATURES = ("bias", "mask", "ALiBi", "dropout")


def inputs(options, headdim, seqlen):
    shape = (options.batch, seqlen, options.hidden // headdim, headdim)
    q, k, v, d_o = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    return [x.requires_grad_() for x in (q, k, v)], d_o


def sdpa(backend, tensors, **options):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors), **options).transpose(1, 2)


def problem(feature, tensors):
    """What needs gradients, and both ways to compute O."""
    batch, seqlen, nheads, _ = tensors[0].shape
    efficient = SDPBackend.EFFICIENT_ATTENTION
    if feature == "bias":
        bias = torch.randn(1, nheads, seqlen, seqlen, device="cuda", dtype=torch.bfloat16).requires_grad_()
        peer = lambda: sdpa(efficient, tensors, attn_mask=bias.expand(batch, -1, -1, -1))
        return [*tensors, bias], {OURS: lambda: ferroflash.attention(*tensors, bias=bias), PEER: peer}
    if feature == "mask":
        mask = torch.rand(batch, 1, seqlen, seqlen, device="cuda") < 0.75
        peer = lambda: sdpa(efficient, tensors, attn_mask=mask.expand(-1, nheads, -1, -1))
        return tensors, {OURS: lambda: ferroflash.attention(*tensors, mask=mask), PEER: peer}
    if feature == "ALiBi":
        slopes = 2.0 ** torch.linspace(-1, -8, nheads, device="cuda")
        place = torch.arange(seqlen, device="cuda")
        distance = (place[:, None] - place[None, :]).abs()
        bias = (-slopes[:, None, None] * distance).to(torch.bfloat16).expand(batch, -1, -1, -1)
        peer = lambda: sdpa(efficient, tensors, attn_mask=bias)
        return tensors, {OURS: lambda: ferroflash.attention(*tensors, alibi_slopes=slopes), PEER: peer}
    peer = lambda: sdpa(SDPBackend.FLASH_ATTENTION, tensors, dropout_p=DROPOUT)
    return tensors, {OURS: lambda: ferroflash.attention(*tensors, dropout_p=DROPOUT), PEER: peer}


def check(feature, needed, ways, d_o):
    """Stops if both do not compute the same; ALiBi as a bias in bf16 is rounded, and may differ more."""
    if feature == "dropout":
        return
    found = {}
    for name, way in ways.items():
        out = way()
        found[name] = [out.detach(), *torch.autograd.grad(out, needed, d_o)]
    allowed = 0.1 if feature == "ALiBi" else 0.02
    for i, (ours, peer) in enumerate(zip(found[OURS], found[PEER])):
        difference = ((ours.float() - peer.float()).abs().max() / peer.float().abs().max()).item()
        if not difference <= allowed:
            raise SystemExit(f"{feature}: tensor {i} differs by {difference:.3g} of its largest; allowed: {allowed}")


def measure(options, feature, headdim, seqlen):
    tensors, d_o = inputs(options, headdim, seqlen)
    needed, ways = problem(feature, tensors)
    check(feature, needed, ways, d_o)
    outs = {name: way() for name, way in ways.items()}
    times = {name: ([], []) for name in ways}
    for _ in range(options.rounds):
        for name in random.sample(list(ways), len(ways)):
            times[name][0].append(seconds(ways[name], options.repetitions, REST))
            gradients = lambda: torch.autograd.grad(outs[name], needed, d_o, retain_graph=True)
            times[name][1].append(seconds(gradients, options.repetitions, REST))
    medians = {name: [statistics.median(t) for t in both] for name, both in times.items()}
    return {"feature": feature, "headdim": headdim, "seqlen": seqlen, "seconds": medians}


def row(found):
    (ours, ours_back), (peer, peer_back) = found["seconds"][OURS], found["seconds"][PEER]
    cells = [found["feature"], found["headdim"], found["seqlen"]]
    for x, y in ((ours, peer), (ours_back, peer_back)):
        cells += [f"{x * 1e3:.2f}", f"{y * 1e3:.2f}", f"{y / x:.2f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=lambda text: text.split(","), default=list(FEATURES), help=f"of {', '.join(FEATURES)}")
    parser.add_argument("--headdim", type=list_of_positive, default=[64, 128], help="head dimensions (default: 64,128)")
    parser.add_argument("--seqlens", type=list_of_positive, default=[1024, 4096], help="sequence lengths (default: 1024,4096)")
    parser.add_argument("--batch", type=positive, default=2, help="sequences (default: 2)")
    parser.add_argument("--hidden", type=positive, default=2048, help="heads times headdim (default: 2048)")
    parser.add_argument("--rounds", type=positive, default=5, help="(default: 5)")
    parser.add_argument("--repetitions", type=positive, default=10, help="(default: 10)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there too")
    options = parser.parse_args()
    for feature in options.features:
        if feature not in FEATURES:
            parser.error(f"--features: {feature}; allowed: {', '.join(FEATURES)}")
    torch.manual_seed(0)
    print("| feature | headdim | seqlen | forward, ms | PyTorch | times | backward, ms | PyTorch | times |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows = []
    for feature in options.features:
        for headdim in options.headdim:
            for seqlen in options.seqlens:
                rows.append(measure(options, feature, headdim, seqlen))
                print(row(rows[-1]), flush=True)
                torch.cuda.empty_cache()
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
