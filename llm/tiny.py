"""A transformer so small that every response can be listed: the rung that proves the sampled code right."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from nlhf.core import Policy
from nlhf.llm.policy import TokenPolicy
from nlhf.metrics import Floats, table

Cache: TypeAlias = list[tuple[Tensor, Tensor]]


class TinyTransformer(TokenPolicy):
    """A decoder that spells response y as the T digits of y in base `vocab`, most significant first.

        log pi(token | x, prefix) = log_softmax(decoder(x, prefix) + log start(token | x, prefix))

    It is fine-tuning in miniature: the last layer starts at zero, so the policy starts exactly at `start`, and
    tokens that lead to no response (58 responses, 64 spellings) keep probability zero.

    Args:
        start: a policy whose n responses can be listed, for instance `game.reference`.
        vocab: number of tokens V; T = ceil(log_V n).
        width, layers, heads: size of the decoder.
        seed: of the initial weights.
        dtype: of the weights and everything computed from them.

    Raises ValueError if vocab < 2 or the sizes do not fit.

    >>> from nlhf.tabular import MatrixGame
    >>> policy = TinyTransformer(MatrixGame.rock_paper_scissors(reference=[0.5, 0.3, 0.2]).reference, vocab=2)
    >>> policy.log_prob(..., ...).exp().numpy().round(3)
    array([[0.5, 0.3, 0.2]])
    >>> y, log_prob = policy.sample([0], 4, torch.Generator().manual_seed(0))
    >>> y.shape, policy.spell(y).shape
    (torch.Size([1, 4]), torch.Size([1, 4, 2]))
    """

    def __init__(
        self,
        start: Policy,
        *,
        vocab: int = 4,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if vocab < 2:
            raise ValueError(f"vocab must be at least 2, got {vocab}")
        if min(width, layers, heads) < 1 or width % heads:
            raise ValueError(
                f"width, layers and heads must be at least 1 and heads divide width, got {width}, {layers} and {heads}"
            )
        log_probs = np.atleast_2d(table(start))
        prompts, self.n = log_probs.shape
        self.vocab, self.length = vocab, 1
        while vocab**self.length < self.n:
            self.length += 1
        self.base = torch.tensor(_conditionals(log_probs, vocab, self.length), dtype=dtype)
        # The network itself holds no weights: a policy is the network called with its own parameters.
        with torch.device("meta"):
            self.network = _Decoder(vocab, self.length, prompts, width, layers, heads)
        generator = torch.Generator().manual_seed(seed)
        self.params = {name: _initial(name, p, dtype, generator) for name, p in self.network.named_parameters()}

    def next_log_probs(self, x: Any, y: Any) -> Tensor:
        """(B, n, T, V) log pi(. | x, y_<t)."""
        prompts = torch.arange(len(self.base))[x]
        y = torch.arange(self.n).expand(len(prompts), -1) if y is ... else torch.as_tensor(y)
        families = -(-self.n // self.vocab)
        if y.shape[1] <= families:
            return self._after_prefixes(prompts, y)
        # One row of the decoder serves the V responses that differ in their last token only.
        rows = self._after_prefixes(prompts, self.vocab * torch.arange(families).expand(len(prompts), -1))
        return rows[torch.arange(len(prompts))[:, None], y // self.vocab]

    def _after_prefixes(self, prompts: Tensor, y: Tensor) -> Tensor:
        tokens = self.spell(y)[..., :-1].flatten(0, 1)
        logits, _ = functional_call(
            self.network, dict(self.params), (prompts.repeat_interleave(y.shape[1]), tokens, None)
        )
        digits = self.vocab ** torch.arange(self.length, 0, -1)
        place = _offsets(self.vocab, self.length) + y[..., None] // digits  # the prefixes of y in self.base
        return (logits.unflatten(0, y.shape) + self.base[prompts[:, None, None], place]).log_softmax(-1)

    def spell(self, y: Any) -> Tensor:
        """(B, n, T) the digits of y in base V, most significant first."""
        y = torch.arange(self.n)[None] if y is ... else torch.as_tensor(y)
        return y[..., None] // self.vocab ** torch.arange(self.length - 1, -1, -1) % self.vocab

    def read(self, tokens: Tensor) -> Tensor:
        """(B, n) the number that the digits spell."""
        return (tokens * self.vocab ** torch.arange(self.length - 1, -1, -1)).sum(-1)

    def start(self, x: Any, n: int) -> tuple[Tensor, Any]:
        """(B n, V) log-probabilities of the first token; the prompt is read once for its n responses."""
        prompts = torch.arange(len(self.base))[x]
        logits, cache = functional_call(
            self.network, dict(self.params), (prompts, torch.empty(len(prompts), 0, dtype=torch.long), None)
        )
        repeated = [(k.repeat_interleave(n, 0), v.repeat_interleave(n, 0)) for k, v in cache]
        log_probs = (logits[:, 0] + self.base[prompts, 0]).log_softmax(-1).repeat_interleave(n, 0)
        prompts = prompts.repeat_interleave(n)
        return log_probs, (prompts, torch.zeros_like(prompts), repeated)

    def extend(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """(B n, V) log-probabilities of the next token."""
        prompts, prefix, past = cache
        prefix = prefix * self.vocab + tokens
        logits, past = functional_call(self.network, dict(self.params), (None, tokens[:, None], past))
        place = _offsets(self.vocab, self.length)[past[0][0].shape[2] - 1] + prefix
        return (logits[:, 0] + self.base[prompts, place]).log_softmax(-1), (prompts, prefix, past)

    def __repr__(self) -> str:
        weights = sum(p.numel() for p in self.params.values())
        return f"TinyTransformer(n={self.n}, vocab={self.vocab}, length={self.length}, weights={weights})"


class _Decoder(nn.Module):
    """Pre-norm decoder. Position 0 holds the prompt, position t the t-th token."""

    def __init__(self, vocab: int, length: int, prompts: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.prompt = nn.Embedding(prompts, width)
        self.token = nn.Embedding(vocab, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, prompt: Tensor | None, tokens: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Logits (rows, t, V) after the prompt (rows,), if it is given, and after each of the tokens (rows, .)."""
        h = self.token(tokens)
        if prompt is not None:
            h = torch.cat([self.prompt(prompt)[:, None], h], 1)
        past = 0 if cache is None else cache[0][0].shape[2]
        h = h + self.position(torch.arange(past, past + h.shape[1]))
        grown = []
        for i, block in enumerate(self.blocks):
            h, kv = block(h, None if cache is None else cache[i])
            grown.append(kv)
        return self.head(self.norm(h)), grown


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, h: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        # With a past there is one new token, which may look at everything.
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        h = h + self.out(attended.transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.norm2(h)))), (k, v)


def _initial(name: str, like: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Ones for norms, zero for the head, N(0, 1) for embeddings, N(0, 1 / fan_in) for matrices."""
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=dtype)
    if name == "head.weight":
        return torch.zeros(like.shape, dtype=dtype)
    scale = 1.0 if name.split(".")[0] in ("prompt", "token", "position") else like.shape[1] ** -0.5
    return torch.empty(like.shape, dtype=dtype).normal_(0.0, scale, generator=generator)


def _offsets(vocab: int, length: int) -> Tensor:
    """(T,) where the prefixes of 0, 1, ..., T - 1 tokens begin in the list of all prefixes."""
    return torch.tensor([(vocab**t - 1) // (vocab - 1) for t in range(length)])


def _conditionals(log_probs: Floats, vocab: int, length: int) -> Floats:
    """(X, prefixes, V) log pi(token | prefix) of a listed law (X, n); a prefix of no response gets zeros."""
    prompts, n = log_probs.shape
    leaves = np.full((prompts, vocab**length), -np.inf)
    leaves[:, :n] = log_probs
    levels = []
    for t in range(length):
        mass = scipy.special.logsumexp(leaves.reshape(prompts, vocab ** (t + 1), -1), axis=-1)
        mass = mass.reshape(prompts, -1, vocab)
        total = scipy.special.logsumexp(mass, axis=-1, keepdims=True)
        levels.append(np.where(np.isneginf(total), 0.0, mass - np.where(np.isneginf(total), 0.0, total)))
    return np.concatenate(levels, axis=1)
