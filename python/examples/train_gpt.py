"""Trains a small GPT on a text file, byte by byte, with attention by ferroflash; then lets it write.

python train_gpt.py [text file] [steps]
"""

import pathlib
import sys

import torch
import torch.nn.functional as F
from torch import nn

from ferroflash import flash_attn_qkvpacked_func

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, HEADS, LAYERS, CONTEXT = 128, 4, 3, 128


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        x = x + self.out(flash_attn_qkvpacked_func(qkv, causal=True).flatten(-2))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.places(places))))


def main(path, steps):
    torch.manual_seed(0)
    text = torch.tensor(list(pathlib.Path(path).read_bytes()), device=DEVICE)
    model = GPT().to(DEVICE)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        begins = torch.randint(len(text) - CONTEXT - 1, (16, 1), device=DEVICE)
        pieces = text[begins + torch.arange(CONTEXT + 1, device=DEVICE)]
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = model(pieces[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), pieces[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    written = text[None, :32]
    with torch.no_grad():
        for _ in range(96):
            logits = model(written[:, -CONTEXT:])[:, -1]
            written = torch.cat([written, torch.multinomial(F.softmax(logits, -1), 1)], 1)
    print(bytes(written[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else __file__, int(sys.argv[2]) if len(sys.argv) > 2 else 200)
