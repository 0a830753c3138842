"""One training step of attention over 131072 tokens on one GPU: S alone would take 1 TB.

python long_context.py [tokens]
"""

import sys
import time

import torch

from ferroflash import attention

tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 131072
device = "cuda" if torch.cuda.is_available() else "cpu"
q = torch.randn(1, tokens, 32, 128, dtype=torch.bfloat16, device=device, requires_grad=True)
k, v = (torch.randn(1, tokens, 8, 128, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(2))


def step():
    out = attention(q, k, v, causal=True, window_size=(tokens // 2, 0))
    out.backward(torch.ones_like(out))
    if device == "cuda":
        torch.cuda.synchronize()


step()
begin = time.perf_counter()
step()
print(f"{tokens} tokens, 32 heads of 128, forward and backward: {time.perf_counter() - begin:.2f} s")
if device == "cuda":
    most, whole = torch.cuda.max_memory_allocated() / 2**30, 32 * tokens**2 * 2 / 2**30
    print(f"{most:.1f} GiB at most; S would take {whole:.0f} GiB")
