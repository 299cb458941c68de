r"""Filter and smoother for a handful of states, all trials at once.

Covariances are computed once for each pattern of clamps and missing entries, means for each trial: by `shared_means` where many trials
share a pattern, else here, with the trials as lanes. Where no two trials share one, `own_patterns` runs.
"""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from issm.inference import lanes
from issm.inference.compression import compress
from issm.inference.covariances import PatternTransitions, StepMatrices, run_covariances, run_informations
from issm.inference.means import following
from issm.inference.moments import Moments, TrialMeans
from issm.inference.own_patterns import Steps, own_moments
from issm.inference.shared_means import are_worth_it, shared_means
from issm.models.lgssm import ParamsLGSSM
from issm.models.transitions import free_transitions, lgssm_transitions
from issm.models.trials import Chunks, Plan, Trials


def small_moments(params: ParamsLGSSM, trials: Trials) -> Moments:
    """Filter and smooth all trials; what the caller does not use is not computed under `jit`."""
    observations = compress(params, trials)
    transitions = _of_patterns(params, trials.of_patterns().plan)
    shifts = _shifts(params, trials.plan)
    if trials.have_own_patterns:
        values = observations.values - observations.offsets
        moments = own_moments(Steps(transitions, shifts, values, observations.weights))
        return replace(moments, logliks=observations.log_norm + moments.logliks - observations.unexplained / 2)

    weights = transitions.weights
    updates = run_covariances(transitions, observations.weights, trials.num_patterns)
    predicted_covs, filtered_covs = lanes.symmetrize(updates.predicted), lanes.symmetrize(updates.filtered)
    retained, white_weights = updates.retained, updates.white_weights
    next_weights = following(weights)
    propagated = lanes.matmul(next_weights, retained)
    onward = lanes.matmul(filtered_covs, lanes.transpose(next_weights))
    information = lanes.matmul(lanes.transpose(white_weights), white_weights)
    informations = lanes.symmetrize(run_informations(propagated, information))
    explained = lanes.matmul(onward, following(informations))
    smoothed_covs = lanes.symmetrize(filtered_covs - lanes.matmul(explained, lanes.transpose(onward)))
    cross_covs = onward[:-1] - lanes.matmul(explained[:-1], predicted_covs[1:])

    matrices = StepMatrices(weights, retained, updates.gains, updates.whitener, white_weights, propagated, onward)
    values, offsets, chunks = observations.values, observations.offsets, trials.chunks
    if are_worth_it(trials.num_trials, params.state_dim, trials.num_patterns, chunks):
        means = shared_means(matrices, shifts, values, offsets, chunks)
    else:
        means = _means_in_lanes(matrices, _to_lanes(shifts), _to_lanes(values - offsets), _Layout(chunks))
    return Moments(
        logliks=observations.log_norm
        - (trials.spread(updates.log_det.T) + means.squares + observations.unexplained) / 2,
        filtered_means=means.filtered,
        filtered_covs=_from_lanes(filtered_covs),
        predicted_means=means.predicted,
        predicted_covs=_from_lanes(predicted_covs),
        adjoints=means.adjoints,
        informations=_from_lanes(informations),
        smoothed_means=means.smoothed,
        smoothed_covs=_from_lanes(smoothed_covs),
        smoothed_cross_covs=_from_lanes(cross_covs),
    )


def _means_in_lanes(matrices: StepMatrices, shifts: Array, values: Array, layout: "_Layout") -> TrialMeans:
    """The means of all trials, with the trials as lanes; what is not recursive is a pass over all steps."""
    shifts, values = layout.enter(shifts), layout.enter(values)
    each = layout.each
    closed_loop = lanes.matmul(matrices.retained, matrices.weights)
    drive = lanes.matvec(each(matrices.retained), shifts) + lanes.matvec(each(matrices.gains), values)
    filtered = _recursion(each(closed_loop), drive)
    previous = jnp.concatenate([jnp.zeros_like(filtered[:1]), filtered[:-1]])
    predicted = lanes.matvec(each(matrices.weights), previous) + shifts
    seen = lanes.matvec(each(matrices.white_weights), predicted)
    innovations = lanes.matvec(each(matrices.whitener), values) - seen
    scores = lanes.matvec(each(lanes.transpose(matrices.white_weights)), innovations)
    adjoints = _recursion(each(matrices.propagated), scores, reverse=True)
    smoothed = filtered + lanes.matvec(each(matrices.onward), following(adjoints))
    squares = (innovations**2).sum(axis=-2)
    return TrialMeans(*map(layout.leave, (filtered, predicted, squares, adjoints, smoothed)))


def _recursion(matrices: Array, drive: Array, reverse: bool = False) -> Array:
    """x_t = W_t x_{t-1} + b_t, or x_t = W_t' x_{t+1} + b_t, from zero; the vectors take the place of b_t, without another array."""
    num_steps = drive.shape[0]

    def step(count: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        vector, vectors = carry
        t = num_steps - 1 - count if reverse else count
        matrix, shift = (lax.dynamic_index_in_dim(x, t, keepdims=False) for x in (matrices, vectors))
        vector = lanes.matvec(lanes.transpose(matrix) if reverse else matrix, vector) + shift
        return vector, lax.dynamic_update_index_in_dim(vectors, vector, t, axis=0)

    return lax.fori_loop(0, num_steps, step, (jnp.zeros_like(drive[0]), drive))[1]


class _Layout(eqx.Module):
    """The order of the trials in the lanes: chunks of one pattern where trials share patterns, else as they came."""

    chunks: Chunks | None

    def enter(self, by_trial: Array) -> Array:
        """From `(..., num_trials or 1)` to lanes."""
        if self.chunks is None:
            return by_trial
        chosen = self.chunks.trials.reshape(-1)
        if by_trial.shape[-1] == 1:
            return jnp.broadcast_to(by_trial, (*by_trial.shape[:-1], len(chosen)))
        return jnp.take(by_trial, chosen, axis=-1)

    def each(self, by_pattern: Array) -> Array:
        """From one lane for each pattern to one for each chunk."""
        return by_pattern if self.chunks is None else jnp.take(by_pattern, self.chunks.pattern, axis=-1)

    def leave(self, by_lane: Array) -> Array:
        """From lanes to `(num_trials, ...)`."""
        return _from_lanes(by_lane if self.chunks is None else jnp.take(by_lane, self.chunks.place, axis=-1))


def _of_patterns(params: ParamsLGSSM, plan: Plan) -> PatternTransitions:
    """The transitions of every pattern."""
    inputs = jnp.zeros((plan.inputs.shape[-2], params.input_dim), plan.inputs.dtype)
    leading = lambda leaf: leaf if leaf.ndim == 3 else leaf[None]  # noqa: E731
    clamps = jax.tree.map(lambda leaf: _to_lanes(leading(leaf)), plan.intervention)
    return PatternTransitions(free_transitions(params, inputs), clamps)


def _shifts(params: ParamsLGSSM, plan: Plan) -> Array:
    """$a_t$ with a leading axis over the trials of the plan, of length 1 if they share it."""
    one = lambda inputs, intervention: lgssm_transitions(params, inputs, intervention).shift  # noqa: E731
    if plan.inputs.ndim == 2 and plan.intervention.mask.ndim == 2:
        return one(plan.inputs, plan.intervention)[None]
    axes = plan.axes
    return jax.vmap(one, in_axes=(axes.inputs, axes.intervention))(plan.inputs, plan.intervention)


def _to_lanes(array: Array) -> Array:
    return jnp.moveaxis(array, 0, -1)


def _from_lanes(array: Array) -> Array:
    return jnp.moveaxis(array, -1, 0)
