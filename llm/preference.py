"""Preferences over text, and the duality gap where responses cannot be listed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import expit
from torch import Tensor

from nlhf.llm.policy import TokenPolicy
from nlhf.metrics import Floats, Metric, estimated_gap

Judge: TypeAlias = Callable[[Sequence[str], Sequence[str], Sequence[str]], ArrayLike]
"""judge(prompts, a, b): the probabilities that response a[i] beats b[i] on prompts[i]."""


@dataclass(frozen=True)
class JudgedGame:
    """A preference game whose oracle reads text.

    The judge is asked in both orders and P(y > z) = (judge(y, z) + 1 - judge(z, y)) / 2, so P(y > z) + P(z > y) = 1
    whatever the judge's bias for a position. A response ties with itself.

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
    prompts: Sequence[str]
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
        first, second = self.text(y), self.text(z)
        asked = [
            (prompt, a, b)
            for prompt, row, column in zip(x, first, second, strict=True)
            for a in row
            for b in column
        ]  # fmt: skip
        prompts, a, b = zip(*asked, strict=True)
        forward = np.asarray(self.judge(prompts, a, b), dtype=np.float64)
        backward = np.asarray(self.judge(prompts, b, a), dtype=np.float64)
        for answer in (forward, backward):
            if answer.shape != (len(asked),) or not ((answer >= 0) & (answer <= 1)).all():
                raise ValueError(f"judge must return {len(asked)} probabilities in [0, 1], got {answer!r}")
        return ((forward + 1 - backward) / 2).reshape(len(x), len(first[0]), len(second[0]))


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
    return np.asarray(expit(20 * np.cross(f, g).sum(axis=-1)))


def _features(text: str) -> tuple[float, float, float]:
    words = re.findall(r"[\w']+", text.lower())
    count = max(1, len(words))
    balance = sum(w in _PRAISE for w in words) - sum(w in _BLAME for w in words)
    return min(1.0, len(words) / 32), float(np.clip(0.5 + 3 * balance / count, 0, 1)), len(set(words)) / count


def sampled_gap(reference: TokenPolicy, n: int, seed: int, level: float = 0.9) -> Metric:
    """The metric `duality_gap` from n samples per prompt of the reference and as many of the policy.

    Records also `duality_gap_low` and `duality_gap_high` (a bootstrap interval), `kl_to_reference` and `win_rate` over
    the reference. What the value and the interval mean, and which way they err, says `nlhf.metrics.estimated_gap`. The
    same seed serves every call, so that a curve shows the policy's change and not the sampler's.
    """

    drawn: dict[tuple[str, ...], Any] = {}  # by prompts; the reference does not change, so neither do its samples

    @torch.no_grad()
    def duality_gap(policy: TokenPolicy, game: Any, tau: float) -> dict[str, float]:
        if game.prompts not in drawn:
            drawn[game.prompts] = reference.sample(game.prompts, n, torch.Generator().manual_seed(seed))[0]
        y = drawn[game.prompts]
        z, _ = policy.sample(game.prompts, n, torch.Generator().manual_seed(seed + 1))
        ratio = policy.log_prob(game.prompts, z) - reference.log_prob(game.prompts, z)
        log_ratio = _float64(ratio)
        win = game.win_prob(game.prompts, y, z)
        gap = estimated_gap(win, log_ratio, tau, np.random.default_rng(seed), level)
        return {
            "duality_gap": gap.value,
            "duality_gap_low": gap.low,
            "duality_gap_high": gap.high,
            "kl_to_reference": float(log_ratio.mean()),
            "win_rate": float(1 - win.mean()),
        }

    return duality_gap


def _float64(values: Tensor) -> Floats:
    return values.double().numpy(force=True)
