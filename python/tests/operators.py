"""Arguments of `torch.ops.ferroflash.attention`."""

# Those that are no tensors, in the order in which it takes them.
OPERATOR_NUMBERS = {
    "max_seqlen_q": None,
    "max_seqlen_k": None,
    "softmax_scale": None,
    "causal": False,
    "window_left": None,
    "window_right": None,
    "softcap": None,
    "dropout_p": 0.0,
    "deterministic": False,
    "allow_tf32": False,
    "num_splits": 0,
}
