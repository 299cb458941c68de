"""`compare` and `check_clamps` in worlds where stimulation clamps, adds or spills."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm
from issm import metrics
from issm.causal.compare import bootstrap_counts
from issm.simulate import random_stimulation

NUM_TIMESTEPS, NUM_TRAIN, NUM_TEST = 30, 16, 10
NOISE = 0.01
WEIGHTS, LOADING = np.array([[0.8, -0.3], [0.4, 0.7]]), np.random.default_rng(0).normal(size=(4, 2))
KINDS = {"iSSM": "clamps", "additive SSM": "inputs", "observational SSM": "ignored"}


def model(input_weights=None):
    return issm.make_lgssm_params(
        [0.0, 0.0], [0.3, 0.3], WEIGHTS, [0.1, 0.1], LOADING, np.full(4, NOISE), dynamics_input_weights=input_weights
    )


def clamps(seed, num_trials):
    return random_stimulation(
        jax.random.key(seed), NUM_TIMESTEPS, 2, num_trials=num_trials, duration=(3, 8), gap=(2, 8), amplitude=2.0
    )


TRAIN, TEST = clamps(0, NUM_TRAIN), clamps(1, NUM_TEST)


def fit(emissions, inputs, interventions):
    """States by least squares from the emissions, whose noise is small; rows of the dynamics by regression where free."""
    states = np.asarray(emissions) @ np.linalg.pinv(LOADING).T
    shape = states.shape[:2]
    driven = np.zeros((*shape, 0)) if inputs is None else np.asarray(inputs)
    held = np.zeros(states.shape, bool) if interventions is None else np.asarray(interventions.mask)
    regressors = np.concatenate([states[:, :-1], driven[:, 1:]], axis=2)
    rows, variances = [], []
    for i in range(2):
        free = ~held[:, 1:, i]
        arrivals = states[:, 1:, i][free]
        rows.append(np.linalg.lstsq(regressors[free], arrivals, rcond=None)[0])
        variances.append(np.mean((arrivals - regressors[free] @ rows[-1]) ** 2))
    rows = np.stack(rows)
    return issm.make_lgssm_params(
        [0.0, 0.0], [0.3, 0.3], rows[:, :2], variances, LOADING, np.full(4, NOISE), dynamics_input_weights=rows[:, 2:]
    )


def constant(emissions, inputs, interventions, history):
    """A user's own model, without states."""
    zeros = jnp.zeros_like(emissions)
    return issm.Forecast(jnp.arange(float(len(emissions))), zeros, zeros[:, history:])


def compared(draw, another):
    """Fit all three models to trials that `draw` makes, and compare them (and another) on others."""
    train, test = draw(jax.random.key(2), TRAIN), draw(jax.random.key(3), TEST)
    models = {"another": another}
    for name, seen_as in KINDS.items():
        models[name] = (fit(train, **issm.stimulation_as(seen_as, TRAIN)), seen_as)
    return issm.compare(jax.random.key(4), models, test, interventions=TEST, history=5)


def clamped_world(key, plan):
    return issm.lgssm_sample(key, model(), NUM_TIMESTEPS, interventions=plan)[1]


def additive_world(key, plan):
    return issm.lgssm_sample(key, ADDITIVE, NUM_TIMESTEPS, plan.value)[1]


ADDITIVE = model(np.diag([0.6, 0.8]))


def leads(result, name):
    """Lower ends of the lead of `name` over each other fitted model, by likelihood and by rollouts."""
    i = result.names.index(name)
    scores = (result.log_likelihood_differences, result.rollout_r2_differences)
    return np.stack([np.delete(np.asarray(score.lower[i]), [i, 0]) for score in scores])


def test_where_stimulation_clamps(record_property):
    result = compared(clamped_world, (model(), "clamps"))
    assert (leads(result, "iSSM") > 0).all()
    rollouts = dict(zip(result.names, np.asarray(result.rollout_r2.value).round(4).tolist(), strict=True))
    record_property("rollout R² where stimulation clamps ('another' is the truth)", rollouts)
    assert abs(rollouts["iSSM"] - rollouts["another"]) < 0.01


def test_where_stimulation_adds(record_property):
    """The comparison says so."""
    result = compared(additive_world, lambda *args: jax.tree.map(lambda leaf: leaf - 1e4, constant(*args)))
    assert (leads(result, "additive SSM") > 0).all()
    rollouts = dict(zip(result.names, np.asarray(result.rollout_r2.value).round(4).tolist(), strict=True))
    record_property("rollout R² where stimulation adds", rollouts)
    assert result.names[int(result.best)] == "additive SSM"
    assert bool(result.decided)
    assert "the trials prefer additive SSM, by " in result.summary()


def test_numbers_are_those_of_a_loop():
    """Log-likelihoods, R² and intervals, of a model of each kind and of a user's own, with gaps in the data."""
    emissions = np.array(clamped_world(jax.random.key(5), TEST))
    emissions[0, 3:9, 1] = np.nan
    emissions[4, 25:] = np.nan
    observed = ~np.isnan(emissions)

    models = {"clamps": (model(), "clamps"), "inputs": (ADDITIVE, "inputs"), "own": constant, "again": constant}
    result = issm.compare(jax.random.key(6), models, emissions, interventions=TEST, history=5)
    log_probs, one_steps, rollouts = [], [], []
    for params, seen in ((model(), dict(interventions=TEST)), (ADDITIVE, dict(inputs=TEST.value))):
        posterior = issm.lgssm_filter(params, emissions, **seen)
        log_probs.append(np.asarray(posterior.marginal_loglik))
        one_steps.append(np.asarray(posterior.predicted_means) @ LOADING.T)
        rolled = []
        for k in range(NUM_TEST):
            cut = {name: jax.tree.map(lambda leaf, k=k: leaf[k], whole) for name, whole in seen.items()}
            mean = np.asarray(posterior.filtered_means[k, 4])
            ahead = []
            for t in range(5, NUM_TIMESTEPS):
                mean = WEIGHTS @ mean
                if "inputs" in cut:
                    mean = mean + np.diag([0.6, 0.8]) @ np.asarray(cut["inputs"][t])
                else:
                    mean = np.where(cut["interventions"].mask[t], cut["interventions"].value[t], mean)
                ahead.append(LOADING @ mean)
            rolled.append(ahead)
        rollouts.append(np.array(rolled))
    log_probs.append(np.arange(10.0))
    one_steps.append(np.zeros_like(emissions))
    rollouts.append(np.zeros_like(emissions[:, 5:]))
    counts = observed.sum(axis=(1, 2))
    drawn = np.asarray(bootstrap_counts(jax.random.key(6), NUM_TEST, 1000, np.dtype(float)))[1:]
    assert (drawn.sum(axis=1) == NUM_TEST).all()
    assert drawn.var() == pytest.approx(0.9, abs=0.05)  # binomial: as many draws as trials
    for i in range(3):
        assert result.log_likelihood.value[i] == pytest.approx(log_probs[i].sum() / counts.sum(), rel=1e-9)
        assert result.one_step_r2.value[i] == pytest.approx(float(metrics.r2(emissions, one_steps[i])), rel=1e-9)
        assert result.rollout_r2.value[i] == pytest.approx(float(metrics.r2(emissions[:, 5:], rollouts[i])), rel=1e-9)
        resampled = drawn @ log_probs[i] / (drawn @ counts)
        assert result.log_likelihood.lower[i] == pytest.approx(np.quantile(resampled, 0.025), rel=1e-9)
        assert result.log_likelihood.upper[i] == pytest.approx(np.quantile(resampled, 0.975), rel=1e-9)
    difference = result.log_likelihood_differences.value
    np.testing.assert_allclose(difference[0, 1], result.log_likelihood.value[0] - result.log_likelihood.value[1])
    np.testing.assert_allclose(difference, -difference.T, atol=1e-12)


def test_each_channel_is_found_out(record_property):
    """State 0 is clamped and its stimulation spills onto state 1, whose own stimulation adds and does not clamp."""
    spill = model(np.array([[0.0, 0.0], [0.3, 0.8]]))

    def draw(key, plan):
        held = issm.Intervention(plan.mask.at[..., 1].set(False), plan.value)
        return issm.lgssm_sample(key, spill, NUM_TIMESTEPS, plan.value, interventions=held)[1]

    check = issm.check_clamps(
        jax.random.key(9), fit, draw(jax.random.key(7), TRAIN), interventions=TRAIN,
        test_emissions=draw(jax.random.key(8), TEST), test_interventions=TEST,
    )  # fmt: skip
    record_property("spill onto state 1, truth 0.3", round(float(check.spill_weights[1, 0]), 3))
    assert check.clamps.tolist() == [True, False]
    assert check.adds.tolist() == [False, True]
    assert bool(check.spills[0])
    first, second = check.summary().splitlines()[-2:]
    assert first.split()[5] == "clamps"
    assert "state 1" in first.split("clamps")[1]
    assert second.split()[5] == "adds"
