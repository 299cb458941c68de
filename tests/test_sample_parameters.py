"""`sample_parameters`: sweeps leave the joint distribution alone, conjugate posteriors, and what R-hat and ESS say of known chains."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import issm
from issm.fitting.chains import effective_sample_size, split_r_hat
from issm.fitting.gibbs import sweep
from issm.fitting.m_step import make_rules
from issm.models.trials import as_trials

NUM_CHAINS, NUM_SWEEPS = 2000, 5
DEGREES, PRECISION, SCALE = 7.0, 6.0, 3.0
MASK = np.array(
    [[[0, 1], [0, 0], [1, 0], [0, 0]], [[0, 0], [1, 1], [0, 1], [0, 0]], [[0, 0], [0, 0], [0, 0], [1, 0]]], bool
)
PLAN = issm.Intervention(MASK, np.where(MASK, 1.5, 0.0))
INPUTS = np.linspace(-1, 1, 4)[:, None]
MISSING = np.zeros((3, 4, 2), bool)
MISSING[0, 1, 0] = MISSING[1, 2] = MISSING[2, 3] = True
BLOCKS = {
    "initial": ("mean",),
    "dynamics": ("weights", "input_weights", "bias"),
    "emissions": ("weights", "input_weights", "bias"),
}


def prior_draws(rng, full):
    """Parameters of two states, two emissions and one input from the priors, many at once; A_01 is known to be zero."""
    fields = {}
    for block, names in BLOCKS.items():
        if full:
            cov = stats.invwishart(DEGREES, SCALE * np.eye(2)).rvs(NUM_CHAINS, random_state=rng)
            factor = np.linalg.cholesky(cov)
        else:
            shape = np.array([DEGREES + (block == "dynamics"), DEGREES]) / 2  # the known entry counts as an observation
            cov = stats.invgamma(shape, scale=SCALE / 2).rvs((NUM_CHAINS, 2), random_state=rng)
            factor = np.sqrt(cov)[:, :, None] * np.eye(2)
        columns = {"mean": 1, "bias": 1, "input_weights": 1, "weights": 2}
        fields[f"{block}_cov"] = cov
        for name in names:
            drawn = factor @ rng.normal(size=(NUM_CHAINS, 2, columns[name])) / np.sqrt(PRECISION)
            fields[f"{block}_{name}"] = drawn if "weights" in name else drawn[..., 0]
    if not full:
        fields["dynamics_weights"][:, 0, 1] = 0.0
    return fields


def assert_prior(params, full):
    """Every entry against its known distribution under the prior."""
    degrees = DEGREES - full
    entries = []
    for block, names in BLOCKS.items():
        values = getattr(params, block)
        cov = np.asarray(values.cov)
        variances = cov[:, [0, 1], [0, 1]] if full else cov
        for i in range(2):
            own = degrees + (not full and block == "dynamics" and i == 0)
            scale = np.sqrt(SCALE / own / PRECISION)
            entries.append((f"{block}.cov[{i}]", variances[:, i], stats.invgamma(own / 2, scale=SCALE / 2)))
            for name in names:
                for column in np.asarray(getattr(values, name)).reshape(NUM_CHAINS, 2, -1)[:, i].T:
                    if column.any():
                        entries.append((f"{block}.{name}[{i}]", column, stats.t(own, scale=scale)))
        if full:
            half = (DEGREES - 1) / 2
            correlation = cov[:, 0, 1] / np.sqrt(variances.prod(axis=1))
            entries.append((f"{block} correlation", (correlation + 1) / 2, stats.beta(half, half)))
    p_values = {name: stats.kstest(values, known.cdf).pvalue for name, values, known in entries}
    assert len(entries) > 20
    assert min(p_values.values()) > 1e-3, {name: p for name, p in p_values.items() if p < 1e-3}


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
def test_drawing_data_and_sweeping_in_turn_keeps_the_prior(full):
    """Parameters from the prior, then data given them and a sweep given the data, again and again: still the prior.

    With clamps on all states, missing entries, an input, and in the diagonal case an entry that is known.
    """
    fields = prior_draws(np.random.default_rng(0), full)
    start = jax.vmap(lambda f: issm.make_lgssm_params(**f))({k: jnp.asarray(v) for k, v in fields.items()})
    one = jax.tree.map(lambda leaf: leaf[0], start)
    prior = issm.RegressionPrior(precision=PRECISION, degrees=DEGREES, scale=SCALE)
    known = eqx.tree_at(
        lambda p: p.dynamics.weights, jax.tree.map(lambda _: True, one), np.array([[True, full], [True, True]])
    )
    rules = make_rules(one, known, issm.Priors(initial=prior, dynamics=prior, emissions=prior))
    trials = as_trials(one, np.where(MISSING, np.nan, 0.0), INPUTS, PLAN)

    @jax.jit
    @jax.vmap
    def chain(key, params):
        def step(params, key):
            data_key, sweep_key = jax.random.split(key)
            inputs = jnp.broadcast_to(jnp.asarray(INPUTS), (3, 4, 1))
            _, emissions = issm.lgssm_sample(data_key, params, 4, inputs, interventions=PLAN)
            data = eqx.tree_at(lambda t: t.emissions, trials, jnp.where(MISSING, jnp.nan, emissions))
            return sweep(sweep_key, params, data, rules, "sequential"), None

        return jax.lax.scan(step, params, jax.random.split(key, NUM_SWEEPS))[0]

    assert_prior(start, full)
    end = chain(jax.random.split(jax.random.key(1), NUM_CHAINS), start)
    assert_prior(end, full)
    moved = np.abs(
        np.corrcoef(np.asarray(start.dynamics.weights)[:, 1, 1], np.asarray(end.dynamics.weights)[:, 1, 1])[0, 1]
    )
    assert moved < 0.6  # it is no identity


TRUTH = issm.make_lgssm_params(0.0, 1.0, 0.8, 0.7, 1.0, 1e-4)
WEIGHT_AND_NOISE = eqx.tree_at(
    lambda p: (p.dynamics.weights, p.dynamics.cov), jax.tree.map(lambda _: False, TRUTH), (True, True)
)


CONJUGATE = issm.Priors(dynamics=issm.RegressionPrior(0.5, jnp.diag(jnp.array([4.0, 0.0])), 5.0, 2.0))


def test_observed_autoregression_has_the_conjugate_posterior():
    """Almost without emission noise: Student's t for the weight, inverse gamma for the variance; effects take the draws."""
    _, emissions = issm.lgssm_sample(jax.random.key(0), TRUTH, 40)
    samples = issm.sample_parameters(
        jax.random.key(1),
        TRUTH,
        emissions,
        trainable=WEIGHT_AND_NOISE,
        num_samples=1000,
        num_warmup=100,
        priors=CONJUGATE,
    )
    past, now = np.asarray(emissions)[:-1, 0], np.asarray(emissions)[1:, 0]
    precision = past @ past + 4
    center = (past @ now + 4 * 0.5) / precision
    degrees = len(past) + 5
    scale = 2 + now @ now + 4 * 0.25 - center**2 * precision
    weight = stats.t(degrees, center, np.sqrt(scale / degrees / precision))
    noise = stats.invgamma(degrees / 2, scale=scale / 2)
    for name, index, known in (("weights", (0, 0), weight), ("cov", (0,), noise)):
        own = lambda tree, name=name, index=index: float(getattr(tree.dynamics, name)[index])  # noqa: E731
        size = own(samples.effective_sample_size)
        assert size > 300
        assert own(samples.mean) == pytest.approx(known.mean(), abs=4.5 * known.std() / np.sqrt(size))
        assert own(samples.sd) == pytest.approx(known.std(), rel=5 / np.sqrt(size))
        for end, probability in zip(samples.intervals(0.8), (0.1, 0.9), strict=True):
            assert known.cdf(own(end)) == pytest.approx(probability, abs=4.5 * 0.3 / np.sqrt(size))
    assert samples.reason.startswith("the chains agree: R-hat at most 1.0")
    assert float(samples.r_hat.emissions.cov[0]) == 1.0  # fixed
    broken = eqx.tree_at(lambda s: s.r_hat.dynamics.bias, samples, jnp.array([jnp.nan]))
    assert broken.reason.startswith("not finite: dynamics.bias")
    apart = eqx.tree_at(lambda s: s.r_hat.dynamics.bias, samples, jnp.array([1.3]))
    assert apart.reason.startswith("the chains do not agree yet in dynamics.bias (R-hat at most 1.300")
    np.testing.assert_array_equal(samples.sd.emissions.cov, 0.0)

    plan = issm.do({0: 3.0}, num_timesteps=3, state_dim=1, start=0, stop=1)
    effect = issm.causal_effect(TRUTH, plan, parameters=samples.draws)
    np.testing.assert_allclose(effect.per_step.parameter.sd[1, 0], 3 * samples.sd.dynamics.weights[0, 0], rtol=1e-6)


def test_effective_sample_size_and_r_hat_of_known_chains():
    rng = np.random.default_rng(0)
    for rho in (0.0, 0.6, 0.9):
        chains = np.zeros((4, 4000))
        chains[:, 0] = rng.normal(size=4) / np.sqrt(1 - rho**2)
        for t in range(1, 4000):
            chains[:, t] = rho * chains[:, t - 1] + rng.normal(size=4)
        expected = 16000 * (1 - rho) / (1 + rho)
        assert float(effective_sample_size(jnp.asarray(chains))) == pytest.approx(expected, rel=0.15)
        assert float(split_r_hat(jnp.asarray(chains))) == pytest.approx(1, abs=0.01)
    apart = rng.normal(size=(2, 50, 3)) + np.array([0.0, 3.0])[:, None, None] * np.array([1.0, 0.0, 0.0])
    halves = apart.reshape(4, 25, 3)
    within = halves.var(axis=1, ddof=1).mean(axis=0)
    between = 25 * halves.mean(axis=1).var(axis=0, ddof=1)
    np.testing.assert_allclose(split_r_hat(jnp.asarray(apart)), np.sqrt((24 / 25 * within + between / 25) / within))
    still = jnp.ones((2, 50))
    assert (float(split_r_hat(still)), float(effective_sample_size(still))) == (1.0, 100.0)


def test_what_has_no_posterior_is_refused_or_named():
    emissions = np.sin(np.arange(20.0))[:, None]
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"trainable.initial.cov: got True, but too few steps"):
        issm.sample_parameters(key, TRUTH, emissions)
    with pytest.raises(ValueError, match=r"priors.input_l1: got a sparsity prior"):
        issm.sample_parameters(key, TRUTH, emissions, priors=issm.Priors(input_l1=1.0))
    with pytest.raises(ValueError, match="num_samples: got 3"):
        issm.sample_parameters(key, TRUTH, emissions, num_samples=3)
    varying = eqx.tree_at(lambda p: p.dynamics.bias, TRUTH, issm.TimeVarying(np.zeros((20, 1))))
    with pytest.raises(ValueError, match=r"params.dynamics.bias: got a TimeVarying"):
        issm.sample_parameters(key, varying, emissions)
