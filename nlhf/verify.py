"""Trying to break the claims of the ledger: what `nlhf verify` prints, writes and draws."""

from __future__ import annotations

import ast
import builtins
import io
import json
import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import partial
from html import escape
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from textwrap import indent
from time import perf_counter
from typing import Any
from unittest import mock

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from tqdm import tqdm

from nlhf.claims import LEDGER, PAPERS, Claim
from nlhf.claims import verify as try_to_break
from nlhf.run import write_atomically

BUDGETS = {"quick": (30, 0), "full": (300, 3000)}
"""Random instances of each claim, and steps of the search for its tightest one."""

LANGUAGE_MODELS = "nlhf.llm.claims"
"""The module of the claims that need torch; it is imported when one of them is asked for."""

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

Curves = list[list[float | None]]


@dataclass(frozen=True)
class Outcome:
    """What trying to break a claim has shown, as plain data: it travels between processes, and to JSON and back."""

    id: str
    statement: str
    source: str
    tag: str
    identity: bool
    """It is an equation."""
    axis: str | None
    tried: int = 0
    ratio: float | None = None
    """The largest lhs / rhs found, of an equation difference / tolerance; None where no right-hand side is large."""
    worst: str | None = None
    """A program that makes the instance which attains the ratio, and measures the claim on it."""
    refuted: dict[str, str | None] | None = None
    """For every mutant a program that makes the instance which refutes it, None if nothing did; None if not tried."""
    counterexample: str | None = None
    """A program that makes the smallest violation found, and measures it."""
    error: str = ""
    lhs: Curves | None = None
    """The curves of a claim with an axis, on the counterexample or else the worst instance; None where not finite."""
    rhs: Curves | None = None
    seconds: float = 0.0

    @property
    def paper(self) -> str:
        """The first part of the id."""
        return self.id.split("/")[0]

    @property
    def file(self) -> str:
        """The name of its programs."""
        return f"{self.id.replace('/', '-')}.py"

    @property
    def failure(self) -> str:
        """Why it does not hold, in one line; empty if it does: no violation, and no mutant that got away."""
        away = [f"nothing refutes the mutant {name!r}" for name, by in (self.refuted or {}).items() if by is None]
        return " ".join((self.error or "; ".join(away)).split())

    @property
    def holds(self) -> bool:
        """Nothing broke it, and everything broke its mutants."""
        return not self.failure

    @property
    def caught(self) -> str:
        """Mutants refuted, of how many."""
        return "-" if self.refuted is None else f"{len(self.refuted) - self._away}/{len(self.refuted)}"

    @property
    def _away(self) -> int:
        return list((self.refuted or {}).values()).count(None)

    @property
    def worst_text(self) -> str:
        """The ratio, of an equation with its unit."""
        if self.ratio is None:
            return "-"
        plain = f"{self.ratio:.3f}" if abs(self.ratio) >= 0.01 else f"{self.ratio:.0e}" if self.ratio else "0"
        return f"{plain} tol" if self.identity else plain


@dataclass(frozen=True)
class Report:
    """The outcomes of some claims."""

    budget: str
    outcomes: tuple[Outcome, ...]
    seconds: float

    @property
    def failing(self) -> list[Outcome]:
        """The claims that do not hold."""
        return [found for found in self.outcomes if not found.holds]

    def summary(self) -> str:
        """In one line."""
        holding, mutants = len(self.outcomes) - len(self.failing), [o.refuted or {} for o in self.outcomes]
        caught = sum(len(of) for of in mutants) - sum(found._away for found in self.outcomes)
        return (
            f"{holding} of {len(self.outcomes)} claims hold on {sum(o.tried for o in self.outcomes):,} instances, "
            f"{caught} of {sum(len(of) for of in mutants)} mutants are refuted"
        )

    def rows(self) -> str:
        """The table to print, failing claims at the end, then their counterexamples."""
        cells = [("claim", "tried", "worst", "mutants", "verdict", "source")]
        for found in sorted(self.outcomes, key=lambda found: not found.holds):
            verdict = "holds" if found.holds else "FAILS"
            cells.append((found.id, f"{found.tried}", found.worst_text, found.caught, verdict, found.source))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = []
        for claim, *numbers, source in cells:
            middle = "  ".join(f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:-1], strict=True))
            line = f"{claim:<{widths[0]}}  {middle}  {source}"
            lines.append(line if len(line) <= 120 else f"{line[:117].rstrip()}...")
        lines.append("\nworst: the largest lhs / rhs of a bound; of an equation the largest difference, in tolerances")
        for found in self.failing:
            lines.append(f"\n{found.id}: {found.statement}\n{found.failure}")
            if found.counterexample is not None:
                short = len(found.counterexample) < 5000
                lines.append(indent(found.counterexample if short else f"counterexamples/{found.file}", "    "))
        return "\n".join(lines)

    def to_json(self) -> str:
        """All of it."""
        content = {"nlhf": version("nlhf"), "budget": self.budget, "seconds": self.seconds}
        claims = [{**asdict(found), "holds": found.holds} for found in self.outcomes]
        return json.dumps({**content, "claims": claims}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """What `to_json` wrote."""
        content = json.loads(text)
        rows = [{name: value for name, value in row.items() if name != "holds"} for row in content["claims"]]
        return cls(content["budget"], tuple(Outcome(**row) for row in rows), content["seconds"])

    def html(self) -> str:
        """A page that needs nothing else: the table, what fails with its counterexample, and the figures."""
        examples, search = BUDGETS[self.budget]
        searched = f" and {search:,} steps of a search for the tightest" if search else ""
        failing = "".join(_card(found) for found in self.failing)
        cards = "".join(_card(found) for found in self.outcomes if found.holds and found.lhs is not None)
        links = ", ".join(f'<a href="#{escape(found.id)}">{escape(found.id)}</a>' for found in self.failing)
        return PAGE.format(
            summary=escape(self.summary()),
            state="fails" if self.failing else "holds",
            how=f"{examples} random instances of each claim{searched}, {self.seconds:.0f} s, nlhf {version('nlhf')}",
            rows="".join(_section(paper, list(rows)) for paper, rows in groupby(self.outcomes, lambda o: o.paper)),
            broken=f'<p class="why">What fails: {links}</p>' if links else "",
            failing=f"<h2>What fails</h2>{failing}" if failing else "",
            figures=f'<h2>Both sides on the worst instance</h2><div class="cards">{cards}</div>' if cards else "",
        )

    def save(self, out: Path) -> list[Path]:
        """Write ledger.json, ledger.html, and the programs of the worst instances and the counterexamples."""
        page, data = self.html().encode(), self.to_json().encode()
        for folder in ("instances", "counterexamples"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        for found in self.outcomes:
            for folder, program in (("instances", found.worst), ("counterexamples", found.counterexample)):
                path = out / folder / found.file
                if program is None:
                    path.unlink(missing_ok=True)  # of a run before this one
                else:
                    write_atomically(path, program.encode())
        write_atomically(out / "ledger.json", data)
        write_atomically(out / "ledger.html", page)
        broken = [out / "counterexamples" / found.file for found in self.failing if found.counterexample is not None]
        return [out / "ledger.json", out / "ledger.html", out / "instances", *broken]


# --- verifying --------------------------------------------------------------------------------------------------------


def claims(names: Sequence[str]) -> dict[str, Claim]:
    """The claims of these ids or papers, or "all"; those about language models if torch is there.

    Raises ValueError for a name that is none of these.
    """
    known = dict(LEDGER)
    if not set(names) <= set(known) | {claim.paper for claim in known.values()}:
        known |= {claim.id: claim for claim in _about_language_models()}
    papers = dict.fromkeys(claim.paper for claim in known.values())
    for name in names:
        if name not in ("all", *papers, *known):
            near = get_close_matches(name, [*papers, *known], n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the papers are {', '.join(papers)}"
            raise ValueError(f"no claim or paper is named {name!r}: {hint}")
    return {id: claim for id, claim in known.items() if {"all", claim.paper, id} & set(names)}


def verify(names: Sequence[str], budget: str = "quick", workers: int | None = None, progress: bool = False) -> Report:
    """Try to break the claims named, in so many processes: one per core if None, in this one if 0.

    What is found does not depend on the number of processes.
    """
    began = perf_counter()
    ids, cores = list(claims(names)), len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    found: dict[str, Outcome] = {}
    with tqdm(total=len(ids), unit="claim", disable=not progress) as bar:
        for outcome in _outcomes(ids, budget, min(cores if workers is None else workers, len(ids))):
            found[outcome.id] = outcome
            failing = sum(not outcome.holds for outcome in found.values())
            bar.set_postfix_str(f"{failing} fail" if failing else "", refresh=False)
            bar.update()
    return Report(budget, tuple(found[id] for id in ids), perf_counter() - began)


def outcome(id: str, budget: str = "quick") -> Outcome:
    """Try to break one claim, and its mutants."""
    began, claim = perf_counter(), claims([id])[id]
    about = (claim.id, claim.statement, claim.source, claim.tag, claim.identity is not None, claim.axis)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            verdict = try_to_break(claim, *BUDGETS[budget])
        except Exception as raised:  # it could not be tried: no instance meets its condition, say
            return Outcome(*about, error=f"{type(raised).__name__}: {raised}", seconds=perf_counter() - began)
        shown = verdict.worst if verdict.counterexample is None else verdict.counterexample
        try:
            lhs, rhs, _, ratio = claim.measure(shown)
        except Exception:  # that is why it is a counterexample
            lhs, rhs, ratio = np.empty(0), np.empty(0), np.nan
    error = verdict.error
    if verdict.counterexample is not None and np.isfinite(ratio) and " is false" not in error:
        error += f", {'difference / tolerance' if claim.identity else 'lhs / rhs'} = {ratio:.6g}"
    drawn = claim.axis is not None and lhs.size > 0
    program = partial(_program, claim)
    return Outcome(
        *about,
        tried=verdict.tried,
        ratio=float(ratio) if np.isfinite(ratio) else None,
        worst=program(shown),
        refuted={name: None if by is None else program(by, name) for name, by in verdict.refuted.items()} or None,
        counterexample=None if verdict.counterexample is None else program(verdict.counterexample),
        error=error,
        lhs=_plain(lhs) if drawn else None,
        rhs=_plain(rhs) if drawn else None,
        seconds=perf_counter() - began,
    )


def _outcomes(ids: list[str], budget: str, workers: int) -> Iterator[Outcome]:
    """In whatever order they are done."""
    if workers == 0:
        yield from (outcome(id, budget) for id in ids)
        return
    # workers are new processes, which read the number of threads when they import NumPy
    with mock.patch.dict(os.environ, dict.fromkeys(THREADS, "1")):
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
        try:
            for done in as_completed([pool.submit(outcome, id, budget) for id in ids]):
                yield done.result()
        except BrokenProcessPool:
            raise ChildProcessError("a worker process was killed, perhaps for its memory: try fewer workers") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _about_language_models() -> Sequence[Claim]:
    if find_spec("torch") is None or find_spec(LANGUAGE_MODELS) is None:
        return ()
    return tuple(import_module(LANGUAGE_MODELS).CLAIMS)


def _program(claim: Claim, instance: Any, mutant: str | None = None) -> str:
    """Code that makes the instance, and measures the claim, or one of its mutants, on it."""
    made, home = ast.parse(repr(instance), mode="eval").body, type(instance).__module__
    names = {node.id for node in ast.walk(made) if isinstance(node, ast.Name)} - set(dir(builtins))
    known = set(vars(sys.modules[home]))
    listed = claim.id in LEDGER
    wanted: dict[str, set[str]] = {home: names & known, "math": names - known}  # inf and nan
    wanted.setdefault("nlhf.claims" if listed else LANGUAGE_MODELS, set()).add("LEDGER" if listed else "CLAIMS")
    imports = [f"from {module} import {', '.join(sorted(of))}" for module, of in sorted(wanted.items()) if of]
    if not listed:
        imports += ["", "LEDGER = {claim.id: claim for claim in CLAIMS}"]
    measured = f"print(LEDGER[{claim.id!r}].measure(instance))"
    if mutant is not None:
        measured = f"claim, context = LEDGER[{claim.id!r}].mutated({mutant!r})\n"
        measured += "with context:\n    print(claim.measure(instance))"
    about = f"# {' '.join(claim.statement.split())}"
    return "\n".join([about, *imports, "", f"instance = {_laid_out(made)}", measured, ""])


def _laid_out(made: ast.expr) -> str:
    """As `ast.unparse`, with every argument and every row of a matrix on a line of its own."""
    if isinstance(made, ast.Call) and made.keywords:
        parts = [_laid_out(arg) for arg in made.args] + [f"{k.arg}={_laid_out(k.value)}" for k in made.keywords]
        opening, closing = f"{ast.unparse(made.func)}(", ")"
    elif isinstance(made, ast.List) and any(isinstance(row, ast.List) for row in made.elts):
        parts, opening, closing = [_laid_out(row) for row in made.elts], "[", "]"
    else:
        return ast.unparse(made)
    return "\n".join([opening, *(indent(f"{part},", "    ") for part in parts), closing])


def _plain(side: Any) -> Curves:
    """(R, K) numbers, None where there is no finite one."""
    rows = np.reshape(side, (-1, np.shape(side)[-1] if np.ndim(side) else 1)).tolist()
    return [[value if np.isfinite(value) else None for value in row] for row in rows]


# --- the page ---------------------------------------------------------------------------------------------------------


def _section(paper: str, rows: list[Outcome]) -> str:
    """The rows of a paper, under the first line of its module."""
    modules = [*PAPERS, *filter(None, [sys.modules.get(LANGUAGE_MODELS)])]
    titles = {
        claim.paper: (module.__doc__ or "").split("\n")[0].rstrip(".") for module in modules for claim in module.CLAIMS
    }
    head = (
        f'<tr class="paper"><th colspan="6">{escape(titles.get(paper, paper))} <code>{escape(paper)}</code></th></tr>'
    )
    return head + "".join(map(_row, rows))


def _row(found: Outcome) -> str:
    name = escape(found.id.split("/", 1)[-1])
    if found.lhs is not None or not found.holds:
        name = f'<a href="#{escape(found.id)}">{name}</a>'
    mutants = "".join(
        f'<li class="{"caught" if by is not None else "away"}">{escape(mutant)}</li>'
        for mutant, by in (found.refuted or {}).items()
    )
    state = "holds" if found.holds else "fails"
    return (
        f'<tr class="{state}"><td><b>{name}</b><div>{escape(found.statement)}</div></td>'
        f'<td class="source">{escape(found.source)} <span class="tag">{escape(found.tag)}</span></td>'
        f'<td class="number">{found.tried}</td><td class="tightness">{_tightness(found)}</td>'
        f'<td class="mutants">{found.caught}<ul>{mutants}</ul></td><td class="verdict">{state}</td></tr>'
    )


def _tightness(found: Outcome) -> str:
    """A bar with the number; of an equation, how much of its tolerance is used."""
    if found.ratio is None:
        return "-"
    if found.identity:
        return f"exact to {found.worst_text}"
    return f'<span class="bar"><i style="width:{100 * np.clip(found.ratio, 0, 1):.1f}%"></i></span> {found.worst_text}'


def _card(found: Outcome) -> str:
    """The figure of a claim; of one that fails also why, and its counterexample."""
    parts = [f"<h3>{escape(found.id)}</h3><p>{escape(found.statement)}</p>"]
    if not found.holds:
        parts.append(f'<p class="why">{escape(found.failure)}</p>')
    if found.counterexample is not None:
        parts.append(f"<pre>{escape(found.counterexample)}</pre>")
    if found.lhs is not None:
        parts += [_figure(found), f"<p>{'difference' if found.identity else 'lhs / rhs'}: {found.worst_text}</p>"]
    state = "holds" if found.holds else "fails"
    return f'<section class="card {state}" id="{escape(found.id)}">{"".join(parts)}</section>'


INK = "#010203"
"""Stands for the colour of the text, which is dark on a light page and light on a dark one."""


def _figure(found: Outcome) -> str:
    """Both sides over the axis as inline SVG: logarithmic where positive, told apart by colour and by dashes."""
    assert found.lhs is not None
    assert found.rhs is not None
    left, right = np.array(found.lhs, dtype=float), np.array(found.rhs, dtype=float)
    x = np.arange(1, left.shape[1] + 1)
    names = ["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"]
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": found.id, "font.size": 9, **dict.fromkeys(names, INK)}
    with matplotlib.rc_context(options):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        ax = figure.subplots()
        bound: dict[str, Any] = {"color": "#D55E00", "linewidth": 2, "linestyle": "--", "zorder": 2.2}
        if found.identity:  # the two coincide: one is seen under the other
            bound |= {"linewidth": 5, "linestyle": "-", "alpha": 0.6, "zorder": 1.9}
        sides = ((right, bound, "rhs"), (left, {"color": INK, "linewidth": 1.4, "zorder": 2.1}, "lhs"))
        for rows, style, label in sides:
            for k, row in enumerate(rows):
                marker = "o" if row.size <= 12 else ""
                ax.plot(x, row, label=label if k == 0 else None, marker=marker, markersize=3.5, **style)
        values = np.concatenate([left, right], axis=None)
        finite = values[np.isfinite(values)]
        positive = finite[finite > 0]
        if positive.size > 0.9 * finite.size and np.nanmin(right) > 0 and positive.max() > 2 * positive.min():
            ax.set_yscale("log", nonpositive="mask")
        if x.size > 12:
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
        else:
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel((found.axis or "").replace("$", r"\$"))
        ax.grid(True, which="major", linewidth=0.4, alpha=0.4)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    drawing = buffer.getvalue()
    drawing = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", drawing[drawing.index("<svg") :], flags=re.S)
    start, body = drawing.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', start)
    assert box is not None
    sides_text = escape(f"Both sides of {found.id} over {found.axis}", quote=True)
    return f'<svg {box[0]} role="img" aria-label="{sides_text}">{body.replace(INK, "currentColor")}'


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Ledger of claims</title>
<style>
:root {{ color-scheme: light dark; --line: #d8d8d8; --soft: #f4f4f2; --ink: #1b1b1b; --faint: #666; --paper: #fff;
  --bar: #0072b2; --bad: #b3261e; --good: #00735c; }}
@media (prefers-color-scheme: dark) {{ :root {{ --line: #3a3d42; --soft: #23262b; --ink: #e6e6e3; --faint: #a0a4aa;
  --paper: #17191c; --bar: #56b4e9; --bad: #ff8a80; --good: #4cc9a4; }} }}
body {{ font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1240px; padding: 24px; }}
h1 {{ font-size: 24px; margin: 0 0 4px; }}
h2 {{ font-size: 19px; margin: 40px 0 12px; }}
h3 {{ font-size: 15px; margin: 0; overflow-wrap: anywhere; }}
p {{ margin: 4px 0; }}
a {{ color: inherit; text-decoration-color: var(--bar); text-underline-offset: 3px; }}
.lead {{ font-size: 17px; }}
.lead.fails, .fails .verdict, .why, .away {{ color: var(--bad); font-weight: 600; }}
.holds .verdict {{ color: var(--good); }}
.note, .source, .mutants ul, .tag {{ color: var(--faint); font-size: 13px; }}
.note {{ max-width: 75em; }}
.table {{ overflow-x: auto; margin-top: 20px; }}
table {{ border-collapse: collapse; width: 100%; min-width: 960px; table-layout: fixed; }}
td, th {{ text-align: left; vertical-align: top; padding: 7px 10px; border-top: 1px solid var(--line); }}
thead th {{ border: 0; font-size: 13px; color: var(--faint); }}
.paper th {{ background: var(--soft); }}
code {{ color: var(--faint); font-weight: 400; font-size: 13px; margin-left: 6px; }}
td:first-child, td.source {{ overflow-wrap: anywhere; }}
.number, th.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
.tightness {{ white-space: nowrap; font-variant-numeric: tabular-nums; }}
.tag {{ border: 1px solid var(--line); border-radius: 9px; padding: 0 7px; font-size: 12px; }}
.bar {{ display: inline-block; width: 84px; height: 8px; background: var(--line); border-radius: 4px;
  overflow: hidden; margin-right: 6px; }}
.bar i {{ display: block; height: 100%; background: var(--bar); }}
.mutants ul {{ margin: 0; padding: 0; list-style: none; }}
.mutants li {{ padding-left: 1.3em; text-indent: -1.3em; overflow-wrap: anywhere; }}
.caught::before {{ content: "\\2713"; display: inline-block; width: 1.3em; text-indent: 0; }}
.away::before {{ content: "\\2717"; display: inline-block; width: 1.3em; text-indent: 0; }}
.away::after {{ content: " (not refuted)"; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 16px; }}
.card {{ border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; min-width: 0; }}
.card.fails {{ border-color: var(--bad); margin-bottom: 16px; }}
.card.fails svg {{ max-width: 460px; }}
.card p {{ font-size: 13px; }}
.card p:not(.why) {{ color: var(--faint); }}
svg {{ width: 100%; height: auto; display: block; margin-top: 8px; }}
svg * {{ stroke-linejoin: round; stroke-linecap: butt; }}
svg text {{ font-family: inherit !important; }}
pre {{ background: var(--soft); padding: 10px 12px; border-radius: 6px; overflow: auto; max-height: 420px;
  font-size: 13px; }}
</style>
</head>
<body>
<h1>Ledger of claims</h1>
<p class="lead {state}">{summary}.</p>
{broken}
<p class="note">{how}.</p>
<p class="note">A claim holds if no instance violates it and every mutant, a wrong version of the claim or of the code,
is refuted by one. Tightness is the largest lhs / rhs that was found: at 1 the constant cannot be improved, and what is
missing to 1 is the gap between it and the worst instance. Of an equation the largest difference is given, in units of
the rounding error that is allowed (tol). Programs that make each worst instance are in the folder instances.</p>
<div class="table"><table>
<colgroup><col style="width:31%"><col style="width:22%"><col style="width:7%"><col style="width:14%">
<col style="width:19%"><col style="width:7%"></colgroup>
<thead><tr><th>claim</th><th>source</th><th class="number">instances</th><th>tightness</th><th>mutants</th>
<th>verdict</th></tr></thead>
<tbody>{rows}</tbody>
</table></div>
{failing}
{figures}
</body>
</html>
"""
