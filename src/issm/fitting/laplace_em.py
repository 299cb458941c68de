r"""Laplace EM: Gauss-Newton smoothing in turn with the parameters that maximise the expected log joint density."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from issm._linalg import symmetrize
from issm.fitting.arrival_statistics import ArrivalMoments, arrival_statistics
from issm.fitting.curved_dynamics import arrivals, cubature_points, update_noise
from issm.fitting.free import DYNAMICS_FLOOR, INITIAL_FLOOR, from_free, keep_frozen, learning_rates, split, to_free
from issm.fitting.m_step import BlockRules, coefficient_mask, coefficients_of, update_block, with_coefficients
from issm.fitting.mask_patterns import find_patterns
from issm.fitting.regression import PatternStatistics, RowStatistics, never_free
from issm.fitting.rollout import rollout_states
from issm.fitting.ssm_fits import check_count, finish, prepare, rollout_length, rollout_stage
from issm.fitting.ssm_result import SSMFit
from issm.fitting.stage import AdamState, Data, ascend, run_stage, start_adam
from issm.fitting.step_data import StepData, with_inputs
from issm.inference.laplace import approximation, find_mode, make_problem, potentials
from issm.interventions import Intervention
from issm.models.fields import TimeVarying, values_of
from issm.models.lgssm import ParamsLGSSMDynamics, ParamsLGSSMInitial
from issm.models.nonlinear import NonlinearDynamics
from issm.models.ssm import SSM, companion
from issm.models.trials import Plan, Trials

GAUSS_NEWTON_STEPS = 4  # for each sweep; the path goes on from where the last one ended


def fit_laplace_em(
    model: SSM,
    emissions: Any,
    inputs: Any = None,
    *,
    interventions: Intervention | None = None,
    trainable: Any = None,
    held_out: Any = None,
    num_iters: int = 100,
    num_rollout: int | None = None,
    num_gradient_steps: int = 3,
    dynamics_rate: float = 3e-2,
    emission_rate: float = 1e-2,
    patience: int | None = None,
    tol: float = 0.0,
    progress: bool = False,
) -> SSMFit:
    r"""Fit a model with any emissions by expectation maximisation around the most probable paths.

    If there are clamps, a rollout stage comes first: the path from one clamp to the next without noise,
    $x_t = (1-c_t) \odot (A x_{t-1} + B u_t + b) + c_t \odot v_t$, is fitted to the data by gradient ascent on
    $\sum_t \log p(y_t \mid f(x_t))$, and so is the initial mean. It is what finds the right basin. Then every sweep

    1. finds the Gaussian around the most probable path of every trial, from where the last sweep left it,
    2. maximises the expected log density over the dynamics and the initial state in closed form, rows learning only from the
       arrivals in which their state was free, and
    3. moves the emission parameters along the gradient of $E[\log p(y_t \mid f(x_t))]$, the expectation over 2D points with the
       posterior's mean and covariance.

    Of `NonlinearDynamics` only the noise has a closed form; their map moves along the gradient of the expected log density of
    the free arrivals, over 4D points of neighbouring states. Paths and covariances are those of the linear dynamics that touch
    the map at the path (the curvature of the map is left out of the Hessian). Such a fit needs a good start: `bend_dynamics`.

    Everything is compiled; `jax.vmap` over models runs many seeds at once.

    Args:
        model: Where to start, e.g. from `initialize_ssm`. Diagonal covariances stay diagonal.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or `(num_trials, num_timesteps, emission_dim)`; NaN is missing.
        inputs: Soft inputs $u_t$, shared or one array for each trial.
        interventions: Clamps, shared or one for each trial. None: no clamps.
        trainable: What may change: a pytree prefix of the model's arrays with Booleans, or Boolean arrays for single entries.
            None: everything but `TimeVarying` fields and exposures.
        held_out: Boolean, `(num_trials,)`: trials to learn nothing from, whose objective is recorded. None: none.
        num_iters: Number of sweeps, at least 0.
        num_rollout: Number of updates of the rollout stage. None: 400 if there are clamps and the dynamics are linear, else 0.
            Zero suits a start from clamps, `initialize_ssm(..., interventions=...)`.
        num_gradient_steps: Steps of Adam on the emission in each sweep, at least 1.
        dynamics_rate: Learning rate of dynamics, initial mean and noise in the rollout stage.
        emission_rate: Learning rate of the emission map in the rollout stage; the sweeps use a fifth of it.
        patience: Stop a stage when the held-out trials have gained nothing for so many updates, and return what was best for
            them. None: never.
        tol: The fit has converged when a sweep changes the objective by at most `tol` nats for each observed entry.
        progress: Whether to draw a bar on standard error.

    Returns:
        The fitted model, the objective before every update, and why the fit ended. Never a model that is not finite.

    Raises:
        ValueError: If an argument has the wrong shape, type or values; the message names it.

    References:
        Fahrmeir & Kaufmann (1991), *Metrika* 38; Smith & Brown (2003), *Neural Computation* 15; Nejatbakhsh & Wang (2025), for
        the model; Kingma & Ba (2015), for the gradient steps.

    Examples:
        >>> import jax, issm
        >>> linear = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.01], [[1.0]], [0.5])
        >>> truth = issm.SSM(linear.initial, linear.dynamics, issm.PoissonEmission(issm.LinearMap([[2.0], [-2.0]]), 5.0))
        >>> plan = issm.do({0: 1.0}, num_timesteps=30, state_dim=1, start=5, stop=10)
        >>> _, counts = issm.sample(jax.random.key(0), truth, 30, interventions=plan)
        >>> start = issm.initialize_ssm(jax.random.key(1), counts, 1, likelihood="poisson", exposure=5.0, widths=())
        >>> fit = issm.fit_laplace_em(start, counts, interventions=plan, num_rollout=20, num_iters=5)
        >>> bool(fit.rollout_log_probs[-1] > fit.rollout_log_probs[0])
        True
    """
    trials, data = prepare(model, emissions, inputs, interventions, held_out, patience)
    curved = isinstance(model.dynamics, NonlinearDynamics)
    num_rollout = rollout_length(num_rollout, None if curved else interventions)
    check_count("num_iters", num_iters, 0)
    check_count("num_gradient_steps", num_gradient_steps, 1)
    model, rollout = rollout_stage(
        model, trials, data, trainable, num_rollout, dynamics_rate, emission_rate, patience, progress
    )
    _, _, masks = split(model, trainable)
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    rates = learning_rates(arrays, dynamics_rate / 5, emission_rate / 5)
    step = Sweep(trials, data, model, rest, masks, rates, num_iters, num_gradient_steps)
    free, _ = eqx.partition(_by_gradient(to_free(model)), eqx.is_inexact_array)
    carry = (_first_paths(model, trials), start_adam(free, jax.random.key(0)))
    loop = run_stage(
        step, arrays, carry, data, num_iters=num_iters, patience=patience, tol=tol, label="laplace EM", bar=progress
    )
    found = loop.good if patience is None else loop.best
    return finish(eqx.combine(found, rest), rollout, loop, patience=patience)


class Sweep(eqx.Module):
    """One sweep of Laplace EM."""

    trials: Trials
    data: Data
    like: SSM
    rest: Any
    masks: Any
    rates: Any
    num_iters: int = eqx.field(static=True)
    num_gradient_steps: int = eqx.field(static=True)

    def __call__(self, arrays: Any, carry: Any, index: Array) -> tuple[Array, Any, Any]:
        """Laplace's marginal log-likelihood of every trial, new parameters, paths and state of the optimiser."""
        paths, adam = carry
        model = eqx.combine(arrays, self.rest)
        moments, paths = expectations(model, self.trials, paths)
        updated = update_in_closed_form(model, moments, self.trials, self.data.training, self.masks)
        updated, adam = self._move(updated, moments, adam, index)
        return moments.log_probs, eqx.filter(updated, eqx.is_inexact_array), (paths, adam)

    def _move(self, model: SSM, moments: "Expectations", adam: AdamState, index: Array) -> tuple[SSM, AdamState]:
        """Some steps of Adam on what has no closed form."""
        free_model = to_free(model)
        arrays, rest = eqx.partition(_by_gradient(free_model), eqx.is_inexact_array)
        masks = _by_gradient(self.masks)
        if isinstance(model.dynamics, NonlinearDynamics):  # the noise has a closed form
            masks = eqx.tree_at(lambda m: m[1].cov, masks, jnp.zeros(model.state_dim, bool))
        points = cubature_points(moments.means, moments.covs)
        pairs = None
        if isinstance(model.dynamics, NonlinearDynamics):
            pairs = arrivals(moments.means, moments.covs, moments.cross_covs, self.trials)

        def objective(arrays: Any) -> Array:
            moved = from_free(eqx.tree_at(_by_gradient, free_model, eqx.combine(arrays, rest)), self.like)
            emission = moved.emission

            def one(emissions: Array, inputs: Array, states: Array) -> Array:
                at = lambda x: emission.log_prob(emissions, emission.predictors(x, inputs)).sum()  # noqa: E731
                return jax.vmap(at)(states).mean()

            axes = (0, self.trials.plan.axes.inputs, 0)
            per_trial = jax.vmap(one, in_axes=axes)(self.trials.emissions, self.trials.plan.inputs, points)
            if pairs is not None and isinstance(moved.dynamics, NonlinearDynamics):
                per_trial = per_trial + pairs.log_probs(moved.dynamics)
            return self.data.mean(per_trial)

        def move(carry: tuple[Any, AdamState], inner: Array) -> tuple[tuple[Any, AdamState], None]:
            arrays, adam = carry
            how = {"masks": masks, "rates": _by_gradient(self.rates)}
            total = self.num_iters * self.num_gradient_steps
            count = index * self.num_gradient_steps + inner
            return ascend(jax.grad(objective)(arrays), adam, arrays, count, num_iters=total, **how), None

        (arrays, adam), _ = lax.scan(move, (arrays, adam), jnp.arange(self.num_gradient_steps, dtype=jnp.int32))
        moved = from_free(eqx.tree_at(_by_gradient, free_model, eqx.combine(arrays, rest)), self.like)
        kept = keep_frozen(masks, _by_gradient(moved), _by_gradient(model))
        return eqx.tree_at(_by_gradient, model, kept), adam


def _by_gradient(model: Any) -> Any:
    """The parts of a model (or of a tree like it) that the gradient moves: maps, and what goes with them."""
    return (model.emission, model.dynamics) if isinstance(model.dynamics, NonlinearDynamics) else (model.emission,)


def _first_paths(model: SSM, trials: Trials) -> Float[Array, "num_trials num_timesteps state_dim"]:
    """Where the first E step starts: the path without noise, as `find_mode` holds it."""
    if isinstance(model.dynamics, NonlinearDynamics):
        return jax.vmap(partial(rollout_states, model), in_axes=(trials.plan.axes,), axis_size=trials.num_trials)(
            trials.plan
        )
    return jnp.zeros((*trials.emissions.shape[:2], model.state_dim), model.initial.mean.dtype)


class Expectations(eqx.Module):
    """Moments of the states of every trial."""

    means: Float[Array, "*num_trials num_timesteps state_dim"]
    covs: Float[Array, "*num_trials num_timesteps state_dim state_dim"]
    cross_covs: Float[Array, "*num_trials num_timesteps_minus_1 state_dim state_dim"]
    log_probs: Float[Array, "*num_trials"]


def expectations(model: SSM, trials: Trials, paths: Array) -> tuple[Expectations, Array]:
    """The E step: the Gaussian around every trial's path, found from `paths` as `find_mode` holds them."""

    def one(emissions: Array, plan: Plan, path: Array) -> tuple[Expectations, Array]:
        problem = make_problem(model, emissions, plan.inputs, plan.intervention)
        mode = find_mode(problem, num_iters=GAUSS_NEWTON_STEPS, start=path)
        problem = problem.around(mode.states)
        result = approximation(problem, mode, mode.states, potentials(problem, mode.states))
        moments = Expectations(
            result.modes,
            result.smoothed_covariances,
            result.smoothed_cross_covariances,
            result.marginal_loglik,
        )
        return moments, mode.states if problem.curved else mode.adjoints

    return jax.vmap(one, in_axes=(0, trials.plan.axes, 0))(trials.emissions, trials.plan, paths)


def update_in_closed_form(
    model: SSM, moments: Expectations, trials: Trials, training: Bool[Array, " num_trials"], masks: Any
) -> SSM:
    """The M step of linear dynamics and of the initial state, that of `fit_em`; of nonlinear dynamics, that of the noise.

    Where data are silent nothing changes.
    """
    every = jnp.arange(trials.num_trials)  # covariances differ between trials whatever their clamps
    own = Trials(trials.emissions, trials.plan, every, None, trials.one_sequence, trials.may_miss)
    data, patterns = StepData(own, training), find_patterns(companion(model), own)
    initial, dynamics = model.initial, model.dynamics
    found = _initial_moments(initial, moments)
    where = (data, slice(0, 1), patterns.initial.free, patterns.initial.index[..., None], patterns.initial.unclamped)
    initial = _update(initial, arrival_statistics(found, *where, initial.cov), masks.initial, INITIAL_FLOOR)
    if isinstance(dynamics, NonlinearDynamics):
        pairs = arrivals(moments.means, moments.covs, moments.cross_covs, trials)
        dynamics = update_noise(dynamics, pairs, training, masks.dynamics.cov)
    elif not any(isinstance(field, TimeVarying) for field in vars(dynamics).values()) and moments.means.shape[1] > 1:
        found, masked = _dynamics_moments(dynamics, moments, data.inputs), patterns.dynamics
        where = (data, slice(1, None), masked.free, masked.index[..., 1:], masked.unclamped)
        dynamics = _update(dynamics, arrival_statistics(found, *where, dynamics.cov), masks.dynamics, DYNAMICS_FLOOR)
    return eqx.tree_at(lambda m: (m.initial, m.dynamics), model, (initial, dynamics))


def _initial_moments(initial: ParamsLGSSMInitial, moments: Expectations) -> ArrivalMoments:
    means, covs = moments.means[:, :1] - initial.mean[None, None], moments.covs[:, :1]
    no_states = covs[..., :0]
    return ArrivalMoments(jnp.ones_like(means[..., :1]), means, no_states[:, :, :0], no_states, covs)


def _dynamics_moments(dynamics: ParamsLGSSMDynamics, moments: Expectations, inputs: Array) -> ArrivalMoments:
    """Of $z_t = [x_{t-1}; u_t; 1]$ and $x_t - Θ z_t$."""
    regressors = with_inputs(moments.means[:, :-1], inputs[:, 1:])
    weights, before = values_of(dynamics.weights), moments.covs[:, :-1]
    cross = jnp.swapaxes(moments.cross_covs, 2, 3)
    known = cross - weights @ before  # Cov[x_t - A x_{t-1}, x_{t-1}]
    around = moments.covs[:, 1:] - weights @ moments.cross_covs - known @ weights.T
    return ArrivalMoments(
        regressors=regressors,
        residuals=moments.means[:, 1:] - regressors @ coefficients_of(dynamics).T,
        regressor_covs=before,
        cross_covs=known,
        residual_covs=symmetrize(around),
    )


def _update(block: Any, stats: RowStatistics | PatternStatistics, masks: Any, floor: float) -> Any:
    """New values of a block; a variance that is learned stays above `floor`, one that is exactly zero stays so."""
    rule = BlockRules(jnp.asarray(coefficient_mask(masks)), jnp.asarray(masks.cov), None)
    coefficients, cov = update_block(coefficients_of(block), block.cov, stats, rule)
    assert not isinstance(cov, TimeVarying)  # such dynamics are not updated
    silent = never_free(stats)
    if block.cov.ndim == 1:
        moves = rule.cov & ~silent & (block.cov > 0)
        return with_coefficients(block, coefficients, jnp.where(moves, cov + floor, block.cov))
    moves = rule.cov.all() & ~silent.all()
    return with_coefficients(
        block, coefficients, jnp.where(moves, cov + floor * jnp.eye(cov.shape[0], dtype=cov.dtype), block.cov)
    )
