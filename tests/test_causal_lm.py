"""A Hugging Face model as a policy, against a loop over tokens and an independent call of the model."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nlhf
from nlhf import algorithms, run
from nlhf.core import Geometric
from nlhf.llm import CausalLM, JudgedGame, RegressionSolver, Sample, TokenMixture
from nlhf.llm.decode import sample
from nlhf.llm.preference import cycle_judge, sampled_gap
from tests.checks import assert_close
from tests.tiny import generator

transformers = pytest.importorskip("transformers", reason="the llm extra is not installed")
pytest.importorskip("peft", reason="the llm extra is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

WORDS = [
    "<pad>",
    "<end>",
    *["a", "good", "bad", "film", "was", "the", "not", "so", "great", "dull", "and", "it", "love", "hate", "me"],
]
PROMPTS = ["the film was", "me"]
FLOAT32 = 2e-5  # sums of a few log-probabilities of order 3 in float32, along two paths through the network


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model over 17 words, saved as any Hugging Face model is; relative and absolute positions."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.save_pretrained(path)
    shared = {"vocab_size": len(WORDS), "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.6}
    with torch.random.fork_rng():
        torch.random.manual_seed(0)  # transformers draws initial weights from the global generator
        if request.param == "llama":
            sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared, **sizes, num_key_value_heads=1))
        else:
            config = transformers.GPT2Config(**shared, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1)
            model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(path)
    return path


@pytest.fixture
def policy(folder: Path) -> CausalLM:
    return CausalLM.from_pretrained(folder, max_new_tokens=5, lora_rank=2)


def moved(policy: CausalLM, seed: int = 0) -> CausalLM:
    noise = torch.Generator().manual_seed(seed)
    return policy.with_params({k: p + 0.3 * torch.randn(p.shape, generator=noise) for k, p in policy.params.items()})


def by_hand(folder: Path, prompt: str, tokens: list[int]) -> float:
    """log pi of one response from the plain model, one token at a time, without padding, masks or caches."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prefix = [WORDS.index(w) for w in prompt.split()]
    total = 0.0
    for token in tokens:
        with torch.no_grad():
            logits = model(torch.tensor([prefix])).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[token])
        prefix.append(token)
        if token == 1:
            break
    return total


def test_log_prob_against_a_loop_over_tokens(folder: Path, policy: CausalLM) -> None:
    y = torch.tensor(
        [
            [[2, 3, 4, 5, 6], [7, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
            [[8, 8, 1, 1, 1], [3, 3, 3, 3, 1], [5, 1, 9, 9, 9]],
        ]
    )
    expected = [
        [by_hand(folder, prompt, row) for row in rows.tolist()] for prompt, rows in zip(PROMPTS, y, strict=True)
    ]
    assert_close(policy.log_prob(PROMPTS, y), expected, atol=FLOAT32)


@pytest.mark.parametrize("mixed", [False, True])
def test_decoding_reports_what_scoring_finds(policy: CausalLM, mixed: bool) -> None:
    law: Any = TokenMixture(((moved(policy), 0.6), (policy, 0.4))) if mixed else moved(policy)
    y, log_prob = law.sample(PROMPTS, 40, torch.Generator().manual_seed(0))
    assert y.shape == (2, 40, 5)
    assert_close(log_prob, law.log_prob(PROMPTS, y).detach(), atol=FLOAT32)
    ended = (y == 1).int().cumsum(-1)
    assert (ended[..., -1] > 0).any()
    assert (y[ended > 0] == 1).all()  # nothing follows an end


def test_responses_decoded_together_are_scored_alike(policy: CausalLM) -> None:
    """A policy, the reference and their mixture in one loop, which rows leave as they end."""
    policy = CausalLM(policy.network, policy.tokenizer, policy.params, 24)
    one = moved(policy)
    laws = [[(one, 1.0)], [(one, 0.6), (policy, 0.4)], [(policy, 1.0)]]
    drawn = sample([(parts, n) for parts, n in zip(laws, (30, 20, 1), strict=True)], PROMPTS, generator(1))
    for parts, (y, log_prob) in zip(laws, drawn, strict=True):
        # up to 24 tokens, sums of order 40
        assert_close(log_prob, TokenMixture(tuple(parts)).log_prob(PROMPTS, y).detach(), atol=5 * FLOAT32)
    y, log_prob = one.sample(["me"], 50, generator(2))
    ended = (y == 1).any(-1)
    assert 13 < int(ended.sum()) < 50
    short = CausalLM(policy.network, policy.tokenizer, one.params, 2).sample(["me"], 50, generator(2))
    assert torch.equal(short[0], y[..., :2])  # who leaves, and when, changes nobody else's randomness


def test_decoding_follows_the_law(policy: CausalLM) -> None:
    short = moved(CausalLM(policy.network, policy.tokenizer, policy.params, 1))
    y, _ = short.sample(["me"], 5000, torch.Generator().manual_seed(0))
    share = torch.bincount(y[0, :, 0], minlength=len(WORDS)) / 5000
    exact = short.log_prob(["me"], torch.arange(len(WORDS))[None, :, None]).exp()[0]
    assert_close(exact.sum(), 1.0, atol=FLOAT32)
    assert ((share - exact).abs() <= 5 * (exact * (1 - exact) / 5000).sqrt() + 1e-6).all()


def test_prompts_do_not_see_each_other(policy: CausalLM) -> None:
    """Left padding, the order of prompts and the number of responses change nothing."""
    law = moved(policy)
    y, log_prob = law.sample(PROMPTS, 3, torch.Generator().manual_seed(0))
    for i, prompt in enumerate(PROMPTS):
        assert_close(law.log_prob([prompt], y[i : i + 1, :1])[0, 0], log_prob[i, 0], atol=FLOAT32)
    assert_close(law.log_prob(PROMPTS[::-1], y.flip(0)), log_prob.flip(0), atol=FLOAT32)


def test_adapters_at_zero_are_the_model_and_the_reference_stays(folder: Path, policy: CausalLM) -> None:
    y, before = policy.sample(PROMPTS, 4, torch.Generator().manual_seed(0))
    changed = moved(policy)
    assert (changed.log_prob(PROMPTS, y) - before).abs().max() > 0.1
    assert_close(policy.freeze().log_prob(PROMPTS, y), before, atol=FLOAT32)
    whole = CausalLM.from_pretrained(folder, max_new_tokens=5, lora_rank=None)
    assert_close(whole.log_prob(PROMPTS, y), before, atol=FLOAT32)
    assert sum(p.numel() for p in whole.params.values()) > sum(p.numel() for p in policy.params.values())


def test_gradient_reaches_the_adapters(policy: CausalLM) -> None:
    params = {name: p.clone().requires_grad_() for name, p in moved(policy).params.items()}
    live = policy.with_params(params)
    y = torch.tensor([[[2, 3, 1, 1, 1]], [[4, 5, 6, 7, 8]]])
    name = next(name for name in params if "lora_A" in name)
    (slope,) = torch.autograd.grad(live.log_prob(PROMPTS, y).sum(), params[name])
    step = 1e-2

    def at(shift: float) -> torch.Tensor:
        shifted = params[name].detach().clone()
        shifted[0, 0] += shift
        with torch.no_grad():
            return policy.with_params({**params, name: shifted}).log_prob(PROMPTS, y).double().sum()

    # central difference: wrong by about step^2 times a third derivative of order 100, and 1e-6 / step in float32
    assert float(at(step) - at(-step)) / (2 * step) == pytest.approx(float(slope[0, 0]), abs=1e-2)


def test_the_judge_is_made_antisymmetric(policy: CausalLM) -> None:
    def prefers_the_first(prompts: Any, a: Any, b: Any) -> list[float]:
        return [0.9 if len(s) >= len(t) else 0.3 for s, t in zip(a, b, strict=True)]

    game = JudgedGame(prefers_the_first, tuple(PROMPTS), policy.text)
    y, _ = policy.sample(PROMPTS, 6, torch.Generator().manual_seed(0))
    z, _ = policy.sample(PROMPTS, 4, torch.Generator().manual_seed(1))
    p = game.win_prob(PROMPTS, y, z)
    assert p.shape == (2, 6, 4)
    assert_close(p + np.swapaxes(game.win_prob(PROMPTS, z, y), 1, 2), 1.0, atol=1e-15)
    assert_close(np.diagonal(game.win_prob(PROMPTS, y, y), axis1=1, axis2=2), 0.5, atol=1e-15)
    with pytest.raises(ValueError, match="judge must return 48 probabilities"):
        JudgedGame(lambda prompts, a, b: [2.0] * len(a), tuple(PROMPTS), policy.text).win_prob(PROMPTS, y, z)
    with pytest.raises(ValueError, match=r"at least one prompt, got \(\)"):
        JudgedGame(cycle_judge, (), policy.text)


def test_the_scripted_judge_is_intransitive() -> None:
    """Long beats cheerful beats varied beats long."""
    long, cheerful, varied = "word " * 40, "good good", "apple river stone"
    win = cycle_judge(["", "", ""], [long, cheerful, varied], [cheerful, varied, long])
    assert (np.asarray(win) > 0.5).all()


@pytest.mark.parametrize("name", algorithms.__all__)
def test_the_same_algorithm_runs_on_a_language_model(policy: CausalLM, name: str) -> None:
    algorithm = getattr(nlhf, name)(eta=1.0, tau=0.1)
    game = JudgedGame(cycle_judge, tuple(PROMPTS), policy.text)
    solver = RegressionSolver(game, Sample(8, correct=False), steps=2, optimizer=partial(torch.optim.Adam, lr=1e-2))
    options: Any = {"policy": policy, "metrics": (sampled_gap(policy, 16, seed=0),), "seed": 3}
    one, two = (run(algorithm, solver, 2, **options) for _ in range(2))
    assert one.records == two.records
    recorded = {metric for _, metric, _ in one.records}
    assert recorded >= {"duality_gap", "duality_gap_low", "duality_gap_high", "kl_to_reference", "win_rate"}
    low, value, high = (one.values(f"duality_gap{end}")[1] for end in ("_low", "", "_high"))
    assert (low <= high).all()
    assert np.isfinite(value).all()


def test_mixtures_keep_their_caches_apart(policy: CausalLM) -> None:
    """The mixture of a policy with itself is the policy, and weight one on either part is that part."""
    one, two = moved(policy, 1), moved(policy, 2)
    y, _ = one.sample(PROMPTS, 8, torch.Generator().manual_seed(0))
    assert_close(TokenMixture(((one, 0.3), (one, 0.7))).log_prob(PROMPTS, y), one.log_prob(PROMPTS, y), atol=FLOAT32)
    same, _ = TokenMixture(((one, 0.3), (one, 0.7))).sample(PROMPTS, 8, torch.Generator().manual_seed(0))
    assert (same == y).float().mean() > 0.95  # a uniform number within rounding of a boundary may fall either way
    alone = TokenMixture.of(Geometric(((one, 1.0), (two, 0.0))))
    assert alone.parts == ((one, 1.0),)


@pytest.mark.parametrize("make", ["missing", "empty", "file"])
def test_missing_models_are_named(tmp_path: Path, make: str) -> None:
    path = tmp_path / "model"
    if make == "empty":
        path.mkdir()
    elif make == "file":
        path.write_text("not a model")
    with pytest.raises(FileNotFoundError, match=f"model {path}: .*; give a Hugging Face folder or a GGUF file"):
        CausalLM.from_pretrained(path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_a_gpu_is_the_one_on_the_cpu(folder: Path, dtype: torch.dtype) -> None:
    """In float32 up to rounding; bfloat16 keeps three digits of log-probabilities of order 20."""
    y = torch.tensor([[[2, 3, 4, 5, 6], [7, 1, 1, 1, 1]], [[8, 8, 1, 1, 1], [3, 3, 3, 3, 1]]])
    found = []
    for device in ("cpu", "cuda"):
        policy = CausalLM.from_pretrained(folder, max_new_tokens=5, lora_rank=2, dtype=dtype, device=device)
        game = JudgedGame(cycle_judge, tuple(PROMPTS), policy.text)
        solver = RegressionSolver(game, Sample(4, correct=False), steps=2, optimizer=partial(torch.optim.Adam, lr=1e-3))
        trace = run(nlhf.NashMD(eta=1.0, tau=0.1), solver, 2, policy=policy, metrics=(sampled_gap(policy, 4, seed=0),))
        assert all(p.device.type == device for p in trace.policy.params.values())
        found.append(policy.log_prob(PROMPTS, y.to(device)).float().cpu())
    assert_close(found[1], found[0], atol=FLOAT32 if dtype == torch.float32 else 0.5)


GGUF = os.environ.get("NLHF_GGUF", "")


@pytest.mark.slow
@pytest.mark.skipif(not GGUF, reason="set NLHF_GGUF to a GGUF file to load a real model")
def test_a_gguf_file() -> None:
    policy = CausalLM.from_pretrained(GGUF, max_new_tokens=8)
    y, log_prob = policy.sample(["What is the capital of France?"], 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        # eight tokens of a 30-layer network in float32, along two paths
        assert_close(policy.log_prob(["What is the capital of France?"], y), log_prob, atol=1e-2)
