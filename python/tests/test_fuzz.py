"""Thousands of malformed calls of every public function: a result or an exception, and a process that lives on.

What is called is drawn at random from a seed, in a child process, which says before each call what it is: if it dies,
the last line is what killed it. `python test_fuzz.py cpu 7 1000` makes the calls again, `python test_fuzz.py cpu 7 1000
523` the one of that number alone.
"""

import faulthandler
import math
import random
import re
import resource
import subprocess
import sys
import time
import warnings
from fractions import Fraction

import numpy
import pytest
import torch

import ferroflash
from ferroflash import _ops  # noqa: F401 (registers the operators)
from operators import OPERATOR_NUMBERS

CALLS = 1500
# What PyTorch itself says, of a whole call: before it gets here, or of copies and of autograd.
PYTORCHS = re.compile(
    r"ferroflash(::|\.)(attention|attention_backward|softmax)|can't allocate memory|CUDA out of memory|[Ii]nference tensor|"
    r"single memory location|convert all Tensors to FakeTensors|size calculation overflowed|not implemented for 'Bool'"
)
# What all other messages name: an argument, or an output.
NAMES = (
    "q|k|v|x|dim|method|bias|mask|alibi_slopes|sinks|cu_seqlens|cu_seqlens_q|cu_seqlens_k|max_seqlen|max_seqlen_q|"
    "max_seqlen_k|"
    "softmax_scale|causal|window_size|softcap|dropout_p|deterministic|allow_tf32|return_lse|return_attn_probs|"
    "return_softmax_lse|qkv|kv|k_cache|v_cache|rotary_cos|rotary_sin|cache_seqlens|cache_batch_idx|cache_leftpad|"
    "block_table|num_splits|rotary_interleaved|nheads|seqlen_q|seqlen_k|batch|headdim|headdim_v|dout|dlse|out|softmax_lse|"
    "rng_state|window_left|window_right|elements|dq|dk|dv|dbias|dsinks|workspace"
).split("|")
BATCH, SEQLEN_Q, SEQLEN_K, NHEADS, NHEADS_K, HEADDIM = 2, 5, 7, 4, 2, 16


class Unruly:
    """Raises whatever is asked of it."""

    def __float__(self, *others):
        raise ZeroDivisionError

    __int__ = __index__ = __len__ = __iter__ = __bool__ = __eq__ = __float__
    __hash__ = None


class Subclass(torch.Tensor):
    pass


class Whole(int):
    pass


def freed(x):
    """Without memory behind it, as sharded parameters are between uses."""
    x.untyped_storage().resize_(0)
    return x


def cut(x):
    """With less memory behind it than it has elements."""
    x.untyped_storage().resize_(max(1, x.untyped_storage().nbytes() // 3))
    return x


def expanded(x, dimension, extent):
    """Larger than memory, as a view of the first of a dimension."""
    if x.dim() == 0:
        return x.expand(extent)
    dimension %= x.dim()
    shape = list(x.shape)
    shape[dimension] = extent
    return x.narrow(dimension, 0, min(1, x.shape[dimension])).expand(shape) if x.shape[dimension] else x


def strided(x, stride):
    """Strides that are never stepped, as far as memory can be told."""
    one = [1 if extent > 1 else stride for extent in x.shape]
    return x.as_strided(x.shape, one) if x.dim() else x


def fake(x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(x)


def unaligned(x):
    """At an address that is no multiple of the size of an element."""
    memory = bytearray(x.numel() * x.element_size() + 1)
    return torch.frombuffer(memory, dtype=x.dtype, offset=1, count=x.numel()).reshape(x.shape)


def nested(x):
    return torch.nested.nested_tensor([x, x], layout=torch.jagged)


DISTORTIONS = {
    "freed": freed,
    "cut": cut,
    "meta": lambda x: x.to("meta"),
    "cpu": lambda x: x.cpu(),
    "fake": fake,
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.reshape(1, -1).to_sparse_csr(),
    "nested": nested,
    "quantized": lambda x: torch.quantize_per_tensor(x.float().cpu(), 0.1, 0, torch.qint8),
    "complex": lambda x: x.to(torch.complex64),
    "conjugated": lambda x: x.to(torch.complex64).conj(),
    "imaginary": lambda x: x.to(torch.complex64).conj().imag,
    "negated": torch._neg_view,
    "subclass": lambda x: x.as_subclass(Subclass),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=x.is_floating_point()),
    "with a gradient": lambda x: x.detach().requires_grad_(x.is_floating_point()),
    "no leaf": lambda x: x.detach().requires_grad_(x.is_floating_point()) * 1,
    "inference": lambda x: torch.inference_mode()(lambda: x.clone())(),
    "scalar": lambda x: x.reshape(-1)[0] if x.numel() else x.new_zeros(()),
    "flat": lambda x: x.reshape(-1),
    "of another rank": lambda x: x[None],
    "of rank 9": lambda x: x.reshape(*[1] * (9 - x.dim()), *x.shape),
    "without elements": lambda x: x[:0],
    "without last": lambda x: x[..., :0],
    "without heads": lambda x: x[..., :0, :] if x.dim() > 1 else x,
    "without tokens": lambda x: x[:, :0] if x.dim() > 1 else x,
    "shorter": lambda x: x[:-1] if x.dim() else x,
    "every other": lambda x: x[..., ::2] if x.dim() else x,
    "reversed axes": lambda x: x.permute(*reversed(range(x.dim()))),
    "last twice": lambda x: x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x,
    "at an odd address": unaligned,
    "unaligned": lambda x: torch.cat([x.flatten(), x.flatten()])[1 : 1 + x.numel()].reshape(x.shape),
    "NaN": lambda x: x * math.nan if x.is_floating_point() else x,
    "infinite": lambda x: x * math.inf if x.is_floating_point() else x,
    "huge": lambda x: x.fill_(1e38) if x.is_floating_point() else x,
    "lowest": lambda x: torch.full_like(x, torch.iinfo(x.dtype).min) if x.dtype == torch.int32 else x,
    "highest": lambda x: torch.full_like(x, torch.iinfo(x.dtype).max) if x.dtype == torch.int32 else x,
    "falling": lambda x: x.flip(0) if x.dim() else x,
    "beyond": lambda x: x + 1 if x.dtype == torch.int32 else x,
    "a list": lambda x: x.tolist() if x.numel() < 100 else [],
    "an array": lambda x: x.detach().float().cpu().numpy(),
    "data": lambda x: x.data,
}
for dtype in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool", "float8_e4m3fn"):
    DISTORTIONS[dtype] = lambda x, dtype=getattr(torch, dtype): x.to(dtype)
for extent in (2, 2**31, 2**40, 2**62):
    for dimension in range(-4, 1):
        DISTORTIONS[f"dimension {dimension} expanded to {extent}"] = lambda x, d=dimension, e=extent: expanded(x, d, e)
for stride in (0, 2**31, 2**62):
    DISTORTIONS[f"strides of {stride}"] = lambda x, stride=stride: strided(x, stride)

# What nobody checks on CUDA, which would wait for the device: whole numbers that are in tensors, lengths that are shorter
# than those, and storages that still have some memory.
UNCHECKED_ON_CUDA = ("cut", "lowest", "highest", "falling", "beyond", "negated")

NUMBERS = [
    None, True, False, 0, 1, -1, 2, 7, 8, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**70), 10**400,
    0.0, -0.0, 0.5, 1.0, -0.5, 1e-45, 1e38, 1e39, 1e300, math.nan, math.inf, -math.inf, 1j, "1", "", b"1", [], [1], (), {},
    Whole(3), Fraction(1, 2), numpy.float32(0.5), numpy.int64(3), numpy.bool_(True), torch.tensor(1.0), torch.tensor([1, 2]),
    torch.float32, Unruly(), "online", "two-pass",
]  # fmt: skip
WINDOWS = [(a, b) for a in NUMBERS[:17] for b in (None, -1, 0, 3, 2**70)]
WINDOWS += [(1, 2, 3), (1,), [2, 2], ("a", 1), (Unruly(), 1)]


class Drawn:
    """Random choices, and good arguments of every function."""

    def __init__(self, device, seed):
        self.random, self.device = random.Random(seed), device

    def tensor(self, *shape):
        dtype = self.dtype
        return torch.randn(shape, device=self.device).to(dtype).requires_grad_(self.gradients)

    def starts(self, *places):
        return torch.tensor(places, dtype=torch.int32, device=self.device)

    def numbers(self):
        """Options that all functions of flash_attn have."""
        return {
            "dropout_p": self.random.choice([0.0, 0.0, 0.3]),
            "softmax_scale": self.random.choice([None, 0.3]),
            "causal": self.random.random() < 0.5,
            "window_size": self.random.choice([(-1, -1), (2, 0), (1, 3)]),
            "softcap": self.random.choice([0.0, 8.0]),
            "alibi_slopes": self.random.choice([None, torch.rand(NHEADS, device=self.device)]),
            "deterministic": self.random.random() < 0.2,
            "return_attn_probs": False,
        }

    def lengths(self):
        return {
            "cu_seqlens_q": self.starts(0, 3, 5),
            "cu_seqlens_k": self.starts(0, 2, 7),
            "max_seqlen_q": 3,
            "max_seqlen_k": 5,
        }

    def some(self, **optional):
        """Some of these."""
        return {name: make() for name, make in optional.items() if self.random.random() < 0.3}

    def attention(self):
        arguments = {
            "q": self.tensor(BATCH, SEQLEN_Q, NHEADS, HEADDIM),
            "k": self.tensor(BATCH, SEQLEN_K, NHEADS_K, HEADDIM),
            "v": self.tensor(BATCH, SEQLEN_K, NHEADS_K, HEADDIM + 8),
        }
        varlen = self.random.random() < 0.3
        if varlen:
            arguments = {name: x.detach()[0].requires_grad_(self.gradients) for name, x in arguments.items()}
            arguments.update(self.lengths())
        numbers = self.numbers()
        del numbers["return_attn_probs"]
        numbers["softcap"] = numbers["softcap"] or None
        return {
            **arguments,
            **numbers,
            "allow_tf32": False,
            "num_splits": self.random.choice([0, 1, 3]),
            "return_lse": self.random.random() < 0.5,
            **self.some(
                bias=lambda: self.tensor(1, NHEADS, 3 if varlen else SEQLEN_Q, 5 if varlen else SEQLEN_K),
                mask=lambda: torch.rand(BATCH, 1, 1, 5 if varlen else SEQLEN_K, device=self.device) < 0.7,
                sinks=lambda: torch.randn(NHEADS, device=self.device),
            ),
        }

    def flash_attn_func(self):
        tensors = {name: self.tensor(BATCH, 6, NHEADS, HEADDIM) for name in "qkv"}
        return {**tensors, **self.numbers()}

    def flash_attn_kvpacked_func(self):
        kv = self.tensor(BATCH, SEQLEN_K, 2, NHEADS_K, HEADDIM)
        return {"q": self.tensor(BATCH, SEQLEN_Q, NHEADS, HEADDIM), "kv": kv, **self.numbers()}

    def flash_attn_qkvpacked_func(self):
        return {"qkv": self.tensor(BATCH, SEQLEN_Q, 3, NHEADS, HEADDIM), **self.numbers()}

    def flash_attn_varlen_func(self):
        q, kv = self.tensor(SEQLEN_Q, NHEADS, HEADDIM), [self.tensor(SEQLEN_K, NHEADS_K, HEADDIM) for _ in range(2)]
        return {"q": q, "k": kv[0], "v": kv[1], **self.lengths(), **self.numbers(), **self.some(block_table=lambda: q)}

    def flash_attn_varlen_kvpacked_func(self):
        kv = self.tensor(SEQLEN_K, 2, NHEADS_K, HEADDIM)
        return {"q": self.tensor(SEQLEN_Q, NHEADS, HEADDIM), "kv": kv, **self.lengths(), **self.numbers()}

    def flash_attn_varlen_qkvpacked_func(self):
        qkv = self.tensor(SEQLEN_Q, 3, NHEADS, HEADDIM)
        return {"qkv": qkv, "cu_seqlens": self.starts(0, 3, 5), "max_seqlen": 3, **self.numbers()}

    def flash_attn_with_kvcache(self):
        numbers = self.numbers()
        for name in ("dropout_p", "deterministic", "return_attn_probs"):
            del numbers[name]
        self.gradients = False
        seqlens = torch.tensor([3, 5], dtype=torch.int32, device=self.device)
        return {
            "q": self.tensor(BATCH, SEQLEN_Q, NHEADS, HEADDIM),
            "k_cache": self.tensor(BATCH, 12, NHEADS_K, HEADDIM),
            "v_cache": self.tensor(BATCH, 12, NHEADS_K, HEADDIM),
            "cache_seqlens": self.random.choice([4, seqlens]),
            **self.random.choice([{}, {name: self.tensor(BATCH, 2, NHEADS_K, HEADDIM) for name in "kv"}]),
            **self.some(cache_batch_idx=lambda: torch.tensor([1, 0], device=self.device)),
            "return_softmax_lse": True,
            "num_splits": self.random.choice([0, 1, 3]),
            "block_table": None,
            "rotary_cos": None,
            **numbers,
        }

    def softmax(self):
        return {"x": self.tensor(3, 5, 7), "dim": self.random.choice([-1, 0, 1]), "method": "online"}

    def operator(self):
        """Of `torch.ops.ferroflash.attention`, which checks less."""
        tensors = self.attention()
        names = ["q", "k", "v", "bias", "mask", "alibi_slopes", "sinks", "cu_seqlens_q", "cu_seqlens_k"]
        return {
            **{name: tensors.get(name) for name in names},
            "rng_state": None,
            **OPERATOR_NUMBERS,
            "max_seqlen_q": tensors.get("max_seqlen_q"),
            "max_seqlen_k": tensors.get("max_seqlen_k"),
            "causal": True,
        }

    def operator_backward(self):
        self.gradients = False
        arguments = self.operator()
        with torch.no_grad():
            out, softmax_lse = torch.ops.ferroflash.attention(*arguments.values())
        results = {"dout": torch.randn_like(out), "dlse": torch.randn_like(softmax_lse)}
        needs = {"needs_dbias": False, "needs_dsinks": False}
        return {**results, "out": out, "softmax_lse": softmax_lse, **arguments, **needs}

    def distorted(self, name, value):
        """Another value in place of an argument, and what it is."""
        if isinstance(value, torch.Tensor) and self.random.random() < 0.9:
            how = self.random.choice(list(DISTORTIONS))
            if self.device == "cuda" and how in UNCHECKED_ON_CUDA and (how == "cut" or not value.is_floating_point()):
                how = "freed"
            x = value.detach().clone()
            if value.requires_grad:
                x.requires_grad_()
            if how in ("freed", "cut", "huge"):
                x = x.detach()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    return how, DISTORTIONS[how](x)
                except (RuntimeError, TypeError, NotImplementedError, ValueError):
                    return f"{how}: not to be had", value
        values = WINDOWS if name == "window_size" and self.random.random() < 0.8 else NUMBERS
        chosen = self.random.choice(values)
        if self.device == "cuda" and name.startswith("max_seqlen") and isinstance(chosen, int) and 0 <= chosen < 5:
            chosen = 5
        return "an unruly object" if isinstance(chosen, Unruly) else str(chosen)[:60], chosen

    def call(self):
        """A function, its arguments, and what is wrong with them."""
        self.dtype = self.random.choice([torch.float32, torch.float16, torch.bfloat16])
        self.gradients = self.random.random() < 0.4
        function = self.random.choice([*ferroflash.__all__[1:], "operator", "operator_backward"])
        arguments = getattr(self, function)()
        changes = {}
        for name in self.random.sample(list(arguments), min(self.random.choice([1, 1, 1, 2, 3]), len(arguments))):
            how, arguments[name] = self.distorted(name, arguments[name])
            changes[name] = how
        if self.random.random() < 0.02:
            changes["without"] = name = self.random.choice(list(arguments))
            del arguments[name]
        about = f"{function} ({self.dtype}, {'with' if self.gradients else 'without'} gradients): {changes}"
        operators = {"operator": "attention", "operator_backward": "attention_backward"}
        if function in operators:
            return getattr(torch.ops.ferroflash, operators[function]), tuple(arguments.values()), {}, about
        return getattr(ferroflash, function), (), arguments, about

    def after(self, result):
        """A backward pass, of gradients that are no better."""
        tensors = result if isinstance(result, (tuple, list)) else [result]
        of = [x for x in tensors if isinstance(x, torch.Tensor) and x.requires_grad and not x.is_meta]
        if of:
            out = self.random.choice(of)
            how, dout = self.distorted("dout", torch.randn_like(out.detach()))
            print(f"  backward: {how}", flush=True)
            leaf = out.grad_fn
            while leaf is not None and not hasattr(leaf, "variable"):
                leaf = next((f for f, _ in leaf.next_functions if f is not None), None)
            if leaf is not None:
                torch.autograd.grad(out, leaf.variable, dout if isinstance(dout, torch.Tensor) else None)


def names_an_argument(message):
    words = set("".join(c if c.isalnum() or c == "_" else " " for c in message).split())
    return bool(words & set(NAMES))


def main(device, seed, calls, only=None):
    """Makes the calls."""
    faulthandler.enable()
    if device == "cpu":
        # What is asked for beyond is refused at once; nobody can be handed it, and nobody waits for it.
        resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))
    else:
        torch.cuda.set_per_process_memory_fraction((4 << 30) / torch.cuda.mem_get_info()[1])
    torch.set_num_threads(1)
    results = 0
    for number in range(calls):
        if only is not None and number != only:
            continue
        # Each call has its own seed, so that it can be made alone.
        torch.manual_seed(number)
        drawn = Drawn(device, f"{seed} {number}")
        function, arguments, named, about = drawn.call()
        print(f"{number} {about}", flush=True)
        backward, begin = False, time.perf_counter()
        try:
            result = function(*arguments, **named)
            results += 1
            backward = True
            drawn.after(result)
            if device == "cuda":
                torch.cuda.synchronize()
        except (ValueError, TypeError, NotImplementedError, RuntimeError, MemoryError, AssertionError) as error:
            if only is not None:
                import traceback

                traceback.print_exc()
            is_pytorchs = PYTORCHS.search(str(error)) is not None
            if isinstance(error, AssertionError) and not is_pytorchs:
                print(f"UNEXPECTED {type(error).__name__}: {error}")
            if not (backward or is_pytorchs or names_an_argument(str(error))):
                print(f"UNNAMED {type(error).__name__}: {error}")
        except BaseException as error:
            print(f"UNEXPECTED {type(error).__name__}: {error}")
        if (seconds := time.perf_counter() - begin) > 20:
            print(f"SLOW {seconds:.1f} s")
    print(f"{results} results of {calls} calls")


@pytest.mark.parametrize("seed", [1, 2])
def test_malformed_calls_end_in_exceptions(device, seed):
    command = [sys.executable, __file__, device, str(seed), str(CALLS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"{done.returncode} after {lines[-1:]}\n{done.stderr[-4000:]}"
    pairs = zip(lines, lines[1:])
    wrong = [f"{call}\n  {found}" for call, found in pairs if found.startswith(("UNNAMED", "UNEXPECTED", "SLOW"))]
    assert not wrong, f"{len(wrong)} of {CALLS} calls\n" + "\n".join(wrong[:20])
    results = int(lines[-1].split()[0])
    # Both what is computed and what is refused.
    assert CALLS / 20 < results < CALLS * 19 / 20, lines[-1]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *map(int, sys.argv[4:]))
