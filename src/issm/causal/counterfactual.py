r"""What would have been on the very trials that were seen: abduction, action, prediction."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from issm._compile import jit_quickly
from issm._linalg import symmetrize
from issm.causal.history import Scenario, check_plan
from issm.causal.predict import Moments, Prediction
from issm.causal.twin import twin_transitions
from issm.inference.dense import BackwardPass, FilterPass, run_filter, run_smoother
from issm.inference.observations import WhitenedEmissions, whiten
from issm.interventions import Intervention
from issm.models.fields import TimeVarying, as_matrix, is_diagonal, over_time, values_of
from issm.models.lgssm import ParamsLGSSM
from issm.models.transitions import Transitions, emission_offsets
from issm.models.trials import Plan, Trials, as_plan, as_trials


def counterfactual(
    params: ParamsLGSSM,
    emissions: Any,
    plan: Intervention,
    *,
    interventions: Intervention | None = None,
    inputs: Any = None,
) -> Prediction:
    r"""What these trials would have been under another plan, $p(x', y' \mid y, do(\pi), \pi')$.

    Abduction, action, prediction: the initial state, the process noise w, the noise of clamps and the emission noise r of each
    trial are shared by the factual world x and the counterfactual world $x' = x + \delta$; only the clamps differ. The twin
    network $[x; \delta]$ is linear Gaussian and is smoothed through y alone. Where an emission was observed,
    $y' = y + C \delta$; where it was missing, $y' = C x' + D u + d + r$ with r given the entries of that step that were observed.
    A state that was clamped and would have been free takes its noise from the prior given what is known of the rest: it was
    never seen. If the plans agree, the answer is the trial itself, with certainty.

    This is not an interventional prediction: that one is for a new trial, with noise of its own. What the other plan would have
    changed on average, over steps and trials, is `counterfactual_effect`.

    Args:
        params: Model parameters.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or with a leading trial axis; NaN is missing.
        plan: $\pi'$, the clamps that might have been, `(num_timesteps, state_dim)` or with a leading trial axis.
        interventions: $\pi$, the clamps that were in force. None: no clamps.
        inputs: Soft inputs, the same in both worlds, `(num_timesteps, input_dim)` or with a leading trial axis. Needed if the
            model has inputs.

    Returns:
        Moments of the counterfactual states and emissions, with the leading axes of `emissions`. The covariance is what remains
        unknown about these very trials.

    Raises:
        ValueError: If an argument has the wrong shape, type or values; the message names it.

    References:
        Pearl (2009), *Causality*, theorem 7.1.7 and sec. 7.1.4 (twin network); Durbin & Koopman (2012), sec. 4.4.

    Examples:
        >>> import numpy as np, issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.5]], [0.1], [[1.0]], [0.5])
        >>> y = np.array([[0.3], [0.1], [-0.4]])
        >>> plan = issm.do({0: 4.0}, num_timesteps=3, state_dim=1, start=1, stop=2)
        >>> issm.counterfactual(params, y, plan, interventions=plan).emissions.mean.tolist() == y.tolist()
        True
        >>> issm.counterfactual(params, y, issm.no_intervention(3, 1), interventions=plan).emissions.sd[0].tolist()
        [0.0]
    """
    trials = as_trials(params, emissions, inputs, interventions)
    return _counterfactual(params, trials, as_twin_scenario(params, trials, plan).plan.intervention)


def as_twin_scenario(params: ParamsLGSSM, trials: Trials, plan: Any) -> Scenario:
    """The plan that might have been, and the one that was in force as the reference."""
    check_plan("plan", plan)
    other = as_plan(
        params,
        trials.plan.inputs,
        plan,
        num_timesteps=trials.emissions.shape[1],
        num_trials=None if trials.one_sequence else trials.num_trials,
        interventions_name="plan",
    )
    return Scenario(None, None, other, trials.plan.intervention)


@jit_quickly
def _counterfactual(params: ParamsLGSSM, trials: Trials, other: Intervention) -> Prediction:
    def one(emissions: Array, plan: Plan, other: Intervention) -> Prediction:
        return counterfactual_sequence(params, emissions, plan, other, may_miss=trials.may_miss)

    if trials.one_sequence:
        return one(trials.emissions[0], trials.plan, other)
    arguments = (trials.emissions, trials.plan, other)
    axes = jax.tree.map(lambda leaf: 0 if leaf.ndim == 3 else None, arguments)
    return jax.vmap(one, in_axes=axes)(*arguments)


class Twins(eqx.Module):
    r"""Both worlds of one sequence, $[x; \delta]$, given its emissions."""

    transitions: Transitions
    steps: FilterPass
    smoothed: BackwardPass


class OwnEmissions(eqx.Module):
    r"""The emissions of the trial itself, $y_t = k_t + U_t x_t + e_t$; where one was observed, U and e are zero.

    Attributes:
        known: k, `(num_timesteps, emission_dim)`.
        rows: U, `(num_timesteps, emission_dim, state_dim)`.
        noise: Covariance of e, `(num_timesteps, emission_dim, emission_dim)`.
    """

    known: Array
    rows: Array
    noise: Array


def counterfactual_sequence(
    params: ParamsLGSSM,
    emissions: Float[Array, "num_timesteps emission_dim"],
    plan: Plan,
    other: Intervention,
    *,
    may_miss: bool,
) -> Prediction:
    """Counterfactual of one sequence; `may_miss` is false when no emission can be NaN."""
    smoothed = smooth_twins(params, emissions, plan, other, may_miss=may_miss).smoothed
    own = own_emissions(params, emissions, plan.inputs, may_miss=may_miss)
    num_timesteps, state_dim = plan.inputs.shape[0], params.state_dim
    eye = jnp.eye(state_dim, dtype=smoothed.means.dtype)
    both = jnp.tile(eye, (num_timesteps, 1, 2))  # x' = x + delta
    rows = jnp.concatenate([own.rows, over_time(params.emissions.weights, num_timesteps)], axis=2)

    def moments(rows: Array) -> tuple[Array, Array]:
        mean = jnp.einsum("tni,ti->tn", rows, smoothed.means)
        return mean, symmetrize(rows @ smoothed.covs @ jnp.swapaxes(rows, 1, 2))

    changed, cov = moments(rows)
    return Prediction(Moments(*moments(both)), Moments(own.known + changed, cov + own.noise))


def smooth_twins(params: ParamsLGSSM, emissions: Array, plan: Plan, other: Intervention, *, may_miss: bool) -> Twins:
    """The twin network of one sequence, seen through the factual emissions alone."""
    transitions = twin_transitions(params, plan.inputs, plan.intervention, other)
    whitened = whiten(params, emissions, plan.inputs, may_miss=may_miss)
    steps = run_filter(transitions, _through_the_factual(whitened).reduce())
    return Twins(transitions, steps, run_smoother(transitions, steps))


def own_emissions(params: ParamsLGSSM, emissions: Array, inputs: Array, *, may_miss: bool) -> OwnEmissions:
    r"""What is known of the emissions given the states: a missing $y = C x + D u + d + K (y_{seen} - C_{seen} x) + e$."""
    num_timesteps = inputs.shape[0]
    weights = over_time(params.emissions.weights, num_timesteps)
    if not may_miss:
        noise = jnp.zeros_like(weights, shape=(*emissions.shape, params.emission_dim))
        return OwnEmissions(emissions, jnp.zeros_like(weights), noise)
    observed = ~jnp.isnan(emissions)
    offsets = emission_offsets(params, inputs)
    carried, noise = _missing_noise(params, observed)
    rows, filled = jnp.where(observed[:, :, None], 0.0, weights), offsets
    if carried is not None:
        rows = rows - carried @ jnp.where(observed[:, :, None], weights, 0.0)
        filled = filled + jnp.einsum("tnm,tm->tn", carried, jnp.where(observed, emissions - offsets, 0.0))
    return OwnEmissions(jnp.where(observed, emissions, filled), rows, noise)


def _through_the_factual(whitened: WhitenedEmissions) -> WhitenedEmissions:
    r"""The emissions as seen by $[x; \delta]$: they see x alone."""
    weights = values_of(whitened.weights)
    weights = jnp.concatenate([weights, jnp.zeros_like(weights)], axis=-1)
    weights = TimeVarying(weights) if isinstance(whitened.weights, TimeVarying) else weights
    return eqx.tree_at(lambda w: w.weights, whitened, weights, is_leaf=lambda node: isinstance(node, TimeVarying))


def _missing_noise(
    params: ParamsLGSSM, observed: Bool[Array, "num_timesteps emission_dim"]
) -> tuple[Array | None, Array]:
    """What the noise of the seen entries says about that of the missing ones: regression K (None: nothing), and the rest."""
    num_timesteps, emission_dim = observed.shape
    cov = over_time(as_matrix(params.emissions.cov), num_timesteps)
    missing_pairs = ~observed[:, :, None] & ~observed[:, None, :]
    if is_diagonal(params.emissions.cov):
        return None, jnp.where(missing_pairs, cov, 0.0)
    eye = jnp.eye(emission_dim, dtype=cov.dtype)[None]
    seen_cov = jnp.where(observed[:, :, None] & observed[:, None, :], cov, eye)
    shared = jnp.where(~observed[:, :, None] & observed[:, None, :], cov, 0.0)
    solved = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(seen_cov), True), jnp.swapaxes(shared, 1, 2))
    carried = jnp.swapaxes(solved, 1, 2)
    return carried, symmetrize(jnp.where(missing_pairs, cov, 0.0) - carried @ jnp.swapaxes(shared, 1, 2))
