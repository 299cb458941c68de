"""Refits to data drawn anew: the uncertainty of a fit without its asymptotics."""

from dataclasses import replace
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from issm._check import check_key, fail
from issm._compile import jit_quickly
from issm._host import is_concrete, to_device
from issm._types import PRNGKey
from issm.fitting.centering import count_observed
from issm.fitting.em import check_stopping, pose, solve
from issm.fitting.em_loop import Problem
from issm.fitting.intervals import means, quantiles, standard_deviations
from issm.fitting.m_step import make_rules
from issm.fitting.priors import Priors
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM
from issm.models.sampling import sample_sequence
from issm.models.trials import as_trials

KINDS = ("parametric", "trials")


class Bootstrap(eqx.Module):
    r"""Parameters fitted to data drawn anew.

    Attributes:
        params: The fit that the draws are about.
        draws: The refits, one leading axis `num_samples`: what `causal_effect` takes in `parameters`.
        standard_errors: Standard deviation of the refits, in the structure of the parameters; zero for what is fixed.
        bias: Their mean less the fit; not taken off anything.
        log_probs: Log-likelihood of every refit on its own data, `(num_samples,)`.
        converged: Whether every refit converged, `(num_samples,)`.
        num_iters: Updates behind every refit, `(num_samples,)`.

    References:
        Efron & Tibshirani (1993), *An Introduction to the Bootstrap*, ch. 6 and 13; Stoffer & Wall (1991), *JASA* 86, for
        state-space models.

    Examples:
        >>> import jax, numpy as np, issm
        >>> params = issm.make_lgssm_params(0.0, 1.0, 0.5, 1.0, 1.0, 1.0)
        >>> refits = issm.bootstrap(jax.random.key(0), params, np.sin(np.arange(30.0))[:, None], num_samples=3, num_iters=2)
        >>> refits.draws.dynamics.weights.shape, refits.reason
        ((3, 1, 1), '0 of 3 refits converged; raise num_iters')
    """

    params: ParamsLGSSM
    draws: ParamsLGSSM
    standard_errors: ParamsLGSSM
    bias: ParamsLGSSM
    log_probs: Float[Array, " num_samples"]
    converged: Bool[Array, " num_samples"]
    num_iters: Int[Array, " num_samples"]

    @property
    def reason(self) -> str:
        """How the refits went, in words."""
        if not is_concrete(self.converged):
            return "not known while JAX traces"
        done = np.asarray(self.converged)
        return f"{done.sum()} of {done.size} refits converged" + ("" if done.all() else "; raise num_iters")

    def intervals(self, level: float = 0.95) -> tuple[ParamsLGSSM, ParamsLGSSM]:
        """Central intervals of the refits by percentiles.

        Args:
            level: Probability inside, between 0 and 1.

        Returns:
            Lower and upper ends in the structure of the parameters.

        Raises:
            ValueError: If `level` is not between 0 and 1.
        """
        return quantiles(self.draws, level)


def bootstrap(
    key: PRNGKey,
    params: ParamsLGSSM,
    emissions: Any,
    inputs: Any = None,
    *,
    interventions: Intervention | None = None,
    kind: str = "parametric",
    num_samples: int = 200,
    trainable: Any = None,
    priors: Priors | None = None,
    num_iters: int = 100,
    tol: float = 1e-7,
    num_at_once: int = 16,
) -> Bootstrap:
    r"""Refit the model to data drawn anew, by `fit_em` from `params`.

    "parametric" draws new states and emissions from the model under the same inputs, clamps and missing entries. "trials" draws
    whole trials from the data with replacement, and does not rest on the model being right; it needs many trials, since those
    drawn twice count as independent. A refit starts from `params`, so that the coordinates of the states stay those of the fit as
    far as clamps or frozen entries hold them; freeze in `trainable` what the data do not identify.

    Args:
        key: JAX random key.
        params: Fitted parameters.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or `(num_trials, num_timesteps, emission_dim)`; NaN is missing.
        inputs: Soft inputs $u_t$, `(num_timesteps, input_dim)`, shared or one such array for each trial.
        interventions: Clamps, shared or one for each trial. None: no clamps.
        kind: "parametric" or "trials".
        num_samples: Number of refits, at least 2. Standard errors are good to a share of about $1 / \sqrt{2 \cdot num\_samples}$.
        trainable: As for `fit_em`.
        priors: As for `fit_em`.
        num_iters: Largest number of EM updates of a refit.
        tol: As for `fit_em`.
        num_at_once: Refits that run side by side; more need more memory.

    Returns:
        The refits, their standard deviations, and how they went.

    Raises:
        ValueError: If an argument has the wrong shape, type or values; the message names it.

    References:
        Efron & Tibshirani (1993), *An Introduction to the Bootstrap*, ch. 6; Stoffer & Wall (1991), *JASA* 86.

    Examples:
        >>> import jax, issm
        >>> truth = issm.make_lgssm_params(0.0, 1.0, 0.9, 0.1, 1.0, 0.5)
        >>> plan = issm.do({0: 2.0}, num_timesteps=30, state_dim=1, start=10, stop=20)
        >>> _, emissions = issm.lgssm_sample(jax.random.key(0), truth, 30, interventions=plan)
        >>> refits = issm.bootstrap(
        ...     jax.random.key(1), truth, emissions, interventions=plan, num_samples=3, num_iters=2)
        >>> bool(refits.standard_errors.dynamics.weights[0, 0] > 0)
        True
    """
    check_key(key)
    _check_options(kind, num_samples, num_at_once)
    check_stopping(num_iters, tol)
    trials = as_trials(params, emissions, inputs, interventions)
    if kind == "trials" and trials.num_trials < 2:
        fail(
            "emissions",
            got="one trial",
            expected='at least two for kind="trials"',
            remedy='Draw from the model instead: kind="parametric".',
        )
    if not all(is_concrete(leaf) for leaf in jax.tree.leaves((params, trials))):
        fail(
            "emissions",
            got="values that JAX traces, or parameters of that kind",
            expected="known ones",
            remedy="Call it outside of `jit` and `vmap`: its refits are compiled and batched already.",
        )
    problem = pose(params, trials, make_rules(params, trainable, priors), num_iters, tol)
    draws, log_probs, converged, counts = _refit(key, params, problem, kind, num_samples, num_iters, num_at_once)
    return Bootstrap(
        params=params,
        draws=draws,
        standard_errors=standard_deviations(draws),
        bias=jax.tree.map(lambda mean, own: to_device(np.asarray(mean) - np.asarray(own)), means(draws), params),
        log_probs=log_probs,
        converged=converged,
        num_iters=counts,
    )


@partial(jit_quickly, static_argnames=("kind", "num_samples", "num_iters", "num_at_once"))
def _refit(
    key: PRNGKey,
    params: ParamsLGSSM,
    problem: Problem,
    kind: str,
    num_samples: int,
    num_iters: int,
    num_at_once: int,
) -> tuple[ParamsLGSSM, Array, Array, Array]:
    """Parameters of all refits, their last log-likelihoods, whether they have converged and after how many updates."""
    redraw = _redraw if kind == "parametric" else _resample

    def one(key: PRNGKey) -> Any:
        fit = solve(params, redraw(key, params, problem), num_iters)
        return fit.params, fit.log_probs[-1], fit.converged, fit.num_iters

    size = min(num_at_once, num_samples)
    count = -(-num_samples // size)
    keys = jax.random.split(key, count * size)  # the last few may be drawn in vain
    keys = keys.reshape(count, size, *keys.shape[1:])
    flat = lambda leaf: leaf.reshape(count * size, *leaf.shape[2:])[:num_samples]  # noqa: E731
    return jax.tree.map(flat, lax.map(jax.vmap(one), keys))


def _redraw(key: PRNGKey, params: ParamsLGSSM, problem: Problem) -> Problem:
    """The same with new data from the model: the same entries are missing, so that trials share what they shared."""
    trials = problem.trials
    axes = trials.plan.axes
    draw = jax.vmap(sample_sequence, in_axes=(0, None, axes.inputs, axes.intervention))
    keys = jax.random.split(key, trials.num_trials)
    _, emissions = draw(keys, params, trials.plan.inputs, trials.plan.intervention)
    if trials.may_miss:
        emissions = jnp.where(jnp.isnan(trials.emissions), jnp.nan, emissions)
    return replace(problem, trials=replace(trials, emissions=emissions))


def _resample(key: PRNGKey, params: ParamsLGSSM, problem: Problem) -> Problem:
    """The same with trials drawn with replacement, each with its inputs and clamps."""
    trials, patterns = problem.trials, problem.patterns
    chosen = jax.random.randint(key, (trials.num_trials,), 0, trials.num_trials)
    plan = jax.tree.map(lambda leaf: leaf[chosen] if leaf.ndim == 3 else leaf, trials.plan)
    trials = replace(trials, emissions=trials.emissions[chosen], plan=plan)
    if trials.num_patterns > 1:  # which trials share a pattern is not known before they are drawn
        trials = replace(trials, representatives=jnp.arange(trials.num_trials), pattern=None, chunks=None)
    if problem.trials.plan.intervention.mask.ndim == 3:
        patterns = eqx.tree_at(
            lambda p: (p.initial.index, p.dynamics.index), patterns, replace_fn=lambda at: at[chosen]
        )
    return replace(problem, trials=trials, patterns=patterns, numbers=count_observed(trials))


def _check_options(kind: Any, num_samples: Any, num_at_once: Any) -> None:
    if kind not in KINDS:
        fail("kind", got=repr(kind), expected=f"one of {KINDS}", remedy='"parametric" draws from the model.')
    for name, value, least in (("num_samples", num_samples, 2), ("num_at_once", num_at_once, 1)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            fail(name, got=repr(value), expected=f"an integer of at least {least}", remedy="Give a count.")
