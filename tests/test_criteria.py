"""The parameter count is the rank of what the data can tell: the derivative of the moments of the emissions."""

import numpy as np
import pytest

import issm

D, N, M, T = 3, 4, 1, 6
PLANS = {
    "no clamps": (),
    "one state, one value": ((0, 1.0, 2, 4),),
    "one state, two values": ((0, 1.0, 2, 3), (0, -2.0, 4, 5)),
    "two states, one of them twice": ((0, 1.0, 0, 2), (0, 0.0, 4, 5), (2, 0.0, 3, 5)),
    "always held at the start": ((1, 2.0, 0, 2), (1, 1.0, 0, 3)),
}


def plan_of(name):
    """Three trials, each with its part of the plan."""
    mask, value = np.zeros((3, T, D), bool), np.zeros((3, T, D))
    for n, (state, held, start, stop) in enumerate(PLANS[name]):
        trials = slice(None) if name == "always held at the start" else n % 3
        mask[trials, start:stop, state] = True
        value[trials, start:stop, state] = held + (np.arange(3)[:, None] if trials == slice(None) else 0.0)
    return issm.Intervention(mask, value)


def random_params(initial_full, dynamics_full, emissions_full):
    rng = np.random.default_rng(0)

    def cov(dim, full):
        factor = rng.normal(size=(dim, dim)) / dim
        return factor @ factor.T + np.eye(dim) if full else rng.uniform(0.5, 1.5, dim)

    return issm.make_lgssm_params(
        rng.normal(size=D), cov(D, initial_full), 0.4 * rng.normal(size=(D, D)), cov(D, dynamics_full),
        rng.normal(size=(N, D)), cov(N, emissions_full), rng.normal(size=D), rng.normal(size=(D, M)), rng.normal(size=N),
        rng.normal(size=(N, M)),
    )  # fmt: skip


def as_matrix(vector, dim, full):
    """A covariance from its free entries."""
    if not full:
        return np.diag(vector)
    rows, columns = np.tril_indices(dim)
    lower = np.zeros((dim, dim), vector.dtype)
    lower[rows, columns] = vector
    return lower + lower.T - np.diag(np.diagonal(lower))


def moments(free, full, plan, inputs):
    """Means and covariances of the emissions of all trials, by the generative equations."""
    covs = [as_matrix(free[name], dim, is_full) for name, dim, is_full in zip("SQR", (D, D, N), full, strict=True)]
    (mask, value), found = plan, []
    for k in range(3):
        means, cross = [], []  # states, and Cov[x_s, x_t] for s <= t
        for t in range(T):
            kept = 1.0 - mask[k, t]
            if t == 0:
                mean, cov, history = free["m"], covs[0], []
            else:
                mean = free["A"] @ means[-1] + free["b"] + free["B"] @ inputs[k, t]
                history = [c @ free["A"].T for c in cross[-1]]
                cov = free["A"] @ history[-1] + covs[1]
            means.append(kept * mean + (1 - kept) * value[k, t])
            cross.append([c * kept[None] for c in history] + [cov * kept[None] * kept[:, None]])
        found += [free["C"] @ m + free["D"] @ inputs[k, t] + free["d"] for t, m in enumerate(means)]
        found += [
            free["C"] @ cross[t][s] @ free["C"].T + (covs[2] if s == t else 0.0) for t in range(T) for s in range(t + 1)
        ]
    return np.concatenate([each.ravel() for each in found])


def derivative(free, full, plan, inputs):
    """Columns of the Jacobian of the moments, by complex steps, which are exact to rounding."""
    plan = tuple(np.asarray(each) for each in (plan.mask, plan.value))
    columns = []
    for name, value in free.items():
        for index in np.ndindex(value.shape):
            moved = value.astype(complex)
            moved[index] += 1e-30j
            columns.append(moments(free | {name: moved}, full, plan, inputs).imag / 1e-30)
    return np.stack(columns, axis=1)


@pytest.mark.parametrize(
    ("plan", "full"),
    [
        ("no clamps", (True, True, True)),
        ("no clamps", (False, False, False)),
        ("no clamps", (True, False, False)),
        ("one state, one value", (False, True, False)),
        ("one state, two values", (False, False, False)),
        ("two states, one of them twice", (True, True, False)),
        ("always held at the start", (False, False, True)),
    ],
)
def test_count_is_the_rank_of_the_moments(plan, full):
    params, plan = random_params(*full), plan_of(plan)
    inputs = np.random.default_rng(1).normal(size=(3, T, M))

    def entries(cov):
        return cov if cov.ndim == 1 else np.asarray(cov)[np.tril_indices(len(cov))]

    free = {
        "m": params.initial.mean, "S": entries(params.initial.cov), "A": params.dynamics.weights,
        "b": params.dynamics.bias, "B": params.dynamics.input_weights, "Q": entries(params.dynamics.cov),
        "C": params.emissions.weights, "d": params.emissions.bias, "D": params.emissions.input_weights,
        "R": entries(params.emissions.cov),
    }  # fmt: skip
    columns = derivative({name: np.asarray(value) for name, value in free.items()}, full, plan, inputs)
    strength = np.linalg.svd(columns, compute_uv=False)
    rank = int((strength > 1e-9 * strength[0]).sum())
    assert (strength[:rank] > 1e-6 * strength[0]).all()  # no doubt about it
    emissions = np.random.default_rng(2).normal(size=(3, T, N))
    emissions[1, 2] = np.nan
    found = issm.information_criteria(params, emissions, inputs, interventions=plan)
    assert found.num_params == rank
    assert found.num_steps == 3 * T - 1
    log_prob = float(issm.marginal_log_prob(params, emissions, inputs, interventions=plan).sum())
    assert float(found.aic) == pytest.approx(2 * rank - 2 * log_prob)
    assert float(found.bic) == pytest.approx(np.log(3 * T - 1) * rank - 2 * log_prob)
