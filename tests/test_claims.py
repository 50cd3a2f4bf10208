"""The ledger: every claim holds, every mutant is refuted, and neither can be so by construction."""

from __future__ import annotations

import pytest

from nlhf.claims import LEDGER, verify


@pytest.mark.parametrize("name", sorted(LEDGER))
def test_claim(name: str) -> None:
    verdict = verify(LEDGER[name], examples=40)
    assert verdict.counterexample is None, f"{verdict.error}\n{verdict.counterexample!r}"
    assert [name for name, found in verdict.refuted.items() if found is None] == []
