r"""States estimated from the emissions by linear functionals, and parameters regressed on them."""

import jax.numpy as jnp
import numpy as np

from issm.fitting.start_data import StartData
from issm.models.lgssm import ParamsLGSSM, make_lgssm_params

RADIUS = 0.98
RIDGE = 1e-3
SMALLEST_SHARE = 1e-3  # of a variance that noise is given at least
LEADS = 2


def subspace_states(data: StartData, rng: np.random.Generator) -> np.ndarray:
    """The directions of the present that past, future and clamps predict; inverse regression names the clamped ones."""
    window = _window(data, 1)
    around = [_shift(window, lag) for lag in (*range(-LEADS, 0), *range(1, LEADS + 1))]
    return _anchor(data, _predictable(data, window, around, rng), rng)


def history_states(data: StartData, rng: np.random.Generator) -> np.ndarray:
    """The same with as many steps of the past as make the states visible, for fewer emissions than states."""
    lags = min(-(-data.state_dim // data.values.shape[2]) + 2, data.values.shape[1])
    window = _window(data, lags)
    present = _window(data, 1)
    ahead = [_shift(present, -lead) for lead in range(1, lags + 1)]
    return _anchor(data, _predictable(data, window, ahead, rng), rng)


def forward_states(data: StartData, rng: np.random.Generator) -> np.ndarray:
    """Emissions regressed on the clamp values, given the recent past: the readout, and by it the states."""
    clamped = np.flatnonzero(data.clamped)
    window = _window(data, 1)
    recent = _window(data, 1, most=data.state_dim)
    ones = np.ones((*window.shape[:2], 1))
    flags, values = data.mask[..., clamped].astype(float), np.where(data.mask, data.value, 0.0)[..., clamped]
    design = np.concatenate([values, flags, _shift(recent, 1), _shift(recent, 2), data.inputs, ones], axis=2)
    weights = _rows(data, design)[0][:, : len(clamped)]
    around = [_shift(window, lag) for lag in (*range(-LEADS, 0), *range(1, LEADS + 1))]
    scores = _predictable(data, window, around, rng)
    loadings, noise = _rows(data, np.concatenate([scores, ones], axis=2))
    rest = loadings[:, :-1] - weights @ np.linalg.lstsq(weights, loadings[:, :-1], rcond=None)[0]
    free = np.flatnonzero(~data.clamped)
    readout = np.zeros((len(weights), data.state_dim))
    readout[:, clamped] = weights
    axes, strength, _ = np.linalg.svd(rest, full_matrices=False)
    count = min(len(free), len(strength))
    readout[:, free[:count]] = axes[:, :count] * strength[:count]
    scaled = readout / noise[:, None]
    gram = scaled.T @ readout
    gram = gram + RIDGE * max(np.trace(gram) / len(gram), 1e-300) * np.eye(len(gram))
    states = data.filled @ np.linalg.solve(gram, scaled.T).T
    states[..., free] = _signed(states[..., free], data)
    spread = states[data.alive].std(axis=0)
    states = states + 1e-3 * rng.normal(size=states.shape) * (spread < 1e-8)
    return np.where(data.mask, data.value, states)


def component_states(data: StartData, rng: np.random.Generator) -> np.ndarray:
    """Principal components of the present: what always can be had."""
    scores = _complete(np.zeros((*data.alive.shape, 0)), _window(data, 1), data.alive, data.state_dim, rng)
    return _anchor(data, scores, rng)


def _window(data: StartData, lags: int, most: int | None = None) -> np.ndarray:
    """Principal components of the present, with those of earlier steps."""
    num_samples = int(data.alive.sum())
    kept = min(data.filled.shape[2], most or max(2 * data.state_dim, 4), max(num_samples // (8 * lags), 1))
    _, _, axes = np.linalg.svd(data.filled[data.alive], full_matrices=False)
    present = data.filled @ axes[:kept].T
    return np.concatenate([_shift(present, lag) for lag in range(lags)], axis=2)


def _predictable(data: StartData, window: np.ndarray, others: list, rng: np.random.Generator) -> np.ndarray:
    """Canonical variates of a window and what surrounds it, `(num_trials, num_timesteps, state_dim)`, of unit variance."""
    alive = data.alive
    clamps = np.concatenate([np.where(data.mask, data.value, 0.0), data.mask.astype(float)], axis=2)
    surroundings = np.concatenate([*others, clamps, data.inputs], axis=2)
    center = window[alive].mean(axis=0)
    directions = _canonical_directions(window[alive], surroundings[alive])
    scores = (window - center) @ directions[:, : data.state_dim]
    return _complete(scores, window, alive, data.state_dim, rng)


def _canonical_directions(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = one - one.mean(axis=0), other - other.mean(axis=0)
    whitener, whitener_other = _whitener(one), _whitener(other)
    cross = (one @ whitener).T @ (other @ whitener_other) / max(len(one), 1)
    left, strength, _ = np.linalg.svd(cross, full_matrices=False)
    return whitener @ left[:, strength > 1e-10]


def _whitener(samples: np.ndarray) -> np.ndarray:
    """Columns that map samples to unit variance, shrunk a little, without the directions that do not vary."""
    size = samples.std(axis=0)
    size = np.where(size > 1e-12 * size.max(initial=0.0), size, np.inf)
    scaled = samples / size
    values, vectors = np.linalg.eigh(scaled.T @ scaled / max(len(samples), 1))
    kept = values > 1e-9 * values.max(initial=0.0)
    return vectors[:, kept] / np.sqrt(values[kept] + RIDGE) / size[:, None]


def _complete(scores: np.ndarray, source: np.ndarray, alive: np.ndarray, state_dim: int, rng: np.random.Generator):
    """Unit variance, and as many columns as states: principal components of what is left, then small noise."""
    scale = scores[alive].std(axis=0)
    scores = scores[..., scale > 1e-8] / scale[scale > 1e-8]
    for extra in (source, rng.normal(size=(*alive.shape, state_dim))):
        missing = state_dim - scores.shape[2]
        if missing == 0:
            break
        design = np.concatenate([scores[alive], np.ones((alive.sum(), 1))], axis=1)
        coefficients = np.linalg.lstsq(design, extra[alive], rcond=None)[0]
        rest = extra - scores @ coefficients[:-1] - coefficients[-1]
        _, strength, axes = np.linalg.svd(rest[alive], full_matrices=False)
        good = strength > 1e-6 * np.sqrt(max(alive.sum(), 1))
        more = rest @ axes[good][:missing].T
        scores = np.concatenate([scores, more / more[alive].std(axis=0)], axis=2)
    return scores


def _anchor(data: StartData, scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """States from scores: the clamped ones by their known values, the others from the directions that remain."""
    alive, state_dim = data.alive, data.state_dim
    states = np.zeros(scores.shape)
    for i in np.flatnonzero(data.clamped):
        states[..., i] = _clamped_state(scores, data.mask[:, :, i] & alive, data.value[:, :, i], alive)
    own = states[..., data.clamped]
    rest = _complete(own - own[alive].mean(axis=0), scores, alive, state_dim, rng)
    free = ~data.clamped
    states[..., free] = _signed(rest[..., state_dim - free.sum() :], data)
    return np.where(data.mask, data.value, states)


def _signed(states: np.ndarray, data: StartData) -> np.ndarray:
    """The sign that nothing in the data decides: the emission that follows the state most rises with it."""
    loadings = states[data.alive].T @ data.filled[data.alive]
    largest = np.take_along_axis(loadings, np.abs(loadings).argmax(axis=1)[:, None], axis=1)[:, 0]
    return states * np.where(largest < 0, -1.0, 1.0)


def _clamped_state(scores: np.ndarray, held: np.ndarray, value: np.ndarray, alive: np.ndarray) -> np.ndarray:
    target, at = value[held], scores[held]
    mean, center = target.mean(), at.mean(axis=0)
    if target.std() > 1e-8 * max(np.abs(target).max(), 1e-300):
        gram = (at - center).T @ (at - center) / len(at)
        gram = gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
        weights = np.linalg.solve(gram, (at - center).T @ (target - mean) / len(at))
        slope = ((at - center) @ weights) @ (target - mean) / ((target - mean) @ (target - mean))
        if slope > 0.05:
            return (scores - center) @ (weights / slope) + mean
    # One level: the direction that tells clamped from free steps, scaled so that the clamped ones lie at their level.
    gram = np.cov(at.T).reshape(at.shape[1], -1) if len(at) > 2 else np.eye(at.shape[1])
    gram = gram + (RIDGE + 1e-2) * np.eye(len(gram))
    weights = np.linalg.solve(gram, center - scores[alive].mean(axis=0))
    reach = (center - scores[alive].mean(axis=0)) @ weights
    size = np.abs(mean) if mean != 0 else 1.0
    projected = (scores - center) @ weights
    return projected * (size / reach if reach > 1e-12 else 0.0) * (np.sign(mean) or 1.0) + mean


def regress(data: StartData, states: np.ndarray) -> ParamsLGSSM:
    """All parameters from states taken as known."""
    alive, state_dim = data.alive, data.state_dim
    ones = np.ones((*states.shape[:2], 1))
    emission, noise = _rows(data, np.concatenate([states, data.inputs, ones], axis=2))
    dynamics = np.zeros((state_dim, emission.shape[1]))
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


def _rows(data: StartData, design: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every emission regressed on a design, from the steps in which it was observed, and the noise that is left."""
    coefficients = np.zeros((data.values.shape[2], design.shape[2]))
    noise = np.ones(len(coefficients))
    for n in range(len(coefficients)):
        seen = data.observed[:, :, n]
        if seen.any():
            coefficients[n], residual = _ridge(design[seen], data.values[:, :, n][seen])
            power = (data.values[:, :, n][seen] ** 2).mean()
            noise[n] = max(residual, SMALLEST_SHARE * (power if power > 0 else 1.0))
    return coefficients, noise


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
