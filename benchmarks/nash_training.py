"""Nash learning at toy scale: a transformer from scratch, an intransitive judge, every player against every other.

    python benchmarks/nash_training.py --out runs/nash_training --seeds 3

After Munos et al. 2024, arXiv:2312.00886, section 8, in a world of our own. A small Llama learns the sentences of a
grammar (SFT, the reference mu). They are warm, exact or, seldom, witty; some hedge, some do not name their subject. The
judge is one of three annotators, drawn anew for every question. Each is a Bradley-Terry judge; all dislike hedges and a
missing subject, and their tastes in style make a Condorcet cycle. From mu are trained, at one tau, by policy gradient
with one optimiser and as many responses, and asking the judge itself (in the paper a model of it) equally often,

    self-play, Nash-MD beta, BR, Nash-EMA    with one gradient step per sub-problem: the players of the paper
    magnetic MD, mirror prox                 with `INNER` gradient steps per sub-problem and the step sizes of theory
    RLHF     max E[r(y)] / 4 - tau KL(pi, mu), r a transformer fitted to judged pairs of mu's responses by Bradley-Terry
             and then asked alone; a sigmoid has slope 1/4, so that tau means what it means to the others

In the paper tau and beta, the weight of mu in the opponent, are free; our `NashMD` has beta = eta tau. With one step
nothing is lost: at pi, KL(pi, pi^(1-beta) mu^beta) / eta has the gradient of tau KL(pi, mu) whatever eta is, so that
NashMD(beta / tau, tau) is Nash-MD-PG. beta = 0 is self-play, beta = 1 the best response to mu (BR). For the same
reason self-play and magnetic MD with one step would be one algorithm.

Fresh responses to prompts that no player was trained on meet before the judge. Intervals (90 %) resample these prompts
within each seed: they know nothing of other seeds, whose range is printed. The duality gap looks for the best response
among 256 of mu (in the curves 32) and errs low. Prints tables and a verdict, writes three CSV and a figure: 16 minutes.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations, product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy.special import expit
from scipy.stats import kendalltau
from torch.optim import AdamW
from tqdm import tqdm

from nlhf import BestResponse, MagneticMD, MirrorProx, NashEMA, NashMD, SelfPlay, plotting, run
from nlhf.llm import Annotators, BradleyTerry, CausalLM, Descent, JudgedGame, PolicyGradientSolver, Sample
from nlhf.llm.causal_lm import draw_weights, trainable
from nlhf.llm.data import Comparison
from nlhf.llm.fit import fit_preference
from nlhf.llm.preference import sampled_gap
from nlhf.llm.preference_model import Scorer
from nlhf.metrics import Floats, estimated_gap
from nlhf.run import check_folder, write_atomically
from nlhf.tabular import MatrixGame, nash

STYLES = {"warm": ("lovely", "kind", "gentle", "charming", "tender", "sweet"),
          "exact": ("measured", "precise", "timed", "ranked", "detailed", "sorted"),
          "witty": ("wry", "droll", "cheeky", "zany", "silly", "punny")}  # fmt: skip
PRIOR = (0.5, 0.4, 0.1)  # of the styles: skewed, because the reward of a style depends on what it was compared with
TASTES = ((4, 0, -4, -4), (-4, 4, 0, -4), (0, -4, 4, -4))  # of the annotators; the last number is for no clear style
HEDGES = ("maybe", "perhaps", "probably", "possibly")
FRAMES = ("the {0} was {1} , {2} and {3}", "i found the {0} {1} and {2} , so {3}", "such a {1} {0} , {2} and {3}",
          "{1} and {2} , this {0} is {3}")  # fmt: skip
NOUNS = ("film", "book", "soup", "hotel", "song", "garden", "city", "poem", "cake", "train", "museum", "beach",
         "concert", "lamp", "chair", "wine", "game", "shirt", "market", "bridge", "tea", "puzzle", "play",
         "boat")  # fmt: skip
QUESTIONS = ("how was the {} ?", "what of the {} ?", "tell me about the {} .")
PROMPTS = [question.format(noun) for noun in NOUNS for question in QUESTIONS]
LENGTH, WIDTH, INNER, RECORDS = 13, 80, 5, 5
PAPER = {"RLHF": 0.5, "self-play": 0.489, "Nash-MD 0.125": 0.598, "Nash-MD 0.25": 0.519, "Nash-MD 0.5": 0.501,
         "BR": 0.148}  # win rates over RLHF: Table 1  # fmt: skip
PLAYERS = ["SFT", *PAPER, "Nash-EMA", "magnetic MD", "mirror prox"]
BEST, BETAS = "Nash-MD 0.125", list(PAPER)[1:]


def sentence(noun: str, rng: np.random.Generator) -> str:
    """A response of the grammar. Two words in fifteen are of another style than the rest."""
    lexicons, style = list(STYLES.values()), rng.choice(3, p=PRIOR)
    words = [rng.choice(lexicons[style if rng.random() < 0.8 else rng.integers(3)]) for _ in range(3)]
    text = str(rng.choice(FRAMES)).format(noun if rng.random() < 0.7 else "thing", *words)
    before, after = (rng.choice(HEDGES) if rng.random() < p else "" for p in (0.4, 0.2))
    return f"{before} {text} {after}".strip()


@cache
def read(prompt: str, text: str) -> tuple[int, int]:
    """The style of most words, 3 if none leads, and merits that all annotators see: the subject, less the hedges."""
    words = text.split()
    counts = [sum(word in lexicon for word in words) for lexicon in STYLES.values()]
    style = counts.index(max(counts)) if counts.count(max(counts)) == 1 else 3
    return style, (prompt.split()[-2] in words) - min(2, sum(word in HEDGES for word in words))


@dataclass(frozen=True)
class Annotator:
    """A Bradley-Terry judge of style and merits."""

    tastes: tuple[int, ...]
    antisymmetric: ClassVar[bool] = True

    def __call__(self, prompts: Sequence[Any], a: Sequence[str], b: Sequence[str]) -> Floats:
        read_all = [[read(*row) for row in zip(prompts, texts, strict=True)] for texts in (a, b)]
        one, other = (np.array([self.tastes[style] + merits for style, merits in rows]) for rows in read_all)
        return np.asarray(expit(one - other))


JUDGE = Annotators([Annotator(tastes) for tastes in TASTES])


class RewardGame(JudgedGame):
    """What a reward model scores, as a game that is linear in it: 1/2 + (r(y) - r(z)) / 4, which is no probability."""

    def compare(self, x: Sequence[str], first: Sequence[Sequence[str]], second: Sequence[Sequence[str]]) -> Floats:
        rows = [row for p, *both in zip(x, first, second, strict=True) for row in product([p], *both)]
        model: Any = self.judge
        with torch.no_grad():
            margins = model.margins(*zip(*rows, strict=True)).numpy()
        return np.asarray(0.5 + margins.reshape(len(x), len(first[0]), len(second[0])) / 4)


def scratch(seed: int) -> CausalLM:
    """A Llama of 0.2 M random weights over the words of the grammar."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = [*PROMPTS, *FRAMES, *HEDGES, "thing", *(word for lexicon in STYLES.values() for word in lexicon)]
    words = ["<end>", *sorted({word for text in texts for word in text.split() if "{" not in word})]
    spelling = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    spelling.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelling, eos_token="<end>", pad_token="<end>")
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2, eos_token_id=0,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, bos_token_id=None,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights from the global generator
        network: Any = LlamaForCausalLM(config)
    draw_weights(network, seed)
    return CausalLM(network.eval(), tokenizer, trainable(network, seed), LENGTH)


def finetune(policy: CausalLM, steps: int, rng: np.random.Generator) -> CausalLM:
    """Maximum likelihood of the grammar, on all prompts."""
    params = {name: p.clone().requires_grad_() for name, p in policy.params.items()}
    live, optimizer = policy.with_params(params), AdamW(params.values(), lr=3e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        x = rng.choice(PROMPTS, 16, replace=False).tolist()
        rows = [policy.tokenizer(sentence(p.split()[-2], rng))["input_ids"] for p in x for _ in range(8)]
        y = torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows]).unflatten(0, (len(x), 8))
        optimizer.zero_grad()
        (-live.log_prob(x, y).mean()).backward()
        optimizer.step()
        decay.step()
    return policy.with_params({name: p.detach() for name, p in params.items()})


def reward_model(mu: CausalLM, prompts: Sequence[str], pairs: int, seed: int) -> BradleyTerry:
    """Fitted to judged pairs of mu's responses, from mu's weights."""
    y, _ = mu.sample(prompts, 2 * pairs, torch.Generator().manual_seed(seed))
    x = [prompt for prompt in prompts for _ in range(pairs)]
    a, b = ([text for row in mu.text(y) for text in row[i::2]] for i in range(2))
    data = [Comparison(*row) for row in zip(x, a, b, JUDGE(x, a, b).tolist(), strict=True)]
    network = Scorer(copy.deepcopy(mu.network.model)).eval()
    params = {name.replace("model.", "backbone.", 1): p for name, p in mu.params.items()}
    start = BradleyTerry(network, mu.tokenizer, {**params, "head": network.head.detach()}, length=24)
    fit = fit_preference(start, data, epochs=4, lr=1e-3, batch=64, seed=seed, progress=False)
    *asked, p = zip(*fit.held_out, strict=True)
    print(f"seed {seed}: correlation of the reward model with the judge {np.corrcoef(fit.model(*asked), p)[0, 1]:.2f}")
    return fit.model


def train(
    mu: CausalLM, prompts: Sequence[str], held: Sequence[str], tau: float, steps: int, seed: int
) -> tuple[dict[str, CausalLM], pd.DataFrame]:
    """Every player's policy, and the records of its training."""
    optimizer = Descent(partial(AdamW, lr=1e-3, weight_decay=0.0), lambda k: 1 - k / steps, max_norm=1.0)
    game = JudgedGame(JUDGE, prompts, mu.text)
    rewards = RewardGame(reward_model(mu, prompts, max(4, steps // 5), seed), prompts, mu.text)
    algorithms: dict[str, Any] = {name: NashMD(float(name[8:]) / tau, tau) for name in PAPER if "MD" in name}
    algorithms |= {name: BestResponse(1 / tau, tau) for name in ("RLHF", "BR")}
    algorithms |= {"self-play": SelfPlay(1 / tau, tau), "Nash-EMA": NashEMA(1 / tau, tau, decay=0.95)}
    algorithms |= {"magnetic MD": MagneticMD.default(tau), "mirror prox": MirrorProx.default(tau)}
    policies, frames = {"SFT": mu}, []
    for name in tqdm(PLAYERS[1:], f"seed {seed}", disable=None):
        gap = sampled_gap(mu, n=32, seed=seed, prompts=held)

        def duality_gap(policy: Any, _: Any, tau: float, gap: sampled_gap = gap) -> dict[str, float]:
            return gap(policy, game, tau)  # RLHF trains in another game

        # the leave-one-out baseline takes away whatever opponent a reward has
        judged, opponents = (rewards, 2) if name == "RLHF" else (game, 8)
        inner, solves = INNER if name in ("magnetic MD", "mirror prox") else 1, 1 + (name == "mirror prox")
        expectation = Sample(8, opponents, correct=False, prompts=16, held=0)
        options: dict[str, Any] = {"policy": mu, "metrics": (duality_gap,), "seed": seed, "progress": False}
        solver, outer = PolicyGradientSolver(judged, expectation, inner, optimizer), steps // (inner * solves)
        trace = run(algorithms[name], solver, outer, every=-(-outer // RECORDS), **options)
        policies[name], rows = trace.policy, trace.frame[["step", "metric", "value"]]
        frames.append(rows.assign(player=name, seed=seed, step=rows["step"] * inner * solves))
    return policies, pd.concat(frames)


def meet(
    policies: dict[str, CausalLM], held: Sequence[str], tau: float, n: int, seed: int
) -> tuple[Floats, pd.DataFrame]:
    """(X, players, players) win rates by prompt, and of every player and prompt the gap and what is said."""
    texts, rows, mu = [], [], policies["SFT"]
    game, win = JudgedGame(JUDGE, held, mu.text), np.full((len(held), len(policies), len(policies)), 0.5)
    for k, (name, policy) in enumerate(policies.items()):
        y, log_prob = policy.sample(held, n if k else 8 * n, torch.Generator().manual_seed(1000 * seed + k))
        texts.append(policy.text(y))
        blocks = game.compare(held, texts[0], [row[:n] for row in texts[k]])
        ratios = (log_prob - mu.log_prob(held, y)).double().numpy()[:, :n]
        for x, prompt in enumerate(held):
            gap = estimated_gap(blocks[[x]], ratios[[x]], tau, np.random.default_rng(seed), resamples=1).value
            style, merits = np.array([read(prompt, text) for text in texts[k][x]]).T
            said = {kind: np.mean(style == i) for i, kind in enumerate(STYLES)} | {"merits": merits.mean()}
            rows.append({"player": name, "seed": seed, "prompt": prompt, "gap": gap, "kl": ratios[x].mean(), **said})
    for i, j in combinations(range(len(texts)), 2):
        win[:, i, j] = game.compare(held, texts[i], texts[j]).mean(axis=(1, 2))
        win[:, j, i] = 1 - win[:, i, j]
    return win, pd.DataFrame(rows)


def resampled(values: Floats, count: int = 1000) -> Floats:
    """(count, ...) means of values (seeds, X, ...) over prompts drawn anew within each seed."""
    rng, (seeds, prompts) = np.random.default_rng(0), values.shape[:2]
    shares = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=(count, seeds)) / (prompts * seeds)
    return np.asarray(np.einsum("csx,sx...->c...", shares, values))


def estimate(values: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean and 90 % interval of values (seeds, X, ...)."""
    low, high = np.quantile(resampled(values), [0.05, 0.95], axis=0)
    return values.mean(axis=(0, 1)), low, high


def report(win: Floats, gaps: dict[str, Floats], table: pd.DataFrame, tau: float) -> None:
    """Print the tables; win is (seeds, X, players, players), gaps are (seeds, X)."""
    mean, low, high = estimate(win)
    cells = np.char.add(np.char.mod("%.3f±", mean), np.char.mod("%.3f", (high - low) / 2))
    print(pd.DataFrame(cells, PLAYERS, PLAYERS).to_string())
    print("win rates of rows over columns, ± half of the 90 % interval\n")
    others = np.where(np.eye(len(PLAYERS), dtype=bool), np.nan, mean)
    facts = {
        "gap": ["{:.3f} [{:.3f}, {:.3f}]".format(*estimate(gap)) for gap in gaps.values()],
        "of seeds": ["{:.3f} to {:.3f}".format(*np.quantile(gap.mean(axis=1), [0, 1])) for gap in gaps.values()],
        "field": np.nanmean(others, axis=1), "worst": np.nanmin(others, axis=1),
        "against": [PLAYERS[i] for i in np.nanargmin(others, axis=1)],
        "lottery": nash(MatrixGame(mean)).policy.probs,
    }  # fmt: skip
    said = table.groupby("player")[["kl", *STYLES, "merits"]].mean()
    print(pd.DataFrame(facts, PLAYERS).join(said).round(3).to_string())
    print(f"gap: at tau = {tau:g}; field, worst: average and least win rate over the others; lottery: equilibrium")
    print("of the table; kl: to SFT, in nats; then shares of the styles; merits: subject less hedges\n")


def verdict(win: Floats, gaps: dict[str, Floats]) -> str:
    """Whether the paper's ordering is in the numbers: a sign counts if the interval and every seed agree on it."""
    (_, low, high), seeds = estimate(win), win.mean(axis=1)
    low, high = np.minimum(low, seeds.min(axis=0)), np.maximum(high, seeds.max(axis=0))
    best, rlhf, *shared = (PLAYERS.index(name) for name in (BEST, *PAPER))
    beaten = [name for name, rate in zip(PLAYERS, low[best], strict=True) if rate > 0.5]
    lost = [name for name, rate in zip(PLAYERS, high[best], strict=True) if rate < 0.5]
    rest, paper = len(PLAYERS) - 1 - len(beaten) - len(lost), list(PAPER.values())
    order = [kendalltau(rates[[rlhf, *shared], rlhf], paper).statistic for rates in (seeds.mean(axis=0), *seeds)]
    signs = len(beaten) == len(PLAYERS) - 1, min(order) > 0, high[PLAYERS.index("BR"), rlhf] < 0.5
    along = [gaps[name].mean() for name in BETAS]
    return f"""The paper's ordering {"appears" if all(signs) else "is there in part" if any(signs) else "is not there"}.
There {BEST} beats every other player; here {", ".join(beaten) or "nobody"}. It loses to
{", ".join(lost) or "nobody"}; of the other {rest} an interval holds 1/2 or seeds disagree.
There BR wins 0.148 against RLHF; here {seeds.mean(axis=0)[PLAYERS.index("BR"), rlhf]:.3f}.
Win rates over RLHF, here and there: Kendall's tau {order[0]:.2f}, of the seeds {min(order):.2f} to {max(order):.2f}.
Gap at beta = 0, 1/8, 1/4, 1/2, 1: {", ".join(f"{gap:.3f}" for gap in along)}, least for {BETAS[np.argmin(along)]}.
"""


def draw(win: Floats, curves: pd.DataFrame, tau: float) -> Figure:
    """The table as a heat map, and the gaps in training."""
    figure = Figure(figsize=(15, 6.4), layout="constrained")
    heat, left, right = figure.subplots(1, 3, width_ratios=[2, 1, 1])
    (mean, low, high), ticks = estimate(win), range(len(PLAYERS))
    reach = float(np.abs(mean - 0.5).max())
    image = heat.imshow(mean, cmap=colormaps["PuOr"], vmin=0.5 - reach, vmax=0.5 + reach)
    for (i, j), value in np.ndenumerate(mean):
        text = f"{value:.3f}\n±{(high - low)[i, j] / 2:.3f}" if i != j else "–"
        ink = "white" if abs(value - 0.5) > 0.6 * reach else "black"
        heat.text(j, i, text, ha="center", va="center", fontsize=8, color=ink)
    heat.set_xticks(ticks, PLAYERS, rotation=40, ha="right")
    heat.set_yticks(ticks, PLAYERS)
    heat.set_title("win rate of row over column, ± half of the 90 % interval", fontsize=10)
    figure.colorbar(image, ax=heat, shrink=0.7)
    panels = {"from self-play to BR": BETAS, "other players": [name for name in PLAYERS[1:] if name not in BETAS]}
    for ax, (title, names) in zip((left, right), panels.items(), strict=True):
        for style, name in zip(plotting.STYLES, names, strict=False):
            some = curves[(curves["player"] == name) & (curves["metric"] == "duality_gap")].groupby("step")["value"]
            ax.plot(some.mean(), label=name, markeredgecolor="white", **{**style, "linewidth": 1.6})
            ax.fill_between(some.mean().index, some.min(), some.max(), color=style["color"], alpha=0.12, linewidth=0)
        ax.set(xlabel="gradient step", title=f"{title}, tau = {tau:g}")
        ax.axhline(0, color="0.4", linewidth=0.8)
        ax.grid(True, linewidth=0.4, alpha=0.5)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    ends = np.array([left.get_ylim(), right.get_ylim()])
    left.set_ylim(ends.min(), ends.max())
    right.set_ylim(ends.min(), ends.max())
    left.set_ylabel(f"{plotting.LABELS['duality_gap']}, estimated: mean and range of {len(win)} seeds")
    return figure


def main(
    out: Path = Path("runs/nash_training"), seeds: int = 3, seed: int = 0, steps: int = 200, tau: float = 0.05,
    quick: bool = False,
) -> None:  # fmt: skip
    """Train the players from one small transformer, and let them meet.

    Args:
        out: folder to write in.
        seeds: how often everything is drawn anew, >= 1.
        seed: the first, >= 0.
        steps: of policy gradient, a multiple of 10.
        tau: strength of the KL regularisation, > 0.
        quick: one seed and few steps, to see that it runs.
    """
    seeds, steps = (1, 10) if quick else (seeds, steps)
    if min(seeds, seed + 1, steps) < 1 or steps % (2 * INNER):
        raise ValueError(f"seeds must be >= 1, seed >= 0, steps a multiple of 10, got {seeds}, {seed}, {steps}")
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    found: list[tuple[Floats, pd.DataFrame, pd.DataFrame]] = []
    for s in range(seed, seed + seeds):
        rng = np.random.default_rng(s)
        prompts = rng.permutation(PROMPTS).tolist()
        mu, held = finetune(scratch(s), 30 if quick else 300, rng), prompts[: 4 if quick else 24]
        policies, records = train(mu, prompts[24:], held, tau, steps, s)
        found.append((*meet(policies, held, tau, 8 if quick else 32, s), records))
    wins, tables, curves = zip(*found, strict=True)
    win, frames = np.stack(wins), {"players": pd.concat(tables), "curves": pd.concat(curves)}
    groups = frames["players"].groupby("player")["gap"]
    gaps = {name: groups.get_group(name).to_numpy().reshape(win.shape[:2]) for name in PLAYERS}
    report(win, gaps, frames["players"], tau)
    print(verdict(win, gaps))
    about = frames["players"].loc[frames["players"]["player"] == "SFT", ["seed", "prompt"]]
    pairs = pd.DataFrame(product(PLAYERS, PLAYERS), columns=["player", "opponent"])
    frames["win_rates"] = about.merge(pairs, how="cross").assign(win_rate=win.ravel())
    for name, frame in frames.items():
        write_atomically(out / f"{name}.csv", frame.assign(tau=tau).to_csv(index=False).encode())
        print("wrote", out / f"{name}.csv")
    print("wrote", *plotting.save(draw(win, frames["curves"], tau), out / "nash_training"))


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError) as error:
        sys.exit(f"nash_training: {error}")
