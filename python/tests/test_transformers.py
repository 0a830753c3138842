"""Small models of random weights, which compute with ferroflash what they compute with eager attention."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

import ferroflash.integrations.transformers as integration  # noqa: E402

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}
CAUSAL = {
    "Llama": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": 7},
    "Gemma2": {
        **GROUPED,
        "head_dim": 16,
        "sliding_window": 9,
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 16,
    },
    "GptOss": {**GROUPED, "head_dim": 16, "sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    "GPT2": {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
}
DROPOUTS = (
    "attention_dropout",
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
    "attention_probs_dropout_prob",
    "hidden_dropout_prob",
)


@pytest.fixture(scope="module", autouse=True)
def registered():
    integration.register()


def build(name, sizes, head, device, implementation, **options):
    config = getattr(transformers, f"{name}Config")(**sizes, **options)
    for dropout in DROPOUTS:
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    torch.manual_seed(3)
    model = getattr(transformers, name + head)._from_config(config, attn_implementation=implementation)
    for parameter in (p for n, p in model.named_parameters() if "sinks" in n):
        torch.nn.init.normal_(parameter)
    return model.to(device).eval()


def both(name, sizes, head, device):
    return [build(name, sizes, head, device, implementation) for implementation in ("eager", "ferro")]


def padded(device, side):
    mask = torch.ones(3, 24, dtype=torch.long, device=device)
    if side == "right":
        mask[1, 17:] = mask[2, 5:] = 0
    elif side == "left":
        mask[1, :7] = mask[2, :19] = 0
    return mask


def drawn_tokens(device, seqlen=24):
    return torch.randint(1, 99, (3, seqlen), device=device)


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", CAUSAL)
def test_logits_and_gradients_of_decoders(device, name, side):
    tokens, mask = drawn_tokens(device), padded(device, side)
    # What a row of padding predicts is no matter: eager attention gives it the mean of V, ours nothing.
    begins = mask.diff(dim=1, prepend=mask[:, :1]) == 1
    labels = tokens.masked_fill((mask == 0) | begins, -100)
    results = []
    for model in both(name, CAUSAL[name], "LMHeadModel" if name == "GPT2" else "ForCausalLM", device):
        output = model(tokens, attention_mask=mask, labels=labels, use_cache=False)
        output.loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((output.logits[mask.bool()], gradients))
    (eager, eager_gradients), (ours, our_gradients) = results
    assert torch.allclose(ours, eager, atol=2e-5)
    assert our_gradients.keys() == eager_gradients.keys()
    for parameter, gradient in eager_gradients.items():
        assert torch.allclose(our_gradients[parameter], gradient, atol=2e-5), parameter


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", CAUSAL)
def test_generation(device, name, side):
    tokens, mask = drawn_tokens(device), padded(device, side)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    eager, ours = (
        model.generate(tokens, attention_mask=mask, **options)
        for model in both(name, CAUSAL[name], "LMHeadModel" if name == "GPT2" else "ForCausalLM", device)
    )
    assert torch.equal(ours, eager)


@pytest.mark.parametrize("side", ["none", "right"])
def test_encoders(device, side):
    tokens, mask = drawn_tokens(device), padded(device, side)
    eager, ours = (model(tokens, attention_mask=mask)[0] for model in both("Bert", SIZES, "Model", device))
    assert torch.allclose(ours[mask.bool()], eager[mask.bool()], atol=2e-5)


def test_position_biases(device):
    sizes = {
        "vocab_size": 99,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    }
    tokens, mask = drawn_tokens(device), padded(device, "right")
    results = []
    for model in both("T5", {**sizes, "decoder_start_token_id": 0}, "ForConditionalGeneration", device):
        output = model(tokens, attention_mask=mask, labels=drawn_labels(device))
        output.loss.backward()
        bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad
        results.append((output.logits, bias))
    for eager, ours in zip(*results):
        assert torch.allclose(ours, eager, atol=2e-5)


def drawn_labels(device):
    return torch.arange(1, 37, device=device).reshape(3, 12)


def test_training_goes_the_same_way(device):
    losses = []
    tokens = drawn_tokens(device)
    for model in both("Llama", GROUPED, "ForCausalLM", device):
        optimiser = torch.optim.SGD(model.train().parameters(), lr=0.3)
        losses.append([])
        for _ in range(5):
            loss = model(tokens, labels=tokens).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[1][-1] < losses[1][0] - 0.1


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_models_compile(device, name):
    torch._dynamo.reset()
    model = build(name, CAUSAL[name], "ForCausalLM", device, "ferro")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens, mask = drawn_tokens(device), padded(device, "left")
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, use_cache=False).logits
        found = compiled(tokens, attention_mask=mask, use_cache=False).logits
    assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=2e-5)


def test_dropout_is_on_in_training_alone(device):
    config = {**GROUPED, "attention_dropout": 0.0}
    model = build("Llama", config, "ForCausalLM", device, "ferro")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    tokens = drawn_tokens(device)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


def test_masks_that_users_pass(device):
    tokens = drawn_tokens(device)
    blocks = torch.ones(24, 24, dtype=torch.bool, device=device).tril()
    blocks[10:, :10] = False
    added = torch.zeros(3, 1, 24, 24, device=device).masked_fill(~blocks, torch.finfo(torch.float32).min)
    eager, ours = both("Llama", GROUPED, "ForCausalLM", device)
    expected = eager(tokens, attention_mask=added).logits
    for mask in (added, blocks.expand(3, 1, 24, 24)):
        assert torch.allclose(ours(tokens, attention_mask=mask).logits, expected, atol=2e-5)


def test_masks_are_not_in_memory():
    """What only padding makes different from a causal mask, a window, or all keys, takes a row of keys at most."""
    from transformers.masking_utils import bidirectional_mask_function

    padding = torch.ones(2, 10, dtype=torch.bool)
    padding[1, 8:] = False
    sizes = {"batch_size": 2, "q_length": 10, "kv_length": 10}
    causal = integration.attention_mask(**sizes, attention_mask=padding)
    assert causal.left is None and causal.padding.shape == (2, 1, 1, 10)
    window = integration.attention_mask(**sizes, local_size=4)
    assert window == integration.CausalMask(3, None)
    both_ways = {
        "allow_is_causal_skip": False,
        "allow_is_bidirectional_skip": True,
        "mask_function": bidirectional_mask_function,
    }
    assert integration.attention_mask(**sizes, **both_ways, attention_mask=padding).shape == (2, 1, 1, 10)
    assert integration.attention_mask(**sizes, **both_ways) is None


def test_names_that_transformers_takes_for_another_are_refused():
    with pytest.raises(ValueError, match="^name: 'ferroflash'; allowed: one without \"flash\""):
        integration.register("ferroflash")


def test_probabilities_are_refused():
    model = build("Llama", GROUPED, "ForCausalLM", "cpu", "ferro")
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, 4, 6, 16)
    with pytest.raises(ValueError, match="^output_attentions: True; allowed: False"):
        integration.attention_forward(attention, x, x, x, None, output_attentions=True)
