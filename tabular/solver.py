"""The exact solver of `Prox` on a table."""

from __future__ import annotations

from dataclasses import dataclass

from scipy.special import softmax

from nlhf.core import Info, Prox
from nlhf.tabular.operators import TabularGame
from nlhf.tabular.policy import Tabular


@dataclass(frozen=True)
class ExactSolver:
    """pi ∝ anchor * exp(eta * P opponent), in log space, for all prompts at once.

    One product with the matrix per opponent and iteration; nothing else costs more than O(n).

    Args:
        game: the game that the algorithm plays.

    >>> from nlhf import NashMD
    >>> from nlhf.tabular import MatrixGame
    >>> game = MatrixGame.rock_paper_scissors(reference=[0.5, 0.3, 0.2])
    >>> algorithm, solver = NashMD(eta=1.0, tau=0.5), ExactSolver(game)
    >>> state, info = algorithm.step(algorithm.init(game.reference), solver)
    >>> state.policy.probs.round(4), info
    (array([0.5231, 0.257 , 0.22  ]), Info(prox_residual=0.0, oracle_calls=9))
    """

    game: TabularGame

    def init(self) -> Tabular:
        """Where `nlhf.run` starts by default: the reference."""
        return self.game.reference

    def __call__(self, prox: Prox, start: Tabular | None = None, seed: int | None = None) -> tuple[Tabular, Info]:
        """The exact answer. `start` and `seed` are for solvers that search and sample."""
        logits = prox.anchor.log_prob(..., ...)
        for opponent, weight in prox.opponents:
            # softmax, because a geometric mixture comes unnormalised
            probs = softmax(opponent.log_prob(..., ...), axis=-1)
            logits = logits + (prox.eta * weight) * self.game.versus(probs)
        return Tabular.from_logits(logits), Info(0.0, len(prox.opponents) * len(self.game.prompts) * self.game.n**2)
