r"""Filter and smoother where every trial has a pattern of its own: one loop forwards, one backwards, the trials as lanes.

The covariances of all trials are then larger than all else together, and to touch new memory costs more than the arithmetic. The loops
write results where they stay, $P^-_t$ and $P_t$ forwards and what is smoothed backwards, and keep nothing else: the loop backwards makes
$V_t$ and $L_t^{-1} H_t$ from $P^-_t$ once more.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from issm.inference import lanes
from issm.inference.covariances import PatternTransitions, Updates, predict, update
from issm.inference.memory import blanks, stored
from issm.inference.moments import Moments


class Steps(eqx.Module):
    """What is given at every step.

    Attributes:
        transitions: $A_t$ and $Q_t$, a lane for each trial.
        shifts: $a_t$, `(num_trials or 1, num_timesteps, state_dim)`.
        values: $z_t$, `(num_trials, num_timesteps, rows)`.
        rows: $H_t$, `(num_timesteps or 1, rows, state_dim, num_trials or 1)`.
    """

    transitions: PatternTransitions
    shifts: Array
    values: Array
    rows: Array

    @property
    def num_timesteps(self) -> int:
        """Number of steps T."""
        return self.values.shape[1]

    def transition(self, t: Any) -> tuple[Array, Array]:
        """$A_t$ and $Q_t$ as lanes."""
        here = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, t), self.transitions)
        return here.weights[0], here.cov[0]

    def update(self, t: Any, predicted: Array) -> Updates:
        """What $z_t$ does to $P^-_t$."""
        shared = self.rows.shape[0] == 1
        return update(predicted, self.rows[0] if shared else lax.dynamic_index_in_dim(self.rows, t, keepdims=False))

    def innovations(self, t: Any, update: Updates, predicted_mean: Array) -> Array:
        """$L^{-1} (z_t - H m^-_t)$."""
        seen = lanes.matvec(update.white_weights, predicted_mean)
        return lanes.matvec(update.whitener, _read(self.values, t)) - seen

    def blank(self, *orders: int) -> tuple[Array, ...]:
        """Arrays of all trials and steps to write into: numbers, vectors or matrices."""
        dim = (self.rows.shape[2],)
        return blanks(self.values.dtype, *((*self.values.shape[:2], *dim * order) for order in orders))

    def nothing(self, *orders: int) -> tuple[Array, ...]:
        """Zeros of one step as lanes: numbers, vectors or matrices."""
        dim, num_trials = (self.rows.shape[2],), self.values.shape[:1]
        return tuple(jnp.zeros((*dim * order, *num_trials), self.values.dtype) for order in orders)


class _Forwards(eqx.Module):
    """Of all trials and steps; `logliks` is without what no state explains."""

    predicted_covs: Array
    filtered_covs: Array
    predicted_means: Array
    filtered_means: Array
    logliks: Array


class _Backwards(eqx.Module):
    smoothed_covs: Array
    cross_covs: Array
    informations: Array
    smoothed_means: Array
    adjoints: Array


def own_moments(steps: Steps) -> Moments:
    """Filter and smooth; `logliks` is without what no state explains."""
    forwards = _run_forwards(steps)
    backwards = _run_backwards(steps, forwards)
    return Moments(
        logliks=forwards.logliks,
        filtered_means=forwards.filtered_means,
        filtered_covs=forwards.filtered_covs,
        predicted_means=forwards.predicted_means,
        predicted_covs=forwards.predicted_covs,
        adjoints=backwards.adjoints,
        informations=backwards.informations,
        smoothed_means=backwards.smoothed_means,
        smoothed_covs=backwards.smoothed_covs,
        smoothed_cross_covs=backwards.cross_covs[:, : steps.num_timesteps - 1],
    )


def _run_forwards(steps: Steps) -> _Forwards:
    def step(t: Array, carry: tuple) -> tuple:
        mean, cov, found = carry
        weights, noise = steps.transition(t)
        predicted = stored(predict(cov, weights, noise))
        predicted_mean = lanes.matvec(weights, mean) + _read(steps.shifts, t)
        update = steps.update(t, predicted)
        innovations = steps.innovations(t, update, predicted_mean)
        mean = lanes.matvec(update.retained, predicted_mean) + lanes.matvec(update.gains, _read(steps.values, t))
        cov = lanes.symmetrize(update.filtered)
        loglik = -(update.log_det + (innovations**2).sum(axis=0)) / 2
        here = _Forwards(lanes.symmetrize(predicted), cov, predicted_mean, mean, loglik)
        return mean, cov, _write(found, here, t)

    start = (*steps.nothing(1, 2), _Forwards(*steps.blank(2, 2, 1, 1, 0)))
    return lax.fori_loop(0, steps.num_timesteps, step, start)[-1]


def _run_backwards(steps: Steps, forwards: _Forwards) -> _Backwards:
    last = steps.num_timesteps - 1

    def step(count: Array, carry: tuple) -> tuple:
        adjoint, information, next_predicted, found = carry
        t = last - count
        next_weights = jnp.where(t < last, steps.transition(jnp.minimum(t + 1, last))[0], 0.0)
        predicted, filtered = (stored(_read(covs, t)) for covs in (forwards.predicted_covs, forwards.filtered_covs))
        onward = lanes.product(filtered, lanes.transpose(next_weights))
        explained = lanes.product(onward, information)
        smoothed = filtered - lanes.matmul(explained, lanes.transpose(onward))
        cross = onward - lanes.matmul(explained, next_predicted)
        mean = _read(forwards.filtered_means, t) + lanes.matvec(onward, adjoint)

        update = steps.update(t, predicted)
        innovations = steps.innovations(t, update, _read(forwards.predicted_means, t))
        scoring = lanes.transpose(update.white_weights)
        propagated = lanes.product(next_weights, update.retained)
        back = lanes.transpose(propagated)
        adjoint = lanes.matvec(scoring, innovations) + lanes.matvec(back, adjoint)
        through = lanes.product(information, propagated)
        information = lanes.symmetrize(lanes.matmul(scoring, update.white_weights) + lanes.matmul(back, through))
        here = _Backwards(lanes.symmetrize(smoothed), cross, information, mean, adjoint)
        return adjoint, information, predicted, _write(found, here, t)

    smoothed, cross, *others = steps.blank(2, 2, 2, 1, 1)
    cross = cross[:, : max(last, 1)]  # what the last step writes past the end is put at the end, and replaced
    start = (*steps.nothing(1, 2, 2), _Backwards(smoothed, cross, *others))
    return lax.fori_loop(0, steps.num_timesteps, step, start)[-1]


def _read(by_trial: Array, t: Any) -> Array:
    """The entries of one step as lanes."""
    return jnp.moveaxis(lax.dynamic_index_in_dim(by_trial, t, axis=1, keepdims=False), 0, -1)


def _write(found: Any, here: Any, t: Any) -> Any:
    """Put what one step made where it stays."""
    put = lambda all, one: lax.dynamic_update_index_in_dim(all, jnp.moveaxis(one, -1, 0), t, axis=1)  # noqa: E731
    return jax.tree.map(put, found, here)
