"""Every theorem as an executable claim that can be refuted, and the same for algorithms."""

from nlhf.claims import (
    bradley_terry,
    categorical,
    distances,
    mirror_descent,
    nash_md,
    newton,
    q_lambda,
    quantiles,
    regularized_games,
    sampling,
)
from nlhf.claims.claim import Claim, Verdict, verify
from nlhf.claims.conformance import Conformance, check

PAPERS = (
    regularized_games,
    newton,
    bradley_terry,
    nash_md,
    mirror_descent,
    distances,
    categorical,
    sampling,
    quantiles,
    q_lambda,
)
LEDGER = {claim.id: claim for paper in PAPERS for claim in paper.CLAIMS}
"""All claims by id, but for those of `nlhf.llm.claims`, which need torch."""

__all__ = ["LEDGER", "Claim", "Conformance", "Verdict", "check", "verify"]
