r"""Laplace's approximation to the posterior of a general state-space model, by Gauss-Newton steps through the smoother.

Around a path, the emissions act on the states as Gaussian potentials; filter and smoother turn these into the next path. A
path is held as the adjoints $\rho_t$ that drive it, $x_t = A_t x_{t-1} + a_t + Q_t \rho_t$, so that its prior density is
$-\tfrac12 \sum_t \rho_t^\top Q_t \rho_t$ without a division by $Q_t$, which clamps make singular. Nonlinear dynamics are replaced by
the linear ones that touch them at the path, anew in every step; their paths are held as they are.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from issm.inference.dense import BackwardPass, FilterPass, run_filter, run_smoother
from issm.inference.observations import Potential
from issm.inference.skew import skew_pull
from issm.interventions import Intervention
from issm.models.joint import state_log_prob
from issm.models.nonlinear import NonlinearDynamics, follow, no_noise
from issm.models.ssm import SSM, transitions_at
from issm.models.transitions import Transitions
from issm.models.trials import Plan, Trials

HALVINGS = 20


class PosteriorSSM(eqx.Module):
    r"""Gaussian approximation to $p(x_{0:T-1} \mid y, do(\cdot), u)$; every field has the leading trial axis of the data, if any.

    Attributes:
        marginal_loglik: Approximation to $\log p(y \mid do(\cdot), u)$, `()`: Laplace's, or a lower bound from a recognition
            network.
        smoothed_means: $E[x_t \mid y]$, `(num_timesteps, state_dim)`; for Laplace to the order beyond the mode.
        modes: The most probable path, `(num_timesteps, state_dim)`; from a network, whose q is Gaussian, the means.
        smoothed_covariances: $Cov[x_t \mid y]$, `(num_timesteps, state_dim, state_dim)`.
        smoothed_cross_covariances: $Cov[x_t, x_{t+1} \mid y]$, `(num_timesteps - 1, state_dim, state_dim)`.
        converged: Whether the last step was a negligible part of a posterior standard deviation.
        num_iters: Number of Gauss-Newton steps.

    References:
        Tierney & Kadane (1986), on Laplace's approximation and the next order of means; Fahrmeir & Kaufmann (1991), on
        state-space models.

    Examples:
        >>> import numpy as np, issm
        >>> linear = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])
        >>> model = issm.SSM(linear.initial, linear.dynamics, issm.PoissonEmission(issm.LinearMap([[1.0], [2.0]])))
        >>> bool(issm.posterior(model, np.ones((5, 2))).converged)
        True
    """

    marginal_loglik: Float[Array, "*trials"]
    smoothed_means: Float[Array, "*trials num_timesteps state_dim"]
    modes: Float[Array, "*trials num_timesteps state_dim"]
    smoothed_covariances: Float[Array, "*trials num_timesteps state_dim state_dim"]
    smoothed_cross_covariances: Float[Array, "*trials num_timesteps_minus_1 state_dim state_dim"]
    converged: Bool[Array, "*trials"]
    num_iters: Int[Array, "*trials"]


@eqx.filter_jit
def laplace_posterior(model: SSM, trials: Trials, num_iters: Int[Array, ""]) -> PosteriorSSM:
    """Laplace's approximation for every trial, with the user's leading axes."""

    def one(emissions: Array, inputs: Array, intervention: Intervention) -> PosteriorSSM:
        return approximation(*expand(make_problem(model, emissions, inputs, intervention), num_iters))

    return trials.map(one)


class Problem(eqx.Module):
    """One sequence: its data, and the transitions into every step, those of nonlinear dynamics around some path."""

    model: SSM
    emissions: Float[Array, "num_timesteps emission_dim"]
    inputs: Float[Array, "num_timesteps input_dim"]
    intervention: Intervention
    into: Transitions

    @property
    def curved(self) -> bool:
        """Whether the transitions depend on the path."""
        return isinstance(self.model.dynamics, NonlinearDynamics)

    def around(self, states: Float[Array, "num_timesteps state_dim"]) -> "Problem":
        """The same with the transitions that touch nonlinear dynamics at `states`."""
        if not self.curved:
            return self
        into = transitions_at(self.model, states, self.inputs, self.intervention)
        return eqx.tree_at(lambda problem: problem.into, self, into)


class Mode(eqx.Module):
    """The most probable path, the adjoints that drive it (zero with nonlinear dynamics), and how it was found."""

    states: Float[Array, "num_timesteps state_dim"]
    adjoints: Float[Array, "num_timesteps state_dim"]
    objective: Float[Array, ""]
    converged: Bool[Array, ""]
    done: Bool[Array, ""]
    num_iters: Int[Array, ""]


def make_problem(model: SSM, emissions: Array, inputs: Array, intervention: Intervention) -> Problem:
    """Gather what belongs to one sequence; nonlinear dynamics around the path that has no noise."""
    path = None
    if isinstance(model.dynamics, NonlinearDynamics):
        path = follow(model.initial.mean, model.dynamics, inputs, intervention, no_noise(intervention))
    return Problem(model, emissions, inputs, intervention, transitions_at(model, path, inputs, intervention))


def expand(problem: Problem, num_iters: int | Int[Array, ""]) -> tuple[Problem, Mode, Array, tuple[Array, Array]]:
    """The most probable path, once more around a path that carries derivatives; the problem and the potential there."""
    mode = find_mode(jax.tree.map(_without_derivative, problem), num_iters=num_iters)
    states, _, _ = smooth_around(problem.around(mode.states), mode.states, curvature(problem, mode.states))
    return problem.around(states), mode, states, curvature(problem, states)


def driven_path(into: Transitions, adjoints: Float[Array, "num_timesteps state_dim"]) -> Array:
    r"""$x_t = A_t x_{t-1} + a_t + Q_t \rho_t$."""
    drive = into.shift + (into.cov * adjoints[:, None, :]).sum(axis=-1)

    def step(state: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        weights, shift = at
        state = (weights * state[None, :]).sum(axis=-1) + shift
        return state, state

    return lax.scan(step, jnp.zeros_like(drive[0]), (into.weights, drive))[1]


def find_mode(problem: Problem, *, num_iters: int | Int[Array, ""], start: Array | None = None) -> Mode:
    """Gauss-Newton steps with a line search.

    They start from the path that the adjoints `start` drive, with nonlinear dynamics from the path `start`; None: from the path
    without noise.
    """
    into, emission = problem.into, problem.model.emission
    dtype = into.shift.dtype
    tolerance = 4 * jnp.sqrt(jnp.finfo(dtype).eps)

    def objective(states: Array, adjoints: Array) -> Array:
        log_probs = emission.log_prob(problem.emissions, emission.predictors(states, problem.inputs))
        if problem.curved:
            return log_probs.sum() + state_log_prob(problem.model, states, Plan(problem.inputs, problem.intervention))
        return log_probs.sum() - jnp.einsum("ti,tij,tj->", adjoints, into.cov, adjoints) / 2

    def better(value: Array, old: Array) -> Array:
        slack = 8 * jnp.finfo(dtype).eps * jnp.abs(old)
        return (value >= old - slack) | (jnp.isfinite(value) & ~jnp.isfinite(old))

    def iterate(mode: Mode) -> Mode:
        pull, precision = potentials(problem, mode.states)
        here, driven_by = problem.around(mode.states), None if problem.curved else mode.adjoints
        states, _, backward = smooth_around(here, mode.states, (pull, precision), driven_by)
        change = states - mode.states
        turn = jnp.zeros_like(change) if problem.curved else backward.adjoints - mode.adjoints
        spread = jnp.sqrt(jnp.maximum(jnp.diagonal(backward.covs, axis1=1, axis2=2), 0.0))
        size = jnp.where(spread > 0, jnp.abs(change) / jnp.where(spread > 0, spread, 1.0), 0.0).max()

        def at(share: Array) -> Array:
            return objective(mode.states + share * change, mode.adjoints + share * turn)

        def halve(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            share, _, count = carry
            return share / 2, at(share / 2), count + 1

        start = (jnp.ones((), dtype), at(jnp.ones((), dtype)), jnp.zeros((), jnp.int32))
        worse = lambda carry: ~better(carry[1], mode.objective) & (carry[2] < HALVINGS)  # noqa: E731
        share, value, _ = lax.while_loop(worse, halve, start)
        found = better(value, mode.objective)
        share = jnp.where(found, share, 0.0)
        small = size <= tolerance
        return Mode(
            states=mode.states + share * change,
            adjoints=mode.adjoints + share * turn,
            objective=jnp.where(found, value, mode.objective),
            converged=small,
            done=small | ~found,
            num_iters=mode.num_iters + 1,
        )

    adjoints = jnp.zeros_like(into.shift)
    if problem.curved:
        states = driven_path(into, adjoints) if start is None else start
    else:
        adjoints = adjoints if start is None else start
        states = driven_path(into, adjoints)
    no, zero = jnp.zeros((), bool), jnp.zeros((), jnp.int32)
    first = Mode(states, adjoints, objective(states, adjoints), no, no, zero)
    return lax.while_loop(lambda mode: ~mode.done & (mode.num_iters < num_iters), iterate, first)


def potentials(problem: Problem, states: Array) -> tuple[Array, Array]:
    r"""$g_t = G_t^\top s_t$ and $J_t = G_t^\top W_t G_t$: score and expected information of the emissions in the states."""
    emission = problem.model.emission
    predictors = emission.predictors(states, problem.inputs)
    slopes = jax.vmap(jax.jacfwd(emission.map))(states)
    score, information = emission.local_information(problem.emissions, predictors)
    if information.ndim == 2:
        return jnp.einsum("tni,tn->ti", slopes, score), jnp.einsum("tni,tn,tnj->tij", slopes, information, slopes)
    return jnp.einsum("tni,tn->ti", slopes, score), jnp.einsum("tmi,tmn,tnj->tij", slopes, information, slopes)


def curvature(problem: Problem, states: Array) -> tuple[Array, Array]:
    """Score of the emissions in the states, and their observed information where it is positive semidefinite."""
    emission = problem.model.emission

    def log_prob(state: Array, observed: Array, given: Array) -> Array:
        return emission.log_prob(observed[None], emission.predictors(state[None], given[None]))[0]

    pull, expected = potentials(problem, states)
    observed = -jax.vmap(jax.hessian(log_prob))(states, problem.emissions, problem.inputs)
    smallest = jnp.linalg.eigvalsh(lax.stop_gradient(observed))[:, 0]
    slack = jnp.finfo(states.dtype).eps * jnp.abs(lax.stop_gradient(observed)).max(axis=(1, 2))
    return pull, jnp.where((smallest >= -8 * slack)[:, None, None], observed, expected)


def smooth_around(
    problem: Problem, states: Array, potential: tuple[Array, Array], adjoints: Array | None = None
) -> tuple[Array, FilterPass, BackwardPass]:
    r"""Filter and smooth the deviations from a path: $\delta_t = A_t \delta_{t-1} - (x_t - A_t x_{t-1} - a_t) + w_t$.

    Returns:
        The smoothed path, and both passes in deviations from `states`.
    """
    into = problem.into
    if adjoints is None:
        previous = jnp.concatenate([jnp.zeros_like(states[:1]), states[:-1]])
        shift = (into.weights * previous[:, None, :]).sum(axis=-1) + into.shift - states
    else:  # the same, without the rounding
        shift = -(into.cov * adjoints[:, None, :]).sum(axis=-1)
    deviations = Transitions(into.weights, shift, into.cov)
    pull, precision = potential
    forward = run_filter(deviations, Potential(precision, pull))
    backward = run_smoother(deviations, forward)
    return states + backward.means, forward, backward


def toward_mean(
    problem: Problem, states: Array, potential: tuple[Array, Array], covs: Array | None = None
) -> tuple[Array, Array]:
    """The potential under which the smoothed path is the mean and not the mode; `covs` are the smoothed ones, if known."""
    if covs is None:
        covs = smooth_around(problem, states, potential)[2].covs
    pull, precision = potential
    emission, emissions, inputs = problem.model.emission, problem.emissions, problem.inputs
    return pull + skew_pull(emission, emissions, inputs, states, covs), precision


def approximation(problem: Problem, mode: Mode, states: Array, potential: tuple[Array, Array]) -> PosteriorSSM:
    r"""The Gaussian around `states`, its mean moved by what skews the posterior, and the integral of the expanded likelihood.

    $$\sum_t \ell_t + g_t^\top \delta_t - \tfrac12 \delta_t^\top J_t \delta_t - \tfrac12 q_t^\top P_t^- q_t
    - \tfrac12 \log |I + P_t^- J_t|$$

    with $\ell_t$ the log-likelihood at the path, $\delta_t$ the filtered deviation from it and $q_t$ the filter's score.
    """
    emission = problem.model.emission
    modes, forward, backward = smooth_around(problem, states, potential)
    pull, precision = potential
    means, _, _ = smooth_around(problem, states, toward_mean(problem, states, potential, backward.covs))
    log_probs = emission.log_prob(problem.emissions, emission.predictors(states, problem.inputs))
    linear = (pull * forward.means).sum(axis=1)
    quadratic = jnp.einsum("ti,tij,tj->t", forward.means, precision, forward.means)
    cost = jnp.einsum("ti,tij,tj->t", forward.score, forward.predicted_covs, forward.score)
    return PosteriorSSM(
        marginal_loglik=(log_probs + linear - (quadratic + cost + forward.log_det) / 2).sum(),
        smoothed_means=means,
        modes=modes,
        smoothed_covariances=backward.covs,
        smoothed_cross_covariances=backward.cross_covs[:-1],
        converged=mode.converged,
        num_iters=mode.num_iters,
    )


def _without_derivative(leaf: Any) -> Any:
    return lax.stop_gradient(leaf) if eqx.is_array(leaf) else leaf
