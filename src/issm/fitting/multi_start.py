"""Restarts of a fit, in one batch: a likelihood with several maxima shows itself by where they end."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from issm._check import check_key, fail
from issm._compile import jit_quickly
from issm._types import PRNGKey
from issm.fitting.em import check_stopping, pose, solve, trim
from issm.fitting.em_loop import Problem
from issm.fitting.initialize import Initialization, initialize_lgssm
from issm.fitting.m_step import make_rules
from issm.fitting.result import FitResult
from issm.fitting.starts import RADIUS
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM
from issm.models.trials import as_trials

SAME = 1.0  # nats within which two fits count as the same maximum


class MultiStart(eqx.Module):
    r"""The best of several fits, and how far the others ended from it.

    Attributes:
        fit: The fit with the largest likelihood.
        log_probs: $\log p(y \mid do(\cdot), u)$ where each fit ended, the data-driven start first, `(num_starts,)`.
        num_iters: Updates that each fit took, `(num_starts,)`.
        start: The data-driven start.

    References:
        `docs/how-to/starting-a-fit.md`.

    Examples:
        >>> import jax, numpy as np, issm
        >>> found = issm.multi_start(jax.random.key(0), np.sin(np.arange(40.0))[:, None], 1, num_starts=2, num_iters=3)
        >>> found.log_probs.shape, bool(found.spread >= 0)
        ((2,), True)
    """

    fit: FitResult
    log_probs: Float[Array, " num_starts"]
    num_iters: Any
    start: Initialization

    @property
    def spread(self) -> Float[Array, ""]:
        """Largest less smallest log-likelihood, in nats."""
        return self.log_probs.max() - self.log_probs.min()

    @property
    def num_same(self) -> int:
        """Number of fits that ended within one nat of the best."""
        return int((self.log_probs >= self.log_probs.max() - SAME).sum())

    @property
    def reason(self) -> str:
        """Which fit won, and how many ended at the same maximum."""
        best = int(jnp.argmax(self.log_probs))
        source = "the data-driven start" if best == 0 else f"restart {best}"
        return (
            f"{source} won; {self.num_same} of {self.log_probs.size} fits ended within {SAME:g} nat of it, "
            f"spread {float(self.spread):.6g} nats; {self.fit.reason}"
        )


def multi_start(
    key: PRNGKey,
    emissions: Any,
    state_dim: int,
    *,
    inputs: Any = None,
    interventions: Intervention | None = None,
    num_starts: int = 8,
    scale: float = 0.5,
    num_iters: int = 100,
    tol: float = 1e-7,
) -> MultiStart:
    r"""Fit from the data-driven start and from random neighbours of it, all in one `vmap`, and keep the best.

    A neighbour multiplies C by a random matrix, $C (I + σ G / \sqrt{D})$ with Gaussian G,
    adds $σ G / \sqrt{D}$ to A (shrunk to a spectral radius of at most 0.98), and multiplies the variances by $e^{σ g}$.

    Args:
        key: JAX random key.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or `(num_trials, num_timesteps, emission_dim)`; NaN is missing.
        state_dim: Number of states D.
        inputs: Soft inputs, `(num_timesteps, input_dim)`, shared or one such array for each trial.
        interventions: Clamps, shared or one for each trial.
        num_starts: Number of fits, at least 1; the first is the one from `initialize_lgssm`.
        scale: σ, how far the neighbours are.
        num_iters: Largest number of updates of each fit.
        tol: The tolerance of `fit_em`.

    Returns:
        The best fit, the log-likelihood of every fit, and their spread.

    Raises:
        ValueError: If an argument has the wrong shape, type or values; the message names it.

    References:
        McLachlan & Krishnan (2008), *The EM Algorithm and Extensions*, 2nd ed., sec. 2.12, on several starting points.

    Examples:
        >>> import jax, issm
        >>> truth = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0], [2.0]], [0.5, 0.5])
        >>> _, emissions = issm.lgssm_sample(jax.random.key(0), truth, 60)
        >>> found = issm.multi_start(jax.random.key(1), emissions, 1, num_starts=3, num_iters=20)
        >>> bool(found.fit.log_probs[-1] >= found.log_probs[0] - 1e-6)
        True
    """
    check_key(key)
    if isinstance(num_starts, bool) or not isinstance(num_starts, (int, np.integer)) or num_starts < 1:
        fail("num_starts", got=repr(num_starts), expected="an integer of at least 1", remedy="One is the start alone.")
    if not (isinstance(scale, (int, float)) and not isinstance(scale, bool) and 0 <= scale < np.inf):
        fail("scale", got=repr(scale), expected="a number of at least zero", remedy="Zero repeats the start.")
    check_stopping(num_iters, tol)
    key_start, key_others = jax.random.split(key)
    start = initialize_lgssm(key_start, emissions, state_dim, inputs=inputs, interventions=interventions)
    others = [_neighbour(one, start.params, scale) for one in jax.random.split(key_others, num_starts - 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), start.params, *others)
    trials = as_trials(start.params, emissions, inputs, interventions)
    problem = pose(start.params, trials, make_rules(start.params, None, None), num_iters, tol)
    fits = _fit_each(stacked, problem, num_iters)
    log_probs = fits.log_probs[:, -1]
    best = int(jnp.argmax(jnp.where(jnp.isfinite(log_probs), log_probs, -jnp.inf)))
    fit = trim(jax.tree.map(lambda leaf: leaf[best], fits))
    return MultiStart(fit, log_probs, fits.num_iters, start)


@partial(jit_quickly, static_argnames="num_iters")
def _fit_each(starts: ParamsLGSSM, problem: Problem, num_iters: int) -> FitResult:
    return jax.vmap(lambda params: solve(params, problem, num_iters))(starts)


def _neighbour(key: PRNGKey, params: ParamsLGSSM, scale: float) -> ParamsLGSSM:
    rng = np.random.default_rng(np.asarray(jax.random.randint(key, (4,), 0, 2**31 - 1)))
    dim, dtype = params.state_dim, params.initial.mean.dtype
    weights = np.asarray(params.dynamics.weights, np.float64) + scale * rng.normal(size=(dim, dim)) / np.sqrt(dim)
    radius = np.abs(np.linalg.eigvals(weights)).max()
    weights = weights * min(1.0, RADIUS / radius) if radius > 0 else weights
    turn = np.eye(dim) + scale * rng.normal(size=(dim, dim)) / np.sqrt(dim)
    readout = np.asarray(params.emissions.weights, np.float64) @ turn
    around = lambda cov: np.asarray(cov, np.float64) * np.exp(scale * rng.normal(size=cov.shape))  # noqa: E731
    return eqx.tree_at(
        lambda p: (p.dynamics.weights, p.dynamics.cov, p.emissions.weights, p.emissions.cov),
        params,
        tuple(
            jnp.asarray(value, dtype)
            for value in (weights, around(params.dynamics.cov), readout, around(params.emissions.cov))
        ),
    )
