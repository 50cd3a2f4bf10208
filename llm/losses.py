"""Losses whose minimum over all policies is the answer of a `Prox`, pi ∝ anchor * exp(eta P opponent)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch.nn.functional as F
from torch import Tensor


class Batch(NamedTuple):
    """A `Prox` on the responses at hand, B prompts with n responses each."""

    x: Any
    """(B,) prompts."""
    y: Any
    """(B, n) responses, drawn from a law m; `...` is all of them."""
    log_law: Tensor
    """(B, n) log m(y), in nats."""
    weight: Tensor
    """(B, n) share of y in averages over m; rows sum to one."""
    log_anchor: Tensor
    """(B, n) log anchor(y), up to a constant."""
    win: Tensor
    """(B, n) P(y > opponent), summed over signed opponents."""
    eta: float
    calls: int
    """Win probabilities looked up for `win`."""
    share: Tensor
    """(B,) the weight of a prompt in the loss."""

    def parts(self, size: int | None) -> Iterator[Batch]:
        """The batch in parts of at most so many prompts."""
        for at in slices(len(self.share), size):
            some: dict[str, Any] = {
                name: v if v is ... else v[at] for name, v in self._asdict().items() if name in ROWS
            }
            yield self._replace(**some)


ROWS = ("x", "y", "log_law", "weight", "log_anchor", "win", "share")
"""What of a batch has a row for each prompt."""


def slices(count: int, size: int | None) -> list[slice]:
    """0 ... count in pieces of at most `size`."""
    step = size or count
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


Loss: TypeAlias = Callable[[Tensor, Batch], Tensor]
"""(B,) one value per prompt, from log pi(y) (B, n) with its gradient, and the batch."""


def variance(log_prob: Tensor, batch: Batch) -> Tensor:
    """Var_{y ~ m}[log pi(y) - log anchor(y) - eta P(y > opponent)]; its gradient on n samples is (n - 1) / n of it.

    Any law m will do, none is corrected for: AGRO, CoPG, REBEL, and SPPO up to its fixed constant.

    Source: Tang et al. 2025, arXiv:2503.19612; Flet-Berliac et al. 2024, arXiv:2406.19185.
    """
    d = log_prob - batch.log_anchor - batch.eta * batch.win
    return (batch.weight * (d - (batch.weight * d).sum(-1, keepdim=True)) ** 2).sum(-1)


def logistic(log_prob: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of sigmoid(h_i - h_j) to sigmoid(r_i - r_j), h = log pi / anchor, r = eta P(y > opponent).

    Source: Rosset et al. 2024, arXiv:2404.03715 (DNO).
    """
    h, r = log_prob - batch.log_anchor, batch.eta * batch.win
    label = (r[:, :, None] - r[:, None, :]).sigmoid()
    miss = F.binary_cross_entropy_with_logits(h[:, :, None] - h[:, None, :], label, reduction="none")
    return (batch.weight[:, :, None] * batch.weight[:, None, :] * miss).sum((1, 2))


def cross_entropy(log_prob: Tensor, batch: Batch) -> Tensor:
    """-E_{y ~ answer}[log pi(y)]: maximum likelihood of the answer, reached from m by self-normalised weights.

    Source: Peters and Schaal 2007 (reward-weighted regression); Peng et al. 2019, arXiv:1910.00177 (AWR).
    """
    answer = (batch.log_anchor + batch.eta * batch.win - batch.log_law + batch.weight.log()).softmax(-1)
    return -(answer * log_prob).sum(-1)


def ipo(h: Tensor, win: Tensor, weight: Tensor, eta: float) -> Tensor:
    """(B,) E_{y, y'}[(h(y) - h(y') - eta (P(y > y') - 1/2))^2], h = log pi / anchor, both drawn from the opponent.

    Averaging over y' turns the label of a pair into P(y > opponent), so no third response is needed.

    Args:
        h: (B, n) with the gradient.
        win: (B, n, n) P(y_i > y_j).
        weight: (B, n) share of y_i; rows sum to one.
        eta: the step of the `Prox`.

    Source: Azar et al. 2023, arXiv:2310.12036 (IPO); Zhang et al. 2024, arXiv:2407.00617 (INPO).
    """
    pairs = weight[:, :, None] * weight[:, None, :]
    return (pairs * (h[:, :, None] - h[:, None, :] - eta * (win - 0.5)) ** 2).sum((1, 2))


def policy_gradient(log_prob: Tensor, log_anchor: Tensor, win: Tensor, eta: float) -> Tensor:
    """(B,) whose gradient is, in expectation over y_i ~ pi, minus that of E[P(y > opponent)] - KL(pi, anchor) / eta.

        -mean_i A_i log pi(y_i),   R_i = win_i - (log pi(y_i) - log anchor(y_i)) / eta,   A_i = R_i - mean_{j != i} R_j

    The KL is that of whole sequences; the leave-one-out baseline keeps the estimate unbiased. A single response is
    compared with 1/2, what it wins against itself. All (B, n).

    Source: Munos et al. 2024, arXiv:2312.00886, section 7; the baseline is that of Kool et al. 2019.
    """
    reward = win - (log_prob.detach() - log_anchor) / eta
    n = reward.shape[-1]
    advantage = reward - 0.5 if n == 1 else (reward - reward.mean(-1, keepdim=True)) * (n / (n - 1))
    return -(advantage * log_prob).mean(-1)


def squared_residual(log_prob: Tensor, one: Batch, two: Batch) -> Tensor:
    """(B,) Var_{y ~ m}[log pi(y) - log answer(y)], in nats^2, from responses judged by two groups of opponents.

    The covariance of the two errors: the noise of judging cancels in expectation, so that a perfect policy measures
    zero on average and not the noise. A listed batch is given twice and the variance is exact.
    """
    weight = one.weight
    first, second = (log_prob - b.log_anchor - b.eta * b.win for b in (one, two))
    first, second = (d - (weight * d).sum(-1, keepdim=True) for d in (first, second))
    covariance = (weight * first * second).sum(-1)
    # over samples, n equal weights, the mean was estimated too
    return covariance if one is two else covariance / (1 - 1 / weight.shape[-1])
