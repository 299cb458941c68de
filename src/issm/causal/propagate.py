"""An effect for known parameters, carried through what is not known of them: draws, or a covariance to first order."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax import lax
from jaxtyping import Array, Float

from issm._linalg import safe_sqrt
from issm.causal.estimates import Effect
from issm.causal.uncertainty import Directions, empirical_spread, mixture_spread, normal_spread
from issm.models.lgssm import ParamsLGSSM

DRAWS_AT_ONCE = 32


class Normal(eqx.Module):
    """Mean and variance of one number, over trials."""

    mean: Array
    variance: Array


class Summaries(eqx.Module):
    """The four quantities of an `EffectEstimate` for known parameters."""

    per_step: Normal
    cumulative: Normal
    average: Normal
    relative: Normal


def over_trials(each: Normal) -> Normal:
    """The average over trials, whose noise is independent."""
    return Normal(each.mean.mean(axis=0), each.variance.mean(axis=0) / each.mean.shape[0])


def effects_of(
    summaries: Callable[[ParamsLGSSM], Any],
    params: ParamsLGSSM,
    uncertain: ParamsLGSSM | Directions | None,
    z: Float[Array, ""],
) -> Any:
    """An `Effect` in the place of every `Normal` of the pytree that `summaries` returns for some parameters."""
    is_normal = lambda node: isinstance(node, Normal)  # noqa: E731
    if uncertain is None:
        return jax.tree.map(lambda known: _effect(known, z), summaries(params), is_leaf=is_normal)
    if isinstance(uncertain, Directions):
        known, derivative = jax.linearize(summaries, params)
        changes = jax.vmap(derivative)(uncertain.columns)
        return jax.tree.map(lambda at, change: _effect_by_change(at, change, z), known, changes, is_leaf=is_normal)
    drawn = lax.map(summaries, uncertain, batch_size=DRAWS_AT_ONCE)
    return jax.tree.map(lambda draws: _effect_of_draws(draws, z), drawn, is_leaf=is_normal)


def _effect(known: Normal, z: Array) -> Effect:
    trial = normal_spread(known.mean, safe_sqrt(known.variance), z)
    return Effect(known.mean, trial, None, trial)


def _effect_by_change(known: Normal, change: Normal, z: Array) -> Effect:
    noise, ignorance = known.variance, (change.mean**2).sum(axis=0)
    return Effect(
        mean=known.mean,
        trial=normal_spread(known.mean, safe_sqrt(noise), z),
        parameter=normal_spread(known.mean, safe_sqrt(ignorance), z),
        total=normal_spread(known.mean, safe_sqrt(noise + ignorance), z),
    )


def _effect_of_draws(draws: Normal, z: Array) -> Effect:
    mean, noise = draws.mean.mean(axis=0), safe_sqrt(draws.variance)
    return Effect(
        mean=mean,
        trial=normal_spread(mean, safe_sqrt(draws.variance.mean(axis=0)), z),
        parameter=empirical_spread(draws.mean, z),
        total=mixture_spread(draws.mean, noise, z),
    )
