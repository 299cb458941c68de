"""`sample_parameters`: sweeps leave the joint distribution alone, conjugate posteriors, and what R-hat and ESS say of known chains."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import issm
from issm._constraints import constrain, log_volume
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
    gibbs = {"trainable": WEIGHT_AND_NOISE, "method": "gibbs"}
    with pytest.raises(ValueError, match=r'priors.input_l1: got a sparsity prior.*Use `method="nuts"`'):
        issm.sample_parameters(key, TRUTH, emissions, priors=issm.Priors(input_l1=1.0), **gibbs)
    with pytest.raises(ValueError, match=r'priors: got a function.*Use `method="nuts"`'):
        issm.sample_parameters(key, TRUTH, emissions, priors=lambda params: 0.0, **gibbs)
    with pytest.raises(ValueError, match=r"method: got 'hmc'; expected one of"):
        issm.sample_parameters(key, TRUTH, emissions, method="hmc")
    with pytest.raises(ValueError, match=r"num_warmup: got 19; expected at least 20 for NUTS"):
        issm.sample_parameters(key, TRUTH, emissions, trainable=WEIGHT_AND_NOISE, method="nuts", num_warmup=19)
    still = eqx.tree_at(lambda p: p.dynamics.cov, TRUTH, jnp.zeros(1))
    with pytest.raises(ValueError, match=r"params.dynamics.cov: got a smallest entry of 0"):
        issm.sample_parameters(key, still, emissions, trainable=WEIGHT_AND_NOISE, method="nuts")
    with pytest.raises(ValueError, match="num_samples: got 3"):
        issm.sample_parameters(key, TRUTH, emissions, num_samples=3)
    varying = eqx.tree_at(lambda p: p.dynamics.bias, TRUTH, issm.TimeVarying(np.zeros((20, 1))))
    with pytest.raises(ValueError, match=r'params.dynamics.bias: got a TimeVarying.*Use `method="nuts"`'):
        issm.sample_parameters(key, varying, emissions, method="gibbs")


def log_normal(params):
    """A prior of one's own: the logarithm of the process noise is normal, and its density taken over the noise itself."""
    log_variance = jnp.log(params.dynamics.cov[0])
    return -((log_variance - jnp.log(0.5)) ** 2) / 2 - log_variance


def test_nuts_under_a_prior_of_ones_own_is_what_a_grid_says():
    """A variance, whose coordinate is its logarithm, beside a bias that varies in time, with a clamp and a missing entry."""
    bias = issm.TimeVarying(np.linspace(-0.5, 0.5, 15)[:, None])
    truth = eqx.tree_at(lambda p: (p.dynamics.bias, p.emissions.cov), TRUTH, (bias, jnp.array([0.3])))
    plan = issm.do({0: 2.0}, num_timesteps=15, state_dim=1, start=5, stop=8)
    _, emissions = issm.lgssm_sample(jax.random.key(3), truth, 15, interventions=plan)
    emissions = emissions.at[3].set(jnp.nan)
    only = eqx.tree_at(lambda p: p.dynamics.cov, jax.tree.map(lambda _: False, truth), True)
    samples = issm.sample_parameters(
        jax.random.key(4), truth, emissions, interventions=plan, trainable=only, priors=log_normal, num_samples=600,
        num_warmup=200, num_chains=3,
    )  # fmt: skip
    assert samples.method == "nuts"
    grid = jnp.exp(jnp.linspace(-8.0, 6.0, 4000))
    at = lambda variance: eqx.tree_at(lambda p: p.dynamics.cov, truth, variance[None])  # noqa: E731
    density = lambda v: issm.marginal_log_prob(at(v), emissions, interventions=plan) + log_normal(at(v))  # noqa: E731
    values = np.asarray(jax.jit(jax.vmap(density))(grid))
    weights = np.exp(values - values.max()) * np.asarray(grid)  # the grid is even in the logarithm
    cumulative = np.cumsum(weights) / weights.sum()
    size = float(samples.effective_sample_size.dynamics.cov[0])
    assert size > 300
    for probability in (0.05, 0.25, 0.5, 0.75, 0.95):
        end = float(np.quantile(samples.draws.dynamics.cov, probability))
        found = np.interp(end, grid, cumulative)
        assert found == pytest.approx(probability, abs=4.5 * np.sqrt(probability * (1 - probability) / size))
    np.testing.assert_array_equal(samples.sd.dynamics.bias.values, 0.0)


def test_nuts_and_gibbs_sampling_agree():
    """Two states with a full noise covariance, clamps, missing entries, priors on both, and an entry that is known."""
    truth = issm.make_lgssm_params(
        [0.0, 0.0], [1.0, 1.0], [[0.7, 0.3], [0.0, 0.6]], [[0.3, 0.1], [0.1, 0.2]], np.eye(2), [0.1, 0.1]
    )
    mask = np.zeros((4, 12, 2), bool)
    mask[0, 3:6, 0] = mask[1, 5:9, 1] = mask[2, 2:4] = True
    plan = issm.Intervention(mask, np.where(mask, 1.5, 0.0))
    _, emissions = issm.lgssm_sample(jax.random.key(5), truth, 12, interventions=plan)
    emissions = emissions.at[3, 4, 0].set(jnp.nan)
    free = lambda p: (p.dynamics.weights, p.dynamics.cov)  # noqa: E731
    only = eqx.tree_at(free, jax.tree.map(lambda _: False, truth), (np.array([[True, True], [False, True]]), True))
    priors = issm.Priors(dynamics=issm.RegressionPrior(0.3, 2.0, 6.0, 1.0))
    options = dict(interventions=plan, trainable=only, priors=priors, num_warmup=200, num_chains=3)
    gibbs = issm.sample_parameters(jax.random.key(6), truth, emissions, num_samples=1500, **options)
    nuts = issm.sample_parameters(jax.random.key(7), truth, emissions, num_samples=500, method="nuts", **options)
    assert (gibbs.method, nuts.method) == ("gibbs", "nuts")
    assert nuts.reason.startswith("the chains agree: R-hat at most 1.0")
    for leaf in ("weights", "cov"):
        of = lambda samples, name, leaf=leaf: np.asarray(getattr(getattr(samples, name).dynamics, leaf))  # noqa: E731
        sizes = [np.minimum(of(each, "effective_sample_size"), 1500) for each in (gibbs, nuts)]
        error = of(gibbs, "sd") * np.sqrt(1 / sizes[0] + 1 / sizes[1])
        assert (np.abs(of(nuts, "mean") - of(gibbs, "mean")) <= 4.5 * error).all()
        moved = of(gibbs, "sd") > 0
        assert moved.sum() == (3 if leaf == "weights" else 4)
        assert (error[moved] < 0.1 * of(gibbs, "sd")[moved]).all()
        np.testing.assert_allclose(of(nuts, "sd")[moved], of(gibbs, "sd")[moved], rtol=0.2)
    assert float(nuts.sd.dynamics.weights[1, 0]) == 0.0
    cov = np.asarray(nuts.draws.dynamics.cov)
    np.testing.assert_array_equal(cov[:, 0, 1], cov[:, 1, 0])
    divergent = eqx.tree_at(lambda s: s.num_divergent, nuts, jnp.array(7))
    assert "7 draws after a divergence" in divergent.reason


def test_volume_of_the_coordinates():
    """Against the determinant of the derivative, over the lower triangle of a matrix."""
    masks = {"cov": np.ones((3, 3), bool), "weights": np.ones((2, 2), bool)}
    rows, columns = np.tril_indices(3)
    point = jnp.asarray(np.random.default_rng(0).normal(size=6))
    tree = lambda z: constrain({"cov": jnp.zeros((3, 3)).at[rows, columns].set(z), "weights": jnp.ones((2, 2))})  # noqa: E731
    jacobian = jax.jacobian(lambda z: tree(z)["cov"][rows, columns])(point)
    np.testing.assert_allclose(log_volume(tree(point), masks), np.linalg.slogdet(jacobian)[1], rtol=1e-12)
    variances = {"cov": jnp.array([0.5, 0.0, 2.0])}
    np.testing.assert_allclose(log_volume(variances, {"cov": np.array([True, False, True])}), 0.0, atol=1e-12)
    assert float(log_volume(variances, {"cov": np.array([True, False, False])})) == pytest.approx(np.log(0.5))


def test_nuts_in_single_precision_under_jit_and_vmap():
    """A sparsity prior, which is not conjugate, shrinks the weight of an input: the larger, the closer to zero."""
    params = issm.make_lgssm_params([0.0], [1.0], [[0.5]], [0.2], [[1.0]], [0.2], dynamics_input_weights=[[0.5]])
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    inputs = np.sin(np.arange(10.0))[:, None].astype(np.float32)
    _, emissions = issm.lgssm_sample(jax.random.key(8), single, 10, inputs)
    only = eqx.tree_at(lambda p: p.dynamics.input_weights, jax.tree.map(lambda _: False, single), True)

    @jax.jit
    @jax.vmap
    def mean(weight):
        priors = issm.Priors(input_l1=weight)
        options = dict(trainable=only, priors=priors, num_samples=100, num_warmup=40, num_chains=2)
        samples = issm.sample_parameters(jax.random.key(9), single, emissions, inputs, **options)
        return samples.mean.dynamics.input_weights[0, 0], samples.num_divergent

    found, num_divergent = mean(jnp.array([0.0, 300.0], jnp.float32))
    assert found.dtype == jnp.float32
    assert num_divergent.shape == (2,)
    assert abs(float(found[1])) < 0.02 < 0.1 < float(found[0])
