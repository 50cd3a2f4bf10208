"""Every theorem as an executable claim that can be refuted."""

from nlhf.claims import nash_md, regularized_games
from nlhf.claims.claim import Claim, Verdict, verify

PAPERS = (regularized_games, nash_md)
LEDGER = {claim.id: claim for paper in PAPERS for claim in paper.CLAIMS}
"""All claims by id."""

__all__ = ["LEDGER", "Claim", "Verdict", "verify"]
