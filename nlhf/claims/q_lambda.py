"""Multi-step evaluation off policy: Q(lambda), Retrace, tree backup and uncorrected n steps, of laws and of means.

Harutyunyan et al. 2016 (arXiv:1602.04951), Munos et al. 2016 (arXiv:1606.02647), Tang et al. 2024 (arXiv:2402.05766).
All but n steps are A_c = I + (I - T^{c mu})^-1 (T^pi - I) for a trace c(s, a), with (T^w eta)(s, a) the law of
R + gamma Z, Z from sum_a' w(a' | s') eta(s', a'), projected on atoms. eps = max_s |pi - mu|_1 and g = gamma^(1/p);
|.|_p is the largest l_p norm of a difference of CDFs, over states and actions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np

from nlhf import CategoricalDP, NStep, QLambda, Retrace, TreeBackup
from nlhf.claims.claim import Claim
from nlhf.claims.instances import Floats, Process, processes
from nlhf.core import Info
from nlhf.evaluation import Backup, EvalState, Evaluation
from nlhf.tabular import MDP, BackupSolver, Categorical, SampledBackupSolver, categorical_fixed_point, sampling
from nlhf.tabular.bellman import Linear
from nlhf.tabular.returns import project
from nlhf.tabular.sampling import Trajectories

TANG = "Tang et al. 2024, arXiv:2402.05766"
HARUTYUNYAN = "Harutyunyan et al. 2016, arXiv:1602.04951"
MUNOS = "Munos et al. 2016, arXiv:1606.02647"

TRACE = "A_c = 1 + (1 - T^{c mu})^-1 (T^pi - 1), T^w the projected Bellman backup that weighs next actions by w"
NORM = "g = gamma^(1/p), |.|_p the largest l_p norm of a difference of CDFs over (s, a)"
EPS = "eps = max_s |pi - mu|_1"

POWERS = np.array([1.0, 1.5, 2.0, 4.0])
SUP = np.append(POWERS, np.inf)

# --- the algorithms, and what they do to a table ----------------------------------------------------------------------


def q_lambda(i: Process) -> QLambda:
    """Q(lambda)."""
    return QLambda(i.target, i.behaviour, i.lam)


def cut(i: Process) -> list[Evaluation]:
    """Retrace and tree backup, whose c mu <= pi."""
    return [Retrace(i.target, i.behaviour, i.lam), TreeBackup(i.target, i.behaviour, i.lam)]


def traced(i: Process) -> list[Evaluation]:
    """All that differ in their traces alone."""
    return [CategoricalDP(i.target), q_lambda(i), *cut(i)]


def on_policy(i: Process) -> Process:
    """The same with mu = pi."""
    return replace(i, behaviour=i.target)


def kept(algorithm: Any) -> Floats:
    """(S, A) c mu, from the definition of each algorithm."""
    pi, mu = algorithm.target, algorithm.behaviour_or_target
    if isinstance(algorithm, CategoricalDP):
        return np.zeros_like(pi)
    shares = {QLambda: mu, Retrace: np.minimum(pi, mu), TreeBackup: pi * mu}
    return np.asarray(algorithm.lam * shares[type(algorithm)])


def after(i: Process, algorithm: Evaluation, tables: Any, solver: BackupSolver | None = None) -> Floats:
    """(n, S, A, m - 1) CDFs after a step of the algorithm from each of n tables."""
    solver = solver or BackupSolver(i.mdp, i.grid)
    starts = (EvalState(Categorical.from_cdf(table, i.grid)) for table in tables)
    return np.stack([algorithm.step(start, solver)[0].returns.cdf for start in starts])


def iterates(i: Process, algorithm: Evaluation, start: Floats, steps: int = 6) -> Floats:
    """(steps + 1, S, A, m - 1) CDFs."""
    found, solver = [start], BackupSolver(i.mdp, i.grid)
    for _ in range(steps):
        found.extend(after(i, algorithm, found[-1:], solver))
    return np.stack(found)


def norms(difference: Floats, powers: Floats = POWERS) -> Floats:
    """(P,) the largest l_p norm of a row of CDFs."""
    size = np.abs(difference)
    return np.array([size.max() if p == np.inf else (size**p).sum(-1).max() ** (1 / p) for p in powers])


def differences(i: Process) -> Floats:
    """(3, S, A, m - 1) CDFs: random, all 1, and 1 with random signs, the modes that backups keep or turn."""
    signs = np.sign(i.rng.standard_normal((*i.target.shape, 1)))
    one = np.ones((*i.target.shape, i.atoms - 1))
    return np.stack([i.rng.standard_normal(one.shape), one, signs * one])


def limit(i: Process, policy: Floats) -> Floats:
    """(S, A, m - 1) CDFs of the projected fixed point of a policy, solved for directly: no tolerance enters."""
    return categorical_fixed_point(i.mdp, policy, i.grid, method="banded").returns.cdf


def shrinkage(i: Process, algorithms: Iterable[Evaluation], powers: Floats = POWERS) -> Floats:
    """(n, P) the largest |A eta - A eta'|_p / |eta - eta'|_p found, of each algorithm."""
    d, solver, found = differences(i), BackupSolver(i.mdp, i.grid), []
    before = np.stack([norms(x, powers) for x in d])
    for algorithm in algorithms:
        base, *moved = after(i, algorithm, [0 * d[0], *d], solver)
        found.append(np.max([norms(there - base, powers) for there in moved] / before, axis=0))
    return np.stack(found)


def residual(i: Process) -> Floats:
    """(4, 3, P) |eta - eta*|_p / |A_c eta - eta|_p."""
    fixed, d, solver = limit(i, i.target), differences(i), BackupSolver(i.mdp, i.grid)
    apart = np.stack([norms(x) for x in d])
    changes = [after(i, a, fixed + d, solver) - fixed - d for a in traced(i)]
    with np.errstate(divide="ignore"):  # where nothing changes nothing holds
        return np.stack([apart / np.stack([norms(x) for x in change]) for change in changes])


def residual_bound(i: Process) -> Floats:
    """(4, 1, P) (1 + g max_s sum_a c mu) / (1 - g)."""
    g, most = i.gamma ** (1 / POWERS), np.array([kept(a).sum(axis=1).max() for a in traced(i)])
    return np.asarray((1 + g * most[:, None, None]) / (1 - g))


# --- the same from definitions ----------------------------------------------------------------------------------------


def pushed(i: Process, values: Floats, masses: Floats) -> tuple[Floats, Floats]:
    """(S, A, ...) values and masses of the law of R + gamma Z, Z from the measure (S, V) of the next state."""
    landed = i.rewards[..., None, None] + i.gamma * values
    chances = (i.reward_probs[..., None] * i.transitions[:, :, None])[..., None] * masses
    return landed.reshape(*i.target.shape, -1), chances.reshape(*i.target.shape, -1)


def bellman(i: Process, policy: Floats, probs: Floats, z: Floats) -> Floats:
    """(S, A, m) masses of T^w eta, from those of eta."""
    return project(*pushed(i, np.tile(z, (len(policy), 1)), np.einsum("sa,sam->sm", policy, probs)), z)


def masses(cdf: Floats, total: float = 1.0) -> Floats:
    """(S, A, m) from CDFs."""
    return np.diff(cdf, axis=-1, prepend=0.0, append=total)


def first_error(i: Process) -> Floats:
    """(S, A, m - 1) T^pi eta - eta for a random eta."""
    eta = differences(i)[0]
    return np.cumsum(bellman(i, i.target, masses(eta), i.grid), axis=-1)[..., :-1] - eta


def undone(i: Process, policy: Floats | None = None) -> Floats:
    """(4, S, A, m - 1) (1 - T^{c mu}) (A_c eta - eta), by default; a measure of mass 0 has backups of mass 0."""
    eta, solver, found = differences(i)[0], BackupSolver(i.mdp, i.grid), []
    for algorithm in traced(i):
        change = after(i, algorithm, [eta], solver)[0] - eta
        share = kept(algorithm) if policy is None else i.lam * policy
        found.append(change - np.cumsum(bellman(i, share, masses(change, 0.0), i.grid), axis=-1)[..., :-1])
    return np.stack(found)


def with_masses(self: BackupSolver, backup: Backup, start: Any = None, seed: Any = None) -> tuple[Categorical, Info]:
    """A bug: (1 - T^{c mu})^-1 (T^pi eta - T^{c mu} eta) of CDFs, which are not linear in measures."""
    share = np.broadcast_to(backup.trace * backup.behaviour, backup.target.shape)
    one, later, f = Linear(self.shift, backup.target), Linear(self.shift, share), backup.returns.cdf
    lost = self.mdp.expect(share.sum(axis=1)).reshape(-1, 1)  # the mass of T^{c mu} eta
    error = one(f.reshape(one.shape)) - later(f.reshape(one.shape)) + (1 - lost) * one.constant
    found = np.linalg.solve(np.eye(f.size) - later.explicit().toarray(), error.ravel())
    return Categorical.from_cdf(found.reshape(f.shape), self.shift.atoms), Info(0.0, 0)


def kernel(i: Process, policy: Floats) -> Floats:
    """(S A, S A) P^w of state-action pairs."""
    return np.asarray(np.einsum("say,yb->sayb", i.transitions, policy).reshape(i.target.size, -1))


def solved(i: Process, share: Floats, amounts: Floats) -> Floats:
    """(S, A) (I - gamma P^w)^-1 amounts."""
    found = np.linalg.solve(np.eye(i.target.size) - i.gamma * kernel(i, share), amounts.ravel())
    return np.asarray(found.reshape(amounts.shape))


def near_limit(i: Process, policy: Floats) -> Floats:
    """(4, 2, S, A, m - 1) CDFs of A_c eta* and A_c (eta* + d), eta* the fixed point of a policy."""
    fixed, d, solver = limit(i, policy), differences(i)[0], BackupSolver(i.mdp, i.grid)
    return np.stack([after(i, a, [fixed, fixed + d], solver) for a in traced(i)])


def linearised(i: Process) -> Floats:
    """(4, 2, S, A, m - 1) eta*, and eta* + (1 - T^{c mu})^-1 (T^pi - T^{c mu}) d."""
    fixed, d, one, found = limit(i, i.target), differences(i)[0], i.operator.explicit().toarray(), []
    for algorithm in traced(i):
        later = Linear(i.operator.shift, kept(algorithm)).explicit().toarray()
        moved = np.linalg.solve(np.eye(d.size) - later, (one - later) @ d.ravel())
        found.append([fixed, fixed + moved.reshape(d.shape)])
    return np.array(found)


# --- means ------------------------------------------------------------------------------------------------------------


def means(i: Process, cdf: Floats) -> Floats:
    """(...) E[Z] = z_m - stride sum F."""
    return i.grid[-1] - (i.grid[1] - i.grid[0]) * cdf.sum(axis=-1)


def mean_after(i: Process) -> Floats:
    """(4, S, A) of A_c eta."""
    start, solver = differences(i)[:1], BackupSolver(i.mdp, i.grid)
    return np.stack([means(i, after(i, a, start, solver)[0]) for a in traced(i)])


def value_backup(i: Process, policy: Floats) -> Floats:
    """(4, S, A) Q + (I - gamma P^{c mu})^-1 (r + gamma P^pi Q - Q), Q = E[eta]."""
    q, paid = means(i, differences(i)[0]), np.sum(i.rewards * i.reward_probs, axis=-1)
    error = paid + i.gamma * (kernel(i, policy) @ q.ravel()).reshape(q.shape) - q
    return np.stack([q + solved(i, kept(a), error) for a in traced(i)])


def value_errors(i: Process, algorithms: Iterable[Evaluation]) -> Floats:
    """(n, S, A) the largest |E[A eta] - Q^pi| / max |E[eta] - Q^pi| found, of each algorithm."""
    tables, truth, solver = limit(i, i.target) + differences(i), i.mdp.values(i.target), BackupSolver(i.mdp, i.grid)
    before = np.abs(means(i, tables) - truth).max(axis=(1, 2), keepdims=True)
    errors = [np.abs(means(i, after(i, a, tables, solver)) - truth) for a in algorithms]
    return np.stack([(error / before).max(axis=0) for error in errors])


def value_factor(i: Process, times: float = 1.0) -> Floats:
    """(2, S, A) 1 - (1 - gamma) E_mu[sum_t gamma^t c_1 ... c_t], the factor before the expectation so many times."""
    ones = np.ones(i.target.shape)
    return np.stack([1 - times * (1 - i.gamma) * solved(i, kept(a), ones) for a in cut(i)])


# --- constants --------------------------------------------------------------------------------------------------------


def mismatch(i: Process) -> float:
    """eps = max_s |pi - mu|_1."""
    return float(np.abs(i.target - i.behaviour).sum(axis=1).max())


def beta(i: Process, powers: Any = POWERS, eps: float | None = None) -> Any:
    """g (1 - lambda + lambda eps) / (1 - lambda g)."""
    g = i.gamma ** (1 / powers)
    return g * (1 - i.lam + i.lam * (mismatch(i) if eps is None else eps)) / (1 - i.lam * g)


def unmatched(i: Process) -> Any:
    """(P,) g max_s sum_a |pi - lambda mu| / (1 - lambda g)."""
    g = i.gamma ** (1 / POWERS)
    return g * np.abs(i.target - i.lam * i.behaviour).sum(axis=1).max() / (1 - i.lam * g)


def cut_factor(i: Process) -> Floats:
    """(2, P) g (1 - C) / (1 - g C), C = min_s sum_a c mu, for Retrace and tree backup."""
    g, least = i.gamma ** (1 / POWERS), np.array([[kept(a).sum(axis=1).min()] for a in cut(i)])
    return np.asarray(g * (1 - least) / (1 - g * least))


def moduli(algorithms: Any, i: Process, powers: Floats = POWERS) -> Floats:
    """(n, P) as declared."""
    return np.array([[a.modulus(i.gamma, p) for p in powers] for a in algorithms])


def below(i: Process, p: float) -> Process:
    """The same with a lambda below (1 - g) / (g eps), g = gamma^(1/p)."""
    g, eps = i.gamma ** (1 / p), mismatch(i)
    return replace(i, lam=i.lam * min(1.0, (1 - g) / (g * eps) if eps > 0 else 1.0))


def at_threshold(i: Process, p: float | None = None) -> Floats:
    """(2, P) declared moduli, each for the largest lambda that its own condition allows, or that of one p; and how far
    that of lambda = 0 is from g."""
    largest, none = replace(i, lam=1.0), moduli([q_lambda(replace(i, lam=0.0))], i)[0]
    found = [q_lambda(below(largest, p or q)).modulus(i.gamma, q) for q in POWERS]
    return np.stack([found, np.abs(none - i.gamma ** (1 / POWERS))])


def alpha(i: Process) -> float:
    """In [0, 1], another number than lambda."""
    return float(np.random.default_rng(i.seed + 1).uniform())


def mixed(i: Process) -> QLambda:
    """Q(lambda) for the target (1 - alpha) mu + alpha pi."""
    return QLambda((1 - alpha(i)) * i.behaviour + alpha(i) * i.target, i.behaviour, i.lam)


def approach(i: Process, algorithm: Evaluation, fixed: Floats, p: float) -> Floats:
    """(6,) |A^k eta - eta*|_p / |eta - eta*|_p, k = 1, ..., 6."""
    sizes = np.array([norms(cdf - fixed, np.array([p]))[0] for cdf in iterates(i, algorithm, differences(i)[0])])
    return np.asarray(sizes[1:] / sizes[0])


def negative(i: Process, algorithm: Evaluation) -> Any:
    """(S, A) the mass below zero after a step from laws on one atom each."""
    at = i.rng.integers(0, i.atoms, (*i.target.shape, 1))
    cdf = 1.0 * (at <= np.arange(i.atoms - 1))
    return Categorical.from_cdf(after(i, algorithm, [cdf])[0], i.grid).negative_mass


def small_trace(i: Process, times: float = 1.0) -> QLambda:
    """Q(lambda) with the largest lambda for which lambda mu <= pi, or times as much."""
    positive = i.behaviour > 0
    return QLambda(i.target, i.behaviour, min(1.0, times * float((i.target[positive] / i.behaviour[positive]).min())))


# --- uncorrected n steps ----------------------------------------------------------------------------------------------


def n_step(i: Process) -> NStep:
    """2 to 4 steps."""
    return NStep(i.target, i.behaviour, 2 + i.seed % 3)


def periodic(i: Process) -> Floats:
    """(S, A, m - 1) CDFs of returns where n - 1 times in turn mu acts, and then once pi: a process of n phases."""
    n, (states, actions) = n_step(i).n, i.target.shape
    rows = np.zeros((n, states, actions, n, states))
    for phase in range(n):
        rows[phase, :, :, (phase + 1) % n] = i.transitions
    whole = MDP(
        rows.reshape(n * states, actions, -1),
        np.tile(i.rewards, (n, 1, 1)),
        i.gamma,
        np.tile(i.reward_probs, (n, 1, 1)),
    )
    acts = np.concatenate([i.target, *(n - 1) * [i.behaviour]])  # on arrival in each phase
    return categorical_fixed_point(whole, acts, i.grid, method="banded").returns.cdf[:states]


def bias(i: Process) -> Any:
    """|U eta^pi - eta^pi|_1."""
    fixed = limit(i, i.target)
    return norms(after(i, n_step(i), [fixed])[0] - fixed, POWERS[:1])[0]


# --- special processes ------------------------------------------------------------------------------------------------


def turned(i: Process, algorithm: Callable[[Floats, Floats, float], Evaluation] = QLambda) -> Floats:
    """(9,) E[eta_k(0, 0)], for action a leading to state a and paying 0, pi = switch, mu = stay, from E = (-1)^a."""
    mdp = MDP(np.eye(2)[np.tile([0, 1], (2, 1))], np.zeros((2, 2)), i.gamma)
    solver, probs = BackupSolver(mdp, [-1.0, 0.0, 1.0]), np.zeros((2, 2, 3))
    probs[:, 0, 2] = probs[:, 1, 0] = 1.0
    state, found = EvalState(Categorical(probs, solver.shift.atoms)), [1.0]
    for _ in range(8):
        state, _ = algorithm(1 - np.eye(2), np.eye(2), i.lam).step(state, solver)
        found.append(float(state.returns.mean[0, 0]))
    return np.array(found)


def layered(i: Process) -> Process:
    """States lead to later ones only, the last pays nothing and is the end; gamma may be 1."""
    rows = i.transitions * np.triu(np.ones(i.transitions.shape[::2]), 1)[:, None]
    rows[..., -1] += 1 - rows.sum(axis=-1)
    rewards = i.rewards.copy()
    rewards[-1] = 0.0
    return replace(i, transitions=rows, rewards=rewards, gamma=i.gamma if i.seed % 2 else 1.0)


def in_layers(i: Process, missing: int = 0) -> Floats:
    """(S, A, m) masses after as many steps as there are layers, from signed measures."""
    j = layered(i)
    mdp, z = MDP(j.transitions, j.rewards, 0.5, j.reward_probs), np.linspace(0, len(j.target), j.atoms)
    solver, cdf = BackupSolver(mdp, z, clip=True), differences(i)[0]
    mdp.gamma, cdf[-1] = j.gamma, 1.0  # a process refuses gamma = 1, which only layers allow
    state = EvalState(Categorical.from_cdf(cdf, z))
    for _ in range(len(j.target) - 1 - missing):
        state, _ = q_lambda(j).step(state, solver)
    return np.asarray(state.returns.probs)


def backwards(i: Process) -> Floats:
    """(S, A, m) masses of the returns, from the end."""
    j = layered(i)
    z = np.linspace(0, len(j.target), j.atoms)
    probs = np.broadcast_to(np.eye(j.atoms)[0], (*j.target.shape, j.atoms))
    for _ in range(len(j.target) - 1):
        probs = bellman(j, j.target, probs, z)
    return np.asarray(probs)


def radius(i: Process) -> Any:
    """The spectral radius of the linear part of Q(lambda), column by column."""
    unit = np.eye(i.target.size * (i.atoms - 1)).reshape(-1, *i.target.shape, i.atoms - 1)
    base, *columns = after(i, q_lambda(i), [0 * unit[0], *unit])
    return np.abs(np.linalg.eigvals(np.reshape(columns - base, (len(unit), -1)))).max()


SMALL = processes(actions=2).map(lambda i: replace(i, atoms=2 + i.atoms % 2))

# --- samples ----------------------------------------------------------------------------------------------------------


def length(i: Process) -> int:
    """How many steps all of whose trajectories can be listed."""
    return 3 if i.rewards.size * len(i.target) <= 6 else 2


def enumerable(i: Process) -> bool:
    """Whether two steps have few enough trajectories."""
    return i.rewards.size * len(i.target) <= 24


def random(i: Process) -> Floats:
    """(S, A, m) masses of signed measures."""
    return masses(differences(i)[0])


def listed(i: Process) -> tuple[Trajectories, Floats]:
    """All trajectories from every state and action, in that order, and the chance of each."""
    (states, actions, paid), chance = i.rewards.shape, np.ones(1)
    s, a, *steps = (x.ravel() for x in np.indices((states, actions, *length(i) * (paid, states, actions))))
    seen, done, rewards = [s], [a], []
    for k, y, b in zip(steps[::3], steps[1::3], steps[2::3], strict=True):
        chance = chance * i.reward_probs[s, a, k] * i.transitions[s, a, y] * i.behaviour[y, b]
        rewards.append(i.rewards[s, a, k])
        s, a = y, b
        seen.append(s)
        done.append(a)
    return Trajectories(*(np.stack(x, axis=1) for x in (seen, done, rewards))), chance


def estimates(i: Process, probs: Floats, algorithm: Evaluation) -> tuple[Floats, Floats]:
    """(B, m) what each trajectory makes of a table of masses, and the chances (B, 1)."""
    (drawn, chance), trace = listed(i), np.broadcast_to(algorithm.trace, i.target.shape)
    solver = SampledBackupSolver(i.mdp, i.grid, samples=1, length=length(i))
    return solver.estimate(Categorical(probs, i.grid), i.target, np.asarray(trace), drawn), chance[:, None]


def expected(i: Process, probs: Floats, algorithm: Evaluation) -> Floats:
    """(S, A, m) E[w]."""
    w, chance = estimates(i, probs, algorithm)
    return (chance * w).reshape(*i.target.shape, -1, i.atoms).sum(axis=2)


def truncated(i: Process, probs: Floats, share: Floats) -> Floats:
    """(S, A, m) Pi A_n eta, A_n = T^pi + T^w (A_{n-1} - 1), of measures that are not projected before."""
    z, now = np.tile(i.grid, (len(i.target), 1)), np.einsum("sa,sam->sm", i.target, probs)
    values, weights = pushed(i, z, now)
    for _ in range(length(i) - 1):
        places = [z, *np.moveaxis(values, 1, 0), *i.target.shape[1] * [z]]
        amounts = [now, *np.moveaxis(share[..., None] * weights, 1, 0), *np.moveaxis(-share[..., None] * probs, 1, 0)]
        values, weights = pushed(i, np.concatenate(places, axis=1), np.concatenate(amounts, axis=1))
    return project(values, weights, i.grid)


def sampled_shrinkage(i: Process) -> Floats:
    """(P,) the largest |E w(eta) - E w(eta')|_p / |eta - eta'|_p found for Q(lambda)."""
    d, algorithm = differences(i), q_lambda(i)
    base, *moved = (np.cumsum(expected(i, masses(f), algorithm), axis=-1)[..., :-1] for f in (0 * d[0], *d))
    return np.max([norms(there - base) / norms(here) for here, there in zip(d, moved, strict=True)], axis=0)


def truncated_factor(i: Process, last: bool = True) -> Any:
    """(P,) (1 - lambda + lambda eps) sum_{t < n} lambda^(t-1) g^t + lambda^(n-1) g^n, or without what is last."""
    g, n, first = i.gamma ** (1 / POWERS), length(i), 1 - i.lam + i.lam * mismatch(i)
    return first * sum(i.lam ** (t - 1) * g**t for t in range(1, n)) + last * i.lam ** (n - 1) * g**n


SAMPLES = 400


def frequencies(i: Process, policy: Floats) -> Floats:
    """How often trajectories that follow a policy go from (s, a) to (s', a'), less P(s' | s, a) mu(a' | s')."""
    drawn = SampledBackupSolver(i.mdp, i.grid, samples=SAMPLES, length=1).sample(policy, i.rng)
    size = i.target.size
    pairs = drawn.states * i.target.shape[1] + drawn.actions
    counts = np.bincount(pairs[:, 0] * size + pairs[:, 1], minlength=size**2).reshape(size, size)
    return np.abs(counts / SAMPLES - kernel(i, i.behaviour))


def band(i: Process) -> float:
    """Within which all frequencies are but once in 10^12 (Hoeffding)."""
    return float(np.sqrt(np.log(2e12 * i.target.size**2) / (2 * SAMPLES)))


def stationary(i: Process) -> Floats:
    """(S A,) w = w P^pi."""
    chain = kernel(i, i.target)
    rows = np.vstack([chain.T - np.eye(len(chain)), np.ones(len(chain))])
    return np.asarray(np.linalg.lstsq(rows, np.append(np.zeros(len(chain)), 1.0))[0])


def weighted(i: Process, w: Floats, backups: int) -> Floats:
    """(4, 2) sum w |T^k d|_2^2, and with l_1 norms; the last d is 1 for the pair that most others lead to."""
    most = np.zeros((1, *i.operator.shape))
    most[0, kernel(i, i.target).sum(axis=0).argmax()] = 1.0
    found = np.concatenate([differences(i).reshape(3, *i.operator.shape), most])
    for _ in range(backups):
        found = np.stack([i.operator(d) for d in found])
    return np.array([[w @ (d**2).sum(axis=1), w @ np.abs(d).sum(axis=1) ** 2] for d in found])


def rounding(i: Process) -> float:
    """Where r + gamma z lands is known to eps |z| / stride; each of two solutions adds that up to 1 / (1 - gamma)."""
    return 1e-14 * (10 * i.atoms + float(np.abs(i.grid).max() / (i.grid[1] - i.grid[0]))) / (1 - i.gamma) ** 2


def of_values(i: Process) -> float:
    """The same of means, sums over atoms."""
    return rounding(i) * i.atoms


UNCUT = {
    "max(1, pi / mu)": lambda: mock.patch.object(
        Retrace, "trace", property(lambda self: self.lam * np.maximum(self._ratio, 1))
    )
}
CDFS_FOR_MEASURES = {"CDFs for measures": lambda: mock.patch.object(BackupSolver, "__call__", with_masses)}
NOTHING = {"nothing done": lambda: mock.patch.object(Evaluation, "step", lambda self, state, solve: (state, None))}
SIGNS_LOST = {
    "signs lost": lambda: mock.patch.object(sampling, "project", lambda z, w, atoms: project(z, np.abs(w), atoms))
}
declared = Evaluation.modulus


CLAIMS = (
    Claim(
        id="q_lambda/definition",
        statement=f"(1 - T^{{c mu}}) (A_c eta - eta) = T^pi eta - eta for signed eta; {TRACE}",
        source=f"{TANG}, the operator; c = 0, lambda, lambda min(1, pi / mu) in {MUNOS}, or lambda pi",
        tag="proved",
        instances=processes(),
        lhs=undone,
        identity=first_error,
        mutants={**CDFS_FOR_MEASURES, "traces by pi": {"lhs": lambda i: undone(i, i.target)}},
        tol=rounding,
    ),
    Claim(
        id="q_lambda/one-step",
        statement=f"A_c = T^pi for lambda = 0, and (T^mu)^(n-1) T^pi = T^pi for n = 1; {TRACE}",
        source="the definitions",
        tag="proved",
        instances=processes(),
        lhs=lambda i: [
            after(i, a, differences(i)[:1])[0] for a in (*traced(replace(i, lam=0.0)), NStep(i.target, i.behaviour, 1))
        ],
        identity=lambda i: first_error(i) + differences(i)[0],
        mutants={"by mu": {"identity": lambda i: first_error(replace(i, target=i.behaviour)) + differences(i)[0]}},
        tol=rounding,
    ),
    Claim(
        id="q_lambda/fixed-point",
        statement=(
            "A_c (eta* + d) = eta* + (1 - T^{c mu})^-1 (T^pi - T^{c mu}) d where T^pi eta* = eta*, also for d = 0; "
            f"{TRACE}"
        ),
        source=f"{TANG}; {MUNOS}: with d = 0, it is the same for all lambda and mu",
        tag="proved",
        instances=processes(),
        lhs=lambda i: near_limit(i, i.target),
        identity=linearised,
        mutants={**CDFS_FOR_MEASURES, "eta* of mu": {"lhs": lambda i: near_limit(i, i.behaviour)}},
        tol=rounding,
    ),
    Claim(
        id="q_lambda/only-fixed-point",
        statement=(
            "|eta - eta*|_p / |A_c eta - eta|_p <= (1 + g max_s sum_a c mu) / (1 - g) where T^pi eta* = eta*; "
            f"{TRACE}; {NORM}"
        ),
        source="(1 - T^pi) (eta* - eta) = (1 - T^{c mu}) (A_c eta - eta), and |T^w d|_p <= g max_s sum_a |w| |d|_p",
        tag="proved",
        instances=processes(),
        lhs=residual,
        rhs=residual_bound,
        mutants={**NOTHING, "half": {"rhs": lambda i: 0.5 * residual_bound(i)}},
        tol=rounding,
    ),
    Claim(
        id="q_lambda/contraction-published",
        statement=(
            "|A eta - A eta'|_p / |eta - eta'|_p <= g (1 - lambda + lambda eps) / (1 - lambda g), c = lambda; "
            f"{EPS}; {NORM}"
        ),
        source=f"{TANG}; {HARUTYUNYAN} has p = 1",
        tag="proved",
        instances=processes(),
        lhs=lambda i: shrinkage(i, [q_lambda(i)]),
        rhs=beta,
        mutants={"eps = 0": {"rhs": lambda i: beta(i, eps=0.0)}, "0.8": {"rhs": lambda i: 0.8 * beta(i)}},
        tol=rounding,
    ),
    Claim(
        id="q_lambda/contraction",
        statement=(
            "|A eta - A eta'|_p / |eta - eta'|_p <= g max_s sum_a |pi - lambda mu| / (1 - lambda g), c = lambda; "
            f"{NORM}"
        ),
        source=f"A = sum_t (lambda T^mu)^(t-1) (T^pi - lambda T^mu); {TANG} has 1 - lambda + lambda eps for the sum",
        tag="proved",
        instances=processes(),
        lhs=lambda i: shrinkage(i, [q_lambda(i)]),
        rhs=unmatched,
        mutants={**NOTHING, "0.8": {"rhs": lambda i: 0.8 * unmatched(i)}},
        tol=rounding,
    ),
    Claim(
        id="q_lambda/modulus",
        statement=(
            "|A eta - A eta'|_p / |eta - eta'|_p <= max_s [g sum_a |pi - c mu| "
            "/ (1 - g sum_a c mu)], also for p = inf; "
            f"{NORM}"
        ),
        source="A d = T^{c mu} A d + T^{pi - c mu} d, both at the worst next state; sharper than a maximum of each",
        tag="proved",
        instances=processes(),
        lhs=lambda i: shrinkage(i, (*traced(i), n_step(i)), SUP),
        rhs=lambda i: moduli((*traced(i), n_step(i)), i, SUP),
        mutants={
            "gamma for g": lambda: mock.patch.object(
                Evaluation, "modulus", lambda self, gamma, p=2.0: declared(self, gamma, 1)
            ),
            "0.8": {"rhs": lambda i: 0.8 * moduli((*traced(i), n_step(i)), i, SUP)},
        },
        tol=rounding,
    ),
    Claim(
        id="q_lambda/modulus-is-sharper",
        statement=(
            "g (1 - lambda) / (1 - lambda g) <= max_s g sum_a |pi - lambda mu| / (1 - lambda g) "
            f"<= g (1 - lambda + lambda eps) / (1 - lambda g); {EPS}"
        ),
        source="|pi - lambda mu| <= (1 - lambda) pi + lambda |pi - mu|, and the sum is at least its own without | |",
        tag="proved",
        instances=processes(),
        lhs=lambda i: np.stack([moduli([q_lambda(i)], i)[0], beta(i, eps=0.0) - moduli([q_lambda(i)], i)[0]]),
        rhs=lambda i: np.stack([beta(i), np.zeros(POWERS.size)]),
        mutants={"eps / 2": {"rhs": lambda i: np.stack([beta(i, eps=mismatch(i) / 2), np.zeros(POWERS.size)])}},
    ),
    Claim(
        id="q_lambda/threshold",
        statement=f"Q(lambda) has a modulus <= 1 up to lambda = (1 - g) / (g eps), and g at lambda = 0; {EPS}; {NORM}",
        source=f"{TANG}; {HARUTYUNYAN} has p = 1: g (1 - lambda + lambda eps) <= 1 - lambda g",
        tag="proved",
        instances=processes(),
        lhs=at_threshold,
        rhs=lambda i: np.reshape([1.0, 0.0], (2, 1)),
        mutants={"that of p = 1": {"lhs": lambda i: at_threshold(i, 1.0)}},
    ),
    Claim(
        id="q_lambda/convergence",
        statement=(
            "|A^k eta - eta*|_2 / |eta - eta*|_2 <= [g (1 - lambda + lambda "
            "eps) / (1 - lambda g)]^k, c = lambda, p = 2; "
            f"{EPS}; {NORM}"
        ),
        source=f"{TANG}; shown for lambda < (1 - g) / (g eps), where it is below 1",
        tag="proved",
        instances=processes(),
        lhs=lambda i: approach(i, q_lambda(below(i, 2.0)), limit(i, i.target), 2.0),
        rhs=lambda i: beta(below(i, 2.0), 2.0) ** np.arange(1, 7),
        mutants={
            "to eta of mu": {"lhs": lambda i: approach(i, q_lambda(below(i, 2.0)), limit(i, i.behaviour), 2.0)},
            "squared": {"rhs": lambda i: beta(below(i, 2.0), 2.0) ** (2 * np.arange(1, 7))},
        },
        tol=rounding,
        axis="iteration k",
    ),
    Claim(
        id="q_lambda/threshold-is-tight",
        statement=(
            "two states, pi always switches, mu always stays, no reward: Q(lambda) multiplies an error of the means "
            "of sign (-1)^action by -gamma (1 + lambda) / (1 - lambda gamma) in every iteration"
        ),
        source=(
            "T^pi turns the sign, T^mu keeps it: divergence for lambda > (1 - "
            "gamma) / (2 gamma) = (1 - gamma) / (gamma eps)"
        ),
        tag="proved",
        instances=processes(actions=1),
        lhs=turned,
        identity=lambda i: (-i.gamma * (1 + i.lam) / (1 - i.lam * i.gamma)) ** np.arange(9),
        mutants={
            **CDFS_FOR_MEASURES,
            "Retrace": {"lhs": lambda i: turned(i, Retrace)},
            "gamma^k": {"identity": lambda i: (-i.gamma) ** np.arange(9)},
        },
        axis="iteration k",
    ),
    Claim(
        id="q_lambda/mixing",
        statement=(
            "the target (1 - alpha) mu + alpha pi has at most the modulus g (1 - "
            "lambda + lambda alpha eps) / (1 - lambda g); "
            f"{EPS}; {NORM}"
        ),
        source=f"{TANG}: |(1 - alpha) mu + alpha pi - mu|_1 = alpha |pi - mu|_1",
        tag="proved",
        instances=processes(),
        lhs=lambda i: [shrinkage(i, [mixed(i)])[0], *(moduli([mixed(j)], j)[0] for j in (i, replace(i, lam=1.0)))],
        rhs=lambda i: [beta(j, eps=alpha(i) * mismatch(i)) for j in (i, i, replace(i, lam=1.0))],
        mutants={
            "alpha^2": {
                "rhs": lambda i: [beta(j, eps=alpha(i) ** 2 * mismatch(i)) for j in (i, i, replace(i, lam=1.0))]
            }
        },
        tol=rounding,
    ),
    Claim(
        id="q_lambda/spectral-radius",
        statement=f"the spectral radius of Q(lambda) is <= gamma (1 - lambda + lambda eps) / (1 - lambda gamma), {EPS}",
        source="the norm of p = 1",
        tag="proved",
        instances=SMALL,
        lhs=radius,
        rhs=lambda i: beta(i, 1.0),
        mutants={**NOTHING, "half": {"rhs": lambda i: 0.5 * beta(i, 1.0)}},
        tol=1e-6,  # an eigenvalue of multiplicity b is found up to eps^(1 / b)
    ),
    Claim(
        id="q_lambda/on-policy-rate",
        statement="on policy the spectral radius of Q(lambda) is gamma (1 - lambda) / (1 - lambda gamma)",
        source="A = (1 - lambda T)^-1 (1 - lambda) T, and T has gamma",
        tag="proved",
        instances=SMALL,
        lhs=lambda i: radius(on_policy(i)),
        identity=lambda i: beta(i, 1.0, 0.0),
        mutants={
            "gamma": {"identity": lambda i: i.gamma},
            "gamma (1 - lambda)": {"identity": lambda i: i.gamma * (1 - i.lam)},
        },
        tol=1e-6,  # as before
    ),
    Claim(
        id="q_lambda/on-policy",
        statement=(
            f"mu = pi: |A eta - A eta'|_p / |eta - eta'|_p <= g (1 - lambda) / (1 - lambda g) <= g, c = lambda; {NORM}"
        ),
        source=f"{TANG} with eps = 0",
        tag="proved",
        instances=processes(),
        lhs=lambda i: shrinkage(i, [q_lambda(on_policy(i))]),
        rhs=lambda i: np.minimum(beta(i, eps=0.0), i.gamma ** (1 / POWERS)),
        mutants={
            "g (1 - lambda)": {"rhs": lambda i: i.gamma ** (1 / POWERS) * (1 - i.lam)},
            "no traces": lambda: mock.patch.object(QLambda, "trace", 0.0),
        },
        tol=rounding,
    ),
    Claim(
        id="q_lambda/cut-published",
        statement=f"|A eta - A eta'|_p / |eta - eta'|_p <= g for Retrace and tree backup, whatever pi and mu; {NORM}",
        source=f"{MUNOS}, Theorem 1 (means); Tang et al. 2022, arXiv:2207.07570 (laws): 0 <= c mu <= pi",
        tag="proved",
        instances=processes(),
        lhs=lambda i: shrinkage(i, cut(i)),
        rhs=lambda i: i.gamma ** (1 / POWERS),
        mutants={**NOTHING, "gamma": {"rhs": lambda i: i.gamma}},
        tol=rounding,
    ),
    Claim(
        id="q_lambda/cut",
        statement=(
            "|A eta - A eta'|_p / |eta - eta'|_p <= g (1 - C) / (1 - g C) for "
            "Retrace and tree backup, C = min_s sum_a c mu; "
            f"{NORM}"
        ),
        source="sum_a |pi - c mu| = 1 - sum_a c mu for Retrace and tree backup, in the modulus",
        tag="proved",
        instances=processes(),
        lhs=lambda i: shrinkage(i, cut(i)),
        rhs=cut_factor,
        mutants={**NOTHING, "0.8": {"rhs": lambda i: 0.8 * cut_factor(i)}},
        tol=rounding,
    ),
    Claim(
        id="q_lambda/kolmogorov",
        statement="sup |F - F'| over (s, a) and z does not grow in a backup T^pi, but need not shrink",
        source="T is a non-negative matrix with row sums <= 1, which are 1 where r + gamma z covers a cell",
        tag="proved",
        instances=processes(),
        lhs=lambda i: shrinkage(i, [CategoricalDP(i.target)], SUP[-1:]),
        rhs=lambda i: 1.0,
        mutants={"gamma": {"rhs": lambda i: i.gamma}, "sqrt(gamma)": {"rhs": lambda i: i.gamma**0.5}},
        tol=rounding,
    ),
    Claim(
        id="q_lambda/laws",
        statement=(
            f"c mu <= pi, as for lambda = min pi / mu, Retrace and tree backup: A_c eta are laws if eta are; {TRACE}"
        ),
        source=f"{TANG}; A eta = sum_t (T^{{c mu}})^(t-1) (T^pi - T^{{c mu}}) eta has no negative term",
        tag="proved",
        instances=processes(),
        lhs=lambda i: [negative(i, a) for a in (small_trace(i), *cut(i))],
        rhs=lambda i: 0.0,
        mutants={**UNCUT, "lambda = 2 min pi / mu": {"lhs": lambda i: negative(i, small_trace(i, 2.0))}},
        tol=rounding,
    ),
    Claim(
        id="q_lambda/means",
        statement=(
            "E[A_c eta] = Q + (I - gamma P^{c mu})^-1 (r + gamma P^pi Q - Q) for signed eta, too, Q = E[eta]; "
            f"{TRACE}"
        ),
        source=f"{HARUTYUNYAN} and {MUNOS}, the operators; Pi keeps means",
        tag="proved",
        instances=processes(),
        lhs=mean_after,
        identity=lambda i: value_backup(i, i.target),
        mutants={**CDFS_FOR_MEASURES, "P^mu Q": {"identity": lambda i: value_backup(i, i.behaviour)}},
        tol=of_values,
    ),
    Claim(
        id="q_lambda/values",
        statement=(
            "max |E[A eta] - Q^pi| / max |E[eta] - Q^pi| <= gamma (1 - lambda + "
            "lambda eps) / (1 - lambda gamma) for Q(lambda), "
            f"{EPS}"
        ),
        source=f"{HARUTYUNYAN}, for Q(lambda)",
        tag="proved",
        instances=processes(),
        lhs=lambda i: value_errors(i, [q_lambda(i)]),
        rhs=lambda i: beta(i, 1.0),
        mutants={**NOTHING, "eps = 0": {"rhs": lambda i: beta(i, 1.0, 0.0)}},
        tol=of_values,
    ),
    Claim(
        id="q_lambda/values-cut",
        statement=(
            "|E[A eta] - Q^pi| / max |E[eta] - Q^pi| <= 1 - (1 - gamma) E_mu[sum_t gamma^t "
            "c_1 ... c_t] for each (s, a), for Retrace and tree backup"
        ),
        source=f"{MUNOS}, Theorem 1, for every state and action; at most gamma",
        tag="proved",
        instances=processes(),
        lhs=lambda i: value_errors(i, cut(i)),
        rhs=value_factor,
        mutants={**NOTHING, "1.1 (1 - gamma)": {"rhs": lambda i: value_factor(i, 1.1)}},
        tol=of_values,
    ),
    Claim(
        id="q_lambda/n-step",
        statement=(
            "U = (T^mu)^(n-1) T^pi: |U^k eta - eta'|_1 / |eta - eta'|_1 <= gamma^(n k), eta' the "
            "laws of acting n - 1 times by mu, then once by pi, and so on; "
            f"{NORM}"
        ),
        source="T^mu and T^pi contract by gamma; eta' is of a process that goes through n phases, for ever",
        tag="proved",
        instances=processes(),
        lhs=lambda i: approach(i, n_step(i), periodic(i), 1.0),
        rhs=lambda i: i.gamma ** (n_step(i).n * np.arange(1, 7)),
        mutants={
            "to eta of pi": {"lhs": lambda i: approach(i, n_step(i), limit(i, i.target), 1.0)},
            "gamma^((n + 1) k)": {"rhs": lambda i: i.gamma ** ((n_step(i).n + 1) * np.arange(1, 7))},
        },
        tol=rounding,
        axis="iteration k",
    ),
    Claim(
        id="q_lambda/n-step-bias",
        statement=(
            "U = (T^mu)^(n-1) T^pi: |eta^mu - eta^pi|_1 <= |U eta^pi - eta^pi|_1 / (1 - "
            "gamma^(n-1)), so U is biased unless mu has the laws of pi; "
            f"{NORM}"
        ),
        source="U eta^pi - eta^pi = (1 - (T^mu)^(n-1)) (eta^mu - eta^pi), the linear part in brackets",
        tag="proved",
        instances=processes(),
        lhs=lambda i: norms(limit(i, i.behaviour) - limit(i, i.target), POWERS[:1]),
        rhs=lambda i: bias(i) / (1 - i.gamma ** (n_step(i).n - 1)),
        mutants={"no bias": {"rhs": lambda i: 0.0}, "half": {"rhs": lambda i: 0.5 * bias(i)}},
        tol=of_values,
    ),
    Claim(
        id="q_lambda/layers",
        statement=(
            "H layers of states, then the end: H steps of Q(lambda) give eta^pi from any "
            "signed eta, for every lambda < 1, mu and gamma <= 1"
        ),
        source="the linear part looks at later layers alone: it is nilpotent",
        tag="proved",
        instances=processes(),
        lhs=in_layers,
        identity=backwards,
        mutants={**CDFS_FOR_MEASURES, "H - 1": {"lhs": lambda i: in_layers(i, 1)}},
        where=lambda i: len(i.target) > 1 and i.lam < 0.99,
        tol=1e-8,  # each of up to 4 layers multiplies rounding by 1 + 2 H <= 9 at most, and 9^4 eps m is 1e-10
    ),
    Claim(
        id="q_lambda/mass",
        statement=(
            "sum_{t=1}^n rho_{t-1} - sum_{t=1}^{n-1} rho_t = 1 for rho_t = c_1 ... "
            "c_t: the masses of a sampled target sum to 1"
        ),
        source=f"{TANG}: sum_{{t=1}}^n rho_{{t-1}} - sum_{{t=1}}^{{n-1}} rho_t = rho_0 = 1, products of traces",
        tag="proved",
        instances=processes(actions=2),
        lhs=lambda i: [estimates(i, random(i), a)[0].sum(axis=1) for a in traced(i)],
        identity=lambda i: 1.0,
        mutants=SIGNS_LOST,
        where=enumerable,
    ),
    Claim(
        id="q_lambda/unbiased",
        statement=(
            "E[w] = Pi A_n eta, w the target from n sampled steps, A_n = T^pi + "
            "T^{c mu} (A_{n-1} - 1) unprojected, A_1 = T^pi"
        ),
        source=f"{TANG}; the tower rule, over all trajectories",
        tag="proved",
        instances=processes(actions=2),
        lhs=lambda i: [expected(i, random(i), a) for a in traced(i)],
        identity=lambda i: [truncated(i, random(i), kept(a)) for a in traced(i)],
        mutants={**SIGNS_LOST, "traces by pi": {"identity": lambda i: truncated(i, random(i), i.lam * i.target)}},
        where=enumerable,
        tol=rounding,
    ),
    Claim(
        id="q_lambda/truncated",
        statement=(
            "|E w(eta) - E w(eta')|_p / |eta - eta'|_p <= (1 - lambda + lambda eps) sum_{t<n} "
            "lambda^(t-1) g^t + lambda^(n-1) g^n, w the target from n sampled steps; "
            f"{EPS}; {NORM}"
        ),
        source="E w = sum_{t<n} (lambda T^mu)^(t-1) (T^pi - lambda T^mu) + (lambda T^mu)^(n-1) T^pi, projected",
        tag="proved",
        instances=processes(actions=2),
        lhs=sampled_shrinkage,
        rhs=truncated_factor,
        mutants={
            "t < n alone": {"rhs": lambda i: truncated_factor(i, last=False)},
            "0.8": {"rhs": lambda i: 0.8 * truncated_factor(i)},
        },
        where=enumerable,
        tol=rounding,
    ),
    Claim(
        id="q_lambda/trajectories",
        statement=(
            "of N trajectories as many go from (s, a) to (s', a') as P(s' | s, a) mu(a' | s') says, up to a share "
            "of sqrt(log(2 cells / delta) / (2 N)), but for a probability of delta = 1e-12"
        ),
        source="Hoeffding for all cells at once, delta = 1e-12",
        tag="proved",
        instances=processes(),
        lhs=lambda i: frequencies(i, i.behaviour),
        rhs=band,
        mutants={
            "actions of pi": {"lhs": lambda i: frequencies(i, i.target)},
            "a fifth": {"rhs": lambda i: 0.2 * band(i)},
        },
    ),
    Claim(
        id="q_lambda/stationary",
        statement="w = w P^pi: sum w |D P^pi d|_2^2 <= gamma sum w |d|_2^2, gamma^2 with l_1 norms; T^pi = D P^pi + c",
        source="Jensen for the next pair, then |D d|_p <= g |d|_p; Peng et al. 2025, arXiv:2502.14172, has this norm",
        tag="proved",
        instances=processes(),
        lhs=lambda i: weighted(i, stationary(i), 1),
        rhs=lambda i: weighted(i, stationary(i), 0) * [i.gamma, i.gamma**2],
        mutants={
            "gamma^2 for both": {"rhs": lambda i: weighted(i, stationary(i), 0) * i.gamma**2},
            "equal weights": {
                "lhs": lambda i: weighted(i, np.ones(i.target.size), 1),
                "rhs": lambda i: weighted(i, np.ones(i.target.size), 0) * [i.gamma, i.gamma**2],
            },
        },
        tol=rounding,
    ),
)
