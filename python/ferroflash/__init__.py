"""Exact attention for PyTorch whose GPU kernels are written in Rust.

Tensors are (batch, seqlen, nheads, headdim), in float32, float16 or bfloat16. On a CUDA device the kernels of
FlashAttention run, compiled by NVIDIA's driver when they are first used; on the CPU the same algorithm runs on all
cores.

- `attention`: everything: bias and attention sinks with gradients, masks, windows, ALiBi, softcap, dropout, sequences
  of different lengths, and the LSE with its gradient.
- `flash_attn_func` and the others: the functions of flash_attn 2.8, with its names, defaults, layouts and results.
- `softmax`: by the online or the two-pass kernel.
- `ferroflash.integrations.torch.register()`: for `torch.nn.attention.activate_flash_attention_impl("ferroflash")`.
- `ferroflash.integrations.transformers.register()`: `attn_implementation="ferro"` for Hugging Face models.

Nothing of torch is imported before one of these is used, and nothing of it is changed.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ferroflash._core import __version__

if TYPE_CHECKING:
    from ferroflash._attention import attention
    from ferroflash._kvcache import flash_attn_with_kvcache
    from ferroflash._softmax import softmax
    from ferroflash.flash_attn_interface import (
        flash_attn_func,
        flash_attn_kvpacked_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_kvpacked_func,
        flash_attn_varlen_qkvpacked_func,
    )

__all__ = [
    "__version__",
    "attention",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "softmax",
]


def __getattr__(name: str) -> Any:
    """The functions, each imported with torch when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'ferroflash' has no attribute {name!r}")
    homes = {"attention": "_attention", "flash_attn_with_kvcache": "_kvcache", "softmax": "_softmax"}
    home = homes.get(name, "flash_attn_interface")
    try:
        value = getattr(importlib.import_module(f"ferroflash.{home}"), name)
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise ModuleNotFoundError(
                f"ferroflash.{name} needs PyTorch 2.4 or newer: pip install torch", name="torch"
            ) from error
        raise
    globals()[name] = value
    return value


def __dir__() -> "list[str]":
    return sorted(__all__)
