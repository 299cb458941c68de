"""Trials with every array in full, and the sums over their steps that regressions share."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from issm.models.trials import Trials


class StepData:
    """Trials with every array in full: by trial (k), and by pattern of clamps and missing entries (g)."""

    def __init__(self, trials: Trials, counted: Bool[Array, " num_trials"] | None = None):
        """All trials, or those that are `counted` alone."""
        self.trials = trials
        self.emissions = trials.emissions
        num_trials, num_timesteps, _ = trials.emissions.shape
        self.dtype = trials.emissions.dtype
        spread = lambda leaf, size: jnp.broadcast_to(leaf, (size, *leaf.shape[-2:]))  # noqa: E731
        self.inputs = spread(trials.plan.inputs, num_trials)
        free = ~trials.plan.intervention.mask
        self.observed = ~jnp.isnan(trials.emissions) if trials.may_miss else None
        self.complete = self.observed is None and counted is None
        alive = jnp.ones((num_trials, num_timesteps), bool)
        if self.observed is not None:
            # Steps after the last observation of a trial say nothing: leaving them out is exact, and quicker to converge.
            alive = jnp.flip(jnp.cumsum(jnp.flip(self.observed.any(axis=2), axis=1), axis=1), axis=1) > 0
        if counted is not None:
            alive = alive & counted[:, None]
        self.alive = alive
        self.free = spread(free, num_trials) & alive[:, :, None]
        chosen = trials.representatives
        self.num_patterns = chosen.shape[0]
        self.pattern_free = self.free[chosen]
        self.pattern_alive = alive[chosen]
        self.pattern_observed = None if self.observed is None else self.observed[chosen]
        self.pattern_count = trials.in_patterns.astype(self.dtype)


def gram(regressors: Array, covs: Array, weights: Array | None, pattern_weights: Array) -> Array:
    r"""$\sum E[z z^\top]$ with one weight for each step and row; None: all are one, and all rows alike."""
    rows = flat(regressors)
    one = lambda weight: (rows * weight[:, None]).T @ rows  # noqa: E731
    means = (rows.T @ rows)[None] if weights is None else lax.map(one, flat(weights).T)
    return means + pad_both(jnp.einsum("gtr,gtij->rij", pattern_weights, covs), rows.shape[1])


def pad(sums: Array, columns: int) -> Array:
    """Zeros for the regressors that are known."""
    return jnp.pad(sums, (*((0, 0),) * (sums.ndim - 1), (0, columns - sums.shape[-1])))


def pad_both(sums: Array, columns: int) -> Array:
    """The same in rows and columns."""
    missing = columns - sums.shape[-1]
    return jnp.pad(sums, (*((0, 0),) * (sums.ndim - 2), (0, missing), (0, missing)))


def with_inputs(states: Array, inputs: Array) -> Array:
    """$[x; u; 1]$ at each step."""
    return jnp.concatenate([states, inputs, jnp.ones((*states.shape[:-1], 1), states.dtype)], axis=-1)


def flat(array: Array) -> Array:
    """Trials and steps as one axis."""
    return array.reshape(-1, array.shape[-1])
