"""Random games, references and policies, degenerate corners included."""

from __future__ import annotations

from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np

from nlhf.tabular import MatrixGame, Tabular


class Instance(NamedTuple):
    """A game, a KL strength, and a policy to start from that is not the reference."""

    game: MatrixGame
    tau: float
    policy: Tabular


def matrix(rng: np.random.Generator, n: int, kind: str) -> np.ndarray:
    """(n, n) win probabilities: iid, all or nothing, transitive, or a mixture of a ranking and a cycle."""
    if kind == "bradley_terry":
        return MatrixGame.bradley_terry(2 * rng.standard_normal(n)).matrix
    if kind == "cyclic":
        return MatrixGame.cyclic(n, 0.9).matrix
    upper = np.triu(rng.uniform(-0.5, 0.5, (n, n)), 1)
    skew = upper - upper.T
    return 0.5 + {"iid": skew, "sign": 0.5 * np.sign(skew), "tie": 0 * skew}[kind]


def tied(seed: int, n: int) -> MatrixGame:
    """A game of few values with duplicated responses: ties, several equilibria, degenerate programmes."""
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.choice([-0.5, -0.25, 0, 0.25, 0.5], (n, n)), 1)
    copies = rng.integers(0, n, n)
    return MatrixGame(0.5 + (upper - upper.T)[np.ix_(copies, copies)])


KINDS = ("iid", "sign", "bradley_terry", "cyclic", "tie")


@st.composite
def instances(draw: st.DrawFn, tau_min: float = 0.02, tau_max: float = 3.0, prompts: bool = False) -> Instance:
    """Games of 2 to 8 responses; references and policies from nearly flat to mass of about 1e-7."""
    n = draw(st.integers(2, 8))
    kind = draw(st.sampled_from(KINDS))
    spread = draw(st.sampled_from((0.1, 1.0, 4.0)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tau = float(np.exp(draw(st.floats(np.log(tau_min), np.log(tau_max)))))
    shape = (draw(st.integers(1, 3)),) if prompts else ()
    win = np.stack([matrix(rng, n, kind) for _ in range(shape[0])]) if shape else matrix(rng, n, kind)
    reference = Tabular.from_logits(spread * rng.standard_normal((*shape, n)))
    policy = Tabular.from_logits(spread * rng.standard_normal((*shape, n)))
    return Instance(MatrixGame(win, reference), tau, policy)
