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

from nlhf import MirrorProx, NashMD, run
from nlhf.llm import (
    CausalLM,
    ContrastiveSolver,
    Descent,
    Enumerate,
    JudgedGame,
    PolicyGradientSolver,
    RegressionSolver,
    Sample,
    TinyTransformer,
)
from nlhf.llm.bare import BareLlama
from nlhf.llm.causal_lm import trainable
from nlhf.llm.preference import cycle_judge, sampled_gap
from nlhf.llm.processes import join, own
from nlhf.llm.shards import shard
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


SHARDED: dict[str, Any] = {
    "all weights": (None, "ours", partial(RegressionSolver, expectation=Sample(6, prompts=4), steps=2)),
    "all weights, policy gradient": (None, "ours", partial(PolicyGradientSolver, expectation=Sample(6), steps=2)),
    "adapters": (2, "ours", partial(RegressionSolver, expectation=Sample(6, micro=1), steps=2)),
    "adapters, policy gradient": (2, "ours", partial(PolicyGradientSolver, expectation=Sample(6, prompts=2), steps=2)),
    "without transformers": (None, "bare", partial(RegressionSolver, expectation=Sample(6), steps=2)),
    "through transformers": (None, "theirs", partial(RegressionSolver, expectation=Sample(6), steps=2)),
}


def language_model(rank: int | None, forward: str) -> CausalLM:
    """In float64, but for the logits. If asked for, each process keeps its shards alone."""
    policy = CausalLM.from_scratch(width=16, layers=2, heads=2, max_new_tokens=5, lora_rank=rank)
    network: Any = policy.network
    if forward == "bare":
        network = BareLlama(policy.params, {"config.json": network.config.to_dict()})
        policy = CausalLM(network, policy.tokenizer, policy.params, policy.length)
    network.double()
    shard(network)
    if forward == "theirs":  # which is what a policy in float64 uses
        policy = CausalLM(network, policy.tokenizer, policy.params, policy.length)
    return policy.with_params(trainable(network, 0))


def sharded_trajectory(name: str, **more: Any) -> Any:
    rank, forward, make = SHARDED[name]
    policy = language_model(rank, forward)
    game = JudgedGame(cycle_judge, [f"Say {i}." for i in range(4)], policy.text)
    solver = make(game, optimizer=Descent(partial(AdamW, lr=1e-2), max_norm=0.1))
    metrics = (sampled_gap(policy, 4, seed=0, prompts=("Say so.", "Well?")),)
    return run(NashMD(eta=1.0, tau=0.1), solver, 3, policy=policy, seed=5, metrics=metrics, **more)


def held_here(tensors: Any) -> list[int]:
    """Numbers in all, and those of which this process holds memory."""
    tensors = [t for t in tensors if t.ndim]
    kept = [t.to_local().untyped_storage().nbytes() // t.element_size() for t in tensors]
    return [sum(t.numel() for t in tensors), sum(kept)]


def work_on_shards(rank: int, port: Path, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{port}", rank=rank, world_size=2)
    for name in SHARDED:
        trace = sharded_trajectory(name, checkpoint=out / f"{name}.npz")
        policy, resumed = trace.policy, sharded_trajectory(name, checkpoint=out / f"{name}.npz").policy
        held = [held_here(some.values()) for some in (policy.params, policy.memory, resumed.params, resumed.memory)]
        held.append(held_here(policy.network.parameters()))
        policy.save_pretrained(out / f"{name} {rank}")
        records = np.array([value for *_, value in trace.records])
        np.savez(out / f"{name}-{rank}.npz", records=records, held=held, **policy.arrays())
        for here, there in zip(policy.arrays().values(), resumed.arrays().values(), strict=True):
            np.testing.assert_array_equal(here, there)
    with pytest.raises(ValueError, match=r"optimizer must be given, .*, for a sharded policy"):
        RegressionSolver(None, Sample(2))(None, policy, 0)  # type: ignore[arg-type]
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or os.name != "posix", reason="torch was built without gloo")
def test_two_processes_with_shards_are_one(tmp_path: Path) -> None:
    """As above, and each holds half: of parameters, the optimiser's memory and what is frozen. Log-probabilities are
    float32, so that what is recorded agrees to 1e-7. The gradient of the last matrix is summed in float32, too, and
    Adam, which divides by the gradient's size, makes up to 1e-4 of that where this matrix is trained."""
    pytest.importorskip("peft", reason="the llm extra is not installed")
    spawn: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]
    spawn(work_on_shards, (tmp_path / "port", tmp_path), nprocs=2)
    for name in SHARDED:
        alone = sharded_trajectory(name)
        expected = {"records": np.array([value for *_, value in alone.records]), **alone.policy.arrays()}
        for rank in range(2):
            with np.load(tmp_path / f"{name}-{rank}.npz") as found:
                assert found.keys() - {"held"} == expected.keys()
                for key, value in expected.items():
                    exact = 1e-7 if key == "records" else 1e-11
                    assert_close(found[key], value, atol=exact if name.startswith("adapters") else 1e-4)
                for total, kept in found["held"]:
                    assert kept == pytest.approx(total / 2, rel=0.1)
        resumed = sharded_trajectory(name, checkpoint=tmp_path / f"{name}.npz")  # a file of shards, a whole policy
        with np.load(tmp_path / f"{name}-0.npz") as found:
            for key, value in resumed.policy.arrays().items():
                np.testing.assert_array_equal(found[key], value)
        assert (tmp_path / f"{name} 0" / "model.safetensors").exists()
        assert not (tmp_path / f"{name} 1").exists()


def test_prompts_are_shared_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nlhf.llm.processes.place", lambda: (1, 2))
    assert own(6) == slice(3, 6)
    with pytest.raises(ValueError, match="prompts must be a multiple of the 2 processes, got 5"):
        own(5)


@pytest.mark.parametrize("name", ["ACCELERATE_USE_DEEPSPEED", "FSDP_OFFLOAD_PARAMS"])
def test_what_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(ValueError, match=f"{name} must not be set: use MULTI_GPU, or FSDP without offloading"):
        join()
