"""Distributional Q(lambda) on a control task: what longer traces and the loss for signed targets do.

    python benchmarks/control.py --task CartPole-v1 --steps 10000 --seeds 3 --out runs/control

Prints the mean score over the last three measurements, writes control.csv (tidy), control.png and control.svg. Half a
minute to a minute per run on one core; every agent is trained once per seed. Needs the extra `nlhf[gym]`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

from nlhf import plotting
from nlhf.llm.control import QLambdaC51, train
from nlhf.run import check_folder, write_atomically
from nlhf.schedules import check_count

AGENTS = {
    "C51 (one step)": QLambdaC51(lam=0.0, length=1),
    "Q(λ), λ = 0.4": QLambdaC51(lam=0.4),
    "Q(λ), λ = 0.7": QLambdaC51(lam=0.7),
    "Q(λ), λ = 0.7, greedy target": QLambdaC51(lam=0.7, alpha=1.0),
    "Q(λ), λ = 0.7, cross-entropy": QLambdaC51(lam=0.7, loss="cross-entropy"),
}


def main(task: str = "CartPole-v1", steps: int = 10_000, seeds: int = 3, out: Path = Path("runs/control")) -> None:
    """Train every agent once per seed.

    Args:
        task: a Gymnasium task with discrete actions, and returns between 0 and 100 when discounted by 0.99.
        steps: of the environment.
        seeds: 0, 1, ...
        out: where to write.
    """
    check_count("steps", steps, 10)
    check_count("seeds", seeds, 1)
    check_folder(out)
    torch.set_num_threads(1)
    rows = []
    for name, agent in AGENTS.items():
        for seed in tqdm(range(seeds), desc=name, disable=None):
            rows += [(name, seed, step, score) for step, score in train(agent, task, steps, seed, every=steps // 10)]
    frame = pd.DataFrame(rows, columns=["agent", "seed", "step", "score"])
    late = frame[frame.step > 0.7 * steps]
    for name in AGENTS:
        by_seed = late[late.agent == name].groupby("seed").score.mean()
        print(f"{name:32} {by_seed.mean():6.0f}, seeds from {by_seed.min():.0f} to {by_seed.max():.0f}")
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    ax = figure.subplots()
    for style, name in zip(plotting.STYLES, AGENTS, strict=False):
        table = frame[frame.agent == name].pivot(index="step", columns="seed", values="score")
        ax.fill_between(
            table.index, table.min(axis=1), table.max(axis=1), color=style["color"], alpha=0.12, linewidth=0
        )
        ax.plot(table.index, table.mean(axis=1), label=name, **{**style, "linewidth": 1.4, "markersize": 4.5})
    ax.set(xlabel="steps of the environment", ylabel="return of ten greedy episodes", title=f"{task}, {seeds} seeds")
    ax.set_ylim(0, 1.05 * float(np.max(frame.score)))
    ax.grid(True, linewidth=0.4, alpha=0.5)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "control.csv", frame.to_csv(index=False).encode())
    for path in [out / "control.csv", *plotting.save(figure, out / "control")]:
        print(f"wrote {path}")


if __name__ == "__main__":
    tyro.cli(main)
