"""Random clamped systems in NumPy, on which fitters are measured."""

from dataclasses import dataclass

import numpy as np

import issm

RADIUS = 0.95
HARD_RADIUS = 0.97


@dataclass
class Design:
    """A true system, its data, and trials under clamps that no fit has seen (without missing entries)."""

    name: str
    truth: issm.ParamsLGSSM
    emissions: np.ndarray
    inputs: np.ndarray | None
    plan: issm.Intervention
    test_emissions: np.ndarray
    test_inputs: np.ndarray | None
    test_plan: issm.Intervention

    @property
    def options(self):
        """What every fitter is told."""
        return dict(inputs=self.inputs, interventions=self.plan)


def random_design(seed, *, state_dim=None, emission_dim=None, num_trials=None, num_timesteps=None, levels=None):
    """Every state clamped to two or more values, D 2 to 10, N from D to 50, K 20 to 60, T 50 to 200.

    Every second system has correlated process noise, every third has 10 % missing entries.
    """
    rng = np.random.default_rng([1, seed])
    state_dim = state_dim or int(rng.integers(2, 11))
    emission_dim = emission_dim or int(rng.integers(state_dim, 51))
    num_trials = num_trials or int(rng.integers(20, 61))
    num_timesteps = num_timesteps or int(rng.integers(50, 201))
    targets = np.eye(state_dim)
    windows = max(2 * state_dim, num_trials)  # one window a trial; each state is clamped in at least two

    def make(count, values):
        return _windows(rng, targets, count, num_timesteps, windows * count // num_trials, (8, 25), values)

    return _build(
        f"random {seed}", rng, targets, make, emission_dim, num_trials, num_timesteps,
        radius=RADIUS, correlated=seed % 2 == 1, missing=0.1 if seed % 3 == 2 else 0.0, levels=levels,
    )  # fmt: skip


HARD = [  # state_dim, emission_dim, num_trials, num_timesteps, input_dim, gains of each channel on the states
    (8, 16, 60, 100, 0, [{0: 1.0}, {1: 1.0}, {2: 1.0}, {3: 1.0}, {4: 1.0}]),
    (5, 8, 60, 80, 1, [{0: 1.0, 1: -0.6}, {2: 1.0}, {3: 0.8}]),
    (10, 20, 50, 80, 0, [{0: 1.0}, {1: 1.0}, {2: 1.0, 3: 0.7}]),
    (6, 12, 40, 120, 2, [{0: 1.0, 1: 0.5}, {1: 1.0, 2: -0.8}, {3: 1.0}]),
]


def hard_design(seed):
    """Clamped in 2 % of the steps, some states never, channels on two states, soft inputs, radius .97, 10 % missing."""
    rng = np.random.default_rng([2, seed])
    state_dim, emission_dim, num_trials, num_timesteps, input_dim, channels = HARD[seed % len(HARD)]
    targets = np.array([[gains.get(i, 0.0) for i in range(state_dim)] for gains in channels])
    windows = int(np.ceil(0.02 * num_trials * num_timesteps / 4))

    def make(count, values):
        return _windows(rng, targets, count, num_timesteps, windows * count // num_trials, (4, 5), values)

    return _build(
        f"hard {seed}", rng, targets, make, emission_dim, num_trials, num_timesteps,
        radius=HARD_RADIUS, correlated=False, missing=0.1, input_dim=input_dim,
    )  # fmt: skip


def rollout_error(params, design):
    """Mean squared error of E[y | do(plan), u] from the initial distribution, over the trials held out."""
    p = {
        f"{b}_{f}": np.asarray(x)
        for b in ("initial", "dynamics", "emissions")
        for f, x in vars(getattr(params, b)).items()
    }
    mask, value = np.asarray(design.test_plan.mask), np.asarray(design.test_plan.value)
    inputs = design.test_inputs
    if inputs is None:
        inputs = np.zeros((*mask.shape[:2], 0))
    state, total = np.broadcast_to(p["initial_mean"], mask[:, 0].shape), 0.0
    for t in range(mask.shape[1]):
        if t:
            state = state @ p["dynamics_weights"].T + p["dynamics_bias"] + inputs[:, t] @ p["dynamics_input_weights"].T
        state = np.where(mask[:, t], value[:, t], state)
        predicted = (
            state @ p["emissions_weights"].T + p["emissions_bias"] + inputs[:, t] @ p["emissions_input_weights"].T
        )
        total = total + ((design.test_emissions[:, t] - predicted) ** 2).mean()
    return total / mask.shape[1]


def _windows(rng, targets, num_trials, num_timesteps, count, lengths, levels):
    """Mask and values of clamps: `count` windows of one channel each, at random places that do not overlap."""
    num_channels, state_dim = targets.shape
    mask = np.zeros((num_trials, num_timesteps, state_dim), bool)
    value = np.zeros((num_trials, num_timesteps, state_dim))
    for w in range(max(count, 2 * num_channels)):
        channel, length = w % num_channels, int(rng.integers(*lengths))
        hit = targets[channel] != 0
        for _ in range(100):
            k, t = int(rng.integers(num_trials)), int(rng.integers(num_timesteps - length))
            if not mask[k, t : t + length].any():
                break
        else:
            continue
        amplitude = levels[w % len(levels)] if levels else rng.choice([-1, 1]) * rng.uniform(1.0, 3.0)
        mask[k, t : t + length] |= hit
        value[k, t : t + length] += amplitude * targets[channel]
    return mask, value


def _build(
    name,
    rng,
    targets,
    make,
    emission_dim,
    num_trials,
    num_timesteps,
    *,
    radius,
    correlated,
    missing,
    levels=None,
    input_dim=0,
    inputs_change=False,
):
    state_dim = targets.shape[1]
    truth = _truth(rng, targets, emission_dim, radius, correlated, input_dim)
    sets = []
    for count, entries, values in ((num_trials, missing, levels), (max(num_trials // 2, 10), 0.0, None)):
        mask, value = make(count, values)
        inputs = None
        if input_dim:
            inputs = np.repeat(rng.normal(size=(count, -(-num_timesteps // 10), input_dim)), 10, axis=1)[
                :, :num_timesteps
            ]
        emissions = _simulate(rng, truth, mask, value, inputs)
        sets.append(
            (np.where(rng.random(emissions.shape) < entries, np.nan, emissions), inputs, issm.Intervention(mask, value))
        )
    params = issm.make_lgssm_params(**truth)
    assert params.state_dim == state_dim
    return Design(name, params, *sets[0], *sets[1])


def _truth(rng, targets, emission_dim, radius, correlated, input_dim):
    """A stable system whose states have about unit variance; it stays stable whichever channel holds its states."""
    state_dim = targets.shape[1]
    turn = np.linalg.qr(rng.normal(size=(state_dim, state_dim)))[0]
    weights = 0.5 * turn + 0.5 * np.eye(state_dim) + 0.3 * rng.normal(size=(state_dim, state_dim)) / np.sqrt(state_dim)
    frees = [np.ones(state_dim, bool)] + [row == 0 for row in targets]
    largest = max(np.abs(np.linalg.eigvals(weights[np.ix_(free, free)])).max(initial=0.0) for free in frees)
    weights = weights * radius / largest
    cov = np.diag(rng.uniform(0.5, 1.5, state_dim))
    if correlated:
        factor = np.eye(state_dim) + 0.3 * rng.normal(size=(state_dim, state_dim)) / np.sqrt(state_dim)
        cov = factor @ cov @ factor.T
    stationary = cov
    for _ in range(200):
        stationary = weights @ stationary @ weights.T + cov
    scale = np.sqrt(np.diagonal(stationary))  # new units of every state, to unit variance
    weights, cov = weights * scale / scale[:, None], cov / scale / scale[:, None]
    readout = rng.normal(size=(emission_dim, state_dim)) / np.sqrt(state_dim)
    noise = rng.uniform(0.2, 0.6, emission_dim) ** 2
    return dict(
        initial_mean=0.5 * rng.normal(size=state_dim),
        initial_cov=np.full(state_dim, 0.5),
        dynamics_weights=weights,
        dynamics_cov=cov if correlated else np.diagonal(cov).copy(),
        dynamics_bias=0.1 * rng.normal(size=state_dim),
        dynamics_input_weights=0.3 * rng.normal(size=(state_dim, input_dim)),
        emissions_weights=readout,
        emissions_cov=noise,
        emissions_bias=rng.normal(size=emission_dim),
        emissions_input_weights=0.3 * rng.normal(size=(emission_dim, input_dim)),
    )


def _simulate(rng, truth, mask, value, inputs):
    num_trials, num_timesteps, state_dim = mask.shape
    cov = truth["dynamics_cov"]
    factor = np.diag(np.sqrt(cov)) if cov.ndim == 1 else np.linalg.cholesky(cov)
    inputs = np.zeros((num_trials, num_timesteps, 0)) if inputs is None else inputs
    emissions = np.zeros((num_trials, num_timesteps, len(truth["emissions_cov"])))
    state = truth["initial_mean"] + np.sqrt(truth["initial_cov"]) * rng.normal(size=(num_trials, state_dim))
    for t in range(num_timesteps):
        if t:
            drive = truth["dynamics_bias"] + inputs[:, t] @ truth["dynamics_input_weights"].T
            state = state @ truth["dynamics_weights"].T + drive + rng.normal(size=state.shape) @ factor.T
        state = np.where(mask[:, t], value[:, t], state)
        clean = (
            state @ truth["emissions_weights"].T
            + truth["emissions_bias"]
            + inputs[:, t] @ truth["emissions_input_weights"].T
        )
        emissions[:, t] = clean + np.sqrt(truth["emissions_cov"]) * rng.normal(size=clean.shape)
    return emissions
