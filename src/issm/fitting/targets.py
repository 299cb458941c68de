"""Which states each stimulation channel clamps, and with what gain, when nobody knows."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from issm._check import as_array, as_float_array, check_key
from issm._types import PRNGKey
from issm.fitting.em import fit_em
from issm.fitting.gains import Design, refit
from issm.fitting.initialize import initialize_lgssm
from issm.fitting.redrawn import WIDE, from_emissions_alone, redraw
from issm.fitting.spectra import (
    CLAMP,
    NONE,
    SOFT,
    UNDECIDED,
    Channel,
    Steps,
    describe,
    functionals,
    judge,
    mix_evenly,
    share_states,
    soft_effect,
)
from issm.fitting.target_data import check_data
from issm.inference.kalman import marginal_log_prob
from issm.inference.smoother import lgssm_smoother
from issm.interventions import Intervention
from issm.models.coordinates import transform_params
from issm.models.fields import values_of
from issm.models.lgssm import ParamsLGSSM

LONGER = 4  # times as many updates for a second attempt


class LearnedTargets(eqx.Module):
    r"""What each stimulation channel does, the states that it clamps, and the model fitted with them.

    States are known up to order and scale, and states that the very same channels clamp only up to an invertible mix. Clamped
    states come first; each is scaled so that the first channel that clamps it has gain one.

    Attributes:
        kinds: "clamp", "soft", "none" or "undecided" for each channel.
        targets: Gains, `(num_channels, state_dim)`, exactly zero where a channel does not clamp a state; usable as
            `stimulate(amplitudes, targets, active)`.
        params: The fitted model; its `dynamics.input_weights` hold the effects of soft channels, zero for all others.
        variance_left: Share of the variance of the states that is left at the steps of each channel, along the directions in
            which least is left, ascending, `(num_channels, state_dim)`: near 0 where it clamps, at least 1 where it does not. NaN
            for a channel that acts alone too rarely.
        variance_left_se: Its standard error.
        soft_p: p-value of no linear effect of the amplitude (Hotelling's test), `(num_channels,)`.
        num_steps: Steps at which each channel acts alone, `(num_channels,)`.
        log_prob: $\log p(y)$ of `params`, where the steps of undecided channels count as redrawn at random.
        reasons: Why a channel is undecided; empty for the others.

    References:
        Nejatbakhsh & Wang (2025), sec. 3; `docs/how-to/learning-targets.md`.

    Examples:
        >>> from issm import LearnedTargets
        >>> sorted(LearnedTargets.__annotations__)[:3]
        ['kinds', 'log_prob', 'num_steps']
    """

    kinds: tuple[str, ...] = eqx.field(static=True)
    targets: Float[Array, "num_channels state_dim"]
    params: ParamsLGSSM
    variance_left: Float[Array, "num_channels state_dim"]
    variance_left_se: Float[Array, "num_channels state_dim"]
    soft_p: Float[Array, " num_channels"]
    num_steps: Int[Array, " num_channels"]
    log_prob: Float[Array, ""]
    reasons: tuple[str, ...] = eqx.field(static=True)

    def inputs(self, amplitudes: Any, active: Any = None) -> Float[Array, "*steps num_channels"]:
        """The amplitudes of soft channels where they are on, and zero for all others: `inputs` for `params`."""
        amplitudes = as_float_array("amplitudes", amplitudes, self.targets.dtype)
        on = amplitudes != 0 if active is None else jnp.asarray(as_array("active", active))
        soft = jnp.asarray([kind == SOFT for kind in self.kinds])
        return jnp.where(on & soft.reshape((1,) * (amplitudes.ndim - 1) + (-1,)), amplitudes, 0.0)

    def summary(self) -> str:
        """A line for each channel."""
        lines = []
        for m, kind in enumerate(self.kinds):
            row = np.asarray(self.targets[m])
            hit = ", ".join(f"state {i} (gain {row[i]:.3g})" for i in np.flatnonzero(row))
            words = {CLAMP: f"clamps {hit}", SOFT: "soft input", NONE: "does nothing"}.get(kind, "")
            lines.append(
                f"channel {m}: {words or 'undecided: ' + self.reasons[m]} ({int(self.num_steps[m])} steps alone)"
            )
        return "\n".join(lines)


def learn_targets(
    key: PRNGKey,
    emissions: Any,
    amplitudes: Any,
    state_dim: int,
    *,
    active: Any = None,
    num_iters: int = 100,
    tol: float = 1e-6,
) -> LearnedTargets:
    r"""Learn what each stimulation channel does: clamp states, $x_{t,i} = \sum_m g_{m,i} u_{t,m}$, push them, or nothing.

    1. A model is fitted in which every stimulated step redraws all states from a wide prior, so that it learns from the others.
       Where step 3 then fails and that fit has not converged, it goes on.
    2. At the steps of one channel the state is estimated from the emissions alone. A perfect clamp removes the variance that
       the dynamics would have put along the clamped state: the generalised eigenvalues of what is left against what was expected
       are near 0 along clamped states and at least 1 elsewhere; their number and eigenvectors are the states that it clamps.
    3. A state that several channels clamp has no variance left in all of them. A channel leaves the states that it does not
       clamp where their dynamics take them, which tells the others apart.
    4. A channel that removes no variance is soft if its amplitude predicts where the state goes (Hotelling's test).
    5. The model is fitted again with the clamps in place. For given targets the likelihood is exactly quadratic in the gains,
       which are set to its maximum between two fits.

    A channel is undecided, not guessed, if an eigenvalue or a p-value lies between the two answers, if it is never on alone, or
    if what the channels clamp does not add up to states. It has no targets, and its steps count as redrawn in `params`.

    Args:
        key: JAX random key, for the start.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or with a leading trial axis; NaN is missing. At least `state_dim`
            emissions are needed.
        amplitudes: Amplitude $u_{t,m}$ of each channel, `(num_timesteps, num_channels)` or with a leading trial axis, in
            units of the stimulator.
        state_dim: Number of states D.
        active: True where a channel is on, same shape; None: where its amplitude is not zero. Pass it where an amplitude of
            zero is a stimulus: a clamp to zero is a clamp.
        num_iters: Largest number of updates of each fit; a first fit that goes on takes up to four times as many.
        tol: Tolerance of `fit_em`.

    Returns:
        Kinds, targets and gains, the model, the evidence, and reasons for what is undecided.

    Raises:
        ValueError: If an argument has the wrong shape, type or values, there are fewer emissions than states, or JAX traces the
            data.

    References:
        Nejatbakhsh & Wang (2025), sec. 3; Golub & Van Loan (2013), sec. 8.7 (generalised eigenvalues); Hotelling (1931).

    Examples:
        >>> import jax, numpy as np, issm
        >>> truth = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.5], [[1.0], [2.0]], [0.1, 0.1])
        >>> amplitudes = np.zeros((20, 30, 2))
        >>> amplitudes[:, 10:15, 0] = np.random.default_rng(0).normal(size=(20, 1))
        >>> amplitudes[:, 20:25, 1] = np.random.default_rng(1).normal(size=(20, 1))
        >>> plan = issm.stimulate(amplitudes, [[1.5], [0.0]])
        >>> _, emissions = issm.lgssm_sample(jax.random.key(0), truth, 30, interventions=plan)
        >>> issm.learn_targets(jax.random.key(1), emissions, amplitudes, 1, num_iters=20).kinds
        ('clamp', 'none')
    """
    check_key(key)
    emissions, amplitudes, active = check_data(emissions, amplitudes, active, state_dim)
    num_channels = amplitudes.shape[-1]
    stimulated = active.any(axis=-1)
    start = initialize_lgssm(key, emissions, state_dim).params
    wide = WIDE * _state_variance(start, emissions)
    redrawn = redraw(stimulated, np.full(state_dim, wide, emissions.dtype))
    for num_updates in (num_iters, LONGER * num_iters):
        fit = fit_em(start, emissions, interventions=redrawn, num_iters=num_updates, tol=tol)
        start = blind = fit.params
        steps = _stimulated_steps(blind, emissions, redrawn, np.asarray(amplitudes, np.float64), active)
        channels = [describe(steps, m) for m in range(num_channels)]
        kinds, reasons = (list(each) for each in zip(*map(judge, channels), strict=True))
        clamping = {m: c for m, c in enumerate(channels) if kinds[m] == CLAMP and c is not None}
        states = share_states(clamping, state_dim)
        if states is not None or fit.converged:
            break
    for m in np.flatnonzero(~active.any(axis=(0, 1))):
        reasons[m] = "never used"
    if states is None:
        for m in clamping:
            kinds[m], reasons[m] = UNDECIDED, "the targets of the clamping channels are not separable"
        clamping, states = {}, []
    rows, offset, targets = _coordinates(steps, clamping, states, num_channels)
    soft = {m: soft_effect(steps, m) for m in range(num_channels) if kinds[m] == SOFT}
    start = _in_coordinates(blind, rows, offset, soft, num_channels)
    design = Design(emissions, amplitudes, active, tuple(kinds))
    params, targets = refit(start, design, jnp.asarray(targets, emissions.dtype), num_iters, tol)
    return _result(params, targets, design, channels, reasons)


def _state_variance(params: ParamsLGSSM, emissions: Array) -> float:
    """Mean variance of the states as the emissions alone give them, by least squares."""
    centered = np.asarray(emissions, np.float64) - np.asarray(values_of(params.emissions.bias), np.float64)
    weights = np.linalg.pinv(np.asarray(values_of(params.emissions.weights), np.float64))
    states = np.where(np.isnan(centered), 0.0, centered) @ weights.T
    return float(states.reshape(-1, len(weights)).var(axis=0).mean())


def _stimulated_steps(
    params: ParamsLGSSM,
    emissions: Array,
    redrawn: Intervention,
    amplitudes: np.ndarray,
    active: np.ndarray,
) -> Steps:
    """The state at each stimulated step from what was seen from then on, and as it was expected before."""
    posterior = lgssm_smoother(params, emissions, interventions=redrawn)
    means, covs, before, before_covs = (
        np.asarray(leaf, np.float64)
        for leaf in (
            posterior.smoothed_means,
            posterior.smoothed_covariances,
            posterior.filtered_means,
            posterior.filtered_covariances,
        )
    )
    weights, bias, mean = (
        np.asarray(values_of(leaf), np.float64)
        for leaf in (params.dynamics.weights, params.dynamics.bias, params.initial.mean)
    )
    noise, initial = (np.diag(np.asarray(cov, np.float64)) for cov in (params.dynamics.cov, params.initial.cov))
    expected, spread = np.empty_like(means), np.empty_like(covs)
    expected[:, 0], spread[:, 0] = mean, initial
    expected[:, 1:] = before[:, :-1] @ weights.T + bias
    spread[:, 1:] = weights @ before_covs[:, :-1] @ weights.T + noise
    used = active.any(axis=-1)
    estimate, error = from_emissions_alone(means[used], covs[used], np.asarray(redrawn.variance, np.float64)[used])
    doubt = np.linalg.eigvalsh(error)[:, -1]
    clear = doubt < 1e3 * np.median(doubt)  # enough was observed at this step
    return Steps(
        estimate[clear],
        error[clear],
        expected[used][clear],
        spread[used][clear],
        amplitudes[used][clear],
        active[used][clear],
    )


def _coordinates(
    steps: Steps, channels: dict[int, Channel], states: list[tuple[int, ...]], num_channels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The map to states, its offset, and the gains of each channel, by regression."""
    state_dim = steps.estimate.shape[1]
    rows = functionals(channels, states, state_dim)
    groups = sorted(set(states))
    offset, targets = np.zeros(state_dim), np.zeros((num_channels, state_dim))
    for group in groups:
        own = [i for i, other in enumerate(sorted(states)) if other == group]
        alone = [steps.active[:, m] & (steps.active.sum(axis=1) == 1) for m in group]
        used = np.any(alone, axis=0)
        design = np.column_stack(
            [np.where(a, steps.amplitude[:, m], 0.0)[used] for a, m in zip(alone, group, strict=True)]
        )
        held = np.atleast_1d(
            np.any(design, axis=0)
        )  # a channel that only ever clamps to zero says nothing about its gain
        design = np.column_stack([design, np.ones(len(design))])
        found = np.linalg.lstsq(design, steps.estimate[used] @ rows[own].T, rcond=None)[0]
        gains, shift = np.where(held[:, None], found[:-1], 1.0), found[-1]
        turn = mix_evenly(rows[own], gains)
        rows[own], offset[own] = turn @ rows[own], -turn @ shift
        targets[np.ix_(group, own)] = gains @ turn.T
    return rows, offset, targets


def _in_coordinates(
    params: ParamsLGSSM, rows: np.ndarray, offset: np.ndarray, soft: dict[int, np.ndarray], num_channels: int
) -> ParamsLGSSM:
    dtype = params.initial.mean.dtype
    effects = np.zeros((rows.shape[0], num_channels))
    for m, effect in soft.items():
        effects[:, m] = rows @ effect
    moved = transform_params(params, jnp.asarray(rows, dtype), jnp.asarray(offset, dtype))
    where = lambda p: (p.dynamics.input_weights, p.emissions.input_weights)  # noqa: E731
    blank = jnp.zeros((params.emission_dim, num_channels), dtype)
    return eqx.tree_at(where, moved, (jnp.asarray(effects, dtype), blank))


def _result(
    params: ParamsLGSSM, targets: Array, design: Design, channels: list[Channel | None], reasons: list[str]
) -> LearnedTargets:
    dtype, state_dim = targets.dtype, targets.shape[1]
    blank = np.full(state_dim, np.nan)
    plan = design.plan(params, targets)
    log_prob = marginal_log_prob(params, design.emissions, design.inputs, interventions=plan).sum()
    return LearnedTargets(
        kinds=design.kinds,
        targets=targets,
        params=params,
        variance_left=jnp.asarray(np.stack([blank if c is None else c.eigenvalues for c in channels]), dtype),
        variance_left_se=jnp.asarray(np.stack([blank if c is None else c.errors for c in channels]), dtype),
        soft_p=jnp.asarray([np.nan if c is None else c.soft_p for c in channels], dtype),
        num_steps=jnp.asarray([0 if c is None else c.num_steps for c in channels]),
        log_prob=log_prob,
        reasons=tuple(reasons),
    )
