"""Return distributions of a policy with their certificate: what `nlhf evaluate` prints, writes and draws."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nlhf import plotting
from nlhf.run import write_atomically
from nlhf.tabular import MDP, Categorical, categorical_fixed_point, certificate, return_distribution

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PROCESSES: dict[str, Callable[[float, int], MDP]] = {
    "chain": lambda gamma, seed: MDP.chain(10, gamma),
    "two-state": lambda gamma, seed: MDP.two_state(gamma),
    "dirichlet": lambda gamma, seed: MDP.dirichlet(20, 1.0, gamma, seed, actions=2),
    "garnet": lambda gamma, seed: MDP.garnet(100, 5, gamma, seed, actions=2),
    "windy-grid": lambda gamma, seed: MDP.windy_grid(5, gamma),
}
"""The processes that `nlhf evaluate` knows by name, made from gamma and the seed."""


@dataclass(frozen=True)
class Evaluation:
    """Return laws of a policy, and how far they can be from the truth."""

    name: str
    mdp: MDP
    policy: Any
    returns: Categorical
    w1_bound: Any
    method: str

    @property
    def frame(self) -> pd.DataFrame:
        """One row per state and action: moments, quantiles, CVaR, and the bound on W1."""
        import pandas as pd

        s, a = np.indices(self.policy.shape)
        law = self.returns
        columns = {"state": s, "action": a, "probability": self.policy, "mean": law.mean, "std": np.sqrt(law.variance)}
        columns |= {f"quantile_{u:g}": law.quantile(u) for u in (0.05, 0.5, 0.95)}
        columns |= {"cvar_0.1": law.cvar(0.1), "w1_bound": self.w1_bound}
        return pd.DataFrame({name: np.ravel(values) for name, values in columns.items()})

    def figure(self) -> Figure:
        """CDFs of the returns from at most seven states, those whose means are spread evenly."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.5, 4), layout="constrained")
        ax = figure.subplots()
        probs = np.sum(self.policy[..., None] * self.returns.probs, axis=1)
        mean = probs @ self.returns.atoms
        ranked = np.argsort(mean, kind="stable")
        shown = ranked[
            np.unique(np.linspace(0, mean.size - 1, min(mean.size, len(plotting.STYLES))).round().astype(int))
        ]
        for style, state in zip(plotting.STYLES, shown, strict=False):
            cdf = np.cumsum(probs[state])
            line = {**style, "linewidth": 1.4, "markevery": max(1, cdf.size // 8), "markersize": 4.5}
            label = f"state {state}, mean {mean[state]:.3g}"
            ax.step(self.returns.atoms, cdf, where="post", label=label, markeredgecolor="white", **line)
        reached = (np.cumsum(probs[shown], axis=1).min(axis=0) < 1 - 1e-4) & (
            np.cumsum(probs[shown], axis=1).max(axis=0) > 1e-4
        )
        if reached.any():
            ax.set_xlim(self.returns.atoms[reached].min(), self.returns.atoms[reached].max())
        ax.set(xlabel="discounted return (units of the rewards)", ylabel="P(return <= x)", ylim=(-0.02, 1.02))
        ax.grid(True, linewidth=0.4, alpha=0.5)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
        return figure

    def save(self, out: Path) -> list[Path]:
        """Write returns.csv and the figure into the folder `out`."""
        figure, table = self.figure(), self.frame.to_csv(index=False).encode()
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "returns.csv", table)
        return [out / "returns.csv", *plotting.save(figure, out / "returns")]


def evaluate(
    name: str, mdp: MDP, policy: Any, accuracy: float | None, atoms: int | None, method: str = "auto"
) -> Evaluation:
    """The return laws of a policy, to an accuracy or on a number of atoms, with the certificate of either."""
    pi = mdp.check_policy(policy)
    if atoms is None:
        found = return_distribution(mdp, pi, 0.01 if accuracy is None else accuracy)
        return Evaluation(name, mdp, pi, found.returns, found.w1_bound, found.method)
    fixed = categorical_fixed_point(mdp, pi, atoms, method=method)
    return Evaluation(name, mdp, pi, fixed.returns, certificate(mdp, pi, fixed.returns), fixed.method)


def load_process(name: str, gamma: float | None, seed: int) -> tuple[MDP, str]:
    """A process of `PROCESSES`, or of an .npz file with transitions, rewards, gamma and perhaps reward_probs.

    Raises ValueError if it is neither, or the file is malformed.
    """
    if name in PROCESSES:
        return PROCESSES[name](0.9 if gamma is None else gamma, seed), name
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"mdp must be one of {', '.join(PROCESSES)} or an .npz file, got {name!r}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not an .npz file of arrays ({error})") from None
    except AttributeError:
        raise ValueError(f"{path}: a single array, expected an .npz file with transitions and rewards") from None
    known = {"transitions", "rewards", "gamma", "reward_probs"}
    if not {"transitions", "rewards"} <= set(arrays) <= known or ("gamma" not in arrays and gamma is None):
        raise ValueError(f"{path}: expected transitions, rewards, gamma[, reward_probs], got {', '.join(arrays)}")
    try:
        discount = float(arrays["gamma"]) if gamma is None else gamma
        return MDP(arrays["transitions"], arrays["rewards"], discount, arrays.get("reward_probs")), path.stem
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def load_policy(name: str, mdp: MDP) -> Any:
    """ "uniform", or the rows of a CSV file without a header: (S, A) probabilities."""
    if name == "uniform":
        return mdp.uniform
    if not Path(name).is_file():
        raise ValueError(f"policy must be uniform or a CSV file of probabilities, got {name!r}")
    try:
        table = np.loadtxt(name, delimiter=",", ndmin=2)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    try:
        return mdp.check_policy(table)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
