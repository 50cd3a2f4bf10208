"""Fitting a learned judge to comparisons, with checkpoints that resume to the last bit."""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from nlhf.calibration import Calibration, calibration
from nlhf.llm.data import Comparison
from nlhf.llm.policy import Params
from nlhf.llm.preference import Judge, ask
from nlhf.llm.preference_model import WEIGHTS, LearnedJudge, read_weights
from nlhf.run import write_atomically
from nlhf.schedules import check_count, is_number

J = TypeVar("J", bound=LearnedJudge)
Records = list[tuple[int, str, float]]
BUCKET = 32  # batches whose comparisons are sorted by length together


@dataclass(frozen=True)
class Fit(Generic[J]):
    """A fitted judge, and how good it is."""

    model: J
    records: tuple[tuple[int, str, float], ...]
    """(step, metric, value): the loss of the parameters after so many steps, and held-out measures after each epoch."""
    train: tuple[Comparison, ...]
    held_out: tuple[Comparison, ...]
    calibration: Calibration | None
    """On what was held out; None if that is nothing."""


def fit_preference(
    model: J,
    comparisons: Sequence[Comparison],
    held_out: float | Sequence[Comparison] = 0.1,
    *,
    epochs: int = 1,
    lr: float = 3e-4,
    batch: int = 16,
    seed: int = 0,
    checkpoint: str | PathLike[str] | None = None,
    every: int = 100,
    progress: bool | None = None,
) -> Fit[J]:
    """Minimise the cross-entropy with soft labels, by Adam.

        mean over comparisons of  -p_a log P(a > b | x) - (1 - p_a) log P(b > a | x)

    The learning rate rises for a tenth of the steps and then falls to zero, both linearly; gradients are cut to norm 1.
    Comparisons of about one length share a batch.

    Args:
        model: where to start; it is left as it is.
        comparisons: to learn from.
        held_out: the share of the prompts whose comparisons are kept for measuring, in [0, 1), or comparisons.
        epochs: times that every comparison is read.
        lr: largest learning rate, > 0.
        batch: comparisons per step.
        seed: of the split and of the order. The same seed gives the same model, to the last bit on one machine.
        checkpoint: a folder. The judge is kept there as `save` writes it, with what is needed to go on; the run
            resumes from it and ends as if it had never stopped. Beside it metrics.jsonl, a line for each record.
        every: steps between checkpoints. What is kept has a finite loss and gradient.
        progress: show a progress bar; by default on a terminal and not in a pipe.

    Raises ValueError for bad arguments and OSError for a folder without enough room, before any work;
    FloatingPointError if the loss is not finite: the last checkpoint stays.

    >>> from nlhf.llm import BradleyTerry
    >>> rows = [Comparison(f"Say {word}.", word, "no", 0.9) for word in ("one", "two", "three", "four")]
    >>> model = BradleyTerry.from_scratch(width=8, layers=1, heads=2, length=16)
    >>> fit = fit_preference(model, rows, held_out=0.25, epochs=20, lr=0.01)
    >>> fit.calibration.n, bool(fit.model(["Say two."], ["two"], ["no"])[0] > 0.6)
    (1, True)
    """
    for name, value, least in (("epochs", epochs, 1), ("batch", batch, 1), ("seed", seed, 0), ("every", every, 1)):
        check_count(name, value, least)
    if not is_number(lr) or lr <= 0:
        raise ValueError(f"lr must be a finite number > 0, got {lr!r}")
    if not comparisons:
        raise ValueError("comparisons must be at least one, got none")
    train, held = split(comparisons, held_out, seed) if isinstance(held_out, float | int) else (comparisons, held_out)
    train, held = tuple(train), tuple(held)
    params = {name: p.detach().clone().requires_grad_() for name, p in model.params.items()}
    live, optimizer = model.with_params(params), torch.optim.Adam(params.values(), lr=lr)
    epoch_steps = -(-len(train) // batch)
    total = epochs * epoch_steps
    identity = {"judge": repr(model), "base": model.base, "start": _parameters_crc(model.params), "train": _crc(train),
                "held_out": _crc(held), "epochs": epochs, "lr": lr, "batch": batch, "seed": seed}  # fmt: skip
    folder = None if checkpoint is None else Path(checkpoint)
    start, records, found = 0, Records(), None
    if folder is not None:
        start, records = _resume(folder, live, optimizer, identity)

    def keep(t: int) -> None:
        if folder is None:
            return
        state = {} if t == total else _flat(optimizer)  # a finished judge needs no momenta
        live.save(folder, about={"run": identity, "t": t, "records": records}, **state)
        lines = [json.dumps(dict(zip(("step", "metric", "value"), row, strict=True))) + "\n" for row in records]
        write_atomically(folder / "metrics.jsonl", "".join(lines).encode())

    shown = sys.stderr.isatty() if progress is None else progress
    bar = tqdm(range(start, total), initial=start, total=total, disable=not shown, desc=type(model).__name__)
    for t, rows in zip(bar, _batches(train, batch, seed, epochs, start), strict=True):
        loss = _loss(live, rows)
        optimizer.zero_grad()
        loss.backward()
        norm = clip_grad_norm_(params.values(), 1.0)
        if not torch.isfinite(loss + norm):
            kept = "" if folder is None else f"; {folder} holds the last good judge"
            raise FloatingPointError(f"loss {loss.item():g}, gradient {norm.item():g} at step {t}: "
                                     f"lower lr = {lr:g}{kept}")  # fmt: skip
        if t % every == 0:
            keep(t)
        records.append((t, "loss", loss.item()))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(10 * (t + 1) / total, 1.0) * (1 - t / total)
        optimizer.step()
        if (t + 1) % epoch_steps == 0 and held:
            found = calibrate(live, held)
            records.extend((t + 1, f"held_out_{name}", estimate.value) for name, estimate in found.metrics.items())
    if start < total:
        keep(total)
    fitted = model.with_params({name: p.detach() for name, p in params.items()})
    if held and found is None:  # resumed where nothing was left to do
        found = calibrate(fitted, held)
    return Fit(fitted, tuple(records), train, held, found)


def calibrate(judge: Judge, comparisons: Sequence[Comparison], **options: Any) -> Calibration:
    """`nlhf.calibration.calibration` of any judge's answers, grouped by prompt; the options are its own."""
    prompts, a, b, p = zip(*comparisons, strict=True)
    return calibration(ask(judge, prompts, a, b), p, prompts, **options)


def split(comparisons: Sequence[Comparison], held_out: float, seed: int) -> tuple[list[Comparison], list[Comparison]]:
    """What to learn from and what to measure on, a share in [0, 1) of the prompts: no prompt is in both.

    Raises ValueError if the share is none, or leaves no prompt to learn from.

    >>> rows = [Comparison(prompt, "yes", "no", 1.0) for prompt in "aabbccdd"]
    >>> [len(part) for part in split(rows, 0.25, seed=0)]
    [6, 2]
    """
    check_count("seed", seed, 0)
    if not is_number(held_out) or not 0 <= held_out < 1:
        raise ValueError(f"held_out must be a share in [0, 1), got {held_out!r}")
    prompts = list(dict.fromkeys(c.prompt for c in comparisons))
    count = max(1, round(held_out * len(prompts))) if held_out else 0
    if count and count >= len(prompts):
        raise ValueError(f"held_out must leave prompts to learn from, got {held_out!r} of {len(prompts)}")
    chosen = {prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))[:count]}
    train, held = ([c for c in comparisons if (c.prompt in chosen) == side] for side in (False, True))
    return train, held


def _batches(train: Sequence[Comparison], batch: int, seed: int, epochs: int, start: int) -> Iterator[list[Comparison]]:
    """The batches of all epochs from step `start` on. Those of an epoch depend on (seed, epoch) alone."""
    lengths = np.array([len(repr(c.prompt)) + len(c.a) + len(c.b) for c in train])  # characters stand for tokens
    for epoch in range(epochs):
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(train))
        buckets = [order[i : i + BUCKET * batch] for i in range(0, len(order), BUCKET * batch)]
        order = np.concatenate([bucket[np.argsort(lengths[bucket], kind="stable")] for bucket in buckets])
        chunks = [order[i : i + batch] for i in range(0, len(order), batch)]
        for step, i in enumerate(rng.permutation(len(chunks)), epoch * len(chunks)):
            if step >= start:
                yield [train[j] for j in chunks[i]]


def _loss(judge: LearnedJudge, rows: Sequence[Comparison]) -> Tensor:
    prompts, a, b, p = zip(*rows, strict=True)
    margins = judge.margins(prompts, a, b)
    return F.binary_cross_entropy_with_logits(margins, torch.tensor(p, dtype=margins.dtype, device=margins.device))


def _resume(
    folder: Path, live: LearnedJudge, optimizer: torch.optim.Adam, identity: dict[str, Any]
) -> tuple[int, Records]:
    """The step and the records of a checkpoint, whose numbers go into the judge and the optimiser; 0 and none."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / WEIGHTS).exists():
        # The parameters and their two momenta, and the old file beside the new one while it is replaced.
        needed = 6 * sum(p.numel() * p.element_size() for p in live.params.values())
        if (free := shutil.disk_usage(folder).free) < needed:
            raise OSError(f"checkpoint needs {needed / 1e6:.1f} MB in {folder}, where {free / 1e6:.1f} MB are free")
        return 0, []
    tensors, about = read_weights(folder)
    before = about.get("run", {})
    if different := [name for name, value in identity.items() if before.get(name) != value]:
        here, there = ({name: run.get(name) for name in different} for run in (identity, before))
        raise ValueError(f"checkpoint {folder} is of another run: it has {there}, this one {here}")
    with torch.no_grad():
        for name, p in live.params.items():
            p.copy_(tensors[name])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("adam."):
            _, i, key = name.split(".")
            state.setdefault(int(i), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return about["t"], [tuple(row) for row in about["records"]]


def _flat(optimizer: torch.optim.Adam) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"adam.{i}.{key}": tensor for i, tensors in state.items() for key, tensor in tensors.items()}


def _crc(rows: Iterable[Comparison]) -> int:
    total = 0
    for row in rows:
        total = zlib.crc32(json.dumps(row).encode(), total)
    return total


def _parameters_crc(params: Params) -> int:
    total = 0
    for name, p in params.items():
        total = zlib.crc32(
            p.detach().cpu().contiguous().view(torch.uint8).numpy().data, zlib.crc32(name.encode(), total)
        )
    return total
