"""The loop behind `fit_em`: updates by EM or by the accelerated search, each judged by its likelihood."""

import time
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from issm._compile import QUICKER, jit_quickly
from issm._host import is_concrete, to_device
from issm._trees import choose
from issm.fitting.centering import (
    mean_of_observed,
    shift_bias,
    variance_floor,
    variance_of_observed,
)
from issm.fitting.m_step import Rules, log_prior, m_step
from issm.fitting.mask_patterns import Patterns
from issm.fitting.priors import ResolvedPrior
from issm.fitting.progress import ProgressBar
from issm.fitting.quasi_newton import SUFFICIENT, Search, look_around, propose, shorten, start_search
from issm.fitting.regression import never_free
from issm.fitting.result import Code, first_broken_field
from issm.fitting.statistics import SufficientStatistics, expected_statistics
from issm.inference.methods import choose_method, suits
from issm.models.emission_sums import sum_emissions
from issm.models.lgssm import ParamsLGSSM
from issm.models.trials import Trials

DRAW_EVERY_SECONDS = 0.3


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


@partial(jit_quickly, static_argnames=("num_places", "accelerate"))
def prepare(params: ParamsLGSSM, problem: Problem, num_places: int, accelerate: bool) -> tuple[Problem, EMState, Array]:
    """Center the emissions, and set up the loop."""
    center = mean_of_observed(problem.trials)
    floor = variance_floor(params, variance_of_observed(problem.trials, center))
    params = shift_bias(params, center)
    blank = jnp.full(num_places, jnp.nan, params.initial.mean.dtype)
    zero = jnp.zeros((), jnp.int32)
    kept = jnp.zeros(params.state_dim, bool)
    search = start_search(params, problem.trials) if accelerate else None
    state = EMState(params, params, floor, blank, blank, zero, zero, zero - 1, kept, search)
    return _with_sums(params, _shift_problem(problem, center)), state, center


def run(state: EMState, problem: Problem, until: int | Int[Array, ""]) -> EMState:
    """Iterate until the fit has ended or `until` updates are behind it.

    In single precision a program holds either the plain form of the smoother or that with square roots, and ends where the parameters
    need the other: most fits compile one of them. Where JAX traces, both are in one program.
    """
    until, trials = to_device(until, np.int32), problem.trials
    iterate = _iterate_lanes if trials.have_own_patterns else _iterate
    if state.params.initial.mean.dtype != jnp.float32 or not is_concrete(state.code):
        return iterate(state, problem, until, "auto")
    while bool(_goes_on(state, problem, until)):
        state = iterate(state, problem, until, choose_method("auto", state.params, trials))
    return state


def _loop(state: EMState, problem: Problem, until: Int[Array, ""], method: str) -> EMState:
    begun = state.num_updates

    def running(state: EMState) -> Array:
        # The first update comes whatever happens: should rounding turn the verdict that chose this program, the fit moves on.
        is_first = state.num_updates == begun
        return _goes_on(state, problem, until) & (is_first | suits(method, state.params))

    def iterate(state: EMState) -> EMState:
        stats = expected_statistics(state.params, problem.trials, problem.patterns, method)
        return _advance(state, stats, problem)

    return lax.while_loop(running, iterate, state)


# Trials with patterns of their own are lanes of one loop, which the quickest compilation would slow down.
_iterate = jit_quickly(_loop, static_argnames="method")
_iterate_lanes = jit_quickly(_loop, static_argnames="method", options=QUICKER)


def _goes_on(state: EMState, problem: Problem, until: Int[Array, ""]) -> Array:
    return (state.code == Code.RUNNING) & ((state.num_updates < until) | (state.num_updates == problem.last))


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


def _rounding(dtype: Any) -> float:
    """Relative loss that counts as rounding."""
    return 1e-8 if dtype == jnp.float64 else 1e-4


def run_with_bar(state: EMState, problem: Problem, num_iters: int) -> EMState:
    """The same loop in short runs, with a bar between them."""
    bar, size = ProgressBar("fit_em", num_iters), 1
    try:
        while int(state.code) == Code.RUNNING:
            began = time.perf_counter()
            state = jax.block_until_ready(run(state, problem, min(int(state.num_updates) + size, num_iters)))
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
