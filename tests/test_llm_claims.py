"""Claims about the torch world hold, and refute the bugs that public libraries have shipped."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from nlhf.claims import Claim, verify
from nlhf.llm.claims import CLAIMS
from tests.power import blind

BUGS = (
    "mixture weight on the wrong model",
    "KL gradient that differentiates the k1 estimate directly",
    "KL gradient with frozen prefixes instead of the sequence KL",
    "KL term with the opposite sign",
    "EOS left out of the sequence log-prob",
    "off-by-one between logits and labels",
    "padding counted in the log-prob",
    "opponent samples taken after the update instead of before",
    "advantage normalised by its own standard deviation",
    "length-normalised policy gradient",
    "pass@k without leave-one-out, here a baseline that includes the sample itself",
    "preference orientation flipped",
    "tau applied twice",
    "stale reference after LoRA merge",
    "mixture whose reference still carries the adapter",
    "two models appending to one KV cache",
    "missing position ids under left padding",
    "sampling temperature differing from the scoring temperature",
    "gradients summed instead of averaged over micro-batches",
    "missing-EOS penalty that looks in the prompt",
    "labels taken by argmax of the score instead of the preference probability",
    "IPO with per-token mean where the sum is meant",
)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_claim(claim: Claim) -> None:
    verdict = verify(claim, examples=8)
    assert verdict.counterexample is None, f"{verdict.error}\n{verdict.counterexample!r}"
    assert [name for name, found in verdict.refuted.items() if found is None] == []


@pytest.mark.skipif(find_spec("peft") is None, reason="the llm extra is not installed")
def test_every_bug_is_a_mutant_of_our_own_code() -> None:
    mutants = {name for claim in CLAIMS for name, mutant in claim.mutants.items() if callable(mutant)}
    assert sorted(set(BUGS) - mutants) == []


@pytest.mark.filterwarnings("ignore")  # what code that is wrong warns of
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_no_claim_holds_by_construction(claim: Claim) -> None:
    assert blind(claim, 2) == []
