r"""Exact, monotone expectation maximisation for the clamped linear Gaussian model."""

from functools import partial
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from issm._check import fail
from issm._compile import jit_quickly
from issm._host import is_concrete, to_device
from issm._trees import choose
from issm.fitting.centering import (
    count_observed,
    shift_bias,
    variance_given_others,
)
from issm.fitting.em_loop import EMState, Problem, prepare, run, run_with_bar
from issm.fitting.m_step import Rules, make_rules
from issm.fitting.mask_patterns import find_patterns
from issm.fitting.priors import Priors
from issm.fitting.quasi_newton import WARM_UP
from issm.fitting.result import Code, FitResult
from issm.interventions import Intervention
from issm.models.fields import TimeVarying
from issm.models.lgssm import ParamsLGSSM
from issm.models.trials import Trials, as_trials


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
    check_stopping(num_iters, tol)
    _check_flags(accelerate, progress)
    trials = as_trials(params, emissions, inputs, interventions)
    problem = pose(params, trials, make_rules(params, trainable, priors), num_iters, tol)
    return trim(solve(params, problem, num_iters, accelerate=accelerate, progress=progress))


def improve(params: ParamsLGSSM, trials: Trials, num_iters: int, tol: float = 0.0) -> FitResult:
    """Some updates with the defaults of `fit_em`; what is compiled for them serves `fit_em` on the same data."""
    return solve(params, pose(params, trials, make_rules(params, None, None), num_iters, tol), num_iters)


def pose(params: ParamsLGSSM, trials: Trials, rules: Rules, num_iters: int, tol: Any) -> Problem:
    """What is asked of a fit, in one pytree."""
    dtype = params.initial.mean.dtype
    patterns = find_patterns(params, trials)
    numbers = count_observed(trials)
    return Problem(trials, patterns, rules, to_device(tol, dtype), to_device(num_iters, np.int32), numbers)


def solve(
    params: ParamsLGSSM, problem: Problem, num_iters: int, *, accelerate: bool = True, progress: bool = False
) -> FitResult:
    """The fit from some parameters on, its logs as long as they may become."""
    accelerate = accelerate and num_iters > WARM_UP and problem.rules.input_l1 is None
    centered, state, center = prepare(params, problem, _places(num_iters), accelerate)
    iterate = run_with_bar if progress and is_concrete(state.code) else run
    return _finish(iterate(state, centered, num_iters), problem, center, params, num_iters)


def _places(num_iters: int) -> int:
    """Length of the logs, in steps of 1024, so that fits of other lengths need no other compilation."""
    return -(-(num_iters + 1) // 1024) * 1024


@partial(jit_quickly, static_argnames="num_iters")
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
    params = choose(state.num_updates > 0, params, start)
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


def trim(fit: FitResult) -> FitResult:
    """Trim the logs where their length is known."""
    if not is_concrete(fit.num_iters):
        return fit
    num_iters = int(fit.num_iters)
    logs = (to_device(np.asarray(log)[: num_iters + 1]) for log in (fit.log_probs, fit.log_priors))
    where = lambda f: (f.log_probs, f.log_priors, f.num_iters, f.converged)  # noqa: E731
    return eqx.tree_at(where, fit, (*logs, num_iters, bool(fit.converged)))


def _at_floor(state: EMState, rules: Rules) -> Array:
    cov = state.params.emissions.cov
    if isinstance(cov, TimeVarying):
        return jnp.zeros(state.floor.shape, bool)
    variances = cov if cov.ndim == 1 else variance_given_others(cov, state.floor)
    return rules.emissions.cov.any() & (variances <= state.floor * (1 + 1e-3))


def check_stopping(num_iters: Any, tol: Any) -> None:
    """Refuse what says nothing about when a fit is to end."""
    if isinstance(num_iters, bool) or not isinstance(num_iters, (int, np.integer)) or num_iters < 1:
        fail(
            "num_iters",
            got=repr(num_iters),
            expected="an integer of at least 1",
            remedy="To evaluate parameters without fitting, use `marginal_log_prob`.",
        )
    if not _is_tolerance(tol):
        fail("tol", got=repr(tol), expected="a number of at least zero", remedy="Zero runs until nothing is gained.")


def _check_flags(accelerate: Any, progress: Any) -> None:
    if not isinstance(accelerate, bool):
        fail("accelerate", got=repr(accelerate), expected="True or False", remedy="False is plain EM.")
    if not isinstance(progress, bool):
        fail("progress", got=repr(progress), expected="True or False", remedy="True draws a bar on standard error.")


def _is_tolerance(tol: Any) -> bool:
    if not is_concrete(tol):
        return tol.ndim == 0
    array = np.asarray(tol)
    return array.ndim == 0 and array.dtype.kind in "iuf" and bool(array >= 0)
