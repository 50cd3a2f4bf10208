"""The command `nlhf verify`: its table, its files, and what it does with a claim that is false."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nlhf import cli
from nlhf.claims import LEDGER
from nlhf.verify import Outcome, Report, claims, verify
from tests.checks import assert_close

TWO = ("nash_md/schedule", "regularized_games/symmetric")
VOID = {"meta", "link", "br", "col", "img", "hr", "input"}
FALSE = replace(
    LEDGER["regularized_games/gap-above"],
    id="regularized_games/too-good",
    statement="gap(pi) - tau KL(pi, pi*) <= |pi - pi*|_1^2 / (1000 tau) & <b>nothing</b> else",
    rhs=lambda i: np.abs(i.pi.probs - i.star.probs).sum() ** 2 / (1000 * i.tau),
    mutants={"zero": {"rhs": lambda i: 0.0}},
)


@pytest.fixture(scope="module")
def report() -> Report:
    """Of two claims, in this process."""
    return verify(TWO, workers=0)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEDGER, FALSE.id, FALSE)


def command(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    """The exit code."""
    monkeypatch.setattr(sys, "argv", ["nlhf", "verify", *flags])
    try:
        cli.main()
    except SystemExit as stopped:
        return int(str(stopped.code))
    return 0


def ran(path: Path) -> dict[str, Any]:
    """The names that a program has defined when it is through."""
    names: dict[str, Any] = {}
    exec(path.read_text(), names)
    return names


# --- claims that hold -------------------------------------------------------------------------------------------------


def test_two_claims(report: Report) -> None:
    assert {found.id for found in report.outcomes} == set(TWO)
    assert report.failing == []
    assert report.summary().startswith("2 of 2 claims hold on 60 instances")
    lines = report.rows().splitlines()
    assert max(map(len, lines)) <= 120
    for found, line in zip(report.outcomes, lines[1:], strict=False):
        assert line.startswith(f"{found.id} ")
        assert f" {found.tried} " in line
        assert " holds " in line


def test_the_curves_are_both_sides_on_the_worst_instance(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path)
    for found in report.outcomes:
        instance = ran(tmp_path / "instances" / found.file)["instance"]
        measured = LEDGER[found.id].measure(instance)
        assert measured.ratio == found.ratio  # to the last bit: repr of a float is exact
        assert (found.axis is None) == (found.lhs is None)
        if found.lhs is not None and found.rhs is not None:
            assert_close(np.array(found.lhs[0], dtype=float), measured.lhs, atol=0)
            assert_close(np.array(found.rhs[0], dtype=float), measured.rhs, atol=0)


def test_what_refutes_a_mutant_is_kept(report: Report, capsys: Any) -> None:
    for found in report.outcomes:
        assert found.refuted is not None
        assert set(found.refuted) == set(LEDGER[found.id].mutants)
        for program in found.refuted.values():
            assert program is not None
            exec(program, {})
            excess = re.search("excess=(.*), ratio", capsys.readouterr().out)
            assert excess is not None
            assert float(excess[1]) > 0


def test_json_there_and_back(report: Report) -> None:
    assert Report.from_json(report.to_json()) == report


def test_the_result_is_the_same_in_two_processes(report: Report) -> None:
    apart = verify(TWO, workers=2)
    timeless = [[replace(found, seconds=0.0) for found in each.outcomes] for each in (report, apart)]
    assert timeless[0] == timeless[1]


class Page(HTMLParser):
    """Collects tags, and sees to it that they are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                self.links.append(value)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_else(report: Report) -> None:
    text = report.html()
    page = Page(text)
    assert page.tags.count("svg") == 1
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)  # all lead to this very page
    assert all(word not in text for word in ("http:", "https:", "url(http", "@import", "<script"))


# --- claims that do not -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("broken")
def test_a_false_claim_ends_with_code_1_and_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert command(monkeypatch, FALSE.id, TWO[1], "--workers", "0", "--out", str(tmp_path)) == 1
    printed = capsys.readouterr().out
    assert "1 of 2 claims hold" in printed
    program = tmp_path / "counterexamples" / "regularized_games-too-good.py"
    assert str(program) in printed
    assert "    instance = Duel(" in printed
    assert FALSE.measure(ran(program)["instance"]).excess > 0
    table = printed[: printed.index("\n\n")].splitlines()
    assert table[-1].startswith(FALSE.id)
    assert " FAILS " in table[-1]
    text = (tmp_path / "ledger.html").read_text()
    Page(text)
    assert "&amp; &lt;b&gt;nothing&lt;/b&gt; else" in text
    assert "instance = Duel(" in text
    # once it holds, the counterexample is no longer there
    monkeypatch.setitem(LEDGER, FALSE.id, replace(LEDGER["regularized_games/gap-above"], id=FALSE.id))
    assert command(monkeypatch, FALSE.id, "--workers", "0", "--out", str(tmp_path)) == 0
    assert not program.exists()


def test_a_mutant_that_nothing_refutes_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = LEDGER[TWO[1]]
    assert claim.identity is not None
    monkeypatch.setitem(LEDGER, claim.id, replace(claim, mutants={"the claim <itself>": {"identity": claim.identity}}))
    (found,) = verify([claim.id], workers=0).outcomes
    assert not found.holds
    assert found.failure == "nothing refutes the mutant 'the claim <itself>'"
    assert found.caught == "0/1"
    assert found.counterexample is None
    Page(Report("quick", (found,), 0.0).html())


def test_a_claim_that_cannot_be_tried_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEDGER, TWO[1], replace(LEDGER[TWO[1]], where=lambda i: False))
    (found,) = verify([TWO[1]], workers=0).outcomes
    assert not found.holds
    assert "Unsatisfi" in found.failure


def test_code_that_raises_is_a_counterexample(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def lhs(i: Any) -> Any:
        raise RuntimeError("no\nluck")

    monkeypatch.setitem(LEDGER, TWO[0], replace(LEDGER[TWO[0]], lhs=lhs))
    report = verify([TWO[0]], workers=0)
    assert report.outcomes[0].failure == "RuntimeError: no luck"
    report.save(tmp_path)
    with pytest.raises(RuntimeError, match="luck"):
        ran(tmp_path / "counterexamples" / report.outcomes[0].file)
    assert Report.from_json(report.to_json()) == report


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize(
    ("lhs", "rhs"),
    [
        ([[1.0]], [[2.0]]),
        ([[0.0] * 30], [[1.0] * 30]),
        ([[-1.0, 0.5]], [[-1.0, 0.5]]),
        ([[None] * 20], [[None] * 20]),
        ([[1.0, 0.1, 0.01] * 9, [2.0, 0.2, None] * 9], [[3.0] * 27] * 2),
    ],
)
def test_figures_of_any_curves(lhs: Any, rhs: Any, identity: bool) -> None:
    found = Outcome("a/b", "x < y", "none", "proved", identity, "cost in $ & <time>", lhs=lhs, rhs=rhs, ratio=0.5)
    assert Page(Report("full", (found,), 1.0).html()).tags.count("svg") == 1


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_of_papers_and_claims() -> None:
    assert set(claims(["nash_md"])) == {id for id in LEDGER if id.startswith("nash_md/")}
    assert list(claims(TWO[::-1])) == [id for id in LEDGER if id in TWO]  # in the order of the ledger
    assert set(claims(["nash_md", TWO[0]])) == set(claims(["nash_md"]))


def test_one_paper_of_the_tabular_world_takes_no_torch() -> None:
    code = "import sys; from nlhf.verify import claims; claims(['nash_md']); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nash_md/one-stop"], "no claim or paper is named 'nash_md/one-stop': did you mean nash_md/one-step"),
        (["nash_mb"], "no claim or paper is named 'nash_mb': did you mean nash_md"),
        (["@@@@"], "no claim or paper is named '@@@@': the papers are regularized_games, "),
        (["nash_md", "--workers", "-1"], "workers must be an integer >= 0, got -1"),
        (["nash_md", "--out", "file"], "out must be a folder that can be written, got 'file'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_done(
    flags: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, *flags) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith(f"nlhf: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_as_a_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("nlhf"), "verify", *TWO, "--out", "here"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "2 of 2 claims hold" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["here"]  # hypothesis leaves nothing beside it
    assert {path.name for path in (tmp_path / "here").iterdir()} == {
        "ledger.json",
        "ledger.html",
        "instances",
        "counterexamples",
    }
