"""`identifiability` against loops in NumPy, second differences, and the spread of estimates over replications."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm
from helpers import joint_gaussian, random_system

TRUTH = issm.make_lgssm_params(
    [0.0, 0.0],
    [0.5, 0.5],
    [[0.7, 0.0], [0.5, 0.6]],
    [0.2, 0.2],
    np.eye(3, 2) + 0.2,
    [0.1, 0.1, 0.1],
    dynamics_bias=[0.1, 0.0],
)
NOTHING = jax.tree.map(lambda _: False, TRUTH)
DYNAMICS = eqx.tree_at(lambda p: (p.dynamics.weights, p.dynamics.bias, p.dynamics.cov), NOTHING, (True, True, True))


def random_plan(seed, num_trials, num_timesteps, state_dim):
    rng = np.random.default_rng(seed)
    mask = rng.random((num_trials, num_timesteps, state_dim)) < 0.4
    return issm.Intervention(mask, rng.integers(-2, 3, mask.shape).astype(float))


def test_counts_are_those_of_loops():
    plan = random_plan(0, 3, 9, 3)
    report = jax.tree.map(np.asarray, issm.identifiability(plan))
    mask, value = np.asarray(plan.mask), np.asarray(plan.value)
    known = np.concatenate([np.where(mask, value, 0.0), np.ones((3, 9, 1))], axis=2)
    for i in range(3):
        arrivals = [(k, t) for k in range(3) for t in range(1, 9) if not mask[k, t, i]]
        assert report.clamped_steps[i] == mask[..., i].sum()
        assert report.num_values[i] == len(set(value[..., i][mask[..., i]]))
        assert report.free_arrivals[i] == len(arrivals)
        moments = sum(np.outer(known[k, t - 1], known[k, t - 1]) for k, t in arrivals)
        np.testing.assert_allclose(report.excitation[i], moments, rtol=1e-12)
        for j in range(3):
            driven = [value[k, t - 1, j] for k, t in arrivals if mask[k, t - 1, j]]
            assert report.driven_arrivals[i, j] == len(driven)
            assert report.driven_values[i, j] == len(set(driven))
            assert report.separated[i, j] == any(mask[k, t, i] != mask[k, t, j] for k in range(3) for t in range(9))
    assert report.rank.tolist() == [4, 4, 4]
    np.testing.assert_allclose(
        report.condition,
        [np.linalg.cond(g / np.sqrt(np.outer(np.diag(g), np.diag(g)))) for g in np.asarray(report.excitation)],
        rtol=1e-9,
    )


def test_gaps_of_a_design_are_named():
    """State 0 moves freely, 1 only to one value, 2 and 3 always together, 4 never."""
    sizes = dict(num_timesteps=20, state_dim=5)
    both = issm.do({2: 1.0, 3: -1.0}, **sizes, start=14, stop=18)
    plan = issm.merge(
        issm.do({0: [1.0, 2.0, -1.0]}, **sizes, start=2, stop=5), issm.do({1: 3.0}, **sizes, start=8, stop=11)
    )
    report = issm.identifiability(issm.merge(plan, both))
    assert np.flatnonzero(report.never_clamped).tolist() == [4]
    assert np.flatnonzero(report.one_value).tolist() == [1, 2, 3]
    assert np.argwhere(report.inseparable).tolist() == [[2, 3], [3, 2]]
    lines = report.summary().splitlines()
    assert lines[:3] == [
        "state 4: never clamped",
        "state 1, 2 and 3: clamped to one value only",
        "states 2 and 3: always clamped together",
    ]
    silent = np.asarray(report.silent)
    assert silent[:, [2, 3, 4]].all(), "two columns that are always proportional, and one that never moves"
    assert not silent[:, [0, 1]].any()
    assert "2 → 0, 3 → 0, 4 → 0" in lines[3]

    def checked(clamps):
        return report.check_plan(issm.do(clamps, num_timesteps=3, state_dim=5))

    for clamps in ({0: 1.5}, {1: 3.0}, {2: 1.0, 3: -1.0}, {0: -1.0, 1: 3.0}):
        assert checked(clamps).supported, clamps
        assert checked(clamps).summary() == "the plan is within what the data's clamps span"
    assert np.flatnonzero(checked({4: 1.0}).never_clamped).tolist() == [4]
    assert "state 4: in the plan, but never clamped" in checked({4: 0.0}).summary()
    assert np.flatnonzero(checked({0: 2.5, 1: 3.0}).beyond_range).tolist() == [0]
    assert "state 0: held at values beyond" in checked({0: 2.5}).summary()
    alone = checked({2: 1.0})
    assert not alone.supported
    assert not alone.never_clamped.any()
    np.testing.assert_allclose(alone.outside_span, np.sqrt(0.5), rtol=1e-6)
    assert "3 of 3 steps clamp a combination" in alone.summary()


def test_excitation_and_information_before_and_after_the_data():
    """A full Q, clamps of all kinds, and a trial that ends early."""
    system = random_system(3, num_timesteps=6, state_dim=3, emission_dim=2, input_dim=1, num_trials=2, clamps="mixed",
                           dynamics_cov="full", missing_steps=(2,))  # fmt: skip
    system.emissions[1, 5:] = np.nan
    params, plan = system.params, system.interventions
    posterior = issm.lgssm_smoother(params, system.emissions, system.inputs, interventions=plan)
    for_both = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (2, 6, 3)), plan)
    before = issm.identifiability(for_both, params, None, system.inputs)
    after = issm.identifiability(plan, params, system.emissions, system.inputs, trainable=False)
    noise = system.fields["dynamics_cov"]
    excitation, information = np.zeros((2, 3, 5, 5)), np.zeros((2, 3, 5, 5))
    for k in range(2):
        _, inputs, mask, _, _ = system.trial(k)
        means, factors, *_ = joint_gaussian(system, k)
        for t in range(1, 6):
            free = np.flatnonzero(~mask[t])
            precision = np.linalg.inv(noise[np.ix_(free, free)])
            moments = [(np.asarray(means[t - 1], float), np.asarray(factors[t - 1] @ factors[t - 1].T, float)),
                       (posterior.smoothed_means[k, t - 1], posterior.smoothed_covariances[k, t - 1])]  # fmt: skip
            for which, (mean, state_cov) in enumerate(moments[: 1 + ((k, t) != (1, 5))]):
                z = np.concatenate([mean, inputs[t], [1.0]])
                second = np.outer(z, z)
                second[:3, :3] += state_cov
                for place, i in enumerate(free):
                    excitation[which, i] += second
                    information[which, i] += precision[place, place] * second
    for which, report in enumerate((before, after)):
        np.testing.assert_allclose(report.excitation, excitation[which], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(report.information, information[which], rtol=1e-9, atol=1e-9)
    assert (before.source, after.source) == ("model", "data")
    assert before.standard_errors is None
    assert after.standard_errors is None


@pytest.fixture(scope="module")
def trials():
    """Eight trials in which each state is clamped, one at a time, to two values."""
    num_timesteps = 30
    plans = [
        issm.do({j: value}, num_timesteps=num_timesteps, state_dim=2, start=3 + 2 * k, stop=13 + 2 * k)
        for k, (j, value) in enumerate([(0, 1.5), (0, -1.0), (1, 1.5), (1, -1.0)] * 2)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *plans)


@pytest.fixture(scope="module")
def replications(trials):
    """Data, fits from scratch and their standard errors."""

    def replicate(key):
        _, emissions = issm.lgssm_sample(key, TRUTH, 30, interventions=trials)
        fit = issm.fit_em(TRUTH, emissions, interventions=trials, trainable=DYNAMICS, num_iters=100, tol=1e-9)
        report = issm.identifiability(trials, fit.params, emissions, trainable=DYNAMICS)
        return emissions, fit.params, report

    return jax.jit(jax.vmap(replicate))(jax.random.split(jax.random.key(0), 60))


def test_standard_errors_are_the_spread_of_estimates(replications, record_property):
    """Pooled over edges: mean reported variance against the variance over the fits."""
    _, params, report = replications
    empirical = params.dynamics.weights.var(axis=0, ddof=1).mean()
    ratio = float(jnp.sqrt((report.standard_errors**2).mean() / empirical))
    record_property("standard errors of edges over their empirical spread, 60 replications", round(ratio, 3))
    assert 0.88 < ratio < 1.12  # one standard error of the ratio is about 0.05


def test_standard_errors_are_second_differences(replications, trials):
    """The observed information of edges, offsets and noise at a fit, by differences of the likelihood itself."""
    emissions, params, report = jax.tree.map(lambda leaf: leaf[0], replications)
    where = lambda p: (p.dynamics.weights, p.dynamics.bias, p.dynamics.cov)  # noqa: E731
    flat, unravel = jax.flatten_util.ravel_pytree(where(params))
    log_prob = jax.jit(jax.vmap(
        lambda x: issm.marginal_log_prob(eqx.tree_at(where, params, unravel(x)), emissions, interventions=trials).sum()
    ))  # fmt: skip
    step, eye = 1e-3, np.eye(len(flat))
    corners = [
        flat + step * (a * eye[i] + b * eye[j]) for a in (1, -1) for b in (1, -1) for i in range(8) for j in range(8)
    ]
    values = np.asarray(log_prob(jnp.stack(corners))).reshape(2, 2, 8, 8)
    hessian = (values[0, 0] - values[0, 1] - values[1, 0] + values[1, 1]) / (4 * step**2)
    expected = np.sqrt(np.diag(np.linalg.inv(-hessian)))[:4].reshape(2, 2)
    np.testing.assert_allclose(report.standard_errors, expected, rtol=1e-3)
    assert not report.silent.any()
    assert "s.e." in report.summary()


def test_without_clamps_the_basis_is_free_and_no_edge_is_known(trials):
    _, emissions = issm.lgssm_sample(jax.random.key(4), TRUTH, 30, interventions=trials)
    free = issm.no_intervention(30, 2)
    report = issm.identifiability(free, TRUTH, emissions)
    assert report.silent.all()
    assert np.isinf(report.standard_errors).all()
    assert report.rank.tolist() == [3, 3], "the states did move; they are not known"
    assert "the data are silent about 0 → 0, 1 → 0, 0 → 1, 1 → 1" in report.summary()
