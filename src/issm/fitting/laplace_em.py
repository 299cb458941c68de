r"""Laplace EM: Gauss-Newton smoothing in turn with the parameters that maximise the expected log joint density."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from issm._check import as_array, fail, is_concrete
from issm._linalg import psd_cholesky, symmetrize
from issm.fitting.arrival_statistics import ArrivalMoments, arrival_statistics
from issm.fitting.free import DYNAMICS_FLOOR, INITIAL_FLOOR, from_free, keep_frozen, learning_rates, split, to_free
from issm.fitting.m_step import BlockRules, coefficient_mask, coefficients_of, update_block, with_coefficients
from issm.fitting.mask_patterns import find_patterns
from issm.fitting.regression import PatternStatistics, RowStatistics, never_free
from issm.fitting.rollout import fit_rollout
from issm.fitting.ssm_result import Code, SSMFit
from issm.fitting.stage import AdamState, Data, Loop, ascend, run_stage, start_adam
from issm.fitting.step_data import StepData, with_inputs
from issm.inference.laplace import approximation, find_mode, make_problem, potentials
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSMDynamics, ParamsLGSSMInitial, TimeVarying, values_of
from issm.models.ssm import SSM, as_model_trials, companion
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
        num_rollout: Number of updates of the rollout stage. None: 400 if there are clamps, else 0.
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
    num_rollout = rollout_length(num_rollout, interventions)
    check_count("num_iters", num_iters, 0)
    check_count("num_gradient_steps", num_gradient_steps, 1)
    model, rollout = rollout_stage(
        model, trials, data, trainable, num_rollout, dynamics_rate, emission_rate, patience, progress
    )
    _, _, masks = split(model, trainable)
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    rates = learning_rates(arrays, dynamics_rate / 5, emission_rate / 5)
    step = Sweep(trials, data, model, rest, masks, rates, num_iters, num_gradient_steps)
    free, _ = eqx.partition(to_free(model).emission, eqx.is_inexact_array)
    adjoints = jnp.zeros((*trials.emissions.shape[:2], model.state_dim), model.initial.mean.dtype)
    carry = (adjoints, start_adam(free, jax.random.key(0)))
    loop = run_stage(
        step, arrays, carry, data, num_iters=num_iters, patience=patience, tol=tol, label="laplace EM", bar=progress
    )
    found = loop.good if patience is None else loop.best
    return finish(eqx.combine(found, rest), rollout, loop)


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
        adjoints, adam = carry
        model = eqx.combine(arrays, self.rest)
        moments, adjoints = expectations(model, self.trials, adjoints)
        updated = update_dynamics(model, moments, self.trials, self.data.training, self.masks)
        emission, adam = self._move_emission(updated, moments, adam, index)
        updated = eqx.tree_at(lambda m: m.emission, updated, emission)
        return moments.log_probs, eqx.filter(updated, eqx.is_inexact_array), (adjoints, adam)

    def _move_emission(
        self, model: SSM, moments: "Expectations", adam: AdamState, index: Array
    ) -> tuple[Any, AdamState]:
        free_model = to_free(model)
        arrays, rest = eqx.partition(free_model.emission, eqx.is_inexact_array)
        points = cubature_points(moments.means, moments.covs)

        def objective(arrays: Any) -> Array:
            whole = eqx.tree_at(lambda m: m.emission, free_model, eqx.combine(arrays, rest))
            emission = from_free(whole, self.like).emission

            def one(emissions: Array, inputs: Array, states: Array) -> Array:
                at = lambda x: emission.log_prob(emissions, emission.predictors(x, inputs)).sum()  # noqa: E731
                return jax.vmap(at)(states).mean()

            axes = (0, self.trials.plan.axes.inputs, 0)
            return self.data.mean(jax.vmap(one, in_axes=axes)(self.trials.emissions, self.trials.plan.inputs, points))

        def move(carry: tuple[Any, AdamState], inner: Array) -> tuple[tuple[Any, AdamState], None]:
            arrays, adam = carry
            how = {"masks": self.masks.emission, "rates": self.rates.emission}
            total = self.num_iters * self.num_gradient_steps
            count = index * self.num_gradient_steps + inner
            return ascend(jax.grad(objective)(arrays), adam, arrays, count, num_iters=total, **how), None

        (arrays, adam), _ = lax.scan(move, (arrays, adam), jnp.arange(self.num_gradient_steps, dtype=jnp.int32))
        whole = eqx.tree_at(lambda m: m.emission, free_model, eqx.combine(arrays, rest))
        return keep_frozen(self.masks.emission, from_free(whole, self.like).emission, model.emission), adam


class Expectations(eqx.Module):
    """Moments of the states of every trial."""

    means: Float[Array, "*num_trials num_timesteps state_dim"]
    covs: Float[Array, "*num_trials num_timesteps state_dim state_dim"]
    cross_covs: Float[Array, "*num_trials num_timesteps_minus_1 state_dim state_dim"]
    log_probs: Float[Array, "*num_trials"]


def expectations(model: SSM, trials: Trials, adjoints: Array) -> tuple[Expectations, Array]:
    """The E step: the Gaussian around every trial's path, found from the paths that `adjoints` drive."""

    def one(emissions: Array, plan: Plan, adjoints: Array) -> tuple[Expectations, Array]:
        problem = make_problem(model, emissions, plan.inputs, plan.intervention)
        mode = find_mode(problem, num_iters=GAUSS_NEWTON_STEPS, adjoints=adjoints)
        result = approximation(problem, mode, mode.states, potentials(problem, mode.states))
        moments = Expectations(
            result.smoothed_means,
            result.smoothed_covariances,
            result.smoothed_cross_covariances,
            result.marginal_loglik,
        )
        return moments, mode.adjoints

    return jax.vmap(one, in_axes=(0, trials.plan.axes, 0))(trials.emissions, trials.plan, adjoints)


def cubature_points(means: Array, covs: Array) -> Float[Array, "num_trials num_points num_timesteps state_dim"]:
    r"""$m_t \pm \sqrt{D}\,L_t e_i$: points with the mean and the covariance of the posterior."""
    state_dim = means.shape[-1]
    factors = jax.vmap(psd_cholesky)(covs.reshape(-1, state_dim, state_dim)).reshape(covs.shape)
    arms = jnp.moveaxis(factors, 3, 1) * jnp.sqrt(jnp.asarray(state_dim, means.dtype))
    return jnp.concatenate([means[:, None] + arms, means[:, None] - arms], axis=1)


def update_dynamics(
    model: SSM, moments: Expectations, trials: Trials, training: Bool[Array, " num_trials"], masks: Any
) -> SSM:
    """The M step of the dynamics and of the initial state, that of `fit_em`; where data are silent nothing changes."""
    every = jnp.arange(trials.num_trials)  # covariances differ between trials whatever their clamps
    own = Trials(trials.emissions, trials.plan, every, None, trials.one_sequence, trials.may_miss)
    data, patterns = StepData(own, training), find_patterns(companion(model), own)
    initial, dynamics = model.initial, model.dynamics
    found = _initial_moments(initial, moments)
    where = (data, slice(0, 1), patterns.initial.free, patterns.initial.index[..., None], patterns.initial.unclamped)
    initial = _update(initial, arrival_statistics(found, *where, initial.cov), masks.initial, INITIAL_FLOOR)
    if not any(isinstance(field, TimeVarying) for field in vars(dynamics).values()) and moments.means.shape[1] > 1:
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


# What all fits of a general model share


def prepare(
    model: SSM, emissions: Any, inputs: Any, interventions: Any, held_out: Any, patience: Any
) -> tuple[Trials, Data]:
    """Check the data, and say which trials are learned from."""
    trials = as_model_trials(model, emissions, inputs, interventions)
    num_trials, dtype = trials.num_trials, model.initial.mean.dtype
    held_out = np.zeros(num_trials, bool) if held_out is None else as_array("held_out", held_out)
    if held_out.dtype != bool or held_out.shape != (num_trials,):
        fail(
            "held_out",
            got=f"dtype {held_out.dtype}, shape {tuple(held_out.shape)}",
            expected=f"Booleans, (num_trials,) = ({num_trials},)",
            remedy="Mark the trials that nothing is learned from.",
        )
    known = is_concrete(held_out)
    if known and bool(np.asarray(held_out).all()):
        fail("held_out", got="nothing but True", expected="a trial to learn from", remedy="Leave one trial False.")
    if patience is not None:
        check_count("patience", patience, 1)
        if known and not np.asarray(held_out).any():
            fail(
                "patience",
                got=f"{patience} without held-out trials",
                expected="`held_out` trials that say when to stop",
                remedy="Mark some trials in `held_out`.",
            )
    counts = (~jnp.isnan(trials.emissions)).sum(axis=(1, 2)).astype(dtype)
    return trials, Data(counts, ~jnp.asarray(held_out))


def check_count(name: str, value: Any, smallest: int) -> None:
    """Refuse what is not an integer of at least `smallest`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < smallest:
        fail(name, got=repr(value), expected=f"an integer of at least {smallest}", remedy="It is a number of updates.")


def rollout_length(num_rollout: int | None, interventions: Intervention | None) -> int:
    """Number of updates of the rollout stage."""
    if num_rollout is not None:
        check_count("num_rollout", num_rollout, 0)
        return num_rollout
    if interventions is None:
        return 0
    return 400 if not is_concrete(interventions.mask) or np.asarray(interventions.mask).any() else 0


def rollout_stage(
    model: SSM, trials: Trials, data: Data, trainable: Any, num_rollout: int,
    dynamics_rate: float, emission_rate: float, patience: int | None, bar: bool,
) -> tuple[SSM, Loop | None]:  # fmt: skip
    """The rollout stage, if it has a length."""
    if not num_rollout:
        return model, None
    options = {"dynamics_rate": dynamics_rate, "emission_rate": emission_rate, "patience": patience, "bar": bar}
    return fit_rollout(model, trials, data, trainable, num_iters=num_rollout, **options)


def finish(model: SSM, rollout: Loop | None, loop: Loop, recognition: Any = None) -> SSMFit:
    """Gather the result; a rollout stage that broke down says so."""
    code = loop.code
    if rollout is not None:
        broken = (rollout.code >= Code.START_NOT_FINITE) & (code < Code.START_NOT_FINITE)
        code = jnp.where(broken, rollout.code, code)
    return SSMFit(
        params=model,
        rollout_log_probs=jnp.zeros(0, loop.log.dtype) if rollout is None else rollout.log,
        log_probs=loop.log,
        held_out=loop.held_out,
        converged=code == Code.CONVERGED,
        num_iters=loop.num_updates,
        code=code,
        recognition=recognition,
    )
