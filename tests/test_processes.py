"""Two processes over gloo do what one does."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.optim import AdamW

from nlhf import MirrorProx, run
from nlhf.llm import (
    ContrastiveSolver,
    Descent,
    Enumerate,
    PolicyGradientSolver,
    RegressionSolver,
    Sample,
    TinyTransformer,
)
from nlhf.llm.processes import own
from nlhf.tabular import MatrixGame
from tests.checks import assert_close

SOLVERS: dict[str, Any] = {
    "regression": partial(RegressionSolver, expectation=Sample(6, prompts=4), steps=2),
    "pairs": partial(ContrastiveSolver, expectation=Sample(6, micro=1, held=0), steps=2),
    "policy gradient": partial(PolicyGradientSolver, expectation=Sample(6, prompts=2), steps=2),
    "listed": partial(RegressionSolver, expectation=Enumerate(), steps=2),
    "L-BFGS": partial(RegressionSolver, expectation=Sample(6), steps=3, optimizer=None),
}


def trajectory(name: str) -> Any:
    game = MatrixGame.random(8, seed=0, prompts=6)
    policy = TinyTransformer(game.reference, vocab=2, width=8, layers=1, heads=2)
    make = {"optimizer": Descent(partial(AdamW, lr=1e-2), max_norm=0.1), **SOLVERS[name].keywords}
    solver = SOLVERS[name].func(game, **make)
    algorithm: Any = MirrorProx(eta=1.0, tau=0.1)
    return run(algorithm, solver, 3, policy=policy, seed=5, metrics=())


def numbers(name: str, trace: Any) -> np.ndarray:
    return np.array([value for _, metric, value in trace.records if name != "listed" or metric != "oracle_calls"])


def work(rank: int, port: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{port}", rank=rank, world_size=2)
    for name in SOLVERS:
        trace = trajectory(name)
        np.savez(out / f"{name}-{rank}.npz", records=numbers(name, trace), **trace.policy.arrays())
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or os.name != "posix", reason="torch was built without gloo")
def test_two_processes_are_one(tmp_path: Path) -> None:
    """Parameters, the optimiser's memory, prox residuals and judgements counted: sums in another order, in float64, and
    six steps of an optimiser enlarge that by less than 1e4. What is listed is looked up by each process."""
    spawn: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]
    spawn(work, (tmp_path / "port", tmp_path), nprocs=2)
    for name in SOLVERS:
        alone = trajectory(name)
        expected = {"records": numbers(name, alone), **alone.policy.arrays()}
        for rank in range(2):
            with np.load(tmp_path / f"{name}-{rank}.npz") as found:
                assert found.keys() == expected.keys()
                for key, value in expected.items():
                    assert_close(found[key], value, atol=1e-11)
                assert np.abs(found["head.weight"]).max() > 1e-3


def test_prompts_are_shared_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nlhf.llm.processes.place", lambda: (1, 2))
    assert own(6) == slice(3, 6)
    with pytest.raises(ValueError, match="prompts must be a multiple of the 2 processes, got 5"):
        own(5)
