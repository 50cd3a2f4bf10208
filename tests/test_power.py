"""No claim holds by construction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from scipy.special import log_softmax, rel_entr, softmax

from nlhf.claims import LEDGER
from nlhf.claims.instances import Duel
from nlhf.metrics import kl_rows
from tests.power import blind


@pytest.mark.filterwarnings("ignore")  # what code that is wrong warns of
@pytest.mark.parametrize("name", sorted(LEDGER))
def test_no_claim_holds_by_construction(name: str) -> None:
    assert blind(LEDGER[name]) == []


def test_one_that_does_is_found() -> None:
    def ours(duel: Duel) -> Any:
        return kl_rows(log_softmax(duel.policy), log_softmax(duel.reference))

    def theirs(duel: Duel) -> Any:
        return rel_entr(softmax(duel.policy), softmax(duel.reference)).sum()

    claim = replace(LEDGER["nash_md/one-step"], lhs=ours, rhs=None, identity=ours, tol=1e-9, where=lambda duel: True)
    assert set(blind(claim, 3)) == {"kl_rows = 0", "_excess = 0"}
    assert blind(replace(claim, identity=theirs), 3) == []
