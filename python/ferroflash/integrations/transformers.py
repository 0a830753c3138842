"""ferroflash in Hugging Face's transformers.

```python
import ferroflash.integrations.transformers
from transformers import AutoModelForCausalLM

ferroflash.integrations.transformers.register()
model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="ferro")
```

Training and generation, causal and bidirectional, with grouped queries, padding, sliding windows, softcap, sinks,
position biases and dropout as the models ask for them. Causal masks and windows, padded or not, are never in memory;
masks of other shapes are, as booleans.

The name is not "ferroflash", since transformers takes every name with "flash" in it for a package like flash_attn: it
looks for that package, prepares other arguments, and for some models (GPT-OSS) takes another implementation instead.
"""

from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ferroflash._arguments import refuse
from ferroflash._attention import attention


class CausalMask(NamedTuple):
    """A causal mask, aligned to the bottom right corner, as what it is made of."""

    # How many keys a query sees to the left of its own; None for all.
    left: Optional[int]
    # (batch, 1, 1, seqlen_k), False for padding; None without any.
    padding: Optional[Tensor]


def register(name: str = "ferro") -> None:
    """Makes `attn_implementation=name` known to transformers 5.

    Raises:
        ValueError: A name with "flash" in it, of which transformers would make something else; an older transformers.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, __version__

    if int(__version__.split(".")[0]) < 5:
        refuse("transformers", __version__, "5 or newer")
    if "flash" in name:
        refuse("name", repr(name), 'one without "flash", which transformers takes for the package flash_attn')
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)


def attention_mask(**arguments: Any) -> Any:
    """The mask of a forward pass: None, a `CausalMask`, or a boolean tensor that `attention` can broadcast.

    What the library's own `sdpa_mask` takes. A mask that is plainly causal, or a sliding window, or all keys, is not
    built; neither is one that only padding makes different.
    """
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    kv_length, kv_offset = arguments["kv_length"], arguments.get("kv_offset", 0)
    padding = _key_padding(arguments.get("attention_mask"), kv_length, kv_offset)
    if arguments.get("allow_is_causal_skip", True):
        local_size = arguments.get("local_size")
        # Chunks, too, are said to be local.
        chunked = getattr(arguments.get("config"), "attention_chunk_size", None) is not None
        ends_with_keys = arguments.get("q_offset", 0) + arguments["q_length"] == kv_offset + kv_length
        if ends_with_keys and not (local_size is not None and chunked):
            return CausalMask(None if local_size is None else local_size - 1, padding)
    elif arguments.get("mask_function") is bidirectional_mask_function and arguments.get("local_size") is None:
        return padding
    return sdpa_mask(**arguments)


def _key_padding(attention_mask: Optional[Tensor], kv_length: int, kv_offset: int) -> Optional[Tensor]:
    """(batch, 1, 1, seqlen_k), False for padding; None where there is none, as far as that can be asked."""
    if attention_mask is None:
        return None
    missing = kv_length + kv_offset - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    padding = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if not torch.compiler.is_compiling() and padding.all():
        return None
    return padding[:, None, None]


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: Optional[float] = None,
    is_causal: Optional[bool] = None,
    softcap: Optional[float] = None,
    s_aux: Optional[Tensor] = None,
    position_bias: Optional[Tensor] = None,
    **kwargs: Any,
) -> Tuple[Tensor, None]:
    """Attention of a module: query, key and value are (batch, nheads, seqlen, headdim); the result has the heads last
    but one.

    `attention_mask` is what `attention_mask` of this module made, or what the user passed: True for keys that are seen,
    or numbers that are added to the scores. Without one a module that is causal sees no later keys.
    """
    if kwargs.get("output_attentions"):
        refuse("output_attentions", True, 'False: P is never in memory; attn_implementation="eager" returns it')
    causal, mask, bias = False, None, position_bias
    window: Tuple[Optional[int], Optional[int]] = (None, None)
    q_length, kv_length = query.shape[2], key.shape[2]
    if isinstance(attention_mask, CausalMask):
        causal, window, mask = True, (attention_mask.left, None), attention_mask.padding
    elif attention_mask is None:
        causal = (getattr(module, "is_causal", True) if is_causal is None else is_causal) and q_length > 1
        if causal and kv_length > q_length:
            # Without a mask only the beginning of a cache is filled.
            key, value = key[:, :, :q_length], value[:, :, :q_length]
            bias = None if bias is None else bias[..., :q_length]
    elif attention_mask.dtype == torch.bool:
        mask = attention_mask[..., :kv_length]
    else:
        added = attention_mask[..., :kv_length]
        bias = added if bias is None else bias + added
    out = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        bias=bias,
        mask=mask,
        sinks=s_aux,
        softmax_scale=scaling,
        causal=causal,
        window_size=window,
        softcap=softcap,
        dropout_p=dropout,
    )
    return out, None
