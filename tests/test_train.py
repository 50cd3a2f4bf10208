"""Training a language model for real: saved folders, resuming, kills, refusals, the commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nlhf import NashMD, OptimisticMD, cli, run
from nlhf import train as train_module
from nlhf.llm import Cached, CausalLM, JudgedGame, PolicyGradientSolver, RegressionSolver, Sample
from nlhf.llm.folders import write_folder
from nlhf.llm.preference import cycle_judge, sampled_gap
from nlhf.llm.solver import Descent
from nlhf.tournament import tournament
from nlhf.train import CHECKPOINT, LearningRate, Tracker, Training, train
from tests.checks import assert_close

transformers = pytest.importorskip("transformers", reason="the llm extra is not installed")
load_file = pytest.importorskip("safetensors.torch", reason="the llm extra is not installed").load_file
peft = pytest.importorskip("peft", reason="the llm extra is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

PROMPTS = [f"Tell me about the number {i}." for i in range(8)]
SMALL: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "max_new_tokens": 6}
FLOAT32 = 2e-5  # sums of a few log-probabilities of order 5 in float32, along two paths through the network
OUTPUTS = ("metrics.jsonl", "samples.jsonl", "judge.jsonl", "model/model.safetensors", CHECKPOINT)


def moved(policy: CausalLM, seed: int = 0) -> CausalLM:
    noise = torch.Generator().manual_seed(seed)
    return policy.with_params({k: p + 0.3 * torch.randn(p.shape, generator=noise) for k, p in policy.params.items()})


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model that is quick to train, as any Hugging Face folder."""
    CausalLM.from_scratch(**SMALL).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def options(data: Path, model: Path, out: Path, **more: Any) -> Training:
    quick: dict[str, Any] = {
        "steps": 4, "n": 4, "prompts": 2, "micro": 1, "inner_steps": 2, "lr": 1e-2, "warmup": 2, "schedule": "cosine",
        "lora_rank": 2, "max_new_tokens": 6, "every": 2, "eval_prompts": 3, "eval_n": 3,
    }  # fmt: skip
    return Training(data=data, model=str(model), out=out, **{**quick, **more})


def flags(chosen: Training) -> list[str]:
    shown = {name: value for name, value in vars(chosen).items() if name not in ("keep",)}
    return [part for name, value in shown.items() for part in (f"--{name.replace('_', '-')}", f"{value}")]


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 2])
def test_a_saved_policy_loads_in_plain_transformers(rank: int | None, tmp_path: Path) -> None:
    policy = moved(CausalLM.from_scratch(**SMALL, lora_rank=rank))
    policy.save_pretrained(tmp_path / "saved")
    policy.save_pretrained(tmp_path / "saved")  # replaces the older copy
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    y, _ = policy.sample(PROMPTS[:1], 3, generator())
    prompt = tokenizer(PROMPTS[0])["input_ids"]
    for row, expected in zip(y[0], policy.log_prob(PROMPTS[:1], y)[0], strict=True):
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + row.tolist()])).logits[0, len(prompt) - 1 : -1].double()
        scored = logits.log_softmax(-1).gather(-1, row[:, None])[:, 0]
        ended = (row == tokenizer.eos_token_id).long()
        assert_close(float(scored[(ended.cumsum(0) - ended) == 0].sum()), float(expected), atol=FLOAT32)
    again = CausalLM.from_pretrained(tmp_path / "saved", max_new_tokens=6, lora_rank=None)
    if rank is None:  # to the last bit; a merged weight is rounded
        assert again.params.keys() == policy.params.keys()
        assert all(torch.equal(again.params[name], p) for name, p in policy.params.items())
        assert torch.equal(again.log_prob(PROMPTS[:1], y), policy.log_prob(PROMPTS[:1], y))


def test_adapters_of_a_network_that_keeps_its_matrices_transposed(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=257, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=256, eos_token_id=256
    )
    with torch.random.fork_rng():
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    CausalLM.from_scratch(**SMALL).tokenizer.save_pretrained(tmp_path / "base")
    policy = moved(CausalLM.from_pretrained(tmp_path / "base", max_new_tokens=4, lora_rank=2))
    policy.save_pretrained(tmp_path / "saved")
    again = CausalLM.from_pretrained(tmp_path / "saved", max_new_tokens=4, lora_rank=None)
    y, log_prob = policy.sample(["Hi"], 4, generator())
    assert_close(again.log_prob(["Hi"], y).detach(), log_prob, atol=FLOAT32)


def test_adapters_alone_load_in_peft(model: Path, tmp_path: Path) -> None:
    policy = moved(CausalLM.from_pretrained(model, lora_rank=2))
    policy.save_pretrained(tmp_path / "adapter", adapter_only=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    loaded = dict(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").named_parameters())
    assert all(torch.equal(loaded[name], p) for name, p in policy.params.items())
    policy.network.save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "theirs"))
    assert ours.keys() == theirs.keys()
    with pytest.raises(ValueError, match="adapter_only must be False for a model without adapters"):
        CausalLM.from_scratch(**SMALL).save_pretrained(tmp_path / "no", adapter_only=True)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def small(new: Path) -> None:
        (new / "weights").write_text("old")

    write_folder(folder, small)

    def full(new: Path) -> None:
        (new / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(folder, full)
    assert (folder / "weights").read_text() == "old"
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds thesis\.tex, which would be lost"):
        write_folder(folder, small)
    assert sorted(path.name for path in folder.iterdir()) == ["thesis.tex", "weights"]
    assert list(tmp_path.iterdir()) == [folder]


# --- resuming -------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("solver", [RegressionSolver, PolicyGradientSolver])
def test_resuming_is_as_if_never_stopped(solver: Any, rank: int | None, suffix: str, tmp_path: Path) -> None:
    """Parameters, moments of AdamW, place in the schedule, prompts drawn, the judge's memory, earlier responses."""
    policy = CausalLM.from_scratch(**SMALL, lora_rank=rank)
    descent = Descent(partial(torch.optim.AdamW, lr=1e-2), LearningRate("linear", 2, 12), 1.0)

    def trained(name: str, fails_at: int | None, file: Path | None) -> Any:
        gap = sampled_gap(policy, 3, seed=0, prompts=PROMPTS[6:])
        calls: list[None] = []

        class Fragile:
            __name__ = "gap"
            memory = gap.memory

            def __call__(self, *asked: Any) -> Any:
                calls.append(None)
                if len(calls) == fails_at:
                    raise Killed
                return gap(*asked)

        game = JudgedGame(Cached(cycle_judge, tmp_path / f"{name}.jsonl"), PROMPTS[:6], policy.text)
        made = solver(game, Sample(4, correct=False, prompts=3, micro=2), steps=2, optimizer=descent)
        options: Any = {"policy": policy, "metrics": (Fragile(),), "every": 2, "seed": 1, "checkpoint": file}
        return run(NashMD(1.0, 0.1), made, 6, **options), gap

    file = tmp_path / f"run.{suffix}"
    with pytest.raises(Killed):
        trained("resumed", 3, file)
    assert file.exists()
    resumed, recalled = trained("resumed", None, file)
    straight, remembered = trained("straight", None, None)
    assert resumed.records == straight.records
    assert recalled.memory == remembered.memory
    assert len(recalled.memory) == 4
    for kind in ("params", "memory"):
        ours, theirs = getattr(resumed.policy, kind), getattr(straight.policy, kind)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], p) for name, p in theirs.items())
    assert int(straight.policy.memory["steps"]) == 12
    answers = [sorted((tmp_path / f"{name}.jsonl").read_text().splitlines()) for name in ("resumed", "straight")]
    assert answers[0] == answers[1]


def test_a_longer_run_forgets_the_last_row_of_a_shorter_one(data: Path, model: Path, tmp_path: Path) -> None:
    for steps in (3, 4):
        train(NashMD(1.0, 0.1), options(data, model, tmp_path / "longer", schedule="constant", steps=steps))
    train(NashMD(1.0, 0.1), options(data, model, tmp_path / "once", schedule="constant"))
    for name in ("metrics.jsonl", "samples.jsonl", "model/model.safetensors"):
        assert (tmp_path / "longer" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


DIES = """
import os, signal, sys
from nlhf.cli import main
files = iter(range({}))
sys.addaudithook(
    lambda event, _: event == "os.rename" and next(files, None) is None and os.kill(os.getpid(), signal.SIGKILL)
)
main()
"""
"""A command that is killed when it has written so many files, as it gives the next one its name."""


def test_a_killed_command_ends_as_if_never_killed(data: Path, model: Path, tmp_path: Path) -> None:
    """Between a checkpoint and what is written beside it, in a checkpoint, and in the model at the end."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"

    def command(out: Path, code: str = "from nlhf.cli import main; main()") -> int:
        arguments = ["train", "nash-md", *flags(options(data, model, out, steps=4, every=1))]
        return subprocess.run([sys.executable, "-c", code, *arguments]).returncode

    assert command(straight) == 0
    for files, cut in ((2, ".metrics.jsonl"), (6, ".checkpoint.safetensors"), (12, ".model")):
        assert command(killed, DIES.format(files)) == -signal.SIGKILL
        assert [path.stem for path in killed.iterdir() if path.name.startswith(".")] == [cut]
    assert command(killed) == 0
    check_same(killed, straight)


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("NLHF_KILLS"), reason="set NLHF_KILLS=1 to kill it twenty times, which takes minutes"
)
@pytest.mark.parametrize("rank", [None, 2])
def test_ten_kills(rank: int | None, data: Path, model: Path, tmp_path: Path) -> None:
    """While it starts (negative moments), trains, measures and writes."""
    moments = np.random.default_rng(0).uniform([-1.0] * 3 + [0.0] * 7, 0.15).tolist()
    assert kill_and_resume(data, model, tmp_path, rank, moments) >= 9


def check_same(killed: Path, straight: Path) -> None:
    """All files are the same to the last byte, but for the order in which the judge was asked; nothing is left over."""
    for name in (*OUTPUTS, "config.json"):
        ours, theirs = ((out / name).read_bytes() for out in (killed, straight))
        if name == "config.json":
            ours = ours.replace(b"/killed", b"/straight")
        if name == "judge.jsonl":
            assert set(ours.splitlines()) == set(theirs.splitlines())
            assert len(ours) == len(theirs)  # nothing is asked twice
            continue
        assert ours == theirs, name
    assert not [path for path in killed.iterdir() if path.name.startswith(".")]


def kill_and_resume(data: Path, model: Path, folder: Path, rank: int | None, moments: list[float]) -> int:
    """Kill the command at moments, go on each time, and compare with what a whole run wrote; the number of kills.

    A moment is a share of the time that it trains, after it has written its first row or found its checkpoint; or,
    below zero, of the time that it starts.
    """
    straight, killed, kills = folder / "straight", folder / "killed", 0

    def command(out: Path) -> tuple[subprocess.Popen[bytes], float]:
        """The process once it trains, and the seconds that took."""
        rows, began = out / "metrics.jsonl", time.perf_counter()
        before = rows.stat().st_mtime_ns if rows.exists() else 0
        arguments = ["train", "nash-md", *flags(options(data, model, out, lora_rank=rank, steps=8, every=1))]
        process = subprocess.Popen([sys.executable, "-c", "from nlhf.cli import main; main()", *arguments])
        while out == killed and moment < 0 and time.perf_counter() - began < -moment * starting:
            time.sleep(0.01)
        while moment >= 0 and process.poll() is None and not (rows.exists() and rows.stat().st_mtime_ns != before):
            time.sleep(0.001)
        return process, time.perf_counter() - began

    moment = 0.0
    process, starting = command(straight)
    began = time.perf_counter()
    assert process.wait() == 0
    training = time.perf_counter() - began
    for moment in moments:
        process, _ = command(killed)
        time.sleep(max(0.0, moment) * training)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    moment = 0.0
    process, _ = command(killed)
    assert process.wait() == 0
    check_same(killed, straight)
    return kills


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_a_number_keeps_the_last_good_policy(data: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    calls: list[None] = []

    class Poisoned(RegressionSolver):
        def __call__(self, prox: Any, start: Any, seed: int | None = None) -> Any:
            calls.append(None)
            if len(calls) == 4:
                start = start.with_params({name: p * torch.nan for name, p in start.params.items()})
            return super().__call__(prox, start, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nlhf.llm.RegressionSolver", Poisoned)
        with pytest.raises(FloatingPointError, match=r"nan.*holds the last good policy, of step 2"):
            train(NashMD(1.0, 0.1), options(data, model, out))
    good = CausalLM.from_pretrained(out / "model", lora_rank=None)
    assert all(p.isfinite().all() for p in good.params.values())
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [0, 2]
    with pytest.raises(FloatingPointError, match="parameters are not finite"):
        sampled_gap(good, 2, 0)(moved(good).with_params({"x": torch.tensor(torch.nan)}), None, 0.1)  # type: ignore[arg-type]


def unwritable(chosen: Training, tmp_path: Path) -> Training:
    (tmp_path / "file").write_text("")
    return train_module.Training(**{**vars(chosen), "out": tmp_path / "file"})


def malformed(chosen: Training, tmp_path: Path) -> Training:
    chosen.data.write_text('{"prompt": "fine"}\n{"prompt": 3}\n')
    return chosen


def changed(chosen: Training, **some: Any) -> Training:
    return Training(**{**vars(chosen), **some})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (unwritable, "out must be a folder that can be written"),
        (malformed, r"prompts\.jsonl, line 2: prompt must be a string or a list"),
        (lambda c, _: changed(c, eval_prompts=8), "eval_prompts must leave prompts to train on, got 8 of the 8"),
        (lambda c, _: changed(c, judge="none"), "judge must be cycle, a folder or module:function, got 'none'"),
        (lambda c, _: changed(c, judge="math:nothing"), "judge math:nothing: module 'math' has no attribute"),
        (lambda c, _: changed(c, judge="nowhere:f"), "judge nowhere:f: No module named 'nowhere'"),
        (lambda c, _: changed(c, judge="math:pi"), "judge math:pi must be a function, got 3.14"),
        (lambda c, path: changed(c, judge=str(path)), r"no model\.safetensors in this folder"),
        (lambda c, path: changed(c, model=str(path / "none")), "no such file or folder"),
        (lambda c, _: changed(c, lr=0.0), "lr must be a finite number > 0, got 0.0"),
        (lambda c, _: changed(c, max_norm=-1.0), "max_norm must be a finite number > 0, got -1.0"),
        (lambda c, _: changed(c, micro=0), "micro must be an integer >= 1, got 0"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    spoil: Callable[[Training, Path], Training], message: str, data: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises((ValueError, OSError), match=message):
        train(NashMD(1.0, 0.1), spoil(options(data, model, out), tmp_path))
    assert not out.exists()


def test_a_full_disk_is_reported_before_training(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nlhf.train.run", lambda *a, **k: pytest.fail("work was done"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Free())
    with pytest.raises(OSError, match=r"checkpoints need 0\.\d MB, 0\.0 MB are free"):
        train(NashMD(1.0, 0.1), options(data, model, tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


class _Free:
    free = 1000


def test_a_folder_belongs_to_one_run(data: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(NashMD(1.0, 0.1), options(data, model, out))
    for other in ({"lr": 1e-3}, {"judge": "tests.test_train:longer"}, {"n": 5}):
        (name,) = other
        with pytest.raises(ValueError, match=f"holds another run: it has {{'{name}'"):
            train(NashMD(1.0, 0.1), options(data, model, out, **other))
    with pytest.raises(ValueError, match=r"holds another run: it has \{'algorithm'"):
        train(NashMD(0.5, 0.1), options(data, model, out))
    with pytest.raises(ValueError, match="solver must be regression or pg for OptimisticMD"):
        train(OptimisticMD(0.5, 0.1), options(data, model, out, solver="ipo"))


# --- metrics --------------------------------------------------------------------------------------------------------


def longer(prompts: Any, a: Any, b: Any) -> list[float]:
    return [float(len(s) > len(t)) + 0.5 * (len(s) == len(t)) for s, t in zip(a, b, strict=True)]


def test_metrics_say_what_they_mean() -> None:
    """Entropy, length and win rates against sums over the responses themselves, one at a time."""

    def whim(prompts: Any, a: Any, b: Any) -> list[float]:
        """Antisymmetric, and no difference of scores: who meets whom matters."""
        ours, theirs = (
            [zlib.crc32(f"{s} {t}".encode()) for s, t in zip(*two, strict=True)] for two in ((a, b), (b, a))
        )
        return [0.5 + (s - t) / 2**33 for s, t in zip(ours, theirs, strict=True)]

    policy = CausalLM.from_scratch(**SMALL)
    embedded = policy.params["model.embed_tokens.weight"].clone()
    embedded[256] *= 4  # the end is likely after some tokens
    policy = policy.with_params({**policy.params, "model.embed_tokens.weight": embedded})
    game = JudgedGame(whim, PROMPTS[:2], policy.text)
    gap, others = sampled_gap(policy, 9, seed=3), [policy, moved(policy, 1), moved(policy, 2)]
    found = [gap(other, game, 0.1) for other in others]
    responses = [p.sample(PROMPTS[:2], 9, torch.Generator().manual_seed(4)) for p in others]
    varied = False
    for (y, log_prob), one in zip(responses, found, strict=True):
        lengths = [row.index(256) + 1 if 256 in row else 6 for row in y.flatten(0, 1).tolist()]
        varied |= len(set(lengths)) > 1
        assert one["length"] == pytest.approx(np.mean(lengths))
        assert one["sequence_entropy"] == pytest.approx(-float(log_prob.mean()), abs=FLOAT32)
        assert one["entropy"] * sum(lengths) == pytest.approx(-float(log_prob.sum()), abs=10 * FLOAT32)
    assert varied
    assert found[0]["win_rate_earlier"] == found[0]["win_rate_worst"] == 0.5
    texts = [policy.text(y) for y, _ in responses]
    assert gap.memory == texts
    rates = [
        np.mean([whim(None, [texts[2][x][i]], [past[x][(i + 1) % 9]]) for x in range(2) for i in range(9)])
        for past in texts[:2]
    ]
    assert found[2]["win_rate_earlier"] == pytest.approx(np.mean(rates))
    assert found[2]["win_rate_worst"] == min(rates)


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_trackers_get_every_measurement(
    kind: str, data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModuleNotFoundError, match=f"report_to {kind} needs: pip install {kind}"):
        Tracker(kind, tmp_path, {})
    logged: list[Any] = []

    class Stub:
        init = staticmethod(lambda **about: logged.append(about))
        log = staticmethod(lambda record, step: logged.append((step, record)))
        finish = staticmethod(lambda: logged.append("finished"))

    monkeypatch.setitem(sys.modules, kind, Stub)
    monkeypatch.setattr("nlhf.train.find_spec", lambda name: True)
    train(NashMD(1.0, 0.1), options(data, model, tmp_path / "out", report_to=kind))
    about, *rows, last = logged
    assert about["config"]["lr"] == 1e-2
    assert last == "finished"
    assert [step for step, _ in rows] == [0, 2, 4]
    assert {"objective/kl", "completions/mean_length", "entropy", "duality_gap"} <= rows[0][1].keys()


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates_are_those_of_transformers(schedule: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)])
    make = {"constant": transformers.get_constant_schedule_with_warmup,
            "linear": transformers.get_linear_schedule_with_warmup,
            "cosine": transformers.get_cosine_schedule_with_warmup}[schedule]  # fmt: skip
    theirs = make(optimizer, 3, *([10] if schedule != "constant" else [])).lr_lambdas[0]
    ours = LearningRate(schedule, 3, 10)
    assert_close([ours(k) for k in range(3, 10)], [theirs(k) for k in range(3, 10)], atol=1e-15)
    assert [ours(k) for k in range(3)] == [theirs(k + 1) for k in range(3)]  # theirs wastes step 0 on a rate of 0


# --- the commands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cli.ALGORITHMS)
def test_every_algorithm_is_a_command(
    name: str, data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    solver = "ipo" if name == "nash-md" else "regression"
    chosen = options(data, model, out, steps=2, solver=solver, keep=True)
    monkeypatch.setattr(sys, "argv", ["nlhf", "train", name, *flags(chosen), "--keep"])
    cli.main()
    printed = capsys.readouterr().out
    assert "duality_gap" in printed
    assert all((out / written).exists() for written in (*OUTPUTS, "config.json", "curves.png", "curves.svg", "step-2"))
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [0, 2]
    assert all(np.isfinite(value) for row in metrics for value in row.values())
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 3 * 3
    assert {row["prompt"] for row in samples} < set(PROMPTS)
    transformers.AutoModelForCausalLM.from_pretrained(out / "step-2")


def test_bad_input_of_the_command_is_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    data.write_text("{]\n")
    arguments = ["train", "self-play", "--model", "tiny", "--data", str(data), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["nlhf", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"nlhf: {data}, line 1: not JSON")
    assert error.count("\n") == 1


def test_a_tournament_of_checkpoints(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Every number of the table from the written responses, pair by pair; a checkpoint ties with its own copy."""
    import pandas as pd

    for seed in (1, 2):
        moved(CausalLM.from_scratch(**SMALL), seed).save_pretrained(tmp_path / f"run-{seed}" / "model")
    folders = [model, tmp_path / "run-1", tmp_path / "run-2"]
    arguments = ["tournament", *map(str, folders), "--data", str(data), "--judge", "tests.test_train:longer"]
    arguments += ["--n", "3", "--prompts", "5", "--max-new-tokens", "6", "--draws", "200"]
    monkeypatch.setattr(sys, "argv", ["nlhf", *arguments, "--out", str(tmp_path / "out")])
    cli.main()
    printed = capsys.readouterr().out
    written = [json.loads(line) for line in (tmp_path / "out" / "responses.jsonl").read_text().splitlines()]
    assert len(written) == 3 * 5 * 3
    texts: dict[Any, list[str]] = {}
    for row in written:
        texts.setdefault((row["checkpoint"], row["prompt"]), []).append(row["response"])
    pairs = pd.read_csv(tmp_path / "out" / "pairwise.csv")
    assert len(pairs) == 6
    for row in pairs.to_dict("records"):
        each = [
            np.mean([longer(None, [y], [z]) for y in texts[row["a"], prompt] for z in texts[row["b"], prompt]])
            for prompt in {prompt for _, prompt in texts}
        ]
        assert row["win"] == pytest.approx(np.mean(each))
        assert min(each) <= row["low"] <= row["win"] <= row["high"] <= max(each)
        assert f"{row['win']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in printed
    standings = pd.read_csv(tmp_path / "out" / "standings.csv")
    assert {"bt_rank", "tau=0.1", "low(0.1)", "high(0.1)", "tau=0"} <= set(standings.columns)
    assert set(standings["item"]) == {"base", "run-1", "run-2"}
    assert standings["tau=0"].sum() == pytest.approx(1)
    assert (tmp_path / "out" / "pairwise.png").exists()


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["base"], "folders must be at least two, got 1"),
        (["base", "base"], "folders must be different ones"),
        (["base", "none"], "no such file or folder; give a Hugging Face folder or a GGUF file"),
    ],
)
def test_a_tournament_that_cannot_be_played(folders: list[str], message: str, model: Path) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        tournament([model.parent / folder for folder in folders], longer, ["Hi"], n=1, max_new_tokens=2)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path, data: Path, model: Path) -> None:
    """The same command under `accelerate launch`, and with shards, each process with half of the prompts: float32 sums
    in another order. A run of one process goes on with shards, under torchrun."""
    command = ["--data", data, "--model", model, "--prompts", 4, "--eval-prompts", 2, "--eval-n", 2,
               "--every", 2, "--max-new-tokens", 6, "--lora-rank", "None", "--lr", 1e-3, "--solver", "pg",
               "--keep"]  # fmt: skip
    body = tmp_path / "body.py"
    body.write_text("from nlhf.cli import main\n\nif __name__ == '__main__':\n    main()\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    accelerate += ["--main_process_port", "0"]

    def trained(out: str, steps: int, *launcher: str, **more: str) -> None:
        arguments = [*launcher, body, "train", "nash-md", *command, "--steps", steps, "--out", tmp_path / out]
        environment = {**os.environ, **more}
        subprocess.run(list(map(str, arguments)), check=True, capture_output=True, timeout=300, env=environment)

    trained("one", 2, sys.executable)
    shutil.copytree(tmp_path / "one", tmp_path / "shards after one")
    trained("one", 4, sys.executable)
    trained("two", 4, *accelerate, "--multi_gpu")
    trained("shards", 4, *accelerate, "--use_fsdp")
    trained("shards after one", 4, *torchrun, ACCELERATE_USE_FSDP="true")

    def rows(out: str) -> list[Any]:
        return [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]

    one = load_file(tmp_path / "one" / "model" / "model.safetensors")
    for name in ("two", "shards", "shards after one"):
        two = load_file(tmp_path / name / "model" / "model.safetensors")
        assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-5
        assert (tmp_path / name / "step-4" / "model.safetensors").exists()
        for here, there in zip(rows("one"), rows(name), strict=True):
            assert here == pytest.approx(there, abs=1e-3)
    for name in ("two", "shards", "shards after one"):
        assert (tmp_path / name / "judge-1.jsonl").read_text()
