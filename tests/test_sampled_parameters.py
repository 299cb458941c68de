"""Draws of the parameters under sampled questions: against closed forms, each draw asked by itself, and loops in NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm
from helpers import assert_refused, random_system

KEY = jax.random.key(0)
NUM_PARAMETERS, NUM_DRAWS = 6, 400
SYSTEM = random_system(
    3, num_trials=2, num_timesteps=6, input_dim=1, clamps="perfect", missing=0.2, initial_cov="diagonal",
    dynamics_cov="diagonal", emissions_cov="diagonal",
)  # fmt: skip
PLAN = issm.do({0: 1.5}, num_timesteps=6, state_dim=2, start=1, stop=4)


def vary(tree, scale):
    """Draws around a model: every array times numbers near one, with a leading axis."""
    rng = np.random.default_rng(0)
    near = lambda leaf: jnp.asarray(  # noqa: E731
        np.asarray(leaf) * (1 + scale * rng.uniform(-1, 1, (NUM_PARAMETERS, *leaf.shape)))
    )
    return jax.tree.map(lambda leaf: near(leaf) if eqx.is_array(leaf) else leaf, tree)


LINEAR_DRAWS = vary(SYSTEM.params, 0.15)
GAUSSIAN, DRAWS = issm.ssm_from_lgssm(SYSTEM.params), jax.vmap(issm.ssm_from_lgssm)(LINEAR_DRAWS)
LINEAR = issm.make_lgssm_params([0.2, 0.0], [0.3, 0.2], [[0.7, -0.3], [0.4, 0.6]], [0.05, 0.1], np.eye(2), [0.1, 0.1])
COUNTS = issm.SSM(
    LINEAR.initial, LINEAR.dynamics, issm.PoissonEmission(issm.LinearMap([[1.0, 0.5], [-0.5, 1.0]], [0.5, 1.0]), 2.0)
)
COUNT_DRAWS = vary(COUNTS, 0.2)


def some_counts():
    """Two trials."""
    return np.stack([issm.sample(key, COUNTS, 6)[1] for key in jax.random.split(KEY)])


def each_model(draws):
    return [jax.tree.map(lambda leaf, s=s: leaf[s], draws) for s in range(NUM_PARAMETERS)]


def assert_agree(found, exact):
    """By Monte-Carlo errors: of means, of standard deviations (known to a share of them), of the spread between parameters."""
    count = NUM_PARAMETERS * NUM_DRAWS
    assert (np.abs(found.mean - exact.mean) < 5 * found.trial.sd / count**0.5 + 1e-9).all()
    np.testing.assert_allclose(found.trial.sd, exact.trial.sd, rtol=5 / np.sqrt(2 * count), atol=1e-9)
    slack = 5 * np.asarray(exact.trial.sd) / NUM_DRAWS**0.5 / np.sqrt(2) + 1e-9
    assert (np.abs(found.parameter.sd - exact.parameter.sd) < slack).all()
    slack += 5 * np.asarray(exact.sd) / np.sqrt(2 * count)
    assert (np.abs(found.sd - exact.sd) < slack).all()


def test_effects_of_linear_models_are_the_closed_form():
    history = issm.History(SYSTEM.emissions, SYSTEM.inputs)
    options = dict(history=history, inputs=np.zeros((2, 6, 1)), window=(1, 5), average_trials=True)
    exact = issm.causal_effect(SYSTEM.params, PLAN, parameters=LINEAR_DRAWS, **options)
    ours = issm.sample_effect(KEY, GAUSSIAN, PLAN, parameters=DRAWS, num_draws=NUM_DRAWS, **options)
    for name in ("per_step", "cumulative", "average"):
        assert_agree(getattr(ours, name), getattr(exact, name))
    np.testing.assert_allclose(ours.relative.mean, exact.relative.mean, rtol=0.3)
    assert ours.num_draws == NUM_PARAMETERS * NUM_DRAWS
    np.testing.assert_allclose(ours.monte_carlo_error, ours.per_step.trial.sd / ours.num_draws**0.5)


def test_counterfactual_effects_of_linear_models_are_the_closed_form():
    """With missing entries, which are drawn; of known and of uncertain parameters."""
    (emissions, inputs), clamps = SYSTEM.data
    options = dict(inputs=inputs, window=(1, 5), **clamps)
    exact = issm.counterfactual_effect(SYSTEM.params, emissions, PLAN, parameters=LINEAR_DRAWS, **options)
    ours = issm.sample_counterfactual_effect(
        KEY, GAUSSIAN, emissions, PLAN, parameters=DRAWS, num_draws=NUM_DRAWS, **options
    )
    for name in ("per_step", "cumulative", "average", "outcome", "average_outcome"):
        assert_agree(getattr(ours, name), getattr(exact, name))
    known = issm.counterfactual_effect(SYSTEM.params, emissions, PLAN, **options).average
    found = issm.sample_counterfactual_effect(KEY, GAUSSIAN, emissions, PLAN, num_draws=2000, **options).average
    assert found.parameter is None
    assert (np.abs(found.mean - known.mean) < 5 * known.sd / 2000**0.5 + 1e-9).all()
    np.testing.assert_allclose(found.sd, known.sd, rtol=5 / np.sqrt(2 * 2000))


def test_models_are_asked_one_by_one():
    """The draws under each of the parameters are those of the same question asked with one key each, summed up in NumPy."""
    num = 50
    together = issm.sample_effect(KEY, COUNTS, PLAN, parameters=COUNT_DRAWS, num_draws=num, window="on")
    keys = jax.random.split(KEY, NUM_PARAMETERS)
    alone = [
        issm.sample_effect(key, model, PLAN, num_draws=num, window="on")
        for key, model in zip(keys, each_model(COUNT_DRAWS), strict=True)
    ]
    for name in ("per_step", "cumulative", "average", "relative"):
        found = getattr(together, name)
        means, sds = (np.stack([getattr(getattr(one, name), field) for one in alone]) for field in ("mean", "sd"))
        noise = (sds**2).mean(axis=0)
        between = np.maximum(means.var(axis=0, ddof=1) - noise / num, 0.0)
        np.testing.assert_allclose(found.mean, means.mean(axis=0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.trial.sd, np.sqrt(noise), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found.parameter.sd, np.sqrt(between), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(found.sd**2, noise + between, rtol=1e-6, atol=1e-9)
        assert (found.lower <= found.upper).all()


@pytest.mark.parametrize("question", ["prediction", "counterfactual"])
def test_draws_under_all_parameters(question):
    num, counts = 40, some_counts()
    if question == "prediction":
        plan = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), PLAN)
        ask = lambda key, model, **options: issm.sample_prediction(  # noqa: E731
            key, model, plan, history=issm.History(counts), num_draws=num, **options
        )
    else:
        ask = lambda key, model, **options: issm.sample_counterfactual(  # noqa: E731
            key, model, counts, PLAN, num_draws=num, **options
        )
    together = ask(KEY, COUNTS, parameters=COUNT_DRAWS)
    keys = jax.random.split(KEY, NUM_PARAMETERS)
    alone = [ask(key, model) for key, model in zip(keys, each_model(COUNT_DRAWS), strict=True)]
    for name in ("states", "emissions"):
        found, apart = getattr(together, name), np.stack([getattr(one, name).draws for one in alone], axis=1)
        assert found.num_parameters == NUM_PARAMETERS
        np.testing.assert_allclose(found.draws, apart.reshape(found.draws.shape), rtol=1e-9, atol=1e-12)
        noise = apart.var(axis=2, ddof=1).mean(axis=1)
        between = np.maximum(apart.mean(axis=2).var(axis=1, ddof=1) - noise / num, 0.0)
        np.testing.assert_allclose(found.trial_sd, np.sqrt(noise), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found.parameter_sd**2, between, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(found.monte_carlo_error, np.sqrt(noise / (NUM_PARAMETERS * num)), atol=1e-9)
        np.testing.assert_array_equal(getattr(alone[0], name).parameter_sd, 0.0)


def test_averages_of_counts_are_those_of_the_draws():
    """Average over trials and steps of what would have been less what was, by loops over the draws of the same key."""
    counts = some_counts()
    draws = np.asarray(issm.sample_counterfactual(KEY, COUNTS, counts, PLAN, num_draws=40).emissions.draws)
    effect = issm.sample_counterfactual_effect(
        KEY, COUNTS, counts, PLAN, num_draws=40, window=(2, 5), average_trials=True
    )
    sums, outcomes = np.zeros((40, 2)), np.zeros((40, 2))
    for k in range(2):
        for t in range(2, 5):
            sums += draws[k, :, t] - counts[k, t]
            outcomes += draws[k, :, t]
    for found, each in ((effect.average, sums / 6), (effect.average_outcome, outcomes / 6)):
        np.testing.assert_allclose(found.mean, each.mean(axis=0), rtol=1e-9)
        np.testing.assert_allclose(found.sd, each.std(axis=0, ddof=1), rtol=1e-9)
        np.testing.assert_allclose(found.upper, np.quantile(each, 0.975, axis=0), rtol=1e-9)
    np.testing.assert_allclose(effect.relative.mean, sums.mean(axis=0) / counts[:, 2:5].sum(axis=(0, 1)), rtol=1e-9)


def ask(parameters):
    return lambda: issm.sample_effect(KEY, COUNTS, PLAN, parameters=parameters, num_draws=2)


FALSE_VARIANCE = eqx.tree_at(lambda m: m.dynamics.cov, COUNT_DRAWS, -COUNT_DRAWS.dynamics.cov)
BAD = {
    "linear draws": (ask(LINEAR_DRAWS), "parameters"),
    "draws of another model": (ask(DRAWS), "parameters"),
    "no axis of draws": (ask(COUNTS), "parameters"),
    "one draw": (ask(jax.tree.map(lambda leaf: leaf[:1], COUNT_DRAWS)), "parameters"),
    "draws that are NaN": (ask(jax.tree.map(lambda leaf: leaf * jnp.nan, COUNT_DRAWS)), "parameters"),
    "a negative variance": (ask(FALSE_VARIANCE), "parameters.dynamics.cov"),
    "a counterfactual under linear draws": (
        lambda: issm.sample_counterfactual(KEY, COUNTS, np.ones((6, 2)), PLAN, parameters=LINEAR_DRAWS), "parameters"),
    "a prediction under linear draws": (
        lambda: issm.sample_prediction(KEY, COUNTS, PLAN, parameters=LINEAR_DRAWS), "parameters"),
    "an average over no trials": (
        lambda: issm.sample_effect(KEY, COUNTS, PLAN, average_trials=True), "average_trials"),
    "draws from too many parameters": (lambda: issm.Draws(jnp.zeros((5, 1, 1)), 2), "num_parameters"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_say_what_is_wrong(name):
    assert_refused(*BAD[name])
