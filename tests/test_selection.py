"""The number of states is found, held-out scores are what a fit without those trials gives, and folds leave out what they say."""

import jax
import numpy as np
import pytest

import issm
from issm.fitting.folds import intervention_folds

K, T, KEY = 12, 40, jax.random.key(0)


@pytest.fixture(scope="module")
def data():
    """Two states that turn."""
    rng = np.random.default_rng(0)
    truth = issm.make_lgssm_params(
        [0.0, 0.0], [1.0, 1.0], [[0.8, 0.4], [-0.4, 0.7]], [0.3, 0.3], rng.normal(size=(5, 2)), np.full(5, 0.3)
    )
    return jax.vmap(lambda key: issm.lgssm_sample(key, truth, T)[1])(jax.random.split(KEY, K))


@pytest.fixture(scope="module")
def selection(data):
    """One state and two."""
    return issm.select_state_dim(KEY, data, [2, 1], num_folds=2, num_iters=40)


def test_finds_the_number_of_states(selection):
    assert selection.dims == (1, 2)
    assert set(selection.choices.values()) == {2}, selection.summary()
    assert selection.state_dim == selection.best_params.state_dim == 2
    assert "state_dim = 2, by held_out_trials" in selection.summary()


def test_what_was_not_scored_is_said(selection):
    assert list(selection.choices) == ["held_out_trials", "co_smoothing", "aic", "bic"]
    assert selection.held_out_interventions is None
    assert any("trials do not differ in their clamps" in note for note in selection.notes)
    with pytest.raises(ValueError, match="criterion: got 'held_out_interventions'"):
        selection.score("held_out_interventions")


def test_held_out_scores_are_of_fits_that_have_not_seen_the_trials(data, selection):
    """The first fold again, by hand."""
    scores = np.asarray(selection.held_out_trials[1])
    fold_key, start_key = jax.random.split(KEY)
    rng = np.random.default_rng(np.asarray(jax.random.randint(fold_key, (4,), 0, 2**31 - 1)))
    held = rng.permutation(K) % 2 == 0
    start = issm.initialize_lgssm(start_key, data[~held], 2)
    fit = issm.fit_em(start.params, data[~held], num_iters=40, tol=1e-6)
    expected = issm.marginal_log_prob(fit.params, data[held])
    np.testing.assert_allclose(scores[held], expected, rtol=1e-8)
    mean, error = selection.score("held_out_trials")
    np.testing.assert_allclose(mean[1], scores.sum() / data.size, rtol=1e-12)
    distance = np.asarray(selection.held_out_trials[0]) - scores
    np.testing.assert_allclose(error.max(), distance.std(ddof=1) * np.sqrt(K) / data.size, rtol=1e-12)


def plan_of_sets(sets, values):
    mask = np.zeros((len(sets), 4, 3), bool)
    for k, states in enumerate(sets):
        mask[k, 1:3, list(states)] = True
    return issm.Intervention(mask, mask * np.asarray(values, float)[:, None, None])


def test_interventions_are_left_out_whole_and_never_the_last_clamps_of_a_state():
    sets = [{0}, {1}, {0, 1}, {0, 1}, {2}, {0}]
    folds, note = intervention_folds(np.random.default_rng(0), plan_of_sets(sets, [1, 1, 1, 2, 1, 1]), 6, 3)
    assert note == ""
    assert folds[2] == folds[3]
    assert folds[0] == folds[5]
    assert folds[4] == -1
    for fold in range(folds.max() + 1):
        left = set().union(*(s for s, f in zip(sets, folds, strict=True) if f != fold))
        assert left == {0, 1, 2}


def test_plans_are_left_out_where_all_trials_clamp_the_same_states():
    folds, _ = intervention_folds(np.random.default_rng(0), plan_of_sets([{0}] * 6, [1, 1, 2, 2, 3, 3]), 6, 2)
    assert folds[0] == folds[1]
    assert folds[2] == folds[3]
    assert folds[4] == folds[5]
    assert set(folds) == {0, 1}


@pytest.mark.parametrize(
    ("sets", "values", "reason"),
    [
        ([{0}] * 4, [1, 2, 3, 4], "every trial has a plan of its own"),
        ([{0}, {0}, {1}, {1}], [1, 1, 2, 2], "no two kinds"),
        ([set()] * 2, [0, 0], "trials do not differ"),
    ],
)
def test_why_no_interventions_are_left_out(sets, values, reason):
    folds, note = intervention_folds(np.random.default_rng(0), plan_of_sets(sets, values), len(sets), 2)
    assert folds is None
    assert reason in note


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(emissions=np.zeros((4, 3))), "emissions: got shape"),
        (dict(dims=[0, 1]), "dims: got"),
        (dict(dims=[]), "dims: got"),
        (dict(dims=[1, 2], interventions=issm.no_intervention(4, 2)), "dims: got 1 for clamps of 2 states"),
        (dict(num_folds=1), "num_folds: got 1"),
        (dict(num_folds=7), "num_folds: got 7"),
        (dict(criterion="best"), "criterion: got 'best'"),
        (dict(criterion="held_out_interventions"), "criterion: got .* for these data"),
    ],
)
def test_bad_calls(change, message):
    options = dict(emissions=np.zeros((6, 4, 3)), dims=[1]) | change
    with pytest.raises(ValueError, match=message):
        issm.select_state_dim(KEY, **options)


def test_traced_data():
    with pytest.raises(ValueError, match="emissions: got data that JAX traces"):
        jax.jit(lambda y: issm.select_state_dim(KEY, y, [1]).aic)(np.zeros((6, 4, 3)))
