"""Sentence embeddings of a BERT-like model from disk, with attention by ferroflash, beside those with sdpa.

python embeddings.py FOLDER    a model such as all-MiniLM-L6-v2, saved by transformers, with its tokenizer
"""

import sys

import torch
from transformers import AutoModel, AutoTokenizer

import ferroflash.integrations.transformers

SENTENCES = [
    "A cat sleeps on the sofa.",
    "A kitten naps on the couch.",
    "The stock market fell sharply today.",
    "Shares dropped after the announcement, which nobody had expected so early in the year.",
]


def embed(folder, implementation):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation=implementation).eval()
    words = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**words).last_hidden_state
    seen = words["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * seen).sum(1) / seen.sum(1), dim=-1)


def main(folder):
    ferroflash.integrations.transformers.register()
    ours, sdpa = (embed(folder, implementation) for implementation in ("ferro", "sdpa"))
    print(f"largest difference from sdpa: {(ours - sdpa).abs().max().item():.1e}")
    nearest = (ours @ ours.T - 2 * torch.eye(len(SENTENCES))).argmax(1).tolist()
    for sentence, other in zip(SENTENCES, nearest):
        print(f"{sentence!r} is nearest to {SENTENCES[other]!r}")


if __name__ == "__main__":
    main(sys.argv[1])
