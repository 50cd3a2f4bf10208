"""Training a language model against a judge: what `nlhf train ALGORITHM` checks, builds, runs and writes."""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import shutil
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from nlhf.algorithms import MirrorProx, OptimisticMD
from nlhf.core import Regularized
from nlhf.run import Trace, check_folder, first_process, run, write_atomically
from nlhf.schedules import check_count, is_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nlhf.llm import CausalLM
    from nlhf.llm.preference import Judge

CHECKPOINT, CONFIG, MODEL = "checkpoint.safetensors", "config.json", "model"
NOT_COMPARED = ("out", "report_to", "steps", "keep", "versions")
"""Options that may differ when a run goes on."""
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
TRL_NAMES = {
    "kl_to_reference": "objective/kl",
    "sequence_entropy": "objective/entropy",
    "length": "completions/mean_length",
}
"""What trackers call a metric that TRL reports, too; `entropy`, per token, has the same name here and there."""
Record: TypeAlias = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Training:
    """The options of a training run.

    Raises ValueError for one that is out of range.
    """

    data: Path
    """A .jsonl, .jsonl.gz or .parquet file, or a folder of Dataset.save_to_disk, with the column prompt."""
    model: str
    """A Hugging Face folder or GGUF file; or tiny, a small model of bytes that knows nothing."""
    judge: str = "cycle"
    """cycle, a scripted judge of intransitive taste; a folder that `nlhf train preference` wrote; or module:function,
    judge(prompts, a, b) -> the probabilities that a beats b. No question is asked twice: answers are in judge.jsonl."""
    out: Path | None = None
    """The folder of everything that is written; runs/ALGORITHM-DATA if not given."""
    device: str | None = None
    """cpu or cuda; a GPU if there is one. Of several processes each takes its own."""
    steps: int = 100
    """Iterations of the algorithm."""
    eta: float | None = None
    """Its step size; what theory recommends if not given."""
    tau: float = 0.1
    """Strength of the KL regularisation, win probability per nat, > 0."""
    n: int = 8
    """Responses per prompt and iteration."""
    opponents: int | None = None
    """Responses of the opponent per prompt; as many as n if not given."""
    prompts: int = 8
    """Prompts per iteration; all if there are fewer."""
    micro: int | None = None
    """Prompts whose gradient is computed at a time: less memory, the same gradient. All at once if not given."""
    solver: Literal["regression", "pg", "ipo"] = "regression"
    """How the sub-problem of an iteration is solved: least squares on log-ratios, policy gradient, or IPO."""
    inner_steps: int = 4
    """Steps of the optimiser, AdamW, in one sub-problem: on the same responses for regression and ipo."""
    lr: float = 1e-4
    """Largest learning rate."""
    warmup: int = 0
    """Steps of the optimiser in which the learning rate rises."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How it falls afterwards."""
    max_norm: float | None = 1.0
    """The largest norm that a gradient keeps; None for no limit."""
    lora_rank: int | None = 8
    """Rank of the adapters; None trains all weights."""
    max_new_tokens: int = 64
    """The most tokens of a response."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the network; adapters are always float32."""
    every: int = 10
    """Iterations between measurements, each followed by a checkpoint."""
    eval_prompts: int = 16
    """Prompts of the data that are held out for measuring."""
    eval_n: int = 8
    """Responses per held-out prompt."""
    keep: bool = False
    """Write a model folder at every measurement (step-10, ...), not of the last policy only."""
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where metrics go besides metrics.jsonl."""
    seed: int = 0
    """Of the split, the prompts, the responses and the adapters."""

    def __post_init__(self) -> None:
        alone = 1 if self.solver == "pg" else 2  # the others compare the responses to a prompt
        least = {"steps": 1, "n": alone, "prompts": 1, "inner_steps": 1, "warmup": 0, "max_new_tokens": 1, "every": 1,
                 "eval_prompts": 1, "eval_n": 2, "seed": 0}  # fmt: skip
        for name, smallest in least.items():
            check_count(name, getattr(self, name), smallest)
        for name, smallest in (("opponents", 1), ("micro", 1), ("lora_rank", 1)):
            if (value := getattr(self, name)) is not None:
                check_count(name, value, smallest)
        for name in ("tau", "lr", "max_norm"):
            value = getattr(self, name)
            if not (is_number(value) and value > 0) and (name, value) != ("max_norm", None):
                raise ValueError(f"{name} must be a finite number > 0, got {value!r}")


@dataclass(frozen=True)
class LearningRate:
    """k -> the factor of the learning rate at step k: rises linearly, then stays, or falls to 0 at step `total`.

    >>> [LearningRate("linear", warmup=2, total=6)(k) for k in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    schedule: str
    warmup: int
    total: int

    def __call__(self, k: int) -> float:
        if k < self.warmup:
            return (k + 1) / self.warmup
        done = (k - self.warmup) / max(1, self.total - self.warmup)
        return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.schedule]


def train(algorithm: Regularized, options: Training) -> Trace:
    """Train a model, and write everything into the folder `options.out`; the same call goes on where it stopped.

    In Python `nlhf.run` does the same with parts of your own: a `CausalLM`, a `JudgedGame`, a solver with a `Descent`,
    and the metric `sampled_gap`. Written are, all of them atomically,

        config.json             the options, and versions
        checkpoint.safetensors  what is needed to go on, to the last bit: parameters, optimiser, evaluation
        metrics.jsonl           an object for each measurement, {"step": 10, "duality_gap": ..., ...}
        samples.jsonl           step, prompt and response of the held-out prompts
        judge.jsonl             every answer of the judge (judge-1.jsonl: to the second of several processes, ...)
        model                   the last policy, as `CausalLM.save_pretrained` writes it
        curves.png, curves.svg  the certificate against the iteration

    Args:
        algorithm: with the step size and the tau of its own.
        options: everything else; `out` must be given.

    Raises ValueError or OSError before any work: for an unwritable or full folder, a folder of another run, data that
    are malformed (naming file and line), a judge or model that is not there. FloatingPointError if the loss or a
    parameter is not finite: the checkpoint and the model are then those of the last good measurement.
    """
    from nlhf.llm.processes import join

    out = options.out
    if out is None:
        raise ValueError("out must be a folder, got None")
    join()
    if options.solver == "ipo" and isinstance(algorithm, OptimisticMD):
        raise ValueError("solver must be regression or pg for OptimisticMD, whose opponent is signed, got 'ipo'")
    check_folder(out)
    config = _config(algorithm, options)
    _check_same_run(out, config)
    tracker = Tracker(options.report_to, out, config)
    known, held = _split(options)
    judge = load_judge(options.judge)
    model = _model(options)
    out.mkdir(parents=True, exist_ok=True)
    if first_process():
        clean(out)
        check_space(out, 8 * _size(model.params) + 2 * _size(dict(model.network.named_parameters())))
        write_atomically(out / CONFIG, (json.dumps(config, indent=2) + "\n").encode())

    from nlhf.llm import Cached, JudgedGame
    from nlhf.llm.preference import sampled_gap

    reader = _Reader(model)
    own = "judge.jsonl" if first_process() else f"judge-{os.environ['RANK']}.jsonl"
    game = JudgedGame(Cached(judge, out / own), known, reader)
    gap = sampled_gap(model, options.eval_n, options.seed, prompts=held)
    solver = _solver(algorithm, game, options)
    last: deque[Trace] = deque(maxlen=1)

    def on_record(trace: Trace) -> None:
        last.append(trace)
        records = by_step(trace)
        step = max(records)
        if options.keep:
            trace.policy.save_pretrained(out / f"step-{step}")
        if not first_process():
            return
        write_lines(out / "metrics.jsonl", [{"step": step, **row} for step, row in records.items()])
        write_lines(out / "samples.jsonl", _samples(records, held, gap.memory))
        tracker.log(step, records[step])

    try:
        trace = run(
            algorithm,
            solver,
            options.steps,
            policy=model,
            metrics=(gap,),
            every=options.every,
            seed=options.seed,
            checkpoint=out / CHECKPOINT,
            on_record=on_record,
            status=reader.rate,
        )
    except ArithmeticError as error:
        if last:
            last[0].policy.save_pretrained(out / MODEL)
            step = last[0].records[-1][0]
            raise FloatingPointError(f"{error}; {out} holds the last good policy, of step {step}") from error
        raise
    finally:
        tracker.finish()
    trace.policy.save_pretrained(out / MODEL)
    if not first_process():
        return trace
    from nlhf import plotting  # matplotlib comes in when there is something to draw

    plotting.save(figure(trace, f"{type(algorithm).__name__} on {options.data.name}"), out / "curves")
    return trace


def load_judge(name: str) -> Judge:
    """A judge by its name: see `Training.judge`. ValueError if there is none."""
    from nlhf.llm.preference import cycle_judge
    from nlhf.llm.preference_model import LearnedJudge

    if name == "cycle":
        return cycle_judge
    if (path := Path(name)).is_dir():
        if not (path / "model.safetensors").is_file():
            raise ValueError(f"judge {name}: no model.safetensors in this folder, nlhf train preference writes one")
        return LearnedJudge.load(path)
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(f"judge must be cycle, a folder or module:function, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as for `python -m`
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"judge {name}: {error}") from None
    if not callable(found):
        raise ValueError(f"judge {name} must be a function, got {found!r}")
    return found


def check_space(folder: Path, needed: int) -> None:
    """OSError unless so many bytes are free, those that a checkpoint and a model there already take included."""
    kept = [folder / CHECKPOINT, *(folder / MODEL).glob("*")]
    free = shutil.disk_usage(folder).free + sum(file.stat().st_size for file in kept if file.is_file())
    if free < needed:
        raise OSError(f"out {folder}: checkpoints need {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free")


def clean(folder: Path) -> None:
    """Remove what a killed run has left half-written."""
    for name in (CHECKPOINT, CONFIG, "metrics.jsonl", "samples.jsonl", "curves.png", "curves.svg", MODEL, "step-*"):
        for path in folder.glob(f".{name}.*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def by_step(trace: Trace) -> dict[int, dict[str, float]]:
    """The records of a trace as one row for each step."""
    rows: dict[int, dict[str, float]] = {}
    for step, name, value in trace.records:
        rows.setdefault(step, {})[name] = value
    return rows


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write objects as lines of JSON, atomically."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def rows(trace: Trace, most: int = 12) -> str:
    """The table to print: at most so many of the recorded steps, evenly spread."""
    records = by_step(trace)
    steps = list(records)
    chosen = sorted({steps[round(i)] for i in np.linspace(0, len(steps) - 1, min(most, len(steps)))})
    names = {"win_rate": "win_rate", "win_rate_earlier": "vs_earlier", "kl_to_reference": "kl", "entropy": "entropy",
             "length": "length", "prox_residual": "residual"}  # fmt: skip
    lines = [["step", "duality_gap", *names.values()]]
    for step in chosen:
        row = records[step]
        gap = f"{row['duality_gap']:.3f} [{row['duality_gap_low']:.3f}, {row['duality_gap_high']:.3f}]"
        shown = row if step else {**row, "prox_residual": None}  # nothing was solved before step 0
        lines.append([f"{step}", gap, *("-" if shown.get(name) is None else f"{shown[name]:.3f}" for name in names)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def figure(trace: Trace, title: str) -> Figure:
    """The certificate against the iteration: gap with its interval, win rates, KL, entropy, length, residual."""
    from matplotlib.figure import Figure

    from nlhf.plotting import STYLES

    panels: list[tuple[str, dict[str, str]]] = [
        ("estimated duality gap (win probability)", {"duality_gap": "estimate, errs low"}),
        ("win rate", {"win_rate": "over the reference", "win_rate_earlier": "over earlier policies, mean",
                      "win_rate_worst": "over earlier policies, least"}),
        ("KL to the reference (nats per response)", {"kl_to_reference": ""}),
        ("entropy (nats per token)", {"entropy": ""}),
        ("length (tokens per response)", {"length": ""}),
        ("prox residual (nats)", {"prox_residual": ""}),
    ]  # fmt: skip
    drawn = Figure(figsize=(12, 6.4), layout="constrained")
    drawn.suptitle(title, fontsize=11)
    recorded = {name for _, name, _ in trace.records}
    for ax, (label, lines) in zip(drawn.subplots(2, 3).flat, panels, strict=True):
        if "duality_gap" in lines:
            steps, low = trace.values("duality_gap_low")
            high = trace.values("duality_gap_high")[1]
            ax.fill_between(steps, low, high, color="0.85", label="90 % of resamples")
            ax.axhline(0, color="k", linewidth=0.6)
        if "win_rate" in lines:
            ax.axhline(0.5, color="k", linewidth=0.6)
        for (name, legend), style in zip(lines.items(), STYLES[2:], strict=False):
            if name in recorded:
                steps, values = trace.values(name)
                shown = slice(1, None) if name == "prox_residual" else slice(None)  # nothing was solved at step 0
                ax.plot(steps[shown], values[shown], label=legend, linewidth=1.4, markersize=4.5, **style)
        if any(lines.values()):
            ax.legend(fontsize=8, frameon=False)
        ax.set(xlabel="iteration", ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        ax.grid(True, linewidth=0.4, alpha=0.5)
        ax.spines[["top", "right"]].set_visible(False)
    return drawn


class Tracker:
    """Metrics to tensorboard, wandb or trackio, or to nobody.

    Raises ModuleNotFoundError if the package is not there; nothing is started before the first metric.
    """

    def __init__(self, kind: str, out: Path, config: Mapping[str, Any]) -> None:
        if kind != "none" and find_spec(PACKAGES[kind]) is None:
            raise ModuleNotFoundError(f"report_to {kind} needs: pip install {PACKAGES[kind]}")
        self.kind, self.out, self.config = kind, out, config
        self.started: Any = None

    def log(self, step: int, record: Record) -> None:
        """Report the metrics of one step, by the names that TRL gives them where it does."""
        if self.kind == "none":
            return
        if self.started is None:
            self.started = self._start()
        named = {TRL_NAMES.get(name, name): value for name, value in record.items()}
        if self.kind == "tensorboard":
            for name, value in named.items():
                self.started.add_scalar(name, value, step)
            self.started.flush()
        else:
            self.started.log(named, step=step)

    def finish(self) -> None:
        """Tell the tracker that there is no more."""
        if self.started is not None:
            self.started.close() if self.kind == "tensorboard" else self.started.finish()

    def _start(self) -> Any:
        if self.kind == "tensorboard":
            return importlib.import_module("torch.utils.tensorboard").SummaryWriter(self.out / "tensorboard")
        module = importlib.import_module(self.kind)
        about = {"project": "nlhf", "name": self.out.name, "config": dict(self.config), "resume": "allow"}
        module.init(**about | ({"id": self.out.name, "dir": str(self.out)} if self.kind == "wandb" else {}))
        return module


class _Reader:
    """Turns responses into strings, those of one tensor once, and counts their tokens."""

    def __init__(self, model: CausalLM) -> None:
        self.model, self.tokens, self.began = model, 0, perf_counter()
        self.seen: deque[tuple[Any, list[list[str]]]] = deque(maxlen=8)

    def __call__(self, y: Any) -> list[list[str]]:
        from nlhf.llm.policy import alive

        for tensor, texts in self.seen:
            if tensor is y:
                return texts
        self.tokens += int(alive(y, self.model.eos).sum())
        texts = self.model.text(y)
        self.seen.append((y, texts))
        return texts

    def rate(self) -> str:
        """Tokens of responses for each second that has passed, whatever it was spent on."""
        return f"{self.tokens / (perf_counter() - self.began):.0f} tokens/s"


def _config(algorithm: Regularized, options: Training) -> dict[str, Any]:
    packages = {name: version(name) for name in ("nlhf", "numpy", "torch", "transformers", "peft")}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    versions = {"python": platform.python_version(), **packages}
    return {"algorithm": repr(algorithm), **plain, "versions": versions}


def _check_same_run(out: Path, config: Mapping[str, Any]) -> None:
    if not (file := out / CONFIG).is_file():
        return
    try:
        before = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: not the configuration of a run ({error})") from None
    if different := [name for name in config if name not in NOT_COMPARED and config[name] != before.get(name)]:
        there, here = ({name: of.get(name) for name in different} for of in (before, config))
        raise ValueError(f"out {out} holds another run: it has {there}, this one {here}")


def _split(options: Training) -> tuple[list[Any], list[Any]]:
    """The prompts to train on and those held out, none of them in both."""
    from nlhf.llm.data import read_prompts

    prompts = list(dict.fromkeys(read_prompts(options.data)))
    if options.eval_prompts >= len(prompts):
        raise ValueError(
            f"eval_prompts must leave prompts to train on, got {options.eval_prompts} of the {len(prompts)} "
            f"different ones in {options.data}"
        )
    order = np.random.default_rng(options.seed).permutation(len(prompts))
    held = {int(i) for i in order[: options.eval_prompts]}
    sides: tuple[list[Any], list[Any]] = ([], [])
    for i, prompt in enumerate(prompts):
        sides[i in held].append(prompt)
    return sides


def _model(options: Training) -> CausalLM:
    import torch

    from nlhf.llm import CausalLM

    some: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens, "lora_rank": options.lora_rank, "seed": options.seed
    }  # fmt: skip
    if options.model == "tiny":
        return CausalLM.from_scratch(**some)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return CausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype), device=device, **some)


def _solver(algorithm: Regularized, game: Any, options: Training) -> Any:
    from torch.optim import AdamW

    from nlhf.llm import ContrastiveSolver, PolicyGradientSolver, RegressionSolver, Sample
    from nlhf.llm.solver import Descent

    per_iteration = options.inner_steps * (2 if isinstance(algorithm, MirrorProx) else 1)  # it solves twice
    schedule = LearningRate(options.schedule, options.warmup, options.steps * per_iteration)
    if options.schedule == "constant":
        schedule = LearningRate("constant", options.warmup, 0)  # a longer run is the same run
    descent = Descent(partial(AdamW, lr=options.lr, weight_decay=0.0), schedule, options.max_norm)
    # Long responses: importance weights would leave a few of them alone, so mixtures stay mixtures of tokens.
    prompts = min(options.prompts, len(game.prompts))
    samples = Sample(options.n, options.opponents, correct=False, prompts=prompts, micro=options.micro)
    make: dict[str, Any] = {"regression": RegressionSolver, "pg": PolicyGradientSolver, "ipo": ContrastiveSolver}
    return make[options.solver](game, samples, steps=options.inner_steps, optimizer=descent)


def _samples(records: Mapping[int, Any], prompts: Sequence[Any], memory: Any) -> list[dict[str, Any]]:
    return [
        {"step": step, "prompt": prompt if isinstance(prompt, str) else [m._asdict() for m in prompt], "response": text}
        for step, responses in zip(records, memory, strict=True)
        for prompt, texts in zip(prompts, responses, strict=True)
        for text in texts
    ]


def _size(params: Mapping[str, Any]) -> int:
    return sum(p.numel() * p.element_size() for p in params.values())
