"""The torch world: policies that spell, the laws they decode, the gradients of the solvers, learned preferences.

What is said of sampling is said by listing every outcome, in float64 where a transformer is ours, in float32 where it
is one of `transformers`. The mutants re-create bugs that public libraries have shipped, in our own code.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from importlib.util import find_spec
from itertools import product
from typing import Annotated, Any, TypeAlias
from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit, log_softmax, softmax
from torch import Tensor
from torch.func import functional_call
from torch.optim import SGD

from nlhf import MagneticMD, NashMD
from nlhf.claims.claim import Claim
from nlhf.claims.instances import KINDS, Duel, Floats, Instance, win_probs
from nlhf.core import Geometric, Prox
from nlhf.llm import causal_lm, data, decode, fit, folders, losses, policy, solver
from nlhf.llm.causal_lm import CausalLM
from nlhf.llm.data import Comparison, read_comparisons
from nlhf.llm.fit import fit_preference
from nlhf.llm.llama import Llama
from nlhf.llm.losses import Batch
from nlhf.llm.policy import LogitTable, Params, TokenMixture, TokenPolicy
from nlhf.llm.preference import JudgedGame
from nlhf.llm.preference_model import BradleyTerry, LearnedJudge, PreferenceModel
from nlhf.llm.solver import ContrastiveSolver, Descent, PolicyGradientSolver, RegressionSolver, Sample
from nlhf.llm.tiny import TinyTransformer

Bug: TypeAlias = Callable[[], AbstractContextManager[Any]]

PAPER = "Munos et al. 2024, arXiv:2312.00886"
CALANDRIELLO = "Calandriello et al. 2024, arXiv:2403.08635"
FLOAT32 = 2e-5
"""Sums of a few float32 log-probabilities of order 3, along two paths through a network."""
SLOPES = 1e-4
"""Of the largest entry of a float32 gradient: random layers amplify rounding, in `transformers` as in our code."""
EXACTLY = float(np.finfo(np.float64).tiny)
"""A tolerance for equality to the last bit."""
FITTED = 1e-6
"""Losses are quadratic at their minimum: it is found to 1e-8 where they are resolved to 1e-16, times conditioning."""
FAMILIES = ("llama", "gpt2")
END, WORDS = 0, ("<end>", "a", "b")

# --- instances: games that a tiny transformer spells, language models of three words, pairs of texts ---


def _other(value: int, rng: np.random.Generator, scale: float) -> int:
    return int(rng.integers(2**31)) if rng.uniform() < 0.5 else value


@dataclass(frozen=True, repr=False)
class Spelling(Duel):
    """A game whose responses are spelled in `vocab` tokens by transformers that were drawn with `seed`."""

    vocab: int
    seed: Annotated[int, _other]

    @cached_property
    def spelled(self) -> tuple[TinyTransformer, ...]:
        """Transformers near the laws pi, mu and q of the game, not at them."""
        made = []
        for k, start in enumerate((self.pi, self.mu, self.q)):
            one = TinyTransformer(start, vocab=self.vocab, width=8, layers=1, heads=2, seed=self.seed + k)
            head = torch.randn(self.vocab, 8, generator=torch.Generator().manual_seed(self.seed + k)).double()
            made.append(one.with_params({**one.params, "head.weight": 0.7 * head}))
        return tuple(made)

    @cached_property
    def tables(self) -> tuple[LogitTable, ...]:
        """The laws pi, mu and q as tables of logits."""
        return LogitTable(self.pi), LogitTable(self.mu), LogitTable(self.q)

    @property
    def b(self) -> float:
        """Weight of the reference in a mixture."""
        return float(np.clip(self.share, 0.05, 0.95))

    @property
    def eta(self) -> float:
        """A step size with eta tau = b."""
        return self.b / self.tau

    @property
    def everything(self) -> tuple[Floats, Tensor]:
        """The only prompt, and all responses to it."""
        return np.zeros(1, dtype=int), torch.arange(self.n)[None]


@st.composite
def spellings(draw: st.DrawFn, sizes: tuple[int, int] = (2, 6)) -> Spelling:
    """2 to 6 responses of one to three tokens; every kind of game; policies from flat to far apart."""
    n, kind, spread = draw(st.integers(*sizes)), draw(st.sampled_from(KINDS)), draw(st.sampled_from([1.0, 0.1, 2.0]))
    tau, share, vocab = draw(st.floats(0.1, 5)), draw(st.floats(0, 1)), draw(st.sampled_from([2, 3]))
    seed = draw(st.integers(0, 2**31 - 1))
    rng = np.random.default_rng(seed)
    laws = spread * rng.standard_normal((4, n))
    return Spelling(win_probs(rng, n, kind), laws[0], laws[1], laws[2], laws[3], tau, share, vocab, seed)


@dataclass(frozen=True, repr=False)
class Text(Instance):
    """A language model of three words, one of which ends a response, with adapters; prompts; a judge of strings.

    Args:
        family: "llama", whose positions are relative and which `nlhf.llm.llama` computes, or "gpt2".
        model: seed of the network.
        seed: of the adapters, the prompts, the taste and the samples.
        lengths: of the prompts, in tokens: shorter ones are padded.
        share: weight of the reference in a mixture.
        eta: a step size.
    """

    family: Annotated[str, lambda value, rng, scale: str(rng.choice(FAMILIES))]
    model: int
    seed: Annotated[int, _other]
    lengths: Annotated[tuple[int, ...], lambda value, rng, scale: tuple(rng.integers(1, 5, len(value)).tolist())]
    share: float
    eta: float

    @cached_property
    def pi(self) -> CausalLM:
        """The model with adapters that change it."""
        drawn = torch.Generator().manual_seed(self.seed)
        params = {
            name: p if "lora_A" in name else 0.5 * torch.randn(p.shape, generator=drawn)
            for name, p in self.mu.params.items()
        }
        return self.mu.with_params(params)

    @cached_property
    def mu(self) -> CausalLM:
        """The reference: the adapters are there, and change nothing."""
        network = adapted(self.family, self.model)
        return CausalLM(network, tokenizer(), causal_lm.trainable(network, self.seed), 3)

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """Words, none of them an end."""
        rng = np.random.default_rng(self.seed)
        return tuple(" ".join(rng.choice(WORDS[1:], length)) for length in self.lengths)

    @cached_property
    def game(self) -> JudgedGame:
        """Any taste, intransitive and biased for whoever is named first."""
        return JudgedGame(partial(taste, seed=self.seed), self.prompts, self.pi.text)

    @cached_property
    def step(self) -> Floats:
        """What one step of each solver takes away, all prompts at a time."""
        return text_steps(self, None)

    @cached_property
    def everything(self) -> tuple[tuple[str, ...], Tensor]:
        """The prompts, and all 15 responses of up to three tokens to each: padded after their end."""
        rows = {tuple(_ended(row)) for row in product(range(3), repeat=3)}
        return self.prompts, torch.tensor(sorted(rows)).expand(len(self.prompts), -1, -1)


def _ended(row: Sequence[int]) -> list[int]:
    end = row.index(END) if END in row else len(row)
    return [*row[:end], *[END] * (len(row) - end)]


@st.composite
def texts(draw: st.DrawFn, longest: int = 3, padded: bool = False) -> Text:
    """Both families, prompts of one to four tokens that need padding, always or at times."""
    lengths = draw(st.lists(st.integers(1, 4), min_size=1 + padded, max_size=longest, unique=padded))
    family, model, seed = draw(st.sampled_from(FAMILIES)), draw(st.integers(0, 3)), draw(st.integers(0, 2**31 - 1))
    return Text(family, model, seed, tuple(lengths), draw(st.floats(0.2, 0.8)), draw(st.floats(0.2, 3)))


def taste(prompts: Sequence[Any], a: Sequence[str], b: Sequence[str], seed: int) -> list[float]:
    """A number in [0, 1) for every question, the same at every time."""
    return [zlib.crc32(f"{seed} {asked}".encode()) / 2**32 for asked in zip(prompts, a, b, strict=True)]


@lru_cache
def tokenizer() -> Any:
    """A word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[END]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=WORDS[END], pad_token=WORDS[END])


@lru_cache
def plain(family: str, seed: int) -> Any:
    """A network of random weights, N(0, 1 / fan_in)."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any]
    ends: dict[str, Any] = {"eos_token_id": END, "bos_token_id": END, "pad_token_id": None}
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights from the global generator
        if family == "gpt2":
            shape = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32}
            network: Any = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), **shape, **ends))
        else:
            shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
            network = LlamaForCausalLM(
                LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=1, max_position_embeddings=32, **shape, **ends)
            )
    causal_lm.draw_weights(network, seed)
    return network.requires_grad_(False).eval()


@lru_cache
def adapted(family: str, seed: int) -> Any:
    """The same network with room for adapters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the layers of GPT-2 are transposed, which peft then minds
        return causal_lm.with_adapters(copy.deepcopy(plain(family, seed)), 2, "CAUSAL_LM").eval()


@dataclass(frozen=True, repr=False)
class Judging(Instance):
    """A learned judge of random weights, and comparisons of three texts with soft or hard labels."""

    kind: str
    seed: Annotated[int, _other]
    soft: bool

    @cached_property
    def judge(self) -> LearnedJudge:
        """One with opinions: its head is drawn, too."""
        one = blank(self.kind, self.seed % 4)
        return one.with_params(
            {**one.params, "head": torch.randn(8, generator=torch.Generator().manual_seed(self.seed))}
        )

    @cached_property
    def judged(self) -> list[Comparison]:
        """Every pair of a good, a fair and a bad text, on prompts of different lengths."""
        rng = np.random.default_rng(self.seed)
        names = rng.permutation(["yes", "no way", "maybe so", "a", "not", "b c"])[:3]
        prompts = [" ".join(rng.choice(["Why", "How"], k + 1)) for k in range(2)]
        return [
            Comparison(x, str(names[i]), str(names[j]), float(rng.uniform(0.05, 0.95)) if self.soft else 1.0)
            for x in prompts
            for i, j in ((0, 1), (1, 2), (0, 2))
        ]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The comparisons as they stand in a file."""
        if self.soft:
            return [dict(zip(("prompt", "response_a", "response_b", "p_a"), c, strict=True)) for c in self.judged]
        return [{"prompt": c.prompt, "chosen": c.a, "rejected": c.b} for c in self.judged]


@lru_cache
def blank(kind: str, seed: int) -> LearnedJudge:
    """A judge that has not learned anything."""
    make = PreferenceModel if kind == "pairwise" else BradleyTerry
    return make.from_scratch(width=8, layers=1, heads=2, length=16, seed=seed)


def judgings(soft: tuple[bool, ...] = (True, False)) -> st.SearchStrategy[Judging]:
    """Both kinds of judges."""
    kinds = st.sampled_from(["pairwise", "bradley-terry"])
    return st.builds(Judging, kinds, st.integers(0, 2**31 - 1), st.sampled_from(soft))


# --- laws and gradients by their definitions ---


def read(tokens: Tensor, eos: int | None) -> Tensor:
    """(..., T) whether a token comes no later than the first end."""
    ends = (tokens == (-1 if eos is None else eos)).long()
    return (ends.cumsum(-1) == ends) & (ends.cumsum(-1).cumsum(-1) <= 1)


def by_tokens(one: TokenPolicy, x: Any, y: Any) -> Tensor:
    """(B, n, T) log pi(y_t | x, y_<t), zero after the end of a response."""
    tokens = one.spell(y)
    found = one.next_log_probs(x, y).gather(-1, tokens.expand(len(x), -1, -1)[..., None])[..., 0]
    return found.masked_fill(~read(tokens, one.eos), 0.0)


def law(one: TokenPolicy, i: Spelling) -> Tensor:
    """(n,) log pi, one token after the other."""
    return by_tokens(one, *i.everything).sum(-1)[0]


def blended(parts: Sequence[tuple[TokenPolicy, float]], x: Any, y: Any, following: Any) -> Tensor:
    """(B, n, T, V) log prod_k pi_k(. | y_<t)^w_k / Z(y_<t)."""
    return torch.as_tensor(sum(w * following(one, x, y) for one, w in parts)).log_softmax(-1)


def by_hand(one: CausalLM, x: Sequence[str], y: Tensor) -> Tensor:
    """(B, n, T, V) log pi(. | x, y_<t) by the network alone: every prompt for itself, no padding, mask or cache."""
    found = []
    for prompt, rows in zip(x, y, strict=True):
        start = torch.tensor([WORDS.index(word) for word in prompt.split()]).expand(len(rows), -1)
        out = functional_call(one.network, dict(one.params), (torch.cat([start, rows[:, :-1]], 1),))
        found.append(out.logits[:, start.shape[1] - 1 :])
    return torch.stack(found).double().log_softmax(-1)


def listed(one: CausalLM, x: Sequence[str], y: Tensor) -> Tensor:
    """(B, n) log pi(y | x), end included, by the network alone."""
    return (by_hand(one, x, y).gather(-1, y[..., None])[..., 0] * read(y, END)).sum(-1)


def surprises(asked: Sequence[Any], x: Any, n: int, seed: int, following: Callable[[Any, Any, Any], Tensor]) -> Floats:
    """Of samples of all laws asked for, decoded together: how far the random numbers lie outside of the cells
    [F(y_t - 1), F(y_t)) of the tokens that they drew, and the reported log-probabilities from the true ones.

    Args:
        asked: policies, and geometric mixtures ((pi, 1 - b), (mu, b)) that are decoded token by token.
        following: (policy, x, tokens) -> (B, n, T, V) log pi(. | x, y_<t).
    """
    numbers: list[Tensor] = []

    def uniform(rows: int, generator: torch.Generator) -> Tensor:
        numbers.append(decode.uniform(rows, generator))
        return numbers[-1]

    drawn = decode.sample(
        [(TokenMixture.of(one).parts, n) for one in asked], x, torch.Generator().manual_seed(seed), uniform
    )
    u, found = torch.stack(numbers, -1).unflatten(0, (len(x), -1)).split(n, 1), []
    for one, (tokens, log_prob), level in zip(asked, drawn, u, strict=True):
        parts = one.parts if isinstance(one, Geometric) else ((one, 1.0),)
        log_probs = blended(parts, x, tokens, following).double()
        upper = log_probs.exp().cumsum(-1).gather(-1, tokens[..., None])[..., 0]
        chosen = log_probs.gather(-1, tokens[..., None])[..., 0]
        lower, kept, T = upper - chosen.exp(), read(tokens, parts[0][0].eos), level.shape[-1]  # T: all have ended
        outside = (level.clamp(lower[..., :T], upper[..., :T]) - level) * kept[..., :T]
        found += [outside.flatten(), (log_prob - (chosen * kept).sum(-1)).flatten()]
    return torch.cat(found).detach().numpy()


def gradient(value: Tensor, params: Params) -> Floats:
    """Flat."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(params.values()))]).numpy()


def scaled(slope: Callable[[Any], Floats], exact: Callable[[Any], Floats]) -> Callable[[Any], Floats]:
    """A float32 gradient in units of the largest entry of the exact one: what cancels in the others is as large."""
    return lambda i: slope(i) / largest(exact(i))


def largest(values: Floats) -> float:
    """The largest absolute value; 1 where all are 0."""
    return float(np.abs(values).max()) or 1.0


def live(one: Any) -> Any:
    """The policy, ready to be differentiated."""
    return one.with_params({name: p.detach().clone().requires_grad_() for name, p in one.params.items()})


def fallen(solve: Any, prox: Prox, start: Any, rate: float = 1.0) -> Floats:
    """The gradient of a solver's loss: what one step of gradient descent takes away, flat."""
    found, _ = solve(prox, start, seed=0)
    return torch.cat([((p - found.params[name]) / rate).flatten() for name, p in start.params.items()]).numpy()


def covariance(weights: Tensor, residual: Tensor, one: Any, log_prob: Tensor, factor: float) -> Floats:
    """factor Cov_{y ~ weights}(residual(y), grad log pi(y)), flat."""
    centred = residual - weights @ residual
    return gradient(factor * (weights * centred).detach() @ log_prob, one.params)


DESCENT: Any = partial(SGD, lr=1.0)


@dataclass(frozen=True)
class Outcomes(Sample):
    """Every pair of responses as a prompt of its own, which counts as much as the pair is probable; the opponent's
    responses are all there, each with its probability. One step on it is the expectation of a sampled one."""

    x: Any = None
    """(B,) prompts."""
    y: Any = None
    """(B, n) all responses, of probabilities."""
    law: Any = None
    """(B, n), and"""
    versus: Any = None
    """(B, n) those of the opponent."""

    def choose(self, game: Any, generator: Any) -> tuple[Any, Tensor]:
        """B n^2 outcomes and their probabilities, all prompts alike."""
        chance = (self.law[:, :, None] * self.law[:, None, :]).flatten() / len(self.x)
        times = self.y.shape[1] ** 2
        x = np.repeat(self.x, times) if isinstance(self.x, np.ndarray) else [p for p in self.x for _ in range(times)]
        return x, chance

    def draw(self, wanted: Any, x: Any, generator: Any) -> Any:
        """Both responses of every outcome, and all of the opponent's."""
        n = self.y.shape[1]
        one, two = torch.tensor(list(product(range(n), repeat=2))).T
        pairs = torch.stack([self.y[:, one], self.y[:, two]], 2).flatten(0, 1)
        against = self.y.repeat_interleave(n * n, 0), self.versus.repeat_interleave(n * n, 0)
        return [[(pairs, torch.full(pairs.shape[:2], 0.5, dtype=torch.float64))], *[[against] for _ in wanted[1:]]]


def every(x: Any, y: Any, drawn: Tensor, versus: Tensor) -> Outcomes:
    """Outcomes of two responses from the one law (B, n), against the other, in nats."""
    return Outcomes(2, held=0, x=x, y=y, law=drawn.exp().detach(), versus=versus.exp().detach())


def forced(i: Spelling) -> Tensor:
    """(n,) log pi(y), decoding y with a cache."""
    pi = i.spelled[0]
    x, y = i.everything
    tokens = pi.spell(y)[0]
    logits, cache = pi.start(x, i.n)
    total = logits.gather(-1, tokens[:, :1])[:, 0]
    for t in range(1, pi.length):
        logits, cache = pi.extend(tokens[:, t - 1], cache)
        total = total + logits.log_softmax(-1).gather(-1, tokens[:, t : t + 1])[:, 0]
    return total


def normalised(i: Spelling) -> float:
    """The sum of all probabilities."""
    return float(i.spelled[0].log_prob(..., ...).exp().sum())


def token_mixture(i: Spelling) -> TokenMixture:
    """pi^(1 - b) mu^b."""
    return TokenMixture(((i.spelled[0], 1 - i.b), (i.spelled[1], i.b)))


def log_normalisers(i: Spelling, b: float) -> Floats:
    """(n,) sum_t log Z(y_<t)."""
    pi, mu, _ = (one.next_log_probs(*i.everything)[0] for one in i.spelled)
    return ((1 - b) * pi + b * mu).logsumexp(-1).sum(-1).numpy()


def regression_by_hand(i: Spelling, factor: float) -> Floats:
    """factor Cov_mu(log pi - log mu - P q / tau, grad log pi)."""
    pi, (_, mu, q) = live(i.spelled[0]), i.spelled
    residual = law(pi, i) - law(mu, i) - torch.tensor(i.win_prob) @ law(q, i).exp() / i.tau
    return covariance(law(mu, i).exp(), residual, pi, law(pi, i), factor)


# --- claims about what a gradient is ---


def sampled_policy_gradient(i: Spelling) -> Floats:
    """Its mean over all outcomes; the opponent is a mixture of mu and q, decoded token by token."""
    pi, mu, q = i.spelled
    x, y = i.everything
    versus: Any = TokenMixture(((mu, i.b), (q, 1 - i.b)))
    outcomes = every(x, y, law(pi, i)[None], _decoded(i, ((mu, i.b), (q, 1 - i.b)))[None])
    solve = PolicyGradientSolver(i.game, outcomes, 1, DESCENT)
    return fallen(solve, Prox(Geometric(((mu, i.b), (q, 1 - i.b))), versus, 1 / i.tau), pi)


def _decoded(i: Spelling, parts: Sequence[tuple[TinyTransformer, float]]) -> Tensor:
    """(n,) log of the law that is decoded token by token."""
    mixed = blended(parts, *i.everything, lambda one, x, y: one.next_log_probs(x, y))
    return mixed.gather(-1, parts[0][0].spell(i.everything[1])[..., None])[..., 0].sum(-1)[0]


def exact_policy_gradient(i: Spelling, sign: float = 1.0) -> Floats:
    """-grad of E[P(y > opponent)] - tau KL(pi, mu^b q^(1 - b)), all responses summed."""
    pi, (_, mu, q) = live(i.spelled[0]), i.spelled
    win = torch.tensor(i.win_prob) @ _decoded(i, ((mu, i.b), (q, 1 - i.b))).exp()
    log_prob, anchor = law(pi, i), i.b * law(mu, i) + (1 - i.b) * law(q, i)
    return gradient(-(log_prob.exp() @ (win - sign * i.tau * (log_prob - anchor))), pi.params)


def sampled_text_gradient(i: Text) -> Floats:
    """The same for responses that end where they like, against the reference."""
    x, y = i.everything
    solve = PolicyGradientSolver(i.game, every(x, y, listed(i.pi, x, y), listed(i.mu, x, y)), 1, DESCENT)
    return fallen(solve, Prox(Geometric(((i.mu, 1.0),)), i.mu, i.eta), i.pi)


def exact_text_gradient(i: Text) -> Floats:
    """-grad of E[P(y > mu)] - KL(pi, mu) / eta, averaged over the prompts."""
    x, y = i.everything
    pi, mu = live(i.pi), listed(i.mu, x, y)
    log_prob = listed(pi, x, y)
    win = (torch.tensor(i.game.win_prob(x, y, y)) @ mu.exp()[..., None])[..., 0]
    return gradient(-(log_prob.exp() * (win - (log_prob - mu) / i.eta)).sum(-1).mean(), pi.params)


def regression_gradient(i: Spelling) -> Floats:
    """Its mean over all outcomes of two responses of mu."""
    pi, mu, q = i.spelled
    x, y = i.everything
    solve = RegressionSolver(i.game, every(x, y, law(mu, i)[None], law(q, i)[None]), steps=1, optimizer=DESCENT)
    return fallen(solve, Prox(Geometric(((mu, 1.0),)), q, 1 / i.tau), pi)


def contrastive(i: Spelling, opponents: int) -> tuple[Any, Geometric, Tensor]:
    """pi, and the opponent: itself, or its mixture with mu; and the (n,) law of the opponent."""
    pi, mu, _ = i.spelled
    q = Geometric(((pi, 1.0),) if opponents == 0 else ((pi, 1 - i.b), (mu, i.b)))
    return pi, q, sum((w * law(one, i) for one, w in q.parts), torch.zeros(())).softmax(-1)


def ipo_gradient(i: Spelling) -> Floats:
    """IPO on pairs of the policy itself, and on pairs of its mixture with the reference."""
    mu = Geometric(((i.spelled[1], 1.0),))
    found = []
    for k in range(2):
        pi, q, _ = contrastive(i, k)
        found.append(fallen(ContrastiveSolver(i.game, steps=1, optimizer=DESCENT), Prox(mu, q, 1 / i.tau), pi))
    return np.concatenate(found)


def ipo_by_hand(i: Spelling, centred: bool = True) -> Floats:
    """-(4 / tau) E_q[(P(y > q) - 1/2 - tau (s - E_q s)) grad log pi], s = log pi / mu, divided by tau, for both q."""
    found = []
    for k in range(2):
        pi, _, q = contrastive(i, k)
        pi = live(pi)
        log_prob = law(pi, i)
        s = log_prob - law(i.spelled[1], i)
        gain = torch.tensor(i.win_prob) @ q - 0.5 - i.tau * (s - (q @ s if centred else 0))
        found.append(gradient(-(4 / i.tau) * (q * gain).detach() @ log_prob, pi.params))
    return np.concatenate(found)


def exact_gradients(i: Spelling) -> Floats:
    """Of the three solvers that list every response."""
    pi, mu, q = i.spelled
    prox = Prox(Geometric(((mu, 1.0),)), q, 1 / i.tau)
    solvers: list[Any] = [RegressionSolver(i.game, steps=1, optimizer=DESCENT)]
    solvers += [make(i.game, steps=1, optimizer=DESCENT) for make in (ContrastiveSolver, PolicyGradientSolver)]
    return np.concatenate([fallen(solve, prox, pi) for solve in solvers])


def covariances(i: Spelling, factors: Sequence[float] = (2, 4)) -> Floats:
    """2 Cov_m, 4 Cov_q, tau Cov_pi of log pi / answer and grad log pi; m is half uniform and half mu."""
    pi, (_, mu, q) = live(i.spelled[0]), i.spelled
    log_prob, versus = law(pi, i), law(q, i).exp()
    residual = log_prob - law(mu, i) - torch.tensor(i.win_prob) @ versus / i.tau
    laws = (0.5 / i.n + law(mu, i).exp() / 2, versus, log_prob.exp())
    scales = (*factors, i.tau)
    return np.concatenate(
        [covariance(m, residual, pi, law(pi, i), scale) for m, scale in zip(laws, scales, strict=True)]
    )


# --- claims about where a solver ends ---


def answered(i: Spelling, logs: Floats, q: Floats, eta: float) -> Floats:
    """pi ∝ anchor exp(eta P q), from the log of the anchor up to a constant."""
    return np.asarray(softmax(logs + eta * i.win_prob @ q))


def nash_md_step(i: Spelling) -> Floats:
    """(n,) one step of Nash-MD by regression."""
    pi, mu, _ = i.tables
    algorithm = NashMD(i.eta, i.tau)
    state, _ = algorithm.step(algorithm.init(mu)._replace(policy=pi), RegressionSolver(i.game, steps=60))
    return _probs(state.policy)


def _probs(one: Any) -> Floats:
    return one.log_prob(..., ...).exp().numpy()[0]


def nash_md_by_hand(i: Spelling, power: int = 1) -> Floats:
    """pi+ ∝ q exp(eta P q), q ∝ pi^(1 - b) mu^b, b = eta tau."""
    logs = (1 - i.b) * i.pi.log_probs + i.b * i.mu.log_probs
    return answered(i, logs, softmax(logs), i.eta**power)


def inpo(i: Spelling) -> Floats:
    """One step of magnetic mirror descent, fitted on pairs of the policy itself."""
    pi, mu, _ = i.tables
    algorithm = MagneticMD(i.eta, i.tau)
    state, _ = algorithm.step(algorithm.init(mu)._replace(policy=pi), ContrastiveSolver(i.game, steps=100))
    return _probs(state.policy)


def offline_ipo(i: Spelling) -> Floats:
    """(2, n) the minimisers of IPO on pairs of pi and of q."""
    pi, mu, q = i.tables
    solve = ContrastiveSolver(i.game, steps=100)
    return np.stack([_probs(solve(Prox(Geometric(((mu, 1.0),)), one, 1 / i.tau), mu)[0]) for one in (pi, q)])


@dataclass(frozen=True, repr=False)
class Linear(Spelling):
    """A game with P(y > z) = 1/2 + r(y) - r(z)."""

    @property
    def reward(self) -> Floats:
        """r up to a constant: the mean of P(y > z) over z."""
        return self.win_prob.mean(axis=1)


@st.composite
def linear_games(draw: st.DrawFn) -> Linear:
    """Rewards of a span up to 1/2."""
    i = draw(spellings())
    r = np.random.default_rng(i.seed).uniform(-0.25, 0.25, i.n)
    return Linear(0.5 + r[:, None] - r, i.reference, i.policy, i.other, i.third, i.tau, i.share, i.vocab, i.seed)


def uniform_pairs(i: Spelling) -> Floats:
    """One gradient step on logits, of rate n eta tau / 4 for E[(s(y) - s(y') - (P(y > pi) - P(y' > pi)) / tau)^2] over
    all pairs, which is twice a variance; s = log pi / mu."""
    pi, mu, _ = (one.params["logits"] for one in i.tables)
    logits = pi.clone().requires_grad_()
    flat, win = torch.full((1, i.n), 1 / i.n, dtype=torch.float64), torch.tensor(i.win_prob) @ pi[0].softmax(-1)
    batch = Batch(..., ..., flat.log(), flat, mu, win[None], 1 / i.tau, 0, torch.ones(1).double())
    (slope,) = torch.autograd.grad(2 * losses.variance(logits.log_softmax(-1), batch).sum(), logits)
    return (pi - i.n * i.b / 4 * slope).softmax(-1).numpy()[0]


def self_play(i: Spelling, eta: float) -> Floats:
    """pi^(1 - eta tau) mu^(eta tau) exp(eta P pi) / Z."""
    logs = (1 - eta * i.tau) * i.pi.log_probs + eta * i.tau * i.mu.log_probs
    return answered(i, logs, i.pi.probs, eta)


def dpo_gradient(i: Spelling, one: Floats) -> Floats:
    """On logits: DPO with Bradley-Terry labels of rewards r = third, on all pairs of the law q; pi = one."""
    logits = torch.tensor(one)[None].requires_grad_()
    reward, q, mu = torch.tensor(i.third)[None], torch.tensor(i.q.log_probs)[None], torch.tensor(i.mu.log_probs)[None]
    batch = Batch(..., ..., q, q.exp(), mu, reward, 1 / i.tau, 0, torch.ones(1).double())
    return torch.autograd.grad(losses.logistic(logits.log_softmax(-1), batch).sum(), logits)[0].numpy()[0]


def dpo_answer(i: Spelling) -> Floats:
    """log of mu exp(r / beta) / Z, beta = tau."""
    return np.asarray(log_softmax(i.mu.log_probs + i.third / i.tau))


def dpo_by_hand(i: Spelling, one: Floats) -> Floats:
    """E_{y, y' ~ q}[(sigmoid(h(y) - h(y')) - sigmoid((r(y) - r(y')) / beta)) (e_y - e_y')], h = log pi / mu."""
    h, r = one - i.mu.log_probs, i.third / i.tau
    miss = expit(h[:, None] - h) - expit(r[:, None] - r)
    return 2 * i.q.probs * (miss @ i.q.probs)


def text_steps(i: Text, micro: int | None) -> Floats:
    """What one step of each solver takes away, so many prompts at a time."""
    sample = Sample(3, held=0, correct=False, micro=micro)
    prox = Prox(Geometric(((i.pi, 1 - i.share), (i.mu, i.share))), i.mu, i.eta)
    solvers = (RegressionSolver, ContrastiveSolver, PolicyGradientSolver)
    return np.concatenate([fallen(make(i.game, sample, steps=1, optimizer=DESCENT), prox, i.pi) for make in solvers])


# --- claims about language models ---


def after_training(i: Text) -> tuple[CausalLM, CausalLM, CausalLM]:
    """The reference, a policy that was trained from it and saved, and what was saved, read again."""
    network = copy.deepcopy(i.mu.network)  # a bug in the code must not reach other instances
    mu = CausalLM(network, i.mu.tokenizer, i.mu.params, 3)
    start = mu.with_params(i.pi.params)
    solve = RegressionSolver(
        i.game, Sample(4, held=0, correct=False), steps=1, optimizer=Descent(DESCENT, max_norm=1.0)
    )
    trained, _ = solve(Prox(Geometric(((mu, 1.0),)), mu, i.eta), start, seed=i.seed)
    with tempfile.TemporaryDirectory() as folder:
        trained.save_pretrained(folder)
        return mu, trained, CausalLM.from_pretrained(folder, max_new_tokens=3, lora_rank=None)


def reference_after_training(i: Text) -> Floats:
    """(B, n) log mu(y), by its own view of the network."""
    return after_training(i)[0].log_prob(*i.everything).detach().numpy()


def base_alone(i: Text) -> Floats:
    """(B, n) log mu(y), by a network that never had adapters."""
    network = plain(i.family, i.model)
    return CausalLM(network, tokenizer(), dict(network.named_parameters()), 3).log_prob(*i.everything).detach().numpy()


def saved(i: Text) -> Floats:
    """(B, n) log pi(y) of the model that was saved, minus that of the policy by peft's own forward pass."""
    _, trained, again = after_training(i)
    return (again.log_prob(*i.everything) - listed(trained, *i.everything)).detach().numpy()


# --- claims about preferences ---


def judged_by_hand(i: Text, flip: bool = False) -> Floats:
    """(B, n, n) (J(y, z) + 1 - J(z, y)) / 2."""
    x, y = i.everything
    words = i.pi.text(y)
    table = [[[taste([p], [a], [b], i.seed)[0] for b in row] for a in row] for p, row in zip(x, words, strict=True)]
    first = np.array(table)
    second = np.swapaxes(first, 1, 2)
    return (second + 1 - first) / 2 if flip else (first + 1 - second) / 2


def label_gradient(i: Judging) -> Floats:
    """Of the loss that a judge is fitted with, on comparisons as they stand in a file."""
    judge = live(i.judge)
    return gradient(fit._loss(judge, read_comparisons(i.rows)), judge.params)


def label_gradient_by_hand(i: Judging, hard: bool = False) -> Floats:
    """E[(P(a > b | x) - p_a) grad logit P(a > b | x)]."""
    judge = live(i.judge)
    x, a, b, p = zip(*i.judged, strict=True)
    label = torch.tensor(np.round(p) if hard else p).float()
    margins = judge.margins(x, a, b)
    return gradient(((margins.sigmoid() - label).detach() * margins).mean(), judge.params)


def scores(i: Judging) -> Floats:
    """(N,) the logit of P(a > b | x) by the network alone: every input for itself, spelled out."""
    judge = i.judge

    def score(x: Any, *responses: str) -> Tensor:
        spell = judge.tokenizer
        tokens = [*spell(x)["input_ids"], *(t for y in responses for t in [*spell(y)["input_ids"], spell.eos_token_id])]
        row = torch.tensor([tokens])
        return functional_call(judge.network, dict(judge.params), (row, torch.ones_like(row)))[0].detach()

    both = [((c.a, c.b), (c.b, c.a)) if i.kind == "pairwise" else ((c.a,), (c.b,)) for c in i.judged]
    margins = [score(c.prompt, *one) - score(c.prompt, *two) for c, (one, two) in zip(i.judged, both, strict=True)]
    return torch.stack(margins).numpy()


def judged_pairs(i: Judging) -> Floats:
    """(2, N) P(a > b | x) and P(b > a | x)."""
    x, a, b, _ = zip(*i.judged, strict=True)
    return np.stack([i.judge(x, a, b), i.judge(x, b, a)])


def rejected_wins(i: Judging) -> float:
    """P(rejected > chosen) after 12 steps on one comparison, from 1/2."""
    one, row = i.judged[0], i.rows[0]
    judge = fit_preference(blank(i.kind, i.seed % 4), read_comparisons([row]), 0, epochs=12, lr=3e-2).model
    return float(judge([one.prompt], [one.b], [one.a])[0])


# --- bugs that libraries have shipped, in our code ---


def wrong(where: Any, name: str, make: Callable[[Any], Any]) -> Bug:
    """What `make` makes of the right code, in its place."""
    return lambda: patch.object(where, name, make(getattr(where, name)))


def flipped_parts(of: Any) -> Any:
    return classmethod(
        lambda cls, one: cls(tuple((p, w) for (p, _), (_, w) in zip(of(one).parts, of(one).parts[::-1], strict=True)))
    )


def per_token(loss: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> Bug:
    """A policy gradient of log-probabilities (B, n, T) of tokens, and those of the anchor."""

    def sampled(self: Any, prox: Prox, start: Any, generator: Any) -> Any:
        def parts(one: Any, step: int) -> Any:
            x, share = self.expectation.choose(self.game, generator)
            ((y, _),), *against = self.expectation.draw([(start, [2]), (prox.opponent, [2])], x, generator)
            log_prob = by_tokens(one, x, y)
            with torch.no_grad():
                anchor = torch.as_tensor(sum(w * by_tokens(part, x, y) for part, w in prox.anchor.parts))
            win = self.expectation.judge(prox, self.game, x, y, [opponents[0] for opponents in against])
            yield loss(log_prob, anchor, win.to(anchor), prox.eta) @ share.to(anchor)

        return parts

    return lambda: patch.object(PolicyGradientSolver, "_sampled", sampled)


def frozen_prefixes(log_prob: Tensor, anchor: Tensor, win: Tensor, eta: float) -> Tensor:
    later = ((log_prob.detach() - anchor) * log_prob).sum(-1).mean(-1) / eta
    return losses.policy_gradient(log_prob.sum(-1), log_prob.sum(-1).detach(), win, eta) + later


def per_length(log_prob: Tensor, anchor: Tensor, win: Tensor, eta: float) -> Tensor:
    length = (log_prob != 0).sum(-1)
    reward = win - (log_prob.detach() - anchor).sum(-1) / eta
    return -((reward - reward.flip(-1)) * log_prob.sum(-1) / length).mean(-1)


def k1(log_prob: Tensor, anchor: Tensor, win: Tensor, eta: float) -> Tensor:
    return losses.policy_gradient(log_prob, log_prob.detach(), win, eta) + (log_prob - anchor).mean(-1) / eta


def whitened(log_prob: Tensor, anchor: Tensor, win: Tensor, eta: float) -> Tensor:
    reward = win - (log_prob.detach() - anchor) / eta
    return -((reward - reward.mean(-1, keepdim=True)) / (reward.std(-1, keepdim=True) + 1e-8) * log_prob).mean(-1)


def own_baseline(log_prob: Tensor, anchor: Tensor, win: Tensor, eta: float) -> Tensor:
    reward = win - (log_prob.detach() - anchor) / eta
    return -((reward - reward.mean(-1, keepdim=True)) * log_prob).mean(-1)


def after_the_update(call: Any) -> Any:
    return lambda self, prox, start, seed=None: call(
        self, prox._replace(opponent=call(self, prox, start, seed)[0]), start, seed
    )


def mixed_twice(anchored: Any) -> Any:
    def mixed(prox: Prox, x: Any, y: Any, shares: Any = None) -> tuple[Tensor, Tensor]:
        found, anchor = anchored(prox, x, y, shares)
        reference, b = prox.anchor.parts[-1]
        return found, anchor + b * (reference.log_prob(x, y) - anchor)

    return mixed


def one_share_each(parts: Any) -> Any:
    return lambda self, size: (part._replace(share=part.share / part.share.sum()) for part in parts(self, size))


def off_by_one(chosen: Any) -> Any:
    return lambda log_probs, tokens, eos: chosen(log_probs.roll(-1, -2), tokens, eos)


def labels_late(log_prob: Any) -> Any:
    def shifted(self: Any, params: Any, tokens: Tensor, mask: Tensor, y: Tensor) -> Tensor:
        rows = self.logits(params, tokens, mask, F.pad(y, (0, 1)))[..., 1:, :].log_softmax(-1)
        return rows.gather(-1, y[..., None])[..., 0]

    return shifted


def end_in_the_prompt(log_prob: Any) -> Any:
    def penalised(self: Any, x: Any, y: Tensor) -> Tensor:
        whole = torch.cat([self.encode(x)[0][:, None].expand(-1, y.shape[1], -1), y], -1)
        found = self.next_log_probs(x, y).gather(-1, y[..., None])[..., 0]
        return (found * policy.alive(whole, self.eos)[..., -y.shape[-1] :]).sum(-1)

    return penalised


def without_positions(call: Any) -> Any:
    return lambda self, weights, tokens, mask, **options: functional_call(
        self.network, dict(weights), (), {"input_ids": tokens, "attention_mask": mask, **options}
    )


def adapters_left_on(weights: Any) -> Any:
    active: list[Params] = []

    def carried(self: Any) -> Any:
        idle = not any(bool(p.any()) for name, p in self.params.items() if "lora_B" in name)
        active[:] = active if idle and active else [self.params]
        return weights(self.with_params(active[0]))

    return carried


@contextmanager
def one_cache() -> Iterator[None]:
    """Whoever starts or extends leaves the cache to all. Rows stay when they have ended: that alone changes nothing."""
    kept: dict[str, Any] = {}
    shared, extend = property(lambda _: kept["cache"], lambda _, cache: kept.update(cache=cache)), decode._Reader.extend

    def stay(self: Any, tokens: Tensor, running: Tensor) -> None:
        extend(self, tokens, torch.ones_like(running))

    with patch.object(decode._Reader, "cache", shared, create=True), patch.object(decode._Reader, "extend", stay):
        yield


def merged_in_place(merged: Any) -> Any:
    def merge(network: Any, params: Params) -> Any:
        weights = merged(network, params)
        for name, module in network.named_modules():
            if hasattr(module, "lora_A"):
                module.base_layer.weight.data = weights[f"{name}.weight".removeprefix("base_model.model.")].clone()
        return weights

    return merge


def unscaled(merged: Any, network: Any, params: Params) -> Any:
    return merged(network, {name: p / 2 if "lora_B" in name else p for name, p in params.items()})


def hardened(win: Any) -> Any:
    return 0 * win + (win > 0.5) + 0.5 * (win == 0.5)


WRONG_MODEL = "mixture weight on the wrong model"
K1 = "KL gradient that differentiates the k1 estimate directly"
PREFIXES = "KL gradient with frozen prefixes instead of the sequence KL"
OPPOSITE = "KL term with the opposite sign"
NO_EOS = "EOS left out of the sequence log-prob"
OFF_BY_ONE = "off-by-one between logits and labels"
PADDING = "padding counted in the log-prob"
AFTER = "opponent samples taken after the update instead of before"
WHITENED = "advantage normalised by its own standard deviation"
LENGTH = "length-normalised policy gradient"
OWN_BASELINE = "pass@k without leave-one-out, here a baseline that includes the sample itself"
FLIPPED = "preference orientation flipped"
TWICE = "tau applied twice"
STALE = "stale reference after LoRA merge"
CARRIED = "mixture whose reference still carries the adapter"
ONE_CACHE = "two models appending to one KV cache"
POSITIONS = "missing position ids under left padding"
TEMPERATURE = "sampling temperature differing from the scoring temperature"
SUMMED = "gradients summed instead of averaged over micro-batches"
PENALTY = "missing-EOS penalty that looks in the prompt"
ARGMAX = "labels taken by argmax of the score instead of the preference probability"
TOKEN_MEAN = "IPO with per-token mean where the sum is meant"

MEAN = wrong(policy, "_chosen", lambda chosen: lambda log_probs, *rest: chosen(log_probs, *rest) / log_probs.shape[2])
COOLER = wrong(decode, "inverse_cdf", lambda draw: lambda logs, u: draw((logs / 0.9).log_softmax(-1), u))
NO_END = wrong(causal_lm, "alive", lambda alive: lambda tokens, eos: alive(tokens, eos) & (tokens != eos))
REWARDED_KL = wrong(
    solver,
    "policy_gradient",
    lambda right: lambda log_prob, anchor, win, eta: right(log_prob, 2 * log_prob.detach() - anchor, win, eta),
)
JUDGED = wrong(Sample, "judge", lambda judge: lambda *asked: 1 - judge(*asked))
ESTIMATORS = {
    OPPOSITE: REWARDED_KL,
    K1: lambda: patch.object(solver, "policy_gradient", k1),
    PREFIXES: per_token(frozen_prefixes),
    WHITENED: lambda: patch.object(solver, "policy_gradient", whitened),
    LENGTH: per_token(per_length),
    OWN_BASELINE: lambda: patch.object(solver, "policy_gradient", own_baseline),
    FLIPPED: JUDGED,
}

# --- the claims ---

SPELLED = (
    Claim(
        id="llm/scores",
        statement="log pi(y | x) = sum_t log pi(y_t | x, y_<t), decoded with a cache",
        source="the chain rule; sum_y pi(y | x) = 1 follows",
        tag="proved",
        instances=spellings(),
        lhs=lambda i: np.concatenate([i.spelled[0].log_prob(*i.everything).numpy()[0], [normalised(i)]]),
        identity=lambda i: np.concatenate([forced(i).numpy(), [1.0]]),
        mutants={OFF_BY_ONE: wrong(policy, "_chosen", off_by_one), "a mean over the tokens": MEAN},
    ),
    Claim(
        id="llm/draws",
        statement="u_t lies in [F(y_t - 1), F(y_t)), F the cumulated law prod_k pi_k(. | y_<t)^w_k / Z(y_<t), of"
        " which log-probabilities are reported",
        source=f"{PAPER}, section 7: pi^(1 - b) mu^b one token after the other; inversion of the distribution function",
        tag="proved",
        instances=spellings(),
        lhs=lambda i: surprises(
            [i.spelled[0], Geometric(((i.spelled[0], 1 - i.b), (i.spelled[1], i.b))), i.spelled[1]],
            i.everything[0],
            20,
            i.seed,
            lambda one, x, tokens: one.next_log_probs(x, one.read(tokens)),
        ),
        identity=lambda i: 0.0,
        mutants={
            WRONG_MODEL: wrong(TokenMixture, "of", flipped_parts),
            TEMPERATURE: COOLER,
        },
    ),
    Claim(
        id="llm/token-mixture",
        statement="log(pi(y)^(1 - b) mu(y)^b / token(y)) = sum_t log Z(y_<t), Z = sum_a pi(a | .)^(1 - b) mu(a | .)^b",
        source="the definition of the law that is decoded",
        tag="proved",
        instances=spellings(),
        lhs=lambda i: token_mixture(i).log_weight(*i.everything).numpy()[0],
        identity=lambda i: log_normalisers(i, i.b),
        mutants={
            "the other weight": {"identity": lambda i: log_normalisers(i, 1 - i.b)},
            "divided instead of multiplied": {"identity": lambda i: -log_normalisers(i, i.b)},
        },
    ),
    Claim(
        id="llm/token-mixture-below",
        statement="token(y) >= pi(y)^(1 - b) mu(y)^b: each Z(y_<t) <= 1",
        source="Hölder's inequality",
        tag="proved",
        instances=spellings(),
        lhs=lambda i: np.exp(token_mixture(i).log_weight(*i.everything).numpy()[0]),
        rhs=lambda i: 1.0,
        mutants={"9/10": {"rhs": lambda i: 0.9}},
    ),
    Claim(
        id="llm/policy-gradient",
        statement="E[-mean_k A_k grad log pi(y_k)] = -grad (E[P(y > opponent)] - tau KL(pi, anchor)), whole sequences",
        source=f"{PAPER}, section 7; the score function, and a baseline that does not depend on its sample",
        tag="proved",
        instances=spellings(),
        lhs=sampled_policy_gradient,
        identity=exact_policy_gradient,
        mutants=ESTIMATORS,
    ),
    Claim(
        id="llm/sampled-regression",
        statement="the mean gradient of the variance loss on n = 2 samples of mu is (n - 1) / n that of the loss:"
        " Cov_mu(log pi - log mu - P q / tau, grad log pi)",
        source="the variance of a sample; Tang et al. 2025, arXiv:2503.19612",
        tag="proved",
        instances=spellings(),
        lhs=regression_gradient,
        identity=lambda i: regression_by_hand(i, 1.0),
        mutants={"(n - 1) / n forgotten": {"identity": lambda i: regression_by_hand(i, 2.0)}, FLIPPED: JUDGED},
    ),
    Claim(
        id="llm/exact-gradients",
        statement="regression, pairs and policy gradient descend 2 Cov_m, 4 Cov_q and tau Cov_pi of log pi / answer and"
        " grad log pi, answer = mu exp(P q / tau) / Z",
        source="differentiation; all three vanish at the answer, on a table only there",
        tag="proved",
        instances=spellings(),
        lhs=exact_gradients,
        identity=covariances,
        mutants={
            "2 Cov_q for the pairs": {"identity": lambda i: covariances(i, (2, 2))},
            TOKEN_MEAN: MEAN,
            ARGMAX: wrong(solver, "ipo", lambda ipo: lambda h, win, *rest: ipo(h, hardened(win), *rest)),
        },
    ),
    Claim(
        id="llm/ipo-gradient",
        statement="IPO on pairs of q, pi or pi^(1 - b) mu^b, descends -(4 / tau) E_q[(P(y > q) - 1/2 - tau (s - E_q s))"
        " grad log pi] / tau, s = log pi / mu",
        source=f"{CALANDRIELLO}, online IPO and IPO-MD; differentiation of the soft-label loss",
        tag="proved",
        instances=spellings(),
        lhs=ipo_gradient,
        identity=lambda i: ipo_by_hand(i),
        mutants={
            "s not centred": {"identity": lambda i: ipo_by_hand(i, centred=False)},
            TOKEN_MEAN: MEAN,
            ARGMAX: wrong(solver, "ipo", lambda ipo: lambda h, win, *rest: ipo(h, hardened(win), *rest)),
            FLIPPED: wrong(solver, "ipo", lambda ipo: lambda h, win, *rest: ipo(h, 1 - win, *rest)),
        },
    ),
    Claim(
        id="llm/nash-md",
        statement="regression makes Nash-MD exact: pi+ ∝ q exp(eta P q), q ∝ pi^(1 - eta tau) mu^(eta tau)",
        source=f"{PAPER}, section 5",
        tag="proved",
        instances=spellings(),
        lhs=nash_md_step,
        identity=nash_md_by_hand,
        tol=FITTED,
        mutants={
            AFTER: wrong(RegressionSolver, "__call__", after_the_update),
            TWICE: wrong(solver, "_law_and_anchor", mixed_twice),
            "eta applied twice": {"identity": lambda i: nash_md_by_hand(i, 2)},
        },
    ),
    Claim(
        id="llm/offline-ipo",
        statement="IPO on pairs of a law m ends at mu exp(P m / tau) / Z",
        source="Azar et al. 2023, arXiv:2310.12036; for pairs that are independent",
        tag="proved",
        instances=spellings(),
        lhs=offline_ipo,
        identity=lambda i: np.stack([answered(i, i.mu.log_probs, q.probs, 1 / i.tau) for q in (i.pi, i.q)]),
        tol=FITTED,
        mutants={
            "tau of the paper's hard labels": {
                "identity": lambda i: np.stack([answered(i, i.mu.log_probs, q.probs, 2 / i.tau) for q in (i.pi, i.q)])
            },
            FLIPPED: wrong(solver, "ipo", lambda ipo: lambda h, win, *rest: ipo(h, 1 - win, *rest)),
            ARGMAX: wrong(solver, "ipo", lambda ipo: lambda h, win, *rest: ipo(h, hardened(win), *rest)),
        },
    ),
    Claim(
        id="llm/linear-preferences",
        statement="where P(y > z) = 1/2 + r(y) - r(z), IPO ends at mu exp(r / tau) / Z = pi*, whatever its pairs",
        source="P m = r + const for every law m",
        tag="proved",
        instances=linear_games(),
        lhs=lambda i: np.vstack([offline_ipo(i), i.star.probs]),
        identity=lambda i: softmax(i.mu.log_probs + i.reward / i.tau),
        tol=FITTED,
        mutants={"any preference": {"identity": lambda i: softmax(i.mu.log_probs + i.reward**2 / i.tau)}},
    ),
    Claim(
        id="llm/inpo",
        statement="INPO's minimiser is the magnetic step [pi mu^(eta tau) exp(eta P pi)]^(1 / (1 + eta tau)) / Z",
        source="Zhang et al. 2024, arXiv:2407.00617; IPO on pairs of the policy itself",
        tag="proved",
        instances=spellings(),
        lhs=inpo,
        identity=lambda i: self_play(i, i.eta / (1 + i.b)),
        tol=FITTED,
        mutants={
            "the explicit step": {"identity": lambda i: self_play(i, i.eta)},
            ARGMAX: wrong(solver, "ipo", lambda ipo: lambda h, win, *rest: ipo(h, hardened(win), *rest)),
        },
    ),
    Claim(
        id="llm/uniform-pairs",
        statement="one gradient step on logits, of rate n eta tau / 4, for the squared loss on all n^2 pairs is"
        " pi+ ∝ pi^(1 - eta tau) mu^(eta tau) exp(eta P pi)",
        source="Zhou, Fazel and Du 2025, arXiv:2503.08942; the gradient is 4 (s - P pi / tau) / n, centred",
        tag="proved",
        instances=spellings(),
        lhs=uniform_pairs,
        identity=lambda i: self_play(i, i.eta),
        mutants={"pairs of two different responses": {"identity": lambda i: self_play(i, i.eta * i.n / (i.n - 1))}},
    ),
    Claim(
        id="llm/dpo",
        statement="DPO with P(y > y') = sigmoid((r(y) - r(y')) / beta) has gradient E_{y, y' ~ q}[(sigmoid(h - h') - P)"
        " (e_y - e_y')], zero at mu exp(r / beta) / Z for every law q of pairs",
        source="Rafailov et al. 2023, arXiv:2305.18290; differentiation of the cross-entropy",
        tag="proved",
        instances=spellings(),
        lhs=lambda i: np.stack([dpo_gradient(i, i.pi.log_probs), dpo_gradient(i, dpo_answer(i))]),
        identity=lambda i: np.stack([dpo_by_hand(i, i.pi.log_probs), 0 * i.third]),
        mutants={
            "one half of it": {
                "identity": lambda i: np.stack([dpo_by_hand(i, i.pi.log_probs) / 2, 0 * i.third]),
            },
            "r forgotten": {"identity": lambda i: np.stack([dpo_by_hand(i, i.mu.log_probs), 0 * i.third])},
        },
    ),
)


TEXT = (
    Claim(
        id="llm/all-responses",
        statement="sum of pi(y | x) over all responses that end, or are cut after T tokens, is 1",
        source="the chain rule; the end is a token",
        tag="proved",
        instances=texts(),
        lhs=lambda i: i.pi.log_prob(*i.everything).exp().sum(-1).detach().numpy(),
        identity=lambda i: 1.0,
        tol=FLOAT32,
        mutants={
            NO_EOS: NO_END,
            PADDING: wrong(causal_lm, "alive", lambda alive: lambda tokens, eos: alive(tokens, None)),
            OFF_BY_ONE: wrong(Llama, "log_prob", labels_late),
        },
    ),
    Claim(
        id="llm/text-scores",
        statement="log pi(y | x) = sum of log pi(y_t | x, y_<t) up to the end, every prompt for itself and unpadded",
        source="the definition",
        tag="proved",
        instances=texts(padded=True),
        lhs=lambda i: i.pi.log_prob(*i.everything).detach().numpy(),
        identity=lambda i: listed(i.pi, *i.everything).numpy(),
        tol=FLOAT32,
        mutants={
            POSITIONS: wrong(CausalLM, "_call", without_positions),
            PENALTY: wrong(CausalLM, "log_prob", end_in_the_prompt),
            NO_EOS: NO_END,
            OFF_BY_ONE: wrong(Llama, "log_prob", labels_late),
        },
    ),
    Claim(
        id="llm/text-draws",
        statement="u_t lies in the cell of y_t under pi(. | y_<t)^(1 - b) mu(. | y_<t)^b / Z, mu without adapters",
        source=f"{PAPER}, section 7; inversion of the distribution function",
        tag="proved",
        instances=texts(padded=True),
        lhs=lambda i: np.concatenate(
            [
                surprises(asked, i.prompts, 10, i.seed, by_hand)
                for mixture in [Geometric(((i.pi, 1 - i.share), (i.mu, i.share)))]
                for asked in ([mixture], [i.pi, mixture, i.mu])
            ]
        ),
        identity=lambda i: 0.0,
        tol=FLOAT32,
        mutants={
            WRONG_MODEL: wrong(TokenMixture, "of", flipped_parts),
            CARRIED: wrong(CausalLM, "_weights", adapters_left_on),
            ONE_CACHE: one_cache,
            TEMPERATURE: COOLER,
            POSITIONS: wrong(CausalLM, "_call", without_positions),
        },
    ),
    Claim(
        id="llm/adapter-off",
        statement="the reference is the network without adapters to the last bit, also after training, merging, saving",
        source="B = 0 in W + s B A, and a policy is a value",
        tag="proved",
        instances=texts(longest=2),
        lhs=reference_after_training,
        identity=base_alone,
        tol=EXACTLY,
        mutants={
            STALE: wrong(folders, "merged", merged_in_place),
            "the trained policy": {"lhs": lambda i: after_training(i)[1].log_prob(*i.everything).detach().numpy()},
        },
    ),
    Claim(
        id="llm/merged",
        statement="what is saved has the log-probabilities of the policy: W + s B A in the place of W and adapters",
        source="(W + s B A) x = W x + s B (A x)",
        tag="proved",
        instances=texts(longest=2),
        lhs=saved,
        identity=lambda i: 0.0,
        tol=FLOAT32,
        mutants={
            "adapters without their scale": lambda: patch.object(folders, "merged", partial(unscaled, folders.merged)),
        },
    ),
    Claim(
        id="llm/text-policy-gradient",
        statement="E[-mean_k A_k grad log pi(y_k)] = -grad (E[P(y > mu)] - KL(pi, mu) / eta), responses of any length",
        source=f"{PAPER}, section 7; the score function, and a baseline that does not depend on its sample",
        tag="proved",
        instances=texts(longest=1),
        lhs=scaled(sampled_text_gradient, exact_text_gradient),
        identity=scaled(exact_text_gradient, exact_text_gradient),
        tol=SLOPES,
        mutants=ESTIMATORS,
    ),
    Claim(
        id="llm/micro-batches",
        statement="the gradients of parts of a batch add up to that of the batch",
        source="a mean over prompts is linear",
        tag="proved",
        instances=texts(),
        lhs=lambda i: text_steps(i, 1) / largest(i.step),
        identity=lambda i: i.step / largest(i.step),
        tol=SLOPES,
        mutants={SUMMED: wrong(Batch, "parts", one_share_each)},
    ),
    Claim(
        id="llm/judged-game",
        statement="P(y > z) = (J(y, z) + 1 - J(z, y)) / 2, J the probability that the first wins",
        source=f"{PAPER}, section 3: P(y > z) + P(z > y) = 1, whatever the judge's bias for a position",
        tag="proved",
        instances=texts(longest=2),
        lhs=lambda i: i.game.win_prob(i.prompts, i.everything[1], i.everything[1]),
        identity=judged_by_hand,
        mutants={
            FLIPPED: wrong(JudgedGame, "compare", lambda compare: lambda *asked: 1 - compare(*asked)),
            ARGMAX: wrong(JudgedGame, "compare", lambda compare: lambda *asked: hardened(compare(*asked))),
            "the other order": {"identity": partial(judged_by_hand, flip=True)},
        },
    ),
    Claim(
        id="llm/learned-judge",
        statement="P(a > b | x) = sigmoid(f(x, a, b) - f(x, b, a)) = 1 - P(b > a | x), inputs read together or alone",
        source=f"{PAPER}, section 3; Bradley and Terry 1952 with f(x, a)",
        tag="proved",
        instances=judgings(),
        lhs=judged_pairs,
        identity=lambda i: expit(np.stack([scores(i), -scores(i)])),
        tol=FLOAT32,
        mutants={
            FLIPPED: wrong(LearnedJudge, "margins", lambda margins: lambda self, x, a, b: margins(self, x, b, a)),
            ARGMAX: wrong(LearnedJudge, "margins", lambda margins: lambda *asked: 1e3 * margins(*asked)),
        },
    ),
    Claim(
        id="llm/labels",
        statement="a judge is fitted along -E[(P(a > b) - p_a) grad logit P(a > b)], p_a = 1 where a was chosen",
        source="the gradient of the cross-entropy with soft labels",
        tag="proved",
        instances=judgings(),
        lhs=label_gradient,
        identity=label_gradient_by_hand,
        tol=FLOAT32,
        mutants={
            FLIPPED: wrong(data, "_split", lambda split: lambda *row: tuple(split(*row)[k] for k in (0, 2, 1))),
            ARGMAX: {"identity": partial(label_gradient_by_hand, hard=True)},
            f"{ARGMAX}, in the loss": wrong(
                fit, "_loss", lambda loss: lambda judge, rows: loss(judge, [c._replace(p_a=round(c.p_a)) for c in rows])
            ),
        },
    ),
    Claim(
        id="llm/fit",
        statement="P(rejected > chosen) < 1/2 after a fit to one comparison",
        source="the cross-entropy falls along its gradient",
        tag="proved",
        instances=judgings(soft=(False,)),
        lhs=rejected_wins,
        rhs=lambda i: 0.49,
        mutants={
            FLIPPED: wrong(data, "_split", lambda split: lambda *row: tuple(split(*row)[k] for k in (0, 2, 1))),
        },
    ),
)
"""These need transformers and peft."""

HAS_MODELS = all(find_spec(name) is not None for name in ("transformers", "peft"))
CLAIMS = (*SPELLED, *(TEXT if HAS_MODELS else ()))
