"""Policies that spell a response token by token, as values: a frozen network and a dictionary of parameters."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from nlhf.core import Geometric, Policy
from nlhf.llm.decode import sample
from nlhf.llm.shards import full, is_sharded, like
from nlhf.metrics import table

Params: TypeAlias = Mapping[str, Tensor]
MEMORY = " of the optimiser"
"""Ends the names under which a checkpoint holds a policy's memory."""


class TokenPolicy(ABC):
    """What the solvers and the decoder ask of a policy. Training makes a new policy of new parameters.

    Shapes: B prompts, n responses of each, T tokens, V the vocabulary.
    """

    params: Params
    memory: Params = MappingProxyType({})
    """What the optimiser that made this policy remembers, by parameter and name: the next one goes on from it."""
    length: int
    """T, the most tokens a response has."""
    eos: int | None = None
    """The token that ends a response, if any does before `length`."""

    @abstractmethod
    def next_log_probs(self, x: Any, y: Any) -> Tensor:
        """(B, n, T, V) log pi(. | x, y_<t) before every token of the responses y."""

    @abstractmethod
    def start(self, x: Any, n: int) -> tuple[Tensor, Any]:
        """(B n, V) logits of the first token, and the cache of the prefix; n rows per prompt, adjacent."""

    @abstractmethod
    def extend(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """(rows, V) logits of the next token after appending tokens (rows,) to the prefixes of the cache."""

    def keep(self, cache: Any, rows: Tensor) -> Any:
        """These rows of a cache alone; asked only of a policy with an end token."""
        raise NotImplementedError

    def spell(self, y: Any) -> Tensor:
        """(B, n, T) the tokens of responses y; (1, n, T) of all responses, y = ..., which every prompt shares."""
        return torch.as_tensor(y)

    def read(self, tokens: Tensor) -> Tensor:
        """The responses y that these tokens (B, n, T) spell."""
        return tokens

    def log_prob(self, x: Any, y: Any) -> Tensor:
        """(B, n) log pi(y | x) of whole responses, their end included, in nats."""
        return _chosen(self.next_log_probs(x, y), self.spell(y), self.eos)

    def sample(self, x: Any, n: int, generator: torch.Generator) -> tuple[Any, Tensor]:
        """n responses per prompt, y (B, n), and their log pi(y | x) (B, n)."""
        ((tokens, log_prob),) = sample([([(self, 1.0)], n)], x, generator)
        return self.read(tokens), log_prob

    def with_params(self, params: Params, memory: Params = MappingProxyType({})) -> Self:
        """This network with other parameters."""
        policy = copy.copy(self)
        policy.params, policy.memory = params, memory
        return policy

    def freeze(self) -> Self:
        """Itself: a policy is a value, and a solver never trains the one it is given."""
        return self

    def lerp(self, other: Self, weight: float) -> Self:
        """Parameters (1 - weight) * self + weight * other."""
        return self.with_params({name: torch.lerp(p, other.params[name], weight) for name, p in self.params.items()})

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """The parameters and the memory, for a checkpoint; bfloat16, which NumPy lacks, as its bits.

        What is sharded is gathered, so that all processes must ask for it.
        """
        kept = {**self.params} | {f"{name}{MEMORY}": value for name, value in self.memory.items()}
        return {name: _bits(full(p.detach())).numpy(force=True).copy() for name, p in kept.items()}

    def replace(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Self:
        """This network with the parameters and the memory of a checkpoint."""
        params = {name: like(_from_bits(arrays[name]), p) for name, p in self.params.items()}
        memory = {
            name.removesuffix(MEMORY): _from_bits(array) for name, array in arrays.items() if name.endswith(MEMORY)
        }
        for name, value in memory.items():  # "parameter entry"; the number of steps has no shape
            p = params.get(name.rpartition(" ")[0])
            if p is not None and is_sharded(p) and value.shape == p.shape:
                memory[name] = like(value, p)
        return self.with_params(params, memory)


def _bits(p: Tensor) -> Tensor:
    return p.view(torch.int16) if p.dtype == torch.bfloat16 else p


def _from_bits(array: np.ndarray[Any, Any]) -> Tensor:
    value = torch.as_tensor(array)
    return value.view(torch.bfloat16) if value.dtype == torch.int16 else value


def alive(tokens: Tensor, eos: int | None) -> Tensor:
    """(..., T) whether a token belongs to its response: all up to and including the first end-of-sequence token."""
    if eos is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    ended = (tokens == eos).long()
    return ended.cumsum(-1) - ended == 0


def _chosen(log_probs: Tensor, tokens: Tensor, eos: int | None) -> Tensor:
    """(B, n) the sum over t of log_probs (B, n, T, V) at the tokens, up to the end of each response."""
    tokens = tokens.expand(log_probs.shape[:3])
    return log_probs.gather(-1, tokens[..., None]).squeeze(-1).masked_fill(~alive(tokens, eos), 0.0).sum(-1)


class LogitTable(TokenPolicy):
    """pi(y | x) = softmax(logits[x])[y]: the smallest trainable policy. A response is one token.

    Args:
        start: a policy whose responses can be listed, for instance `game.reference`; the table starts there.

    >>> from nlhf.tabular import MatrixGame
    >>> policy = LogitTable(MatrixGame.rock_paper_scissors(reference=[0.5, 0.3, 0.2]).reference)
    >>> policy.log_prob(..., ...).exp().numpy().round(3)
    array([[0.5, 0.3, 0.2]])
    """

    length = 1

    def __init__(self, start: Policy) -> None:
        self.params = {"logits": torch.tensor(np.atleast_2d(table(start)))}

    def log_prob(self, x: Any, y: Any) -> Tensor:
        """(B, n) log pi(y | x); x (B,) and y (B, n) are indices, `...` is all of them."""
        log_probs = self.params["logits"].log_softmax(-1)[x]
        return log_probs if y is ... else log_probs.gather(-1, torch.as_tensor(y))

    def next_log_probs(self, x: Any, y: Any) -> Tensor:
        """(B, n, 1, V): the same for every response."""
        log_probs = self.log_prob(x, ...)
        n = log_probs.shape[-1] if y is ... else y.shape[-1]
        return log_probs[:, None, None, :].expand(-1, n, 1, -1)

    def spell(self, y: Any) -> Tensor:
        """The index itself, as one token."""
        return (torch.arange(self.params["logits"].shape[-1])[None] if y is ... else torch.as_tensor(y))[..., None]

    def read(self, tokens: Tensor) -> Tensor:
        """The token is the index."""
        return tokens[..., 0]

    def start(self, x: Any, n: int) -> tuple[Tensor, None]:
        """(B n, V) log pi(. | x)."""
        return self.log_prob(x, ...).repeat_interleave(n, 0), None

    def extend(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        raise IndexError("a response of a LogitTable is one token long")


@dataclass(frozen=True)
class TokenMixture:
    """Token-by-token geometric mixture: at every prefix, softmax of sum_i w_i log pi_i(. | prefix).

    This is what can be decoded, and *not* the mixture of whole responses, `Geometric`, that the algorithms pose:

        log token(y) = log geometric(y) - sum_t log Z(y_<t),    Z(prefix) = sum_a prod_i pi_i(a | prefix)^w_i

    The two agree when responses are one token long. `log_weight` is the correction.

    Args:
        parts: (policy, weight) pairs.
    """

    parts: tuple[tuple[TokenPolicy, float], ...]

    @classmethod
    def of(cls, policy: Any) -> TokenMixture:
        """The mixture that decodes a `Geometric`, or a single policy, which it then equals."""
        parts = policy.parts if isinstance(policy, Geometric) else ((policy, 1.0),)
        return cls(tuple((part, weight) for part, weight in parts if weight))

    def log_prob(self, x: Any, y: Any) -> Tensor:
        """(B, n) normalised log-probability of the token-level mixture, in nats."""
        first = self.parts[0][0]
        mixed = sum(weight * policy.next_log_probs(x, y) for policy, weight in self.parts)
        return _chosen(torch.as_tensor(mixed).log_softmax(-1), first.spell(y), first.eos)

    def log_weight(self, x: Any, y: Any) -> Tensor:
        """(B, n) log geometric(y) - log token(y): importance weights, up to a constant, that correct the samples."""
        return torch.as_tensor(Geometric(self.parts).log_prob(x, y)) - self.log_prob(x, y)

    def sample(self, x: Any, n: int, generator: torch.Generator) -> tuple[Any, Tensor]:
        """n responses per prompt, y (B, n), decoded with one cache per part, and their log-probabilities (B, n)."""
        ((tokens, log_prob),) = sample([(self.parts, n)], x, generator)
        return self.parts[0][0].read(tokens), log_prob
