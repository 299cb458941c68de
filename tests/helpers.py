"""The slow exact thing: the joint Gaussian of one trial, and random systems to compare it on.

Nothing here knows a Kalman recursion. Every state is written as an affine map of the independent standard normal noise
sources of `docs/concepts.md` (the draw of the initial state, one draw of process noise for each step, one draw for each noisy
clamp), by the generative equations and loops. What is known about the sources given some of the emissions is then one linear
least-squares problem, solved by Householder's QR in NumPy's extended precision: with R = 1e-10 or S = 1e7, double precision
would not leave the digits that the library is asked for.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import jaxtyping
import numpy as np
import pytest

import issm

LONG = np.longdouble


def assert_refused(call, argument):
    """The call fails by its own check, not by the run-time types of the tests, and names the argument."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=f"^{argument}: got"):
            call()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@dataclass
class System:
    """Parameters (the arguments of `make_lgssm_params`) and data of a random system, all NumPy."""

    fields: dict
    emissions: np.ndarray
    inputs: np.ndarray | None
    mask: np.ndarray | None
    value: np.ndarray | None
    variance: np.ndarray | None
    num_trials: int | None
    time_varying: tuple = field(default=())

    @property
    def num_timesteps(self):
        return self.emissions.shape[-2]

    @property
    def state_dim(self):
        return len(self.fields["initial_mean"])

    @property
    def emission_dim(self):
        return self.emissions.shape[-1]

    @property
    def params(self):
        return issm.make_lgssm_params(
            **{
                name: issm.TimeVarying(value) if name in self.time_varying else value
                for name, value in self.fields.items()
            }
        )

    @property
    def interventions(self):
        if self.mask is None:
            return None
        return issm.Intervention(self.mask, self.value, self.variance)

    @property
    def data(self):
        """What inference takes after `params`, with `interventions` by keyword."""
        return (self.emissions, self.inputs), {"interventions": self.interventions}

    def trial(self, k):
        """Emissions, inputs, mask, value and variance of one trial; None is filled in."""
        num_timesteps, state_dim = self.num_timesteps, self.state_dim

        def pick(array, width):
            if array is None:
                return np.zeros((num_timesteps, width))
            return array if array.ndim == 2 else array[k]

        emissions = self.emissions if self.num_trials is None else self.emissions[k]
        width = np.shape(self.fields["dynamics_input_weights"])[-1]
        clamp = (pick(array, state_dim) for array in (self.mask, self.value, self.variance))
        mask, value, variance = clamp
        return emissions, pick(self.inputs, width), mask.astype(bool), value, variance

    def at(self, name, t):
        """A field at step t, covariances as matrices, in extended precision."""
        value = np.asarray(self.fields[name])
        value = value[t] if name in self.time_varying else value
        return LONG(np.diag(value) if name.endswith("cov") and value.ndim == 1 else value)


# The joint Gaussian


def joint_gaussian(system, trial=0):
    """Mean and factor of the stacked states and emissions, x = mean + factor @ noise, per step.

    Returns the lists `state_means, state_factors, emission_means` and the list of R's Cholesky factors. The noise of the
    states and the noise of the emissions are independent.
    """
    _, inputs, mask, value, variance = system.trial(trial)
    num_timesteps, d = mask.shape
    sources = 2 * d * num_timesteps  # w_t and the noise of the clamps, or of the initial state
    means, factors, emission_means, emission_factors = [], [], [], []
    for t in range(num_timesteps):
        own, clamp = (slice(2 * d * t + o, 2 * d * t + o + d) for o in (0, d))
        if t == 0:
            mean, factor = system.at("initial_mean", 0), np.zeros((d, sources), LONG)
            factor[:, own] = pivoted_cholesky(system.at("initial_cov", 0))
        else:
            weights = system.at("dynamics_weights", t)
            mean = weights @ means[-1] + system.at("dynamics_bias", t)
            mean = mean + system.at("dynamics_input_weights", t) @ inputs[t]
            factor = weights @ factors[-1]
            factor[:, own] = pivoted_cholesky(system.at("dynamics_cov", t))
        for i in range(d):
            if mask[t, i]:
                mean[i], factor[i] = value[t, i], 0.0
                factor[i, clamp.start + i] = np.sqrt(LONG(variance[t, i]))
        means.append(mean)
        factors.append(factor)
        emission_mean = system.at("emissions_weights", t) @ mean + system.at("emissions_bias", t)
        emission_means.append(emission_mean + system.at("emissions_input_weights", t) @ inputs[t])
        emission_factors.append(system.at("emissions_cov", t))
    return means, factors, emission_means, emission_factors


def joint_moments(system, trial=0):
    """Mean and covariance of the stacked vector (x_0 ... x_{T-1}, y_0 ... y_{T-1}), float64."""
    means, factors, emission_means, emission_covs = joint_gaussian(system, trial)
    loadings = [system.at("emissions_weights", t) @ factor for t, factor in enumerate(factors)]
    factor = np.concatenate(factors + loadings)
    cov = factor @ factor.T
    start = len(means) * system.state_dim
    for emission_cov in emission_covs:
        stop = start + len(emission_cov)
        cov[start:stop, start:stop] += emission_cov
        start = stop
    return np.float64(np.concatenate(means + emission_means)), np.float64(cov)


def reference(system, trial=0):
    """Everything that `lgssm_smoother` returns, for one trial, from the joint Gaussian."""
    emissions = system.trial(trial)[0]
    means, factors, emission_means, emission_covs = joint_gaussian(system, trial)
    num_timesteps, d = len(means), system.state_dim
    rows, targets, log_dets, counts = [], [], [], []
    for t in range(num_timesteps):
        seen = ~np.isnan(emissions[t])
        root = pivoted_cholesky(emission_covs[t][np.ix_(seen, seen)], pivot=False)
        loading = (system.at("emissions_weights", t) @ factors[t])[seen]
        residual = emissions[t][seen] - emission_means[t][seen]
        whitened = forward_substitution(root, np.column_stack([loading, residual]))
        rows.append(whitened[:, :-1])
        targets.append(whitened[:, -1])
        log_dets.append(2 * np.log(np.diag(root)).sum())
        counts.append(seen.sum())

    def given(stop, steps):
        """Moments of the stacked states in `steps` and log-likelihood, given the emissions before `stop`."""
        # Only the sources that these states or emissions depend on matter.
        factor = np.concatenate([factors[t] for t in steps])
        loading = np.concatenate([np.zeros((0, factor.shape[1]), LONG), *rows[:stop]])
        used = (factor != 0).any(axis=0) | (loading != 0).any(axis=0)
        factor, loading = factor[:, used], loading[:, used]
        target = np.concatenate([np.zeros(0, LONG), *targets[:stop]])
        n = factor.shape[1]
        stacked = np.zeros((len(loading) + n, n + 1), LONG)
        stacked[: len(loading), :n], stacked[: len(loading), n] = loading, target
        stacked[len(loading) :, :n] = np.eye(n, dtype=LONG)
        triangle = householder(stacked)
        root, solution = triangle[:n, :n], triangle[:n, n]
        # cov(noise) = (root' root)^-1 and mean(noise) = root^-1 solution
        factor = forward_substitution(root.T, factor.T).T
        mean = np.concatenate([means[t] for t in steps]) + factor @ solution
        rest = (triangle[n:, n] ** 2).sum()
        log_det = 2 * np.log(np.abs(np.diag(root))).sum() + sum(log_dets[:stop])
        loglik = -(sum(counts[:stop]) * np.log(2 * LONG(np.pi)) + log_det + rest) / 2
        return mean, factor @ factor.T, loglik

    predicted = [given(t, [t]) for t in range(num_timesteps)]
    filtered = [given(t + 1, [t]) for t in range(num_timesteps)]
    mean, cov, marginal_loglik = given(num_timesteps, range(num_timesteps))
    blocks = cov.reshape(num_timesteps, d, num_timesteps, d).swapaxes(1, 2)
    steps = np.arange(num_timesteps)
    result = {
        "marginal_loglik": marginal_loglik,
        "logliks": np.diff([0, *(loglik for _, _, loglik in filtered)]),
        "filtered_means": [m for m, _, _ in filtered],
        "filtered_covariances": [c for _, c, _ in filtered],
        "predicted_means": [m for m, _, _ in predicted],
        "predicted_covariances": [c for _, c, _ in predicted],
        "smoothed_means": mean.reshape(num_timesteps, d),
        "smoothed_covariances": blocks[steps, steps],
        "smoothed_cross_covariances": blocks[steps[:-1], steps[1:]],
        "joint_smoothed_covariance": cov,
    }
    return SimpleNamespace(**{k: np.asarray(v, LONG).astype(np.float64) for k, v in result.items()})


def references(system):
    """`reference` of every trial, stacked along a leading axis if the system has one."""
    if system.num_trials is None:
        return reference(system)
    trials = [vars(reference(system, k)) for k in range(system.num_trials)]
    return SimpleNamespace(**{k: np.stack([trial[k] for trial in trials]) for k in trials[0]})


def relative_error(actual, expected, scale=None):
    """Largest absolute difference over the largest entry of the reference array (norm-wise, not entry by entry).

    An array that is zero in the reference has no scale: there the difference itself is returned. Another array may set the
    scale: cross-covariances are blocks of the same joint covariance as the smoothed covariances, and take their scale.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"shape {actual.shape}, reference {expected.shape}"
    if expected.size == 0:
        return 0.0
    if not np.isfinite(actual).all():
        return np.inf
    return np.abs(actual - expected).max() / (np.abs(expected if scale is None else scale).max() or 1.0)


# Linear algebra in extended precision, which LAPACK does not have


def pivoted_cholesky(matrix, pivot=True):
    """A square factor L with L L' = matrix, which may be singular if `pivot`; lower triangular if not."""
    rest, n = np.array(matrix, LONG), len(matrix)
    factor, tolerance = np.zeros((n, n), LONG), n * np.finfo(LONG).eps * np.abs(matrix).max(initial=0)
    for j in range(n):
        i = int(np.argmax(np.diag(rest))) if pivot else j
        if pivot and rest[i, i] <= tolerance:
            break
        assert rest[i, i] > 0, "not positive definite"
        factor[:, j] = rest[:, i] / np.sqrt(rest[i, i])
        rest -= np.outer(factor[:, j], factor[:, j])
        rest[i, :], rest[:, i] = 0.0, 0.0
    return factor


def forward_substitution(lower, right):
    """Solve lower @ x = right."""
    solution = np.zeros(right.shape, LONG)
    for i in range(len(lower)):
        solution[i] = (right[i] - lower[i, :i] @ solution[:i]) / lower[i, i]
    return solution


def householder(matrix):
    """Q' @ matrix, which is upper triangular in its first columns; rows sorted by size, for stiff rows."""
    order = np.argsort(-np.abs(matrix[:, :-1]).max(axis=1, initial=0), kind="stable")
    matrix = matrix[order]
    for j in range(matrix.shape[1] - 1):
        below = matrix[j:, j]
        reflector = below.copy()
        reflector[0] += np.copysign(np.sqrt(below @ below), below[0])
        square = reflector @ reflector
        if square > 0:
            matrix[j:, j:] -= np.outer(reflector, (2 / square) * (reflector @ matrix[j:, j:]))
            matrix[j + 1 :, j] = 0.0
    return matrix


# Random systems


def random_system(
    seed,
    *,
    num_trials=None,
    num_timesteps=6,
    state_dim=2,
    emission_dim=3,
    input_dim=0,
    initial_cov="full",
    dynamics_cov="full",
    emissions_cov="full",
    clamps=None,
    shared_interventions=True,
    shared_inputs=True,
    missing=0.0,
    missing_steps=(),
    time_varying=(),
    unit_root=False,
    biases=True,
):
    """A random system with data drawn from it.

    Covariances: "full", "diagonal", "singular" (rank one), "zero", or a number (that variance, diagonal). Clamps: None,
    "perfect", "zero" (to the value zero), "noisy", "initial" (at t = 0 too), "throughout" (state 0 at every step),
    "everything" (all states at every step), "mixed" (perfect, zero and noisy, from t = 0). `time_varying` names fields, or is
    "all". `unit_root` makes A a chain of integrators.
    """
    rng = np.random.default_rng(seed)
    t, d, n, m = num_timesteps, state_dim, emission_dim, input_dim
    varying = ("weights", "cov", "bias", "input_weights")
    if time_varying == "all":
        time_varying = [f"{part}_{name}" for part in ("dynamics", "emissions") for name in varying]

    def make(name, draw):
        return np.stack([draw() for _ in range(t)]) if name in time_varying else draw()

    def draw_weights():
        if unit_root:
            return np.eye(d) + np.diag(np.ones(d - 1), 1)
        weights = rng.normal(size=(d, d))
        return 0.95 * weights / np.abs(np.linalg.eigvals(weights)).max()

    def draw_cov(kind, dim):
        if isinstance(kind, float):
            return np.full(dim, kind)
        if kind == "zero":
            return np.zeros(dim)
        if kind == "diagonal":
            return rng.uniform(0.2, 1.0, dim)
        if kind == "singular":  # the product of these factors is exact: singular to the last bit
            factor = rng.integers(1, 16, (dim, 1)) / 16 * rng.choice([-1, 1], (dim, 1))
            return factor @ factor.T
        factor = rng.normal(size=(dim, dim)) / np.sqrt(dim)
        return (factor @ factor.T + 0.3 * np.eye(dim)) / 2

    fields = {
        "initial_mean": rng.normal(size=d),
        "initial_cov": draw_cov(initial_cov, d),
        "dynamics_weights": make("dynamics_weights", draw_weights),
        "dynamics_cov": make("dynamics_cov", lambda: draw_cov(dynamics_cov, d)),
        "emissions_weights": make("emissions_weights", lambda: rng.normal(size=(n, d))),
        "emissions_cov": make("emissions_cov", lambda: draw_cov(emissions_cov, n)),
        "dynamics_input_weights": make("dynamics_input_weights", lambda: rng.normal(size=(d, m))),
        "emissions_input_weights": make("emissions_input_weights", lambda: rng.normal(size=(n, m))),
    }
    if biases:
        fields["dynamics_bias"] = make("dynamics_bias", lambda: rng.normal(size=d))
        fields["emissions_bias"] = make("emissions_bias", lambda: rng.normal(size=n))
    else:
        fields["dynamics_bias"], fields["emissions_bias"] = np.zeros(d), np.zeros(n)

    leading = () if num_trials is None else (num_trials,)
    clamp_shape = (t, d) if shared_interventions else (*leading, t, d)
    mask, value, variance = random_clamps(rng, clamps, clamp_shape)
    inputs = rng.normal(size=(t, m) if shared_inputs else (*leading, t, m)) if m else None
    system = System(
        fields,
        np.zeros((*leading, t, n)),
        inputs,
        mask,
        value,
        variance,
        num_trials,
        tuple(time_varying),
    )
    for k in range(num_trials or 1):
        _, factors, emission_means, emission_covs = joint_gaussian(system, k)
        noise = rng.normal(size=factors[0].shape[1])
        for step in range(t):
            deviation = system.at("emissions_weights", step) @ (factors[step] @ noise)
            residual = np.linalg.cholesky(np.float64(emission_covs[step])) @ rng.normal(size=n)
            index = (step,) if num_trials is None else (k, step)
            system.emissions[index] = emission_means[step] + deviation + residual
    system.emissions[rng.random(system.emissions.shape) < missing] = np.nan
    system.emissions[..., list(missing_steps), :] = np.nan
    return system


def random_clamps(rng, kind, shape):
    """Mask, value and variance of a random plan; values under a false mask are large numbers that must not matter."""
    if kind is None:
        return None, None, None
    mask = rng.random(shape) < 0.35
    mask[..., 0, :] = False
    value, variance = rng.normal(size=shape), np.zeros(shape)
    if kind in ("initial", "mixed"):
        mask[..., 0, 0] = True
    if kind == "throughout":
        mask[..., :, 0] = True
    if kind == "everything":
        mask[...] = True
    if kind in ("zero", "mixed"):
        value = np.where(rng.random(shape) < (0.4 if kind == "mixed" else 1.0), 0.0, value)
    if kind in ("noisy", "mixed"):
        chosen = rng.random(shape) < (0.5 if kind == "mixed" else 1.0)
        variance = np.where(chosen, rng.uniform(0.1, 1.0, shape), 0.0)
    return mask, np.where(mask, value, 1e3), np.where(mask, variance, 1e3)


SYSTEMS = {
    "scalar": dict(state_dim=1, emission_dim=1, num_timesteps=10, initial_cov="diagonal",
                   dynamics_cov="diagonal", emissions_cov="diagonal", biases=False),
    "tall": dict(state_dim=2, emission_dim=5, input_dim=2, clamps="perfect", missing=0.3),
    "wide": dict(state_dim=5, emission_dim=2, num_timesteps=7, emissions_cov="diagonal", clamps="mixed",
                 missing=0.1, missing_steps=(0, 3)),
    "zero-clamps": dict(state_dim=3, emission_dim=4, input_dim=1, dynamics_cov="diagonal", clamps="zero"),
    "noisy-clamps": dict(state_dim=3, emission_dim=2, initial_cov="diagonal", clamps="noisy", missing=0.2),
    "clamped-start": dict(state_dim=3, emission_dim=2, clamps="initial", missing_steps=(5,)),
    "four-states": dict(state_dim=4, emission_dim=4, input_dim=3, clamps="mixed"),
    "trials": dict(num_trials=3, input_dim=2, clamps="mixed", shared_interventions=False,
                   shared_inputs=False, missing=0.3, missing_steps=(2,)),
    "trials-shared-plan": dict(num_trials=2, input_dim=1, clamps="mixed", shared_inputs=False,
                               emissions_cov="diagonal"),
    "trials-shared-inputs": dict(num_trials=2, input_dim=1, clamps="mixed", shared_interventions=False,
                                 dynamics_cov="diagonal", missing=0.2),
    "time-varying": dict(input_dim=2, clamps="mixed", time_varying="all", missing=0.2),
    "time-varying-diagonal": dict(num_trials=2, num_timesteps=4, emission_dim=4, input_dim=1,
                                  dynamics_cov="diagonal", emissions_cov="diagonal", time_varying="all",
                                  clamps="perfect", shared_interventions=False, missing=0.2),
    "one-step": dict(num_timesteps=1, input_dim=1, clamps="mixed", missing=0.2),
    "one-step-trials": dict(num_timesteps=1, num_trials=2, clamps="mixed", shared_interventions=False),
    "singular-noise": dict(state_dim=3, dynamics_cov="singular", initial_cov="zero", clamps="perfect"),
    "no-noise": dict(dynamics_cov="zero", initial_cov="singular", emissions_cov="diagonal"),
    "clamped-throughout": dict(state_dim=3, clamps="throughout", missing=0.2),
    "all-clamped": dict(clamps="everything"),
    "tiny-noise-tall": dict(emissions_cov=1e-10, clamps="perfect", unit_root=True),
    "tiny-noise-wide": dict(state_dim=3, emission_dim=1, num_timesteps=8, emissions_cov=1e-10,
                            clamps="mixed"),
    "tiny-noise-singular": dict(state_dim=2, emission_dim=3, dynamics_cov="singular", emissions_cov=1e-10),
    "many-emissions": dict(emission_dim=200, num_timesteps=3, clamps="perfect", missing=0.2),
    "unit-roots": dict(state_dim=3, emission_dim=1, num_timesteps=12, initial_cov=1e7, unit_root=True,
                       dynamics_cov="diagonal", missing_steps=(4, 5)),
    "long": dict(state_dim=1, emission_dim=1, num_timesteps=60, initial_cov=1e7, unit_root=True,
                 dynamics_cov="diagonal", emissions_cov="diagonal", biases=False),
}  # fmt: skip
"""Shapes and options; each is drawn with `SEEDS`, which share one compilation."""

SEEDS = (0, 1)
