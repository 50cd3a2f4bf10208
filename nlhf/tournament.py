"""Checkpoints against each other: what `nlhf tournament` samples, judges, prints and draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nlhf import plotting
from nlhf.run import write_atomically
from nlhf.schedules import check_count
from nlhf.solve import Standings, standings
from nlhf.tabular import MatrixGame
from nlhf.tabular.evidence import Rounds
from nlhf.train import MODEL, write_lines

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Tournament:
    """Who beats whom, how sure that is, and what follows: Nash mixtures and the Bradley-Terry ranking."""

    standings: Standings
    low: Floats
    """(K, K) lower end of P(row > column); a bootstrap of the prompts."""
    high: Floats
    """(K, K) upper end."""
    responses: tuple[dict[str, Any], ...]
    """Rows checkpoint, prompt, response."""

    @property
    def frame(self) -> pd.DataFrame:
        """One row per ordered pair: a, b, P(a > b) and its interval."""
        import pandas as pd

        names, win = self.standings.labels, self.standings.game.matrix
        return pd.DataFrame(
            {"a": a, "b": b, "win": win[i, j], "low": self.low[i, j], "high": self.high[i, j]}
            for i, a in enumerate(names)
            for j, b in enumerate(names)
            if i != j
        )

    def rows(self) -> str:
        """The table to print: P(row > column) with its interval."""
        import pandas as pd

        names, win = list(self.standings.labels), self.standings.game.matrix
        shown = [
            ["-" if i == j else f"{p:.3f} [{self.low[i, j]:.3f}, {self.high[i, j]:.3f}]" for j, p in enumerate(row)]
            for i, row in enumerate(win)
        ]
        return pd.DataFrame(shown, index=names, columns=names).to_string()

    def figure(self) -> Figure:
        """P(row > column) as a table in colour."""
        from matplotlib.figure import Figure

        names, win = [plotting.shortened(name) for name in self.standings.labels], self.standings.game.matrix
        size = 2.6 + 0.8 * len(names)
        drawn = Figure(figsize=(size + 1, size), layout="constrained")
        ax = drawn.subplots()
        image = ax.imshow(win, cmap="PuOr", vmin=0, vmax=1)
        for (i, j), p in np.ndenumerate(win):
            if i != j:
                text = f"{p:.2f}\n{self.low[i, j]:.2f}-{self.high[i, j]:.2f}"
                ax.text(j, i, text, ha="center", va="center", fontsize=7, color="k" if 0.15 < p < 0.85 else "w")
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
        ax.set_yticks(range(len(names)), names)
        ax.set(xlabel="opponent", ylabel="checkpoint")
        ax.set_title(f"{len(self._prompts)} prompts, {self.standings.level:.0%} intervals", fontsize=10)
        drawn.colorbar(image, label="win probability of the row", shrink=0.8)
        return drawn

    @property
    def _prompts(self) -> set[str]:
        return {str(row["prompt"]) for row in self.responses}

    def save(self, out: Path) -> list[Path]:
        """Write pairwise.csv, responses.jsonl, both figures and what `Standings.save` writes into the folder `out`."""
        written = self.standings.save(out)
        write_atomically(out / "pairwise.csv", self.frame.to_csv(index=False).encode())
        write_lines(out / "responses.jsonl", self.responses)
        figures = plotting.save(self.figure(), out / "pairwise")
        return [out / "pairwise.csv", out / "responses.jsonl", *figures, *written]


def tournament(
    folders: Sequence[Path],
    judge: Any,
    prompts: Sequence[Any],
    n: int = 8,
    taus: Sequence[float] = (0.1, 0.01, 0.0),
    *,
    max_new_tokens: int = 64,
    draws: int = 1000,
    level: float = 0.9,
    seed: int = 0,
) -> Tournament:
    """Let every checkpoint answer every prompt, and judge all pairs of responses of two checkpoints to one prompt.

    Args:
        folders: at least two of `nlhf train`, or Hugging Face folders or GGUF files.
        judge: probabilities that the first of two responses wins, `nlhf.llm.preference.Judge`.
        prompts: to answer.
        n: responses of each checkpoint per prompt.
        taus: strengths of the KL regularisation >= 0, to the uniform mixture, of the Nash mixtures over checkpoints.
        max_new_tokens: the most tokens of a response.
        draws: of the prompts, for the intervals; they say nothing of other prompts if there is one.
        level: coverage of the intervals.
        seed: of the responses and the draws.

    Raises ValueError for fewer than two checkpoints, FileNotFoundError for one that is not there.
    """
    if len(folders) < 2:
        raise ValueError(f"folders must be at least two, got {len(folders)}")
    check_count("n", n, 1)
    check_count("draws", draws, 2)
    from nlhf.llm import JudgedGame

    game = JudgedGame(judge, prompts, text=lambda y: y)
    paths = [folder / MODEL if (folder / MODEL / "config.json").is_file() else folder for folder in folders]
    labels = _labels(folders)
    texts = [answers(path, game.prompts, n, max_new_tokens, (seed, i)) for i, path in enumerate(paths)]
    wins = np.full((len(game.prompts), len(paths), len(paths)), 0.5)
    for i in range(len(paths)):
        for j in range(i):
            wins[:, i, j] = game.compare(game.prompts, texts[i], texts[j]).mean(axis=(1, 2))
            wins[:, j, i] = 1 - wins[:, i, j]
    rounds = Rounds(wins)
    table = MatrixGame(rounds.mean, labels=labels)
    table.evidence = rounds
    low, high = np.quantile(rounds.draw(np.random.default_rng(seed), draws), [(1 - level) / 2, (1 + level) / 2], axis=0)
    responses = tuple(
        {
            "checkpoint": label,
            "prompt": prompt if isinstance(prompt, str) else [m._asdict() for m in prompt],
            "response": text,
        }
        for label, answered in zip(labels, texts, strict=True)
        for prompt, some in zip(game.prompts, answered, strict=True)
        for text in some
    )
    return Tournament(standings("tournament", table, taus, draws, level, seed), low, high, responses)


def answers(path: Path, prompts: Sequence[Any], n: int, max_new_tokens: int, seed: tuple[int, int]) -> list[list[str]]:
    """n responses to every prompt by the model of a folder or file, drawn by its own random numbers."""
    import torch

    from nlhf.llm import CausalLM

    model = CausalLM.from_pretrained(path, max_new_tokens=max_new_tokens, lora_rank=None)
    drawn = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1  # 63 bits, as torch takes them
    generator = torch.Generator().manual_seed(int(drawn))
    size = max(1, 64 // n)
    parts = [model.sample(prompts[i : i + size], n, generator)[0] for i in range(0, len(prompts), size)]
    return [texts for y in parts for texts in model.text(y)]


def _labels(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"folders must be different ones, got {', '.join(map(str, folders))}")
