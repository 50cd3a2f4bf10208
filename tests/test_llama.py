"""The functional Llama against the modules of transformers, token by token and without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from nlhf.llm import CausalLM, llama
from nlhf.llm.causal_lm import bytes_tokenizer
from nlhf.llm.llama import Llama, supported
from tests.checks import assert_close

transformers = pytest.importorskip("transformers", reason="the llm extra is not installed")
peft = pytest.importorskip("peft", reason="the llm extra is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

FLOAT32 = 2e-5  # logits of order 10 in float32, after sums in another order
SLOPES = 1e-4  # of a tensor's largest: random layers amplify rounding, both paths are off by up to 5e-5 of it
V = 23
SIZES = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
SHARED = SIZES | {"max_position_embeddings": 64, "initializer_range": 0.5}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped queries": ("Llama", {"num_key_value_heads": 2}),
    "tied, one key": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
    "llama 3": ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 100.0} | LLAMA3}),
    "yarn": ("Llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0}}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen 2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
}
MASK = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
PADDED = [MASK, torch.ones_like(MASK)]


def make(family: str, **options: Any) -> Any:
    """A random network; its biases and norms are moved from 0 and 1, where mistakes would not show."""
    config = getattr(transformers, f"{family}Config")(**SHARED, **options)
    with torch.random.fork_rng():
        torch.random.manual_seed(0)  # transformers draws initial weights from the global generator
        network = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for p in network.parameters():
                p += 0.2 * torch.randn(p.shape) * (p.ndim == 1)
    return network


def adapted(network: Any, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.random.manual_seed(1)
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", **options)
        network = peft.get_peft_model(network, config).eval()
        for name, p in network.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.2)
    return network


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def by_hand(network: Any, prompts: Tensor, mask: Tensor, y: Tensor) -> Tensor:
    """(B, n, T, V) logits of the network, one token at a time, without padding, masks or caches."""
    rows = [
        network(torch.cat([prompt[real], response[:t]])[None]).logits[0, -1]
        for prompt, real, responses in zip(prompts, mask.bool(), y, strict=True)
        for response in responses
        for t in range(y.shape[-1])
    ]
    return torch.stack(rows).float().view(*y.shape, -1)


def chosen(logits: Tensor, y: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> Any:
    family, options = NETWORKS[request.param]
    return make(family, **options)


def weights(network: Any) -> dict[str, Tensor]:
    return dict(network.named_parameters())


def decoded(network: Any, prompts: Tensor, mask: Tensor, y: Tensor) -> Tensor:
    """(B, n, T, V) logits with a cache."""
    model, rows = Llama.of(network), y.flatten(0, 1)
    logits, cache = model.prefill(weights(network), prompts, mask, y.shape[1], y.shape[2] - 1)
    steps = [logits, *(model.decode(row, cache) for row in rows.T[:-1])]
    return torch.stack(steps, 1).unflatten(0, y.shape[:2])


@pytest.mark.parametrize("mask", PADDED, ids=["padded", "even"])
@torch.no_grad()
def test_logits_against_a_loop_over_tokens(network: Any, mask: Tensor) -> None:
    assert supported(network)
    prompts, y, model = tokens(*mask.shape), tokens(3, 2, 4, seed=1), Llama.of(network)
    expected = by_hand(network, prompts, mask, y)
    assert expected.std() > 1  # far from uniform
    assert_close(model.logits(weights(network), prompts, mask, y), expected, atol=FLOAT32)
    assert_close(model.log_prob(weights(network), prompts, mask, y), chosen(expected, y), atol=FLOAT32)
    assert_close(decoded(network, prompts, mask, y), expected, atol=FLOAT32)


@pytest.mark.parametrize("mask", PADDED, ids=["padded", "even"])
def test_rows_that_ended_leave(mask: Tensor) -> None:
    network = make("Llama", num_key_value_heads=2)
    prompts, y, model, rows = tokens(*mask.shape), tokens(3, 2, 4, seed=1), Llama.of(network), torch.tensor([0, 3, 4])
    _, cache = model.prefill(weights(network), prompts, mask, 2, 3)
    model.decode(y.flatten(0, 1)[:, 0], cache)
    cache = cache.keep(rows)
    left = [model.decode(y.flatten(0, 1)[rows, t], cache) for t in (1, 2)]
    expected = decoded(network, prompts, mask, y).flatten(0, 1)[rows, 2:]
    assert_close(torch.stack(left, 1), expected, atol=FLOAT32)


def test_responses_of_one_token() -> None:
    network, y = make("Llama"), tokens(3, 2, 1, seed=1)
    found = Llama.of(network).logits(weights(network), tokens(3, 5), MASK, y)
    assert_close(found.detach(), by_hand(network, tokens(3, 5), MASK, y).detach(), atol=FLOAT32)


@pytest.mark.parametrize("mask", PADDED, ids=["padded", "even"])
def test_gradients_against_autograd(network: Any, mask: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "CHUNK", 5 * V)  # 24 rows: four blocks of five and one of four
    prompts, y = tokens(*mask.shape), tokens(3, 2, 4, seed=1)
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    named = weights(network)
    found = torch.autograd.grad(
        (Llama.of(network).log_prob(named, prompts, mask, y) * slope).sum(), list(named.values())
    )
    expected = torch.autograd.grad((chosen(by_hand(network, prompts, mask, y), y) * slope).sum(), list(named.values()))
    for one, two in zip(found, expected, strict=True):
        assert_close(one, two, atol=SLOPES * float(two.abs().max()))


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters(rslora: bool) -> None:
    network = adapted(make("Llama", num_key_value_heads=2), use_rslora=rslora)
    assert supported(network)
    prompts, y, model = tokens(3, 5), tokens(3, 2, 4, seed=1), Llama.of(network)
    with torch.no_grad():
        expected = by_hand(network, prompts, MASK, y)
        assert_close(model.logits(weights(network), prompts, MASK, y), expected, atol=FLOAT32)
        assert_close(decoded(network, prompts, MASK, y), expected, atol=FLOAT32)
        with network.disable_adapter():
            assert (by_hand(network, prompts, MASK, y) - expected).abs().max() > 0.1
    # a policy: adapters of its own, in the place of the network's
    mine = {name: (1.5 * p).detach().requires_grad_() for name, p in network.named_parameters() if "lora_" in name}

    def call(row: Tensor) -> Any:
        return functional_call(network, mine, (row,))

    found = model.log_prob(weights(network) | mine, prompts, MASK, y)
    loop = chosen(by_hand(call, prompts, MASK, y), y)
    assert_close(found.detach(), loop.detach(), atol=FLOAT32)
    slopes = zip(*(torch.autograd.grad(one.sum(), list(mine.values())) for one in (found, loop)), strict=True)
    for one, two in slopes:
        assert_close(one, two, atol=SLOPES * float(two.abs().max()))


class Widest(TorchDispatchMode):
    """Remembers the largest tensor whose last dimension is the vocabulary."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and V in out.shape[-1:]:
            self.seen = max(self.seen, out.untyped_storage().nbytes() // out.element_size())
        return out


def test_no_more_logits_are_held_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    network, y = make("Llama"), tokens(3, 10, 4, seed=1)
    monkeypatch.setattr(llama, "CHUNK", 40 * V)
    with Widest() as widest:  # type: ignore[no-untyped-call]
        Llama.of(network).log_prob(weights(network), tokens(3, 5), MASK, y).sum().backward()
    assert widest.seen == 40 * V
    with Widest() as widest:  # type: ignore[no-untyped-call]
        Llama.of(network).logits(weights(network), tokens(3, 5), MASK, y)
    assert widest.seen == 120 * V


@torch.no_grad()
def test_bfloat16_is_as_accurate_as_transformers() -> None:
    exact, rounded = make("Llama", num_key_value_heads=2), make("Llama", num_key_value_heads=2).bfloat16()
    prompts, y = tokens(3, 5), tokens(3, 8, 4, seed=1)
    truth = chosen(by_hand(exact, prompts, MASK, y), y)
    found = Llama.of(rounded).log_prob(weights(rounded), prompts, MASK, y)
    theirs = chosen(by_hand(rounded, prompts, MASK, y), y)
    assert found.dtype == torch.float32
    # rounding to eight bits, the same in size: the ratio of two such averages over 96 tokens stays near one
    assert (found - truth).square().mean() < 2 * (theirs - truth).square().mean()


def test_what_differs_is_refused() -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    others = [
        make("Mistral", sliding_window=8),
        make("Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
        make("Llama", rope_parameters=dynamic),
        make("Llama", hidden_act="gelu"),
        make("Llama").double(),
        make("Qwen3"),
        make("Granite", embedding_multiplier=2.0),
        make("Mixtral", num_local_experts=2),
        adapted(make("Llama"), use_dora=True),
        adapted(make("Llama"), rank_pattern={"q_proj": 2}),
        adapted(make("Llama"), lora_bias=True),
        torch.nn.Linear(2, 2),
    ]
    assert [supported(other) for other in others] == [False] * len(others)
    merged = adapted(make("Llama"))
    assert supported(merged)
    merged.merge_adapter()
    assert not supported(merged)


@pytest.mark.parametrize("adapters", [True, False])
def test_other_models_in_chunks(adapters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 goes through transformers, yet holds no more logits than a chunk, and its gradients are autograd's."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.5}
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        network: Any = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=V, bos_token_id=1, eos_token_id=1, **sizes)
        ).eval()
    if adapters:
        network = adapted(network.requires_grad_(False), fan_in_fan_out=True)
    params = {name: p.detach().requires_grad_() for name, p in network.named_parameters() if p.requires_grad}
    policy = CausalLM(network, bytes_tokenizer(), params, 4)
    monkeypatch.setattr(policy, "encode", lambda x: (tokens(3, 5), MASK))
    policy.eos, y = V, tokens(3, 10, 4, seed=1)
    monkeypatch.setattr(llama, "CHUNK", 40 * V)
    with Widest() as widest:  # type: ignore[no-untyped-call]
        found = policy.log_prob([], y)
        slopes = torch.autograd.grad(found.sum(), list(params.values()))
    assert policy.head is not None
    assert widest.seen == 40 * V

    def call(row: Tensor) -> Any:
        return functional_call(network, params, (row,))

    expected = chosen(by_hand(call, tokens(3, 5), MASK, y), y).sum(-1)
    assert_close(found.detach(), expected.detach(), atol=4 * FLOAT32)
    for one, two in zip(slopes, torch.autograd.grad(expected.sum(), list(params.values())), strict=True):
        assert_close(one, two, atol=SLOPES * float(two.abs().max()))


def test_logits_that_are_capped_are_told_apart() -> None:
    network = make("Gemma2", num_key_value_heads=2, head_dim=4, final_logit_softcapping=2.0)
    policy = CausalLM(network, bytes_tokenizer(), weights(network), 4)
    assert policy.llama is None
    assert policy.head is None
    plain = make("Gemma2", num_key_value_heads=2, head_dim=4, final_logit_softcapping=None)
    assert CausalLM(plain, bytes_tokenizer(), weights(plain), 4).head == "model.embed_tokens.weight"
