r"""Exact, monotone expectation maximisation for the clamped linear Gaussian model."""

import time
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from issm._check import fail, is_concrete
from issm._compile import jit_quickly
from issm.fitting.centering import (
    count_observed,
    mean_of_observed,
    shift_bias,
    variance_floor,
    variance_given_others,
)
from issm.fitting.m_step import Rules, log_prior, m_step, make_rules
from issm.fitting.mask_patterns import Patterns, find_patterns
from issm.fitting.priors import Priors, ResolvedPrior
from issm.fitting.progress import ProgressBar
from issm.fitting.quasi_newton import SUFFICIENT, WARM_UP, Search, choose, look_around, propose, shorten, start_search
from issm.fitting.regression import never_free
from issm.fitting.result import Code, FitResult, first_broken_field
from issm.fitting.statistics import SufficientStatistics, expected_statistics
from issm.interventions import Intervention
from issm.models.emission_sums import sum_emissions
from issm.models.lgssm import ParamsLGSSM, TimeVarying
from issm.models.trials import Trials, as_trials

DRAW_EVERY_SECONDS = 0.3


def fit_em(
    params: ParamsLGSSM,
    emissions: Any,
    inputs: Any = None,
    *,
    interventions: Intervention | None = None,
    trainable: Any = None,
    priors: Priors | None = None,
    num_iters: int = 100,
    tol: float = 1e-7,
    accelerate: bool = True,
    progress: bool = False,
) -> FitResult:
    r"""Maximise $\log p(y \mid do(\cdot), u)$ over the parameters by expectation maximisation.

    With $z_t = [x_{t-1}; u_t; 1]$ and $W_i$ the arrivals in which state i was not clamped, row i of $Θ = [A, B, b]$ and a
    diagonal Q become

    $$Θ_i = \Big(\sum_{W_i} E[x_{t,i} z_t^\top]\Big) \Big(\sum_{W_i} E[z_t z_t^\top]\Big)^{-1}, \quad
    Q_{ii} = |W_i|^{-1} \sum_{W_i} E[(x_{t,i} - Θ_i z_t)^2]$$

    and a full Q is updated given Θ, the noise of a clamped state being a missing value (an ECM). The initial distribution and
    the emissions are updated in the same way; a row of the emissions learns from the steps in which it was observed. No update
    lowers the likelihood by more than rounding. A direction in which the data are silent keeps the value it started from.

    EM is slow where the states hide much. By Fisher's identity every E step also gives the exact score, so that after some
    updates a quasi-Newton search takes over; a step that does not gain is not taken, and EM is asked again.

    Args:
        params: Where to start. Diagonal covariances stay diagonal; `TimeVarying` fields stay as they are.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or `(num_trials, num_timesteps, emission_dim)`; NaN is missing.
        inputs: Soft inputs $u_t$, `(num_timesteps, input_dim)`, shared or one such array for each trial.
        interventions: Clamps, shared or one for each trial. None: no clamps.
        trainable: What may change: a pytree prefix of `params` with Booleans, or Boolean arrays for single entries. None:
            everything but `TimeVarying` fields. A full covariance is frozen as a whole, a diagonal one entry by entry.
        priors: Priors; the objective is then the log-likelihood plus their log density. None: maximum likelihood.
        num_iters: Largest number of updates, at least 1.
        tol: The fit has converged when an update gains less than `tol` nats for each observed number, and the next step
            promises no more.
        accelerate: Whether to look further than the updates of EM: after five of them, by limited-memory BFGS on the exact score,
            preconditioned by the information of the complete data, every step judged by its likelihood. False: EM alone. With
            `priors.input_l1` the objective has corners, and it is EM alone.
        progress: Whether to draw a bar on standard error. An interrupt from the keyboard then ends the fit and returns what
            it has reached.

    Returns:
        The fitted parameters, the log-likelihood before every update, and why the fit ended.

    Raises:
        ValueError: If an argument has the wrong shape, type or values; the message names it.

    References:
        Shumway & Stoffer (1982), *J. Time Series Analysis* 3; Meng & Rubin (1993), *Biometrika* 80 (ECM); Jamshidian & Jennrich
        (1997), *J. Royal Statistical Society B* 59 (quasi-Newton acceleration); Nejatbakhsh & Wang (2025), sec. 3, for the model.

    Examples:
        >>> import jax, numpy as np, issm
        >>> truth = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0], [2.0]], [0.5, 0.5])
        >>> plan = issm.do({0: 2.0}, num_timesteps=60, state_dim=1, start=20, stop=40)
        >>> _, emissions = issm.lgssm_sample(jax.random.key(0), truth, 60, interventions=plan)
        >>> fit = issm.fit_em(truth, emissions, interventions=plan, num_iters=5)
        >>> bool((np.diff(fit.log_probs) >= 0).all())
        True
    """
    _check_options(num_iters, tol, accelerate, progress)
    trials = as_trials(params, emissions, inputs, interventions)
    problem = _pose(params, trials, make_rules(params, trainable, priors), num_iters, tol)
    accelerate = accelerate and num_iters > WARM_UP and problem.rules.input_l1 is None
    centered, state, center = _prepare(params, problem, _places(num_iters), accelerate)
    run = _run_with_bar if progress and is_concrete(state.code) else _run
    state = run(state, centered, num_iters)
    return _result(_finish(state, problem, center, params, num_iters))


def improve(params: ParamsLGSSM, trials: Trials, num_iters: int, tol: float = 0.0) -> FitResult:
    """Some updates with the defaults of `fit_em`; what is compiled for them serves `fit_em` on the same data."""
    problem = _pose(params, trials, make_rules(params, None, None), num_iters, tol)
    centered, state, center = _prepare(params, problem, _places(num_iters), True)
    return _finish(_run(state, centered, num_iters), problem, center, params, num_iters)


class Problem(eqx.Module):
    """Data and rules of a fit, checked; `last` is the largest number of updates, `numbers` that of the observed entries."""

    trials: Trials
    patterns: Patterns
    rules: Rules
    tol: Float[Array, ""]
    last: Int[Array, ""]
    numbers: Float[Array, ""]


class EMState(eqx.Module):
    """What the loop carries.

    Attributes:
        params: Parameters whose likelihood is computed next.
        previous: The last parameters whose likelihood is known.
        floor: Smallest emission variances.
        log_probs, log_priors: Of the parameters before every update.
        num_updates: Number of updates behind `params`.
        code: Why the loop ended, or `Code.RUNNING`.
        broken: First field whose update was not finite, or -1.
        kept: States whose dynamics were never learned.
        search: The accelerated search, or None for plain EM.
    """

    params: ParamsLGSSM
    previous: ParamsLGSSM
    floor: Float[Array, " emission_dim"]
    log_probs: Float[Array, " num_log_probs"]
    log_priors: Float[Array, " num_log_probs"]
    num_updates: Int[Array, ""]
    code: Int[Array, ""]
    broken: Int[Array, ""]
    kept: Bool[Array, " state_dim"]
    search: Search | None


def _pose(params: ParamsLGSSM, trials: Trials, rules: Rules, num_iters: int, tol: Any) -> Problem:
    dtype = params.initial.mean.dtype
    patterns = find_patterns(params, trials)
    numbers = count_observed(trials.emissions)
    return Problem(trials, patterns, rules, jnp.asarray(tol, dtype), jnp.asarray(num_iters, jnp.int32), numbers)


def _places(num_iters: int) -> int:
    """Length of the logs, in steps of 1024, so that fits of other lengths need no other compilation."""
    return -(-(num_iters + 1) // 1024) * 1024


@partial(jax.jit, static_argnames=("num_places", "accelerate"))
def _prepare(
    params: ParamsLGSSM, problem: Problem, num_places: int, accelerate: bool
) -> tuple[Problem, EMState, Array]:
    """Center the emissions, and set up the loop."""
    center = mean_of_observed(problem.trials.emissions)
    floor = variance_floor(params, problem.trials.emissions)
    params = shift_bias(params, center)
    blank = jnp.full(num_places, jnp.nan, params.initial.mean.dtype)
    zero = jnp.zeros((), jnp.int32)
    kept = jnp.zeros(params.state_dim, bool)
    search = start_search(params, problem.trials) if accelerate else None
    state = EMState(params, params, floor, blank, blank, zero, zero, zero - 1, kept, search)
    return _with_sums(params, _shift_problem(problem, center)), state, center


def _run(state: EMState, problem: Problem, until: int | Int[Array, ""]) -> EMState:
    """Iterate until the fit has ended or `until` updates are behind it."""
    return _iterate(state, problem, jnp.asarray(until, jnp.int32))


@jit_quickly
def _iterate(state: EMState, problem: Problem, until: Int[Array, ""]) -> EMState:

    def running(state: EMState) -> Array:
        return (state.code == Code.RUNNING) & ((state.num_updates < until) | (state.num_updates == problem.last))

    def iterate(state: EMState) -> EMState:
        stats = expected_statistics(state.params, problem.trials, problem.patterns)
        return _advance(state, stats, problem)

    return lax.while_loop(running, iterate, state)


def _advance(state: EMState, stats: SufficientStatistics, problem: Problem) -> EMState:
    """Judge the parameters that `stats` belong to, and update them if the fit goes on."""
    k, rules, search = state.num_updates, problem.rules, state.search
    prior = log_prior(state.params, rules)
    objective = stats.log_prob + prior
    before = (state.log_probs + state.log_priors)[jnp.maximum(k - 1, 0)]
    first = k == 0
    gain = jnp.where(first, jnp.inf, objective - before)
    numbers = problem.numbers
    finite = jnp.isfinite(objective)
    slack = _rounding(objective.dtype) * jnp.maximum(jnp.abs(objective), numbers)
    updated = m_step(state.params, stats, rules, state.floor)

    # A trial of the accelerated search that does not gain enough leaves the best parameters as they are; an update of EM that
    # gained nothing is dropped, and ends the fit. Either way the log never goes down.
    by_em, promised = jnp.asarray(True), jnp.zeros_like(gain)
    rejected = jnp.asarray(False)
    if search is not None:
        by_em = search.by_em
        rejected = ~by_em & ~(gain >= SUFFICIENT * search.length * search.slope)
        found = look_around(search, state.params, updated, stats, rules, state.floor)
        search = choose(rejected, shorten(search, gain), found)
        promised = search.slope / 2
    drop = by_em & ~first & (~finite | (gain < 0))
    small = (gain <= 0) | ((gain <= problem.tol * numbers) & (promised <= problem.tol * numbers))
    broken = first_broken_field(updated)
    ended = [
        (~finite & first, Code.START_NOT_FINITE),
        (~finite & by_em, Code.LOGLIK_NOT_FINITE),
        (by_em & (gain < -slack), Code.DECREASED),
        (~rejected & small, Code.CONVERGED),
        (k == problem.last, Code.MAX_ITERS),
        (~rejected & (broken >= 0), Code.UPDATE_NOT_FINITE),
    ]
    code = jnp.select([c for c, _ in ended], [jnp.int32(v) for _, v in ended], jnp.int32(Code.RUNNING))
    previous = (state.log_probs[jnp.maximum(k - 1, 0)], state.log_priors[jnp.maximum(k - 1, 0)])
    entry = (jnp.where(rejected, old, new) for old, new in zip(previous, (stats.log_prob, prior), strict=True))
    log_probs, log_priors = (
        jnp.where(drop, log, log.at[k].set(value))
        for log, value in zip((state.log_probs, state.log_priors), entry, strict=True)
    )
    goes_on = code == Code.RUNNING
    current = choose(drop | rejected, state.previous, state.params)
    proposal = updated
    if search is not None:
        search, proposal = propose(search, current, stats, rules, state.floor, k + 1, jnp.abs(objective))
    return EMState(
        params=choose(goes_on, proposal, current),
        previous=current,
        floor=state.floor,
        log_probs=log_probs,
        log_priors=log_priors,
        num_updates=jnp.where(goes_on, k + 1, jnp.where(drop, k - 1, k)),
        code=code,
        broken=jnp.where(code == Code.UPDATE_NOT_FINITE, broken, state.broken),
        kept=never_free(stats.dynamics),
        search=search,
    )


def _run_with_bar(state: EMState, problem: Problem, num_iters: int) -> EMState:
    """The same loop in short runs, with a bar between them."""
    bar, size = ProgressBar("fit_em", num_iters), 1
    try:
        while int(state.code) == Code.RUNNING:
            began = time.perf_counter()
            state = jax.block_until_ready(_run(state, problem, min(int(state.num_updates) + size, num_iters)))
            done = int(state.num_updates)
            bar.draw(done, float(state.log_probs[max(done - 1, 0)]))
            if time.perf_counter() - began < DRAW_EVERY_SECONDS / 2:
                size *= 2
    except KeyboardInterrupt:
        at = int(state.num_updates)
        state = eqx.tree_at(
            lambda s: (s.params, s.num_updates, s.code),
            state,
            (state.previous, jnp.int32(max(at - 1, 0)), jnp.int32(Code.INTERRUPTED)),
        )
    finally:
        bar.close()
    return state


@partial(jax.jit, static_argnames="num_iters")
def _finish(state: EMState, problem: Problem, center: Array, start: ParamsLGSSM, num_iters: int) -> FitResult:
    """Undo the centering, and repeat the last entry of the logs to their end."""
    places = jnp.minimum(jnp.arange(num_iters + 1, dtype=jnp.int32), state.num_updates)
    params = shift_bias(state.params, -center)
    moves = problem.rules.emissions.coefficients
    bias, before = params.emissions.bias, start.emissions.bias
    if isinstance(bias, TimeVarying) or isinstance(before, TimeVarying):
        bias = before
    elif moves is not None:
        bias = jnp.where(moves[:, -1], bias, before)
    params = eqx.tree_at(lambda p: p.emissions.bias, params, bias)
    params = jax.tree.map(lambda new, old: jnp.where(state.num_updates > 0, new, old), params, start)
    return FitResult(
        params=params,
        log_probs=state.log_probs[places],
        log_priors=state.log_priors[places],
        converged=state.code == Code.CONVERGED,
        num_iters=state.num_updates,
        code=state.code,
        broken=state.broken,
        floored=_at_floor(state, problem.rules),
        kept=state.kept,
    )


def _result(fit: FitResult) -> FitResult:
    """Trim the logs where their length is known."""
    if not is_concrete(fit.num_iters):
        return fit
    num_iters = int(fit.num_iters)
    logs = (fit.log_probs[: num_iters + 1], fit.log_priors[: num_iters + 1])
    where = lambda f: (f.log_probs, f.log_priors, f.num_iters, f.converged)  # noqa: E731
    return eqx.tree_at(where, fit, (*logs, num_iters, bool(fit.converged)))


def _at_floor(state: EMState, rules: Rules) -> Array:
    cov = state.params.emissions.cov
    if isinstance(cov, TimeVarying):
        return jnp.zeros(state.floor.shape, bool)
    variances = cov if cov.ndim == 1 else variance_given_others(cov, state.floor)
    return rules.emissions.cov.any() & (variances <= state.floor * (1 + 1e-3))


def _rounding(dtype: Any) -> float:
    """Relative loss that counts as rounding."""
    return 1e-8 if dtype == jnp.float64 else 1e-4


def _shift_problem(problem: Problem, center: Array) -> Problem:
    """Emissions less their mean, and the priors of the emission bias with them: the same problem, better conditioned."""
    prior = problem.rules.emissions.prior
    if prior is not None:
        shifted: ResolvedPrior = eqx.tree_at(lambda p: p.mean, prior, prior.mean.at[:, -1].add(-center))
        problem = eqx.tree_at(lambda p: p.rules.emissions.prior, problem, shifted)
    return eqx.tree_at(lambda p: p.trials.emissions, problem, problem.trials.emissions - center[None, None])


def _with_sums(params: ParamsLGSSM, problem: Problem) -> Problem:
    """With what is summed over the data once for all iterations."""
    trials = problem.trials
    if trials.may_miss:
        return problem
    sums = sum_emissions(params, trials.emissions, trials.plan.inputs)
    return eqx.tree_at(lambda p: p.trials.sums, problem, sums, is_leaf=lambda x: x is None)


def _check_options(num_iters: Any, tol: Any, accelerate: Any, progress: Any) -> None:
    if isinstance(num_iters, bool) or not isinstance(num_iters, (int, np.integer)) or num_iters < 1:
        fail(
            "num_iters",
            got=repr(num_iters),
            expected="an integer of at least 1",
            remedy="To evaluate parameters without fitting, use `marginal_log_prob`.",
        )
    if not _is_tolerance(tol):
        fail("tol", got=repr(tol), expected="a number of at least zero", remedy="Zero runs until nothing is gained.")
    if not isinstance(accelerate, bool):
        fail("accelerate", got=repr(accelerate), expected="True or False", remedy="False is plain EM.")
    if not isinstance(progress, bool):
        fail("progress", got=repr(progress), expected="True or False", remedy="True draws a bar on standard error.")


def _is_tolerance(tol: Any) -> bool:
    if not is_concrete(tol):
        return tol.ndim == 0
    array = np.asarray(tol)
    return array.ndim == 0 and array.dtype.kind in "iuf" and bool(array >= 0)
