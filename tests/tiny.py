"""Transformers and sub-problems so small that every outcome can be listed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nlhf import metrics
from nlhf.core import Geometric, Prox
from nlhf.llm import LogitTable, TinyTransformer
from nlhf.llm.policy import TokenPolicy
from nlhf.tabular import Tabular


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def perturbed(policy: TinyTransformer, scale: float = 0.5, seed: int = 0) -> TinyTransformer:
    """The transformer with random weights in its last layer, too: far from the reference."""
    noise = generator(seed)
    head = policy.params["head.weight"]
    return policy.with_params(
        {**policy.params, "head.weight": scale * torch.randn(head.shape, generator=noise).to(head)}
    )


def small(n: int, seed: int = 0, vocab: int = 2, prompts: int = 1, scale: float = 0.5) -> TinyTransformer:
    rng = np.random.default_rng(seed)
    start = Tabular.from_logits(rng.standard_normal((prompts, n)))
    return perturbed(TinyTransformer(start, vocab=vocab, width=8, layers=1, heads=2, seed=seed), scale, seed)


def random_prox(start: TokenPolicy, seed: int = 0, eta: float = 1.5) -> Prox:
    rng = np.random.default_rng(seed)
    shape = tuple(metrics.table(start).shape)
    anchor = LogitTable(Tabular.from_logits(rng.standard_normal(shape)))
    return Prox(
        Geometric(((start, 0.7), (anchor, 0.3))),
        LogitTable(Tabular.from_logits(rng.standard_normal(shape))),
        eta,
    )


def in_numpy(prox: Prox) -> Prox:
    def table(policy: Any) -> Tabular:
        return Tabular.from_logits(metrics.table(policy))

    return Prox(Geometric(tuple((table(p), w) for p, w in prox.anchor.parts)), table(prox.opponent), prox.eta)
