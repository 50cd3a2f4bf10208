"""The command line. Every command is a function; its flags are the function's arguments."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.extras import SubcommandApp

from nlhf import algorithms
from nlhf.core import Regularized
from nlhf.schedules import check_count, check_tau
from nlhf.train import Training


def _kebab(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()


ALGORITHMS: dict[str, type[Regularized]] = {_kebab(name): getattr(algorithms, name) for name in algorithms.__all__}


def ladder(
    algorithm: Annotated[str, tyro.conf.Positional],
    game: str = "random",
    tau: float = 0.1,
    eta: float | None = None,
    steps: int = 100,
    seed: int = 0,
    model: Path | None = None,
    out: Path | None = None,
) -> None:
    """Run one algorithm object on every rung, from an exact table to a language model.

    Args:
        algorithm: best-response, magnetic-md, mirror-prox, nash-ema, nash-md, optimistic-md or self-play.
        game: random, low-rank, bradley-terry, rock-paper-scissors, dice, or a CSV file of win probabilities
            or of comparisons.
        tau: strength of the KL regularisation, > 0.
        eta: step size; what theory recommends for the algorithm if not given.
        steps: iterations of rungs 1 to 5.
        seed: of the game, the samples and the transformer.
        model: a Hugging Face folder or GGUF file for rung 6.
        out: where to write; runs/ladder-ALGORITHM if not given.
    """
    from nlhf.ladder import climb, load_game
    from nlhf.run import check_folder

    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    check_tau(tau, positive=True)
    cls = ALGORITHMS[algorithm]
    chosen = cls.default(tau) if eta is None else cls(eta, tau)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")
    out = Path("runs", f"ladder-{algorithm}") if out is None else out
    check_folder(out)
    played, name = load_game(game, seed)
    policy = None
    if model is not None:
        from nlhf.llm import CausalLM

        policy = CausalLM.from_pretrained(model, max_new_tokens=12, seed=seed)
    climbed = climb(chosen, played, name, steps, seed, policy)
    written = climbed.save(out)
    start = climbed.traces["1 exact table"].values("duality_gap")[1][0]
    print(f"{climbed.label} on {name}: {played.n} responses, duality gap of the reference {start:.3g}\n")
    print(_rows(climbed.table), "\n")
    print("\n".join(f"wrote {path}" for path in written))


def solve(
    data: Annotated[Path, tyro.conf.Positional],
    tau: str = "0.1,0.01,0",
    reference: Path | None = None,
    clusters: int | None = None,
    draws: int = 1000,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Exact equilibria of preference data, beside its Bradley-Terry ranking.

    Args:
        data: a CSV file (or .csv.gz): win probabilities, P(row > column); or comparisons, with the columns item_a,
            item_b, winner[, weight]; or scores, one row per question and one column per item.
        tau: strengths of the KL regularisation, >= 0, separated by commas.
        reference: a CSV file with the columns item, probability; uniform if not given.
        clusters: of scores only: group the questions into so many prompts by who does well on them.
        draws: games drawn from comparisons or scores for the uncertainty of the equilibrium.
        seed: of the draws and the clusters.
        out: where to write; runs/solve-NAME if not given.
    """
    from nlhf.run import check_folder
    from nlhf.solve import clustered, standings
    from nlhf.tabular import MatrixGame, tables

    taus = _taus(tau)
    if draws < 2:
        raise ValueError(f"draws must be at least 2, got {draws}")
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")
    name = data.name.removesuffix(".gz").removesuffix(".csv")
    out = Path("runs", f"solve-{name}") if out is None else out
    check_folder(out)
    options: dict[str, object] = {}
    if clusters is not None:
        if tables.kind(data) != "scores":
            raise ValueError(f"clusters need scores by question, {data} holds {tables.kind(data)}")
        options["groups"] = clustered(tables.read_scores(data)[1], clusters, seed)
    game = MatrixGame.from_file(data, **options)
    if reference is not None:
        game = game.with_reference(tables.read_distribution(reference, game.labels))
    found = standings(name, game, taus, draws, seed=seed)
    print(found.summary(), "\n")
    print(found.rows())
    print("\n" + found.certificates.to_string(index=False, float_format=lambda v: f"{v:.2g}"), "\n")
    print("\n".join(f"wrote {path}" for path in found.save(out)))


def evaluate(
    mdp: Annotated[str, tyro.conf.Positional],
    policy: str = "uniform",
    gamma: float | None = None,
    method: str = "auto",
    atoms: int | None = None,
    accuracy: float | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Return distributions of a policy in a known decision process, with a bound on their error.

    Args:
        mdp: chain, two-state, dirichlet, garnet, windy-grid, or an .npz file with the arrays transitions (S, A, S),
            rewards, gamma and perhaps reward_probs.
        policy: uniform, or a CSV file of probabilities, a row for each state.
        gamma: discount in [0, 1); 0.9 for a process by name, that of the file otherwise.
        method: auto, aggregation, banded or iteration, for a number of atoms that is given.
        atoms: a fixed number of atoms, instead of an accuracy.
        accuracy: the largest W1 error allowed, in units of the rewards; 0.01 if neither it nor atoms is given.
        seed: of a random process.
        out: where to write; runs/evaluate-NAME if not given.
    """
    from nlhf.evaluate import evaluate as run_evaluation
    from nlhf.evaluate import load_policy, load_process
    from nlhf.run import check_folder

    if atoms is not None and accuracy is not None:
        raise ValueError("atoms and accuracy exclude each other: give one of them")
    if atoms is None and method != "auto":
        raise ValueError("method can be chosen for a given number of atoms only")
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")
    process, name = load_process(mdp, gamma, seed)
    out = Path("runs", f"evaluate-{name}") if out is None else out
    check_folder(out)
    found = run_evaluation(name, process, load_policy(policy, process), accuracy, atoms, method)
    bound, count = float(found.w1_bound.max()), found.returns.atoms.size
    print(f"{name}: {process}, {count} atoms by {found.method}; W1 to the truth is at most {bound:.3g}\n")
    frame = found.frame
    print(frame.head(20).to_string(index=False, float_format="{:.4g}".format))
    if len(frame) > 20:
        print(f"and {len(frame) - 20} more rows in returns.csv")
    print("\n" + "\n".join(f"wrote {path}" for path in found.save(out)))


def preference(
    data: Path,
    model: str = "tiny",
    kind: Literal["pairwise", "bradley-terry"] = "pairwise",
    held_out: float = 0.1,
    epochs: int = 1,
    lr: float = 3e-4,
    batch: int = 16,
    length: int = 512,
    lora_rank: int | None = 8,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Fit a preference model to judged pairs, and say how good its probabilities are on held-out prompts.

    The same command goes on where it was interrupted.

    Args:
        data: a .jsonl, .jsonl.gz or .parquet file, or a folder of Dataset.save_to_disk, with the columns prompt,
            chosen, rejected (strings or conversations) or prompt, response_a, response_b, p_a.
        model: a Hugging Face folder or GGUF file; or tiny, a small model of bytes that knows nothing.
        kind: pairwise, which reads both responses at once and may be intransitive; or bradley-terry, a reward model.
        held_out: share of the prompts that are kept for measuring, in [0, 1).
        epochs: times that every comparison is read.
        lr: largest learning rate.
        batch: comparisons per step.
        length: the most tokens that are read of a prompt and of each response.
        lora_rank: rank of the adapters of a pretrained model; None trains all weights.
        seed: of the split, the order, and the initial weights.
        out: the folder of the model, its metrics and its figure; runs/preference-NAME if not given.
    """
    from nlhf.run import check_folder

    for option, value, least in (("epochs", epochs, 1), ("batch", batch, 1), ("length", length, 1), ("seed", seed, 0)):
        check_count(option, value, least)
    if not lr > 0:
        raise ValueError(f"lr must be a number > 0, got {lr!r}")
    name = data.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".parquet")
    out = Path("runs", f"preference-{name}") if out is None else out
    check_folder(out)
    from nlhf.llm import BradleyTerry, PreferenceModel, fit_preference, read_comparisons
    from nlhf.llm.fit import split

    comparisons = read_comparisons(data)
    known, held = split(comparisons, held_out, seed)
    cls = PreferenceModel if kind == "pairwise" else BradleyTerry
    if model == "tiny":
        judge = cls.from_scratch(length=length, seed=seed)
    else:
        judge = cls.from_pretrained(model, length=length, lora_rank=lora_rank, seed=seed)
    fit = fit_preference(judge, known, held, epochs=epochs, lr=lr, batch=batch, seed=seed, checkpoint=out)
    print(f"{fit.model} on {name}: learned from {len(known)} comparisons")
    if cut := judge.cut(comparisons):
        print(
            f"{cut} of {len(comparisons)} comparisons have a text of more than {length} tokens, the rest was not read"
        )
    written = [out / "model.safetensors", out / "metrics.jsonl"]
    if (measured := fit.calibration) is not None:
        print(f"held out: {measured.n} comparisons of {measured.groups} prompts, {measured.level:.0%} intervals\n")
        print(measured.frame.to_string(index=False, float_format="{:.3f}".format), "\n")
        print(measured.reliability.to_string(index=False, float_format="{:.3f}".format), "\n")
        written += measured.save(out)
    print("\n".join(f"wrote {path}" for path in written))


def tournament(
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional],
    data: Path,
    judge: str = "cycle",
    n: int = 8,
    prompts: int = 64,
    tau: str = "0.1,0.01,0",
    max_new_tokens: int = 64,
    draws: int = 1000,
    seed: int = 0,
    out: Path = Path("runs", "tournament"),
) -> None:
    """Play checkpoints against each other: who beats whom, the Nash mixture, and the Bradley-Terry ranking beside it.

    Args:
        folders: two or more, of `nlhf train`, or Hugging Face folders or GGUF files.
        data: a .jsonl, .jsonl.gz or .parquet file, or a folder of Dataset.save_to_disk, with the column prompt.
        judge: cycle, a folder that `nlhf train preference` wrote, or module:function.
        n: responses of each checkpoint per prompt.
        prompts: how many of the data's prompts are drawn; all if there are fewer.
        tau: strengths of the KL regularisation, >= 0, separated by commas, of the Nash mixtures over checkpoints.
        max_new_tokens: the most tokens of a response.
        draws: of the prompts, for the intervals.
        seed: of the prompts, the responses and the draws.
        out: where to write.
    """
    from nlhf.run import check_folder
    from nlhf.tournament import tournament as play
    from nlhf.train import load_judge

    for option, value, least in (("prompts", prompts, 1), ("max_new_tokens", max_new_tokens, 1), ("seed", seed, 0)):
        check_count(option, value, least)
    taus = _taus(tau)
    check_folder(out)
    from numpy.random import default_rng

    from nlhf.llm.data import read_prompts

    known = list(dict.fromkeys(read_prompts(data)))
    asked = [known[i] for i in default_rng(seed).permutation(len(known))[:prompts]]
    found = play(folders, load_judge(judge), asked, n, taus, max_new_tokens=max_new_tokens, draws=draws, seed=seed)
    print(f"P(row > column) on {len(asked)} prompts, {n} responses each, {found.standings.level:.0%} intervals\n")
    print(found.rows(), "\n")
    print(found.standings.summary(), "\n")
    print(found.standings.rows(), "\n")
    print("\n".join(f"wrote {path}" for path in found.save(out)))


def verify(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ("all",),
    budget: Literal["quick", "full"] = "quick",
    workers: int | None = None,
    out: Path = Path("runs", "verify"),
) -> None:
    """Try to break the theorems, and the code that they are about. Exit code 1 if one of them breaks.

    Args:
        names: ids of claims, such as nash_md/one-step, or papers, such as nash_md, or all.
        budget: quick, random instances; or full, more of them and a search for the tightest one.
        workers: processes; one per core if not given, 0 for none beside this one, where a debugger works.
        out: where to write.
    """
    from nlhf.run import check_folder
    from nlhf.verify import verify as try_to_break

    if workers is not None:
        check_count("workers", workers, 0)
    check_folder(out)
    report = try_to_break(names, budget, workers, progress=sys.stderr.isatty())
    print(report.rows(), "\n")
    print(f"{report.summary()}, {report.seconds:.0f} s\n")
    print("\n".join(f"wrote {path}" for path in report.save(out)))
    if report.failing:
        sys.exit(1)


def _taus(text: str) -> list[float]:
    try:
        return [float(check_tau(float(part))) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"tau must be numbers >= 0 separated by commas, got {text!r}") from None


def _rows(table: object) -> str:
    import pandas as pd

    assert isinstance(table, pd.DataFrame)
    shown = table.copy()
    if table["gap_low"].isna().all():
        shown = shown.drop(columns=["gap_low", "gap_high"])
    return shown.to_string(index=False, na_rep="-", float_format=lambda v: f"{v:.2e}" if abs(v) < 0.01 else f"{v:.3g}")


def _training(name: str, cls: type[Regularized]) -> None:
    def command(options: Annotated[Training, tyro.conf.arg(name="")]) -> None:
        from nlhf.run import first_process
        from nlhf.train import rows
        from nlhf.train import train as run_training

        algorithm = cls.default(options.tau) if options.eta is None else cls(options.eta, options.tau)
        data = options.data.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".parquet")
        out = Path("runs", f"{name}-{data}") if options.out is None else options.out
        trace = run_training(algorithm, replace(options, out=out))
        if not first_process():
            return
        print(f"{name} on {data}, measured on {options.eval_prompts} held-out prompts, 90% interval of the gap\n")
        print(rows(trace), "\n")
        print("\n".join(f"wrote {path}" for path in sorted(out.iterdir()) if not path.name.startswith(".")))

    help = f"Train a language model against a judge by {cls.__name__}; the same command goes on where it stopped."
    train.command(name=name, help=help)(command)


train = SubcommandApp()
train.command(preference)
for algorithm_name, algorithm_class in ALGORITHMS.items():
    _training(algorithm_name, algorithm_class)
app = SubcommandApp()
for command in (ladder, solve, evaluate, tournament, verify):
    app.command(command)
app.command(train, name="train", help="Fit a preference model to data, or train a language model against a judge.")


def main() -> None:
    """Entry point of the command `nlhf`. Bad input ends with one line on stderr and exit code 2."""
    try:
        app.cli(prog="nlhf", description="Preference games and return distributions, exactly and on language models.")
    except (ValueError, OSError, ModuleNotFoundError, ArithmeticError) as error:
        print(f"nlhf: {error}", file=sys.stderr)
        sys.exit(2)
