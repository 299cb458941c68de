"""A start for the fitters, from the data: subspace identification, with the clamps as anchors of the coordinates."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from issm._check import as_float_array, check_key, common_float_dtype, fail, is_concrete
from issm._types import PRNGKey
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM, make_lgssm_params
from issm.models.trials import as_trials

RADIUS = 0.98
RIDGE = 1e-3
SMALLEST_SHARE = 1e-3  # of a variance that noise is given at least


def initialize_lgssm(
    key: PRNGKey,
    emissions: Any,
    state_dim: int,
    *,
    inputs: Any = None,
    interventions: Intervention | None = None,
) -> ParamsLGSSM:
    r"""Parameters to start a fitter from, with diagonal covariances.

    1. Canonical correlation of the past of the emissions (with the clamp values) and their future gives state scores.
    2. The functional of the scores that predicts the known value of a clamped state, rescaled to slope one, is that state;
       states that are never clamped are given the principal directions that remain.
    3. Regressions give C, D, d, R from all steps and each row of A, B, b, Q from the arrivals in which it was not clamped. A is
       shrunk to a spectral radius of at most 0.98.

    The start follows a change of units: emissions $c y + k$ give C, d and R in the new units and the same dynamics.

    Args:
        key: JAX random key; it only serves directions in which the data do not vary.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or `(num_trials, num_timesteps, emission_dim)`; NaN is missing.
        state_dim: Number of states D.
        inputs: Soft inputs, `(num_timesteps, input_dim)`, shared or one such array for each trial.
        interventions: Clamps, shared or one for each trial.

    Returns:
        Parameters in the dtype of the emissions.

    Raises:
        ValueError: If an argument has the wrong shape, type or values, if there are fewer observed steps than `state_dim + 1`, or
            if the data are traced by JAX: a start is made before compilation.

    References:
        Van Overschee & De Moor (1996), *Subspace Identification for Linear Systems*, ch. 3; Katayama (2005), *Subspace Methods
        for System Identification*, ch. 8 (canonical correlations).

    Examples:
        >>> import jax, issm
        >>> truth = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0], [2.0]], [0.5, 0.5])
        >>> _, emissions = issm.lgssm_sample(jax.random.key(0), truth, 100)
        >>> issm.initialize_lgssm(jax.random.key(1), emissions, state_dim=1).emissions.weights.shape
        (2, 1)
    """
    check_key(key)
    data = _Data(emissions, state_dim, inputs, interventions)
    rng = np.random.default_rng(np.asarray(jax.random.randint(key, (4,), 0, 2**31 - 1)))
    scores = _scores(data, rng)
    states = _anchor(data, scores, rng)
    return _regress(data, states)


class _Data:
    """The trials as NumPy arrays in float64, emissions standardised and gaps in time filled for the scores."""

    def __init__(self, emissions: Any, state_dim: int, inputs: Any, interventions: Any):
        _check_state_dim(state_dim)
        if not all(is_concrete(leaf) for leaf in jax.tree.leaves((emissions, inputs, interventions))):
            fail(
                "emissions",
                got="data that JAX traces",
                expected="concrete arrays",
                remedy="Make the start outside `jit` and `vmap`, and pass it to the fitter.",
            )
        self.dtype = common_float_dtype(emissions)
        emissions = as_float_array("emissions", emissions, self.dtype)
        emission_dim = emissions.shape[-1] if emissions.ndim else 0
        input_dim = np.shape(inputs)[-1] if inputs is not None and np.ndim(inputs) else 0
        trials = as_trials(_blank(state_dim, emission_dim, input_dim, self.dtype), emissions, inputs, interventions)
        self.state_dim = state_dim
        raw = np.asarray(trials.emissions, np.float64)
        num_trials, num_timesteps, _ = raw.shape
        spread = lambda a: np.broadcast_to(np.asarray(a), (num_trials, num_timesteps, a.shape[-1]))  # noqa: E731
        self.inputs = spread(trials.plan.inputs).astype(np.float64)
        self.mask = spread(trials.plan.intervention.mask)
        self.value = spread(trials.plan.intervention.value).astype(np.float64)
        self.observed = ~np.isnan(raw)
        steps = int(self.observed.any(axis=2).sum())
        if steps < state_dim + 1:
            fail(
                "emissions",
                got=f"{steps} steps with an observation",
                expected=f"at least state_dim + 1 = {state_dim + 1}",
                remedy="Give more data, or fit fewer states.",
            )
        count = np.maximum(self.observed.sum(axis=(0, 1)), 1)
        self.center = np.where(self.observed, raw, 0.0).sum(axis=(0, 1)) / count
        centered = np.where(self.observed, raw - self.center, 0.0)
        # The two steps leave no trace of a large offset.
        shift = centered.sum(axis=(0, 1)) / count
        self.center, centered = self.center + shift, np.where(self.observed, centered - shift, 0.0)
        scale = np.sqrt((centered**2).sum(axis=(0, 1)) / count)
        typical = np.sqrt((scale**2).mean()) if (scale > 0).any() else 1.0
        moves = scale > 1e-12 * np.abs(np.where(self.observed, raw, 0.0)).max(axis=(0, 1))  # more than by rounding
        self.scale = np.where(moves, scale, typical)
        self.values = centered / self.scale
        self.filled = _fill_gaps(self.values, self.observed)
        # Steps past the last observation of a trial are no data.
        self.alive = np.flip(np.cumsum(np.flip(self.observed.any(axis=2), axis=1), axis=1), axis=1) > 0


def _scores(data: _Data, rng: np.random.Generator) -> np.ndarray:
    """Canonical variates of past and future, `(num_trials, num_timesteps, state_dim)`, with unit variance."""
    num_timesteps, emission_dim = data.filled.shape[1:]
    state_dim, alive = data.state_dim, data.alive
    num_samples = int(alive.sum())
    kept = min(emission_dim, max(2 * state_dim, 4), max(num_samples // 8, 1))
    _, _, axes = np.linalg.svd(data.filled[alive], full_matrices=False)
    y = data.filled @ axes[:kept].T
    lags = min(-(-state_dim // kept) + 2, max(num_timesteps - 1, 1), max(num_samples // (4 * kept), 1))
    clamps = np.concatenate([np.where(data.mask, data.value, 0.0), data.mask.astype(float)], axis=2)
    past = np.concatenate([_shift(y, lag) for lag in range(lags)] + [clamps, data.inputs], axis=2)
    if num_timesteps > 1:
        future = np.concatenate([_shift(y, -lead) for lead in range(1, lags + 1)], axis=2)
        used = alive & _shift(alive[:, :, None].astype(float), -1)[:, :, 0].astype(bool)
        quiet = used & ~_any_ahead(np.asarray(data.mask.any(axis=2)), lags)
        if quiet.sum() >= max(used.sum() // 3, 5 * past.shape[2]):
            used = quiet
        directions = _canonical_directions(past[used], future[used])
    else:
        directions = np.zeros((past.shape[2], 0))
    scores = (past - past[alive].mean(axis=0)) @ directions[:, :state_dim]
    return _complete(scores, y, alive, state_dim, rng)


def _canonical_directions(past: np.ndarray, future: np.ndarray) -> np.ndarray:
    past, future = past - past.mean(axis=0), future - future.mean(axis=0)
    whitener_past, whitener_future = _whitener(past), _whitener(future)
    cross = (past @ whitener_past).T @ (future @ whitener_future) / max(len(past), 1)
    left, strength, _ = np.linalg.svd(cross, full_matrices=False)
    return whitener_past @ left[:, strength > 1e-10]


def _whitener(samples: np.ndarray) -> np.ndarray:
    """Columns that map samples to unit variance, shrunk a little, without the directions that do not vary."""
    cov = samples.T @ samples / max(len(samples), 1)
    values, vectors = np.linalg.eigh(cov)
    top = values.max(initial=0.0)
    kept = values > 1e-9 * top
    return vectors[:, kept] / np.sqrt(values[kept] + RIDGE * top)


def _complete(scores: np.ndarray, y: np.ndarray, alive: np.ndarray, state_dim: int, rng: Any) -> np.ndarray:
    """Unit variance, and as many columns as states: principal components of what is left, then small noise."""
    scale = scores[alive].std(axis=0)
    scores = scores[..., scale > 1e-8] / scale[scale > 1e-8]
    for source in (y, rng.normal(size=(*y.shape[:2], state_dim))):
        missing = state_dim - scores.shape[2]
        if missing == 0:
            break
        design = np.concatenate([scores[alive], np.ones((alive.sum(), 1))], axis=1)
        coefficients = np.linalg.lstsq(design, source[alive], rcond=None)[0]
        rest = source - scores @ coefficients[:-1] - coefficients[-1]
        _, strength, axes = np.linalg.svd(rest[alive], full_matrices=False)
        good = strength > 1e-6 * np.sqrt(max(alive.sum(), 1))
        extra = rest @ axes[good][:missing].T
        extra = extra / extra[alive].std(axis=0)
        scores = np.concatenate([scores, extra], axis=2)
    return scores


def _anchor(data: _Data, scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """States from scores: the clamped ones by their known values, the others from the directions that remain."""
    alive, state_dim = data.alive, data.state_dim
    clamped = [i for i in range(state_dim) if (data.mask[:, :, i] & alive).sum() >= 2]
    states = np.zeros(scores.shape)
    for i in clamped:
        held = data.mask[:, :, i] & alive
        states[:, :, i] = _clamped_state(scores, held, data.value[:, :, i], alive)
    rest = _complete(_decorrelated(states[..., clamped], alive), scores, alive, state_dim, rng)
    free = [i for i in range(state_dim) if i not in clamped]
    states[..., free] = rest[..., state_dim - len(free) :]
    return np.where(data.mask, data.value, states)


def _clamped_state(scores: np.ndarray, held: np.ndarray, value: np.ndarray, alive: np.ndarray) -> np.ndarray:
    target, at = value[held], scores[held]
    mean, center = target.mean(), at.mean(axis=0)
    spread = target.std()
    if spread > 1e-8 * max(np.abs(target).max(), 1e-300):
        gram = (at - center).T @ (at - center) / len(at)
        gram = gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
        weights = np.linalg.solve(gram, (at - center).T @ (target - mean) / len(at))
        slope = ((at - center) @ weights) @ (target - mean) / ((target - mean) @ (target - mean))
        if slope > 0.05:
            return (scores - center) @ (weights / slope) + mean
    # One level: the direction that tells clamped from free steps, scaled so that the clamped ones lie at their level.
    gram = np.cov(at.T).reshape(at.shape[1], -1) if len(at) > 2 else np.eye(at.shape[1])
    gram = gram + (RIDGE + 1e-2) * np.eye(len(gram))
    overall = scores[alive].mean(axis=0)
    weights = np.linalg.solve(gram, center - overall)
    reach = (center - overall) @ weights
    level = mean if mean != 0 else 0.0
    projected = (scores - center) @ weights
    size = np.abs(level) if level != 0 else 1.0
    return projected * (size / reach if reach > 1e-12 else 0.0) * (np.sign(level) or 1.0) + level


def _decorrelated(states: np.ndarray, alive: np.ndarray) -> np.ndarray:
    return states - states[alive].mean(axis=0)


def _regress(data: _Data, states: np.ndarray) -> ParamsLGSSM:
    """All parameters from states taken as known."""
    alive, state_dim = data.alive, data.state_dim
    ones = np.ones((*states.shape[:2], 1))
    design = np.concatenate([states, data.inputs, ones], axis=2)
    emission = np.zeros((data.values.shape[2], design.shape[2]))
    noise = np.ones(len(emission))
    for n in range(len(emission)):
        seen = data.observed[:, :, n]
        if seen.any():
            emission[n], residual = _ridge(design[seen], data.values[:, :, n][seen])
            power = (data.values[:, :, n][seen] ** 2).mean()
            noise[n] = max(residual, SMALLEST_SHARE * (power if power > 0 else 1.0))
    dynamics = np.zeros((state_dim, design.shape[2]))
    variances = states[alive].var(axis=0)
    variances = np.where(variances > 0, variances, 1.0)
    process = 0.1 * variances
    regressors = np.concatenate([states[:, :-1], data.inputs[:, 1:], ones[:, 1:]], axis=2)
    for i in range(state_dim):
        used = alive[:, 1:] & ~data.mask[:, 1:, i]
        if used.sum() > 1:
            dynamics[i], residual = _ridge(regressors[used], states[:, 1:, i][used])
            process[i] = max(residual, SMALLEST_SHARE * variances[i])
        else:
            dynamics[i, i] = 0.5
    weights = dynamics[:, :state_dim]
    radius = np.abs(np.linalg.eigvals(weights)).max()
    weights = weights * min(1.0, RADIUS / radius) if radius > 0 else weights
    first = np.array([~data.mask[:, 0, i] & alive[:, 0] for i in range(state_dim)])
    mean = np.array([states[f, 0, i].mean() if f.any() else 0.0 for i, f in enumerate(first)])
    spread = np.array([states[f, 0, i].var() if f.sum() > 2 else 0.0 for i, f in enumerate(first)])
    emission = emission * data.scale[:, None]
    cast = lambda a: jnp.asarray(a, data.dtype)  # noqa: E731
    return make_lgssm_params(
        initial_mean=cast(mean),
        initial_cov=cast(np.maximum(spread, 0.1 * variances)),
        dynamics_weights=cast(weights),
        dynamics_cov=cast(process),
        emissions_weights=cast(emission[:, :state_dim]),
        emissions_cov=cast(noise * data.scale**2),
        dynamics_bias=cast(dynamics[:, -1]),
        dynamics_input_weights=cast(dynamics[:, state_dim:-1]),
        emissions_bias=cast(emission[:, -1] + data.center),
        emissions_input_weights=cast(emission[:, state_dim:-1]),
    )


def _ridge(design: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, float]:
    """Least squares, shrunk a little in units of each regressor (not its constant), and the mean squared residual."""
    size = np.sqrt((design**2).mean(axis=0))
    size = np.where(size > 0, size, 1.0)
    scaled = design / size
    shrink = np.full(design.shape[1], RIDGE)
    shrink[-1] = 1e-9
    gram = scaled.T @ scaled / len(scaled) + np.diag(shrink)
    coefficients = np.linalg.solve(gram, scaled.T @ target / len(scaled)) / size
    return coefficients, float(((target - design @ coefficients) ** 2).mean())


def _shift(values: np.ndarray, lag: int) -> np.ndarray:
    """Values `lag` steps earlier, zero where there are none."""
    shifted = np.zeros_like(values)
    if lag == 0:
        return values
    if abs(lag) < values.shape[1]:
        if lag > 0:
            shifted[:, lag:] = values[:, :-lag]
        else:
            shifted[:, :lag] = values[:, -lag:]
    return shifted


def _any_ahead(flags: np.ndarray, leads: int) -> np.ndarray:
    """Whether a flag is set at one of the next steps."""
    return np.any([_shift(flags[:, :, None].astype(float), -lead)[:, :, 0] > 0 for lead in range(1, leads + 1)], axis=0)


def _fill_gaps(values: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Straight lines between the observed steps of a channel; zero, its mean, where a trial has none."""
    filled = np.where(observed, values, 0.0)
    steps = np.arange(values.shape[1])
    for k, n in zip(*np.nonzero(~observed.all(axis=1)), strict=True):
        seen = observed[k, :, n]
        if seen.any():
            filled[k, :, n] = np.interp(steps, steps[seen], values[k, seen, n])
    return filled


def _blank(state_dim: int, emission_dim: int, input_dim: int, dtype: Any) -> ParamsLGSSM:
    """Parameters with the right shapes, for the checks at the door."""
    if emission_dim < 1:
        fail("emissions", got="no emission axis", expected="(num_timesteps, emission_dim)", remedy="Use `y[:, None]`.")
    return make_lgssm_params(
        initial_mean=jnp.zeros(state_dim, dtype),
        initial_cov=jnp.ones(state_dim, dtype),
        dynamics_weights=jnp.zeros((state_dim, state_dim), dtype),
        dynamics_cov=jnp.ones(state_dim, dtype),
        emissions_weights=jnp.zeros((emission_dim, state_dim), dtype),
        emissions_cov=jnp.ones(emission_dim, dtype),
        dynamics_input_weights=jnp.zeros((state_dim, input_dim), dtype),
        emissions_input_weights=jnp.zeros((emission_dim, input_dim), dtype),
    )


def _check_state_dim(state_dim: Any) -> None:
    if isinstance(state_dim, bool) or not isinstance(state_dim, (int, np.integer)) or state_dim < 1:
        fail("state_dim", got=repr(state_dim), expected="an integer of at least 1", remedy="Give the number of states.")
