"""`flash_attn_with_kvcache` against each sequence by itself, in plain torch."""

import pytest
import torch

from ferroflash import flash_attn_with_kvcache
from ferroflash._reference import reference

BATCH, SEQLEN_CACHE, NHEADS, NHEADS_K, HEADDIM = 3, 20, 4, 2, 16


def cache(device, batch=BATCH, dtype=torch.float32):
    shape = (batch, SEQLEN_CACHE, NHEADS_K, HEADDIM)
    return [torch.randn(shape, device=device, dtype=dtype) for _ in range(2)]


def queries(device, seqlen, dtype=torch.float32):
    return torch.randn(BATCH, seqlen, NHEADS, HEADDIM, device=device, dtype=dtype)


def new(device, seqlen):
    return [torch.randn(BATCH, seqlen, NHEADS_K, HEADDIM, device=device) for _ in range(2)]


def one_by_one(q, k_cache, v_cache, seqlens, slots=None, **options):
    """O and LSE of each sequence with as many keys as it has."""
    slopes = options.pop("alibi_slopes", None)
    outs, lses = [], []
    for i, seqlen in enumerate(seqlens):
        slot = i if slots is None else slots[i]
        k, v = (x[slot : slot + 1, :seqlen] for x in (k_cache, v_cache))
        own = slopes if slopes is None or slopes.dim() == 1 else slopes[i]
        out, lse = reference(q[i : i + 1], k, v, alibi_slopes=own, **options)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def assert_right(found, expected):
    for x, y in zip(found, expected):
        assert x.shape == y.shape
        assert torch.allclose(x.double(), y, atol=1e-5)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": (4, 0)},
    "window on both sides": {"window_size": (3, 2)},
    "softcap": {"softcap": 4.0},
    "scale": {"softmax_scale": 0.4},
    "slopes": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 1.0]), "causal": True},
    "slopes of each": {"alibi_slopes": torch.rand(BATCH, NHEADS)},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("seqlen_q", [1, 5])
@pytest.mark.parametrize("appended", [False, True])
def test_sequences_have_lengths_of_their_own(device, name, seqlen_q, appended):
    options = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in OPTIONS[name].items()}
    q, (k_cache, v_cache) = queries(device, seqlen_q), cache(device)
    before = [6, 0, SEQLEN_CACHE - seqlen_q]
    k, v = new(device, seqlen_q) if appended else (None, None)
    grown = [x.clone() for x in (k_cache, v_cache)]
    after = [n + seqlen_q for n in before] if appended else before
    if appended:
        for i, n in enumerate(before):
            for x, y in zip(grown, (k, v)):
                x[i, n : n + seqlen_q] = y[i]
    seqlens = torch.tensor(before, dtype=torch.int32, device=device)
    given = {**options, "cache_seqlens": seqlens, "return_softmax_lse": True}
    found = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **given)
    assert torch.equal(k_cache, grown[0]) and torch.equal(v_cache, grown[1])
    assert_right(found, one_by_one(q, *grown, after, **options))


@pytest.mark.parametrize("seqlens", [None, 0, 7, SEQLEN_CACHE])
def test_all_sequences_may_have_one_length(device, seqlens):
    q, (k_cache, v_cache) = queries(device, 3), cache(device)
    found = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=seqlens, causal=True, return_softmax_lse=True)
    expected = [SEQLEN_CACHE if seqlens is None else seqlens] * BATCH
    assert_right(found, one_by_one(q, k_cache, v_cache, expected, causal=True))


def test_a_loop_of_decoding_is_one_causal_call(device):
    q, (k, v) = queries(device, 12), new(device, 12)
    k_cache, v_cache = (torch.full_like(x, float("nan")) for x in cache(device))
    first = flash_attn_with_kvcache(q[:, :5], k_cache, v_cache, k[:, :5], v[:, :5], cache_seqlens=0, causal=True)
    outs = [first]
    for i in range(5, 12):
        one = [x[:, i : i + 1] for x in (q, k, v)]
        outs.append(flash_attn_with_kvcache(one[0], k_cache, v_cache, *one[1:], cache_seqlens=i, causal=True))
    expected, _ = reference(q, k, v, causal=True)
    assert torch.allclose(torch.cat(outs, 1).double(), expected, atol=1e-5)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_sequences_of_the_cache_may_be_chosen(device, as_tensor, dtype):
    q, (k_cache, v_cache), (k, v) = queries(device, 2), cache(device, 5), new(device, 2)
    slots, before = [4, 0, 2], [3, 3, 3]
    grown = [x.clone() for x in (k_cache, v_cache)]
    for slot, n, *both in zip(slots, before, k, v):
        for x, y in zip(grown, both):
            x[slot, n : n + 2] = y
    seqlens = torch.tensor(before, dtype=torch.int32, device=device) if as_tensor else 3
    idx = torch.tensor(slots, dtype=dtype, device=device)
    options = {"cache_seqlens": seqlens, "cache_batch_idx": idx, "causal": True, "return_softmax_lse": True}
    found = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **options)
    assert torch.equal(k_cache, grown[0]) and torch.equal(v_cache, grown[1])
    assert_right(found, one_by_one(q, *grown, [5, 5, 5], slots, causal=True))


def test_the_cache_may_lie_in_another_tensor(device):
    q, (k_cache, v_cache) = queries(device, 2), cache(device)
    wide = torch.stack([k_cache, v_cache], 2)
    seqlens = torch.tensor([5, 9, 1], dtype=torch.int32, device=device)
    found = flash_attn_with_kvcache(q, wide[:, :, 0], wide[:, :, 1], cache_seqlens=seqlens, return_softmax_lse=True)
    assert_right(found, one_by_one(q, k_cache, v_cache, [5, 9, 1]))


def test_compiles_and_grows_the_cache(device):
    q, (k_cache, v_cache), (k, v) = queries(device, 1), cache(device), new(device, 1)
    seqlens = torch.tensor([5, 9, 1], dtype=torch.int32, device=device)

    def step(q, k_cache, v_cache, k, v, seqlens):
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=seqlens, causal=True)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    caches = [[x.clone() for x in (k_cache, v_cache)] for _ in range(2)]
    found, expected = compiled(q, *caches[0], k, v, seqlens), step(q, *caches[1], k, v, seqlens)
    assert torch.allclose(found, expected, atol=1e-6)
    assert all(torch.equal(x, y) for x, y in zip(*caches))


def test_half_precision(device):
    q, (k_cache, v_cache) = queries(device, 2, torch.bfloat16), cache(device, dtype=torch.bfloat16)
    seqlens = torch.tensor([5, 9, 1], dtype=torch.int32, device=device)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=seqlens)
    assert out.dtype == torch.bfloat16
    expected, _ = one_by_one(q, k_cache, v_cache, [5, 9, 1])
    assert torch.allclose(out.double(), expected, atol=2e-2)


def test_there_are_no_gradients(device):
    q, (k_cache, v_cache) = queries(device, 2).requires_grad_(), cache(device)
    assert not flash_attn_with_kvcache(q, k_cache, v_cache).requires_grad


BAD = {
    "rotary_cos": torch.zeros(4, 8),
    "rotary_sin": torch.zeros(4, 8),
    "cache_leftpad": torch.zeros(BATCH, dtype=torch.int32),
    "block_table": torch.zeros(BATCH, 2, dtype=torch.int32),
    "q": torch.zeros(BATCH, NHEADS, HEADDIM),
    "k_cache": torch.zeros(BATCH + 1, SEQLEN_CACHE, NHEADS_K, HEADDIM),
    "v_cache": torch.zeros(BATCH, SEQLEN_CACHE - 1, NHEADS_K, HEADDIM),
    "k": torch.zeros(BATCH, 18, NHEADS_K, HEADDIM),
    "v": None,
    "cache_seqlens": SEQLEN_CACHE + 1,
    "cache_batch_idx": torch.zeros(BATCH + 1, dtype=torch.int32),
    "num_splits": 1.5,
    "return_softmax_lse": 1,
    "softcap": -1.0,
    "window_size": 3,
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_bad_is_named(name):
    k_cache, v_cache = cache("cpu")
    k, v = new("cpu", 18 if name == "k" else 2)
    arguments = {"q": queries("cpu", 2), "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "cache_seqlens": 3}
    with pytest.raises((ValueError, TypeError), match=f"^{name}: .*; allowed: "):
        flash_attn_with_kvcache(**{**arguments, name: BAD[name]})
    with pytest.raises(TypeError, match="^cache_seqlens: dtype torch.int64; allowed: torch.int32"):
        flash_attn_with_kvcache(**{**arguments, "cache_seqlens": torch.zeros(BATCH, dtype=torch.int64)})


def test_cuda_graphs_capture_decoding(cuda):
    q, (k_cache, v_cache), (k, v) = queries(cuda, 1), cache(cuda), new(cuda, 1)
    seqlens = torch.tensor([5, 9, 1], dtype=torch.int32, device=cuda)

    def step():
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=seqlens, causal=True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(3):
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
        seqlens += 1
        graph.replay()
        assert torch.equal(out, step())
