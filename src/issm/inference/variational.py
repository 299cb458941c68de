r"""Variational posteriors of a general state-space model: Gaussian chains through the filter, and independent states.

The evidence lower bound is $E_q[\log p(y \mid x)] - \gamma\,KL(q \,\|\, p(x \mid do(\cdot)))$ with the divergence in closed form.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from issm._check import check_key, fail
from issm._linalg import psd_cholesky
from issm._types import PRNGKey
from issm.inference.dense import run_filter, run_smoother
from issm.inference.laplace import PosteriorSSM, Problem, make_problem
from issm.inference.observations import Potential, Rows
from issm.inference.recognition import MeanField, Recognition
from issm.interventions import Intervention
from issm.models.emissions import LOG_TWO_PI
from issm.models.ssm import SSM, as_model_trials, check_linear
from issm.models.trials import Plan, Trials

Guess = Rows | Potential | MeanField
"""What a recognition network says of one sequence."""


def elbo(
    key: PRNGKey,
    model: SSM,
    recognition: Recognition,
    emissions: Any,
    inputs: Any = None,
    *,
    interventions: Intervention | None = None,
    gamma: float = 1.0,
    num_samples: int = 1,
) -> Float[Array, "*trials"]:
    r"""Unbiased estimate of the evidence lower bound, $E_q[\log p(y \mid x)] - \gamma\,KL(q \,\|\, p(x \mid do(\cdot), u))$.

    The divergence is exact, entropy included. For a q that comes from potentials with precisions $J_t$, the expectation is
    taken over pairs $m_t \pm \delta_t,\ \delta_t \sim N(0, P_t)$, of $\log p(y_t \mid x_t) + \tfrac12 \delta_t^\top J_t \delta_t$,
    minus $\tfrac12 \mathrm{tr}(J_t P_t)$: where $J_t$ is the information of a linear Gaussian emission, nothing of it is random.

    Args:
        key: JAX random key; every trial has draws of its own.
        model: The model.
        recognition: What turns data into q: `PotentialNetwork`, `FreePotentials`, `MeanFieldLSTM`.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or `(num_trials, num_timesteps, emission_dim)`; NaN is missing.
        inputs: Soft inputs $u_t$, shared or one array for each trial.
        interventions: Clamps, shared or one for each trial. None: no clamps.
        gamma: Weight of the divergence; with 1 the result is a lower bound of $\log p(y \mid do(\cdot), u)$ in expectation.
        num_samples: Number of pairs of draws, at least 1.

    Returns:
        One number in nats for each trial.

    Raises:
        ValueError: If an argument has the wrong shape, type or values; the message names it.

    References:
        Nejatbakhsh & Wang (2025), sec. 3; Johnson et al. (2016), for potentials from a network.

    Examples:
        >>> import jax, numpy as np, issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[2.0]], [0.5])
        >>> y = np.ones((4, 1))
        >>> exact = issm.FreePotentials(1, 4, 1)
        >>> exact = exact.set(np.full((1, 4, 1, 1), 2.0**2 / 0.5), np.full((1, 4, 1), 2.0 / 0.5))
        >>> bound = issm.elbo(jax.random.key(0), issm.ssm_from_lgssm(params), exact, y)
        >>> bool(abs(bound - issm.marginal_log_prob(params, y)) < 1e-4)
        True
    """
    check_key(key)
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        fail(
            "num_samples",
            got=repr(num_samples),
            expected="an integer of at least 1",
            remedy="It counts pairs of draws.",
        )
    trials = as_model_trials(model, emissions, inputs, interventions)
    check_recognition(recognition, model, trials)
    bounds = _elbo(key, model, recognition, trials, jnp.asarray(gamma, model.initial.mean.dtype), num_samples)
    return trials.like_user(bounds)


def check_recognition(recognition: Any, model: SSM, trials: Trials) -> None:
    """Refuse what is no recognition network, or one for other data, or nonlinear dynamics."""
    check_linear(model, "whose divergence has no closed form, use `fit_laplace_em` and Laplace's approximation")
    if not isinstance(recognition, Recognition):
        fail(
            "recognition",
            got=f"a {type(recognition).__name__}",
            expected="a `PotentialNetwork`, `FreePotentials`, `MeanFieldLSTM` or a subclass of `Recognition`",
            remedy="Build one of them for the sizes of the data.",
        )
    num_trials, num_timesteps, emission_dim = trials.emissions.shape
    recognition.check(num_trials, num_timesteps, emission_dim, model.state_dim)


@eqx.filter_jit
def _elbo(
    key: PRNGKey, model: SSM, recognition: Recognition, trials: Trials, gamma: Array, num_samples: int
) -> Float[Array, " num_trials"]:
    def one(key: PRNGKey, emissions: Array, plan: Plan, trial: Array) -> Array:
        problem = make_problem(model, emissions, plan.inputs, plan.intervention)
        guess = recognition(emissions, plan.inputs, plan.intervention, trial)
        return bound_of(key, problem, guess, gamma, num_samples)[0]

    keys = jax.random.split(key, trials.num_trials)
    return jax.vmap(one, in_axes=(0, 0, trials.plan.axes, 0))(
        keys, trials.emissions, trials.plan, jnp.arange(trials.num_trials)
    )


class Chain(eqx.Module):
    """Moments of q, its divergence from the prior, and the precisions that it came from."""

    means: Float[Array, "num_timesteps state_dim"]
    covs: Float[Array, "num_timesteps state_dim state_dim"]
    cross_covs: Float[Array, "num_timesteps_minus_1 state_dim state_dim"]
    divergence: Float[Array, ""]
    precisions: Float[Array, "num_timesteps state_dim state_dim"]


def bound_of(
    key: PRNGKey, problem: Problem, guess: Guess, gamma: Array, num_samples: int
) -> tuple[Float[Array, ""], Chain]:
    """The bound of one sequence, and the moments of its q."""
    emission = problem.model.emission
    chain = independent_chain(problem, guess) if isinstance(guess, MeanField) else potential_chain(problem, guess)
    factors = jax.vmap(psd_cholesky)(chain.covs)

    def pair(white: Array) -> Array:
        away = (factors * white[:, None, :]).sum(axis=-1)
        at = lambda states: emission.log_prob(problem.emissions, emission.predictors(states, problem.inputs)).sum()  # noqa: E731
        return (at(chain.means + away) + at(chain.means - away)) / 2 + _quadratic(chain.precisions, away) / 2

    white = jax.random.normal(key, (num_samples, *chain.means.shape), chain.means.dtype)
    expected = jax.vmap(pair)(white).mean() - (chain.precisions * chain.covs).sum() / 2
    return expected - gamma * chain.divergence, chain


def potential_chain(problem: Problem, potential: Rows | Potential) -> Chain:
    r"""Filter and smooth the prior under the potentials.

    With the smoother's adjoints $r_t$, and $|I + P_t^- J_t|$ from the filter, nothing is divided by a covariance or cancels:
    $KL = \tfrac12 \sum_t r_t^\top Q_t r_t + \log |I + P_t^- J_t| - \mathrm{tr}(J_t P_t)$.
    """
    forward = run_filter(problem.into, potential)
    backward = run_smoother(problem.into, forward)
    precisions = _precisions(potential)
    moved = _quadratic(problem.into.cov, backward.adjoints)
    narrowed = forward.log_det.sum() - (precisions * backward.covs).sum()
    return Chain(backward.means, backward.covs, backward.cross_covs[:-1], (moved + narrowed) / 2, precisions)


def independent_chain(problem: Problem, guess: MeanField) -> Chain:
    """States that are independent of each other under q; those without noise are where they are sent."""
    into = problem.into
    eye = jnp.eye(guess.means.shape[-1], dtype=guess.means.dtype)[None]
    known = jnp.diagonal(into.cov, axis1=1, axis2=2) == 0
    previous = jnp.concatenate([jnp.zeros_like(guess.means[:1]), guess.means[:-1]])
    means = jnp.where(known, into.shift, guess.means)
    variances = jnp.where(known, 0.0, guess.scales**2)
    previous, previous_variances = (jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]]) for x in (means, variances))
    residuals = means - (into.weights * previous[:, None, :]).sum(axis=-1) - into.shift
    spread = jnp.einsum("tij,tj,tkj->tik", into.weights, previous_variances, into.weights) + variances[:, :, None] * eye
    both = ~known[:, :, None] & ~known[:, None, :]
    second = jnp.where(both, spread + residuals[:, :, None] * residuals[:, None, :], 0.0)
    factors = jnp.linalg.cholesky(jnp.where(known[:, :, None], eye, into.cov))
    half = jax.scipy.linalg.solve_triangular(factors, second, lower=True)
    whitened = jax.scipy.linalg.solve_triangular(factors, jnp.swapaxes(half, 1, 2), lower=True)
    log_dets = 2 * jnp.log(jnp.diagonal(factors, axis1=1, axis2=2)).sum()
    traces = jnp.trace(whitened, axis1=1, axis2=2).sum()
    count = (~known).sum().astype(means.dtype)
    entropy = (jnp.where(known, 0.0, jnp.log(jnp.where(known, 1.0, variances))).sum() + count * (1 + LOG_TWO_PI)) / 2
    divergence = (traces + log_dets + count * LOG_TWO_PI) / 2 - entropy
    covs = variances[:, :, None] * eye
    return Chain(means, covs, jnp.zeros_like(covs[:-1]), divergence, jnp.zeros_like(covs))


def recognised_posterior(model: SSM, recognition: Recognition, trials: Trials) -> PosteriorSSM:
    """The moments of q, and its bound from 32 pairs of draws with a fixed key."""
    return trials.like_user(_recognised(model, recognition, trials))


@eqx.filter_jit
def _recognised(model: SSM, recognition: Recognition, trials: Trials) -> PosteriorSSM:
    def one(emissions: Array, plan: Plan, trial: Array) -> PosteriorSSM:
        problem = make_problem(model, emissions, plan.inputs, plan.intervention)
        guess = recognition(emissions, plan.inputs, plan.intervention, trial)
        gamma = jnp.ones((), model.initial.mean.dtype)
        bound, chain = bound_of(jax.random.key(0), problem, guess, gamma, 32)
        yes, none = jnp.ones((), bool), jnp.zeros((), jnp.int32)
        return PosteriorSSM(bound, chain.means, chain.means, chain.covs, chain.cross_covs, yes, none)

    return jax.vmap(one, in_axes=(0, trials.plan.axes, 0))(trials.emissions, trials.plan, jnp.arange(trials.num_trials))


def _precisions(potential: Rows | Potential) -> Array:
    if isinstance(potential, Potential):
        return potential.precision
    return jnp.einsum("tni,tnj->tij", potential.weights, potential.weights)


def _quadratic(matrices: Array, vectors: Array) -> Array:
    return jnp.einsum("ti,tij,tj->", vectors, matrices, vectors)
