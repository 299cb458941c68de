"""Fits with the clamps of `learn_targets` in place, and the gains that go with them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from issm._compile import jit_quickly
from issm.fitting.em import fit_em
from issm.fitting.redrawn import WIDE
from issm.fitting.spectra import CLAMP, SOFT, UNDECIDED
from issm.inference.kalman import marginal_log_prob
from issm.interventions import Intervention, stimulate
from issm.models.coordinates import transform_params
from issm.models.fields import as_matrix, values_of
from issm.models.lgssm import ParamsLGSSM


class Design:
    """Data, with what is known of the channels."""

    def __init__(self, emissions: Array, amplitudes: Array, active: np.ndarray, kinds: tuple[str, ...]):
        of_kind = lambda *wanted: np.array([kind in wanted for kind in kinds])  # noqa: E731
        self.emissions, self.kinds = emissions, kinds
        self.amplitudes, self.active = amplitudes, active
        self.inputs = jnp.where(active & of_kind(SOFT), amplitudes, 0.0)
        self.unknown = np.any(active & of_kind(UNDECIDED), axis=-1, keepdims=True)
        self.clamping = active & of_kind(CLAMP)

    def plan(self, params: ParamsLGSSM, targets: Array) -> Intervention:
        """Clamps where they are known, wide redraws where an undecided channel is on."""
        clamps = stimulate(self.amplitudes, targets, self.clamping)
        scale = WIDE * jnp.diagonal(
            values_of(as_matrix(params.initial.cov)) + values_of(as_matrix(params.dynamics.cov))
        )
        unknown = jnp.broadcast_to(self.unknown, clamps.mask.shape)
        return Intervention(
            clamps.mask | unknown,
            jnp.where(unknown, 0.0, clamps.value),
            jnp.where(unknown, scale.reshape((1,) * (clamps.mask.ndim - 1) + (-1,)), 0.0),
        )


def refit(params: ParamsLGSSM, design: Design, targets: Array, num_iters: int, tol: float) -> tuple[ParamsLGSSM, Array]:
    """Fit, set the gains to their best, and fit again."""
    trainable = eqx.tree_at(lambda p: p.emissions.input_weights, jax.tree.map(lambda _: True, params), False)
    for more in (True, False):
        plan = design.plan(params, targets)
        params = fit_em(
            params,
            design.emissions,
            design.inputs,
            interventions=plan,
            trainable=trainable,
            num_iters=num_iters,
            tol=tol,
        ).params
        if more and bool((jnp.count_nonzero(targets, axis=0) > 1).any()):  # a single gain is the scale of its state
            places = jnp.nonzero(targets)
            gains = _best_gains(
                params,
                design.emissions,
                design.inputs,
                plan,
                design.amplitudes,
                design.unknown,
                targets[places],
                places,
            )
            targets = targets.at[places].set(gains)
    unit = np.ones(params.state_dim)
    for i in np.flatnonzero(np.asarray(targets).any(axis=0)):
        column = np.asarray(targets[:, i])
        unit[i] = column[np.flatnonzero(column)[0]]
    params = transform_params(params, jnp.asarray(np.diag(1 / unit), targets.dtype))
    # Divided by NumPy: XLA would multiply by the inverse, and a gain of one would not be one.
    return params, jnp.asarray(np.asarray(targets) / unit[None].astype(targets.dtype))


@jit_quickly
def _best_gains(
    params: ParamsLGSSM,
    emissions: Array,
    inputs: Array,
    plan: Intervention,
    amplitudes: Array,
    unknown: Array,
    gains: Array,
    places: tuple[Array, ...],
) -> Array:
    """The maximum of the likelihood over the gains, of which it is a quadratic function: one step of Newton."""

    def log_prob(gains: Array) -> Array:
        targets = jnp.zeros((amplitudes.shape[-1], params.state_dim), gains.dtype).at[places].set(gains)
        value = jnp.where(plan.mask & ~unknown, jnp.where(plan.mask, amplitudes @ targets, 0.0), plan.value)
        moved = eqx.tree_at(lambda p: p.value, plan, value)
        return marginal_log_prob(params, emissions, inputs, interventions=moved).sum()

    score = jax.grad(log_prob)
    slope = score(gains)
    # Differences of the derivative of a quadratic function are exact.
    curvature = jax.lax.map(lambda direction: slope - score(gains + direction), jnp.eye(len(gains), dtype=gains.dtype))
    return gains + jnp.linalg.lstsq(curvature, slope)[0]
