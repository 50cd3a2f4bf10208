"""Preferences over text, and the duality gap where responses cannot be listed."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import scipy
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from nlhf.llm.policy import TokenPolicy, alive
from nlhf.llm.shards import full
from nlhf.metrics import Floats, estimated_gap
from nlhf.schedules import check_count

Judge: TypeAlias = Callable[[Sequence[str], Sequence[str], Sequence[str]], ArrayLike]
"""judge(prompts, a, b): the probabilities that response a[i] beats b[i] on prompts[i].

A judge with the attribute `antisymmetric = True` says that judge(prompts, a, b) + judge(prompts, b, a) = 1.
"""


def ask(judge: Judge, prompts: Sequence[Any], a: Sequence[str], b: Sequence[str]) -> Floats:
    """(N,) what the judge answers; ValueError unless that is N probabilities."""
    answer = np.asarray(judge(prompts, a, b), dtype=np.float64)
    if answer.shape != (len(a),) or not ((answer >= 0) & (answer <= 1)).all():
        raise ValueError(f"judge must return {len(a)} probabilities in [0, 1], got {answer!r}")
    return answer


@dataclass(frozen=True)
class JudgedGame:
    """A preference game whose oracle reads text.

    The judge is asked in both orders and P(y > z) = (judge(y, z) + 1 - judge(z, y)) / 2, so P(y > z) + P(z > y) = 1
    whatever the judge's bias for a position; one that is antisymmetric is asked once. A response ties with itself.

    Args:
        judge: probabilities that the first of two responses wins; it may be intransitive.
        prompts: the prompts, all of the same weight.
        text: turns responses (B, n, T) into strings, for instance `CausalLM.text`.

    Raises ValueError if the judge returns anything but probabilities.

    >>> from nlhf.llm.preference import cycle_judge
    >>> game = JudgedGame(cycle_judge, ["Say hello."], text=lambda y: y)
    >>> p = game.win_prob(game.prompts, [["hello", "a good great fine day"]], [["hello"]])
    >>> p.shape, float(p[0, 0, 0])
    ((1, 2, 1), 0.5)
    """

    judge: Judge
    prompts: Sequence[Any]
    text: Callable[[Any], list[list[str]]] = field(repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str) or not self.prompts:
            raise ValueError(f"prompts must be a list of at least one prompt, got {self.prompts!r}")
        object.__setattr__(self, "prompts", tuple(self.prompts))

    @property
    def prompt_weights(self) -> Floats:
        """(X,) uniform."""
        return np.full(len(self.prompts), 1 / len(self.prompts))

    def win_prob(self, x: Sequence[str], y: Any, z: Any) -> Floats:
        """(B, n, m) P(y > z | x) of responses y (B, n, T) and z (B, m, T)."""
        return self.compare(x, self.text(y), self.text(z))

    def compare(self, x: Sequence[str], first: Sequence[Sequence[str]], second: Sequence[Sequence[str]]) -> Floats:
        """(B, n, m) P(first > second | x) of strings, n of the one and m of the other for each prompt."""
        asked = [
            (prompt, a, b)
            for prompt, row, column in zip(x, first, second, strict=True)
            for a in row
            for b in column
        ]  # fmt: skip
        prompts, a, b = zip(*asked, strict=True)
        win = ask(self.judge, prompts, a, b)
        if not getattr(self.judge, "antisymmetric", False):
            win = (win + 1 - ask(self.judge, prompts, b, a)) / 2
        return win.reshape(len(x), len(first[0]), len(second[0]))

    def __repr__(self) -> str:
        prompts = f"{len(self.prompts)} prompts, crc {zlib.crc32(repr(self.prompts).encode()):08x}"
        return f"JudgedGame({self.judge!r}, {prompts})"


_PRAISE = frozenset(
    [
        "amazing",
        "beautiful",
        "best",
        "enjoy",
        "excellent",
        "fine",
        "fun",
        "good",
        "great",
        "happy",
        "like",
        "love",
        "nice",
        "perfect",
        "wonderful",
    ]
)
_BLAME = frozenset(
    [
        "awful",
        "bad",
        "boring",
        "dull",
        "fail",
        "hate",
        "horrible",
        "poor",
        "sad",
        "terrible",
        "ugly",
        "waste",
        "weak",
        "worse",
        "worst",
        "wrong",
    ]
)


def cycle_judge(prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Floats:
    """A scripted judge with an intransitive taste: length beats cheer, cheer beats variety, variety beats length.

        P(a > b) = sigmoid(20 det[1, f(a), f(b)]),   f = (length, cheer, variety), each in [0, 1]

    length is the number of words over 32, cheer half of one plus the balance of cheerful and gloomy words times
    three over the number of words (cut to [0, 1]), variety the share of distinct words.
    """
    texts = {text: i for i, text in enumerate(dict.fromkeys([*a, *b]))}
    features = np.array([_features(text) for text in texts])
    f, g = features[[texts[t] for t in a]], features[[texts[t] for t in b]]
    return np.asarray(scipy.special.expit(20 * np.cross(f, g).sum(axis=-1)))


def _features(text: str) -> tuple[float, float, float]:
    words = re.findall(r"[\w']+", text.lower())
    count = max(1, len(words))
    balance = sum(w in _PRAISE for w in words) - sum(w in _BLAME for w in words)
    return min(1.0, len(words) / 32), float(np.clip(0.5 + 3 * balance / count, 0, 1)), len(set(words)) / count


class sampled_gap:
    """The metric `duality_gap` from n samples per prompt of the reference and as many of the policy.

    It records by name

        duality_gap, duality_gap_low, duality_gap_high    see `nlhf.metrics.estimated_gap`: how they err
        kl_to_reference, sequence_entropy                 nats per response
        entropy                                           nats per token
        length                                            tokens per response, its end included
        win_rate                                          over the reference
        win_rate_earlier, win_rate_worst                  over the policies recorded before: on average, and the least

    The last two are 1/2 where nothing was recorded before. The same seed serves every call, so that a curve shows the
    policy's change and not the sampler's; a response meets earlier ones that were drawn with other random numbers.

    Args:
        reference: a policy.
        n: samples, at least 2.
        seed: of the samples and the bootstrap.
        level: coverage of the interval.
        prompts: to measure on, for instance held out from the game's; by default those of the game.

    Raises FloatingPointError for a policy whose parameters are not finite.
    """

    def __init__(
        self,
        reference: TokenPolicy,
        n: int,
        seed: int,
        level: float = 0.9,
        prompts: Sequence[Any] | None = None,
    ) -> None:
        check_count("n", n, 2)
        self.__name__ = "duality_gap"
        self.reference, self.n, self.seed, self.level = reference, n, seed, level
        self.prompts = None if prompts is None else tuple(prompts)
        self.memory: list[list[list[str]]] = []
        """The responses of every policy recorded so far, by prompt; `nlhf.run` keeps them in its checkpoint."""
        self._drawn: dict[Any, list[list[str]]] = {}  # the reference does not change, nor do its samples

    @torch.no_grad()
    def __call__(self, policy: TokenPolicy, game: JudgedGame, tau: float) -> dict[str, float]:
        if not all(bool(full(p.isfinite().all())) for p in policy.params.values()):
            raise FloatingPointError("the policy's parameters are not finite: take a smaller step")
        x, reference = game.prompts if self.prompts is None else self.prompts, self.reference
        if x not in self._drawn:
            self._drawn[x] = game.text(reference.sample(x, self.n, torch.Generator().manual_seed(self.seed))[0])
        z, _ = policy.sample(x, self.n, torch.Generator().manual_seed(self.seed + 1))
        log_prob, texts = policy.log_prob(x, z), game.text(z)
        log_ratio = _float64(log_prob - reference.log_prob(x, z))
        win = game.compare(x, self._drawn[x], texts)
        gap = estimated_gap(win, log_ratio, tau, np.random.default_rng(self.seed), self.level)
        length = _float64(alive(policy.spell(z), policy.eos).sum(-1))
        surprise = -_float64(log_prob)
        # The i-th responses of two policies share their random numbers, so the i-th meets the one after it.
        asked = [prompt for prompt in x for _ in range(self.n)]
        own = [[text] for row in texts for text in row]
        earlier = [
            float(game.compare(asked, own, [[text] for row in past for text in [*row[1:], row[0]]]).mean())
            for past in self.memory
        ] or [0.5]
        self.memory.append(texts)
        return {
            "duality_gap": gap.value,
            "duality_gap_low": gap.low,
            "duality_gap_high": gap.high,
            "kl_to_reference": float(log_ratio.mean()),
            "win_rate": float(1 - win.mean()),
            "win_rate_earlier": float(np.mean(earlier)),
            "win_rate_worst": min(earlier),
            "entropy": float(surprise.sum() / length.sum()),
            "sequence_entropy": float(surprise.mean()),
            "length": float(length.mean()),
        }


def _float64(values: Tensor) -> Floats:
    return values.double().numpy(force=True)
