"""What may import what, and what it costs."""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from nlhf.llm.folders import import_for_good

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets"}


def imported(path: Path) -> set[str]:
    """Every module that a file imports anywhere, in full."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def at_the_top(path: Path) -> set[str]:
    """The top-level packages that a file imports when it is imported."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
    return found


@pytest.mark.parametrize(
    "statement", ["import nlhf", "import nlhf.tabular", "import nlhf.cli, nlhf.ladder, nlhf.plotting"]
)
def test_torch_stays_out(statement: str) -> None:
    code = f"import sys; {statement}; print(sorted({HEAVY!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_transformers_stay_out_of_the_torch_world_until_a_model_is_loaded() -> None:
    code = "import sys, nlhf.llm; print(sorted({'transformers', 'peft', 'accelerate', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_command_starts_without_figures_and_special_functions() -> None:
    """A third of a second: SciPy imports its parts when they are first asked for."""
    code = "import sys, nlhf.cli, nlhf.llm; print(sorted({'matplotlib', 'scipy.special'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("module", ["fresh", "broken"])
def test_an_import_for_good_leaves_the_collector_as_it_was(
    module: str, enabled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it imports is out of the collector's sight, which looks on at everything else; and that once."""
    (tmp_path / "fresh.py").write_text("import gc\nlooked = gc.isenabled()\n")
    (tmp_path / "broken.py").write_text("import none_such\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(True))  # for good would be for all later tests
    frozen: list[bool] = []
    (gc.enable if enabled else gc.disable)()
    try:
        for _ in range(2):
            with pytest.raises(ModuleNotFoundError) if module == "broken" else nullcontext():
                import_for_good(module)
        assert gc.isenabled() == enabled
        assert not (module == "fresh" and sys.modules.pop("fresh").looked)
        assert len(frozen) == enabled * (2 if module == "broken" else 1)
    finally:
        gc.enable()


def test_the_two_worlds_do_not_know_each_other() -> None:
    for world, other in (("tabular", "llm"), ("llm", "tabular")):
        for path in (ROOT / world).glob("*.py"):
            assert not any(name.startswith(f"nlhf.{other}") for name in imported(path)), path


def test_the_core_knows_no_array_library() -> None:
    for path in [
        ROOT / "nlhf" / "core.py",
        ROOT / "nlhf" / "schedules.py",
        *(ROOT / "nlhf" / "algorithms").glob("*.py"),
    ]:
        assert not {name.split(".")[0] for name in imported(path)} & (HEAVY | {"numpy", "scipy", "pandas"}), path


def test_language_model_libraries_are_imported_lazily_and_only_in_llm() -> None:
    for path in [
        *(ROOT / "nlhf").glob("*.py"),
        *(ROOT / "tabular").glob("*.py"),
        *(ROOT / "llm").glob("*.py"),
    ]:
        assert not at_the_top(path) & (HEAVY - {"torch"}), path
        if path.parent.name != "llm":
            assert "torch" not in at_the_top(path), path
            assert not {name.split(".")[0] for name in imported(path)} & (HEAVY - {"torch"}), path


@pytest.mark.parametrize("name", ["tabular", "llm"])
def test_bare_names_are_refused_with_a_hint(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"ImportError: this folder is the package nlhf.{name}: write `import nlhf.{name}`" in done.stderr
