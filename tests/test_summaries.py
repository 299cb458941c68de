"""Tables of results hold their numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm
from issm._tables import format_number, format_table, join_words

PARAMS = issm.make_lgssm_params(
    [0.0, 0.0], [1.0, 1.0], [[0.5, 0.0], [1.0, 2.0]], [0.1, 0.1], [[1.0, 1.0]], [0.5], emissions_bias=[10.0]
)
PLAN = issm.do({0: 4.0}, num_timesteps=4, state_dim=2, stop=2)


def rows(table):
    lines = table.splitlines()
    start = next(i for i, line in enumerate(lines) if set(line) <= {"-", " "}) + 1
    return [line.split() for line in lines[start:]]


def test_effect():
    effect = issm.causal_effect(PARAMS, PLAN)
    found = rows(effect.summary())
    assert [row[0] for row in found] == ["average", "cumulative", "relative"]
    for row, part in zip(found, (effect.average, effect.cumulative, effect.relative), strict=True):
        part = jax.tree.map(lambda leaf: leaf[-1:] if leaf.ndim == 2 else leaf, part)
        expected = [float(x.ravel()[0]) for x in (part.mean, part.sd, part.lower, part.upper, part.total.p_value)]
        np.testing.assert_allclose([float(cell) for cell in row[2:]], expected, rtol=1e-3)


def test_an_effect_that_does_not_exist_has_no_spread():
    """Relative to an expected outcome of zero: no number, and no p-value of zero either."""
    effect = issm.causal_effect(PARAMS, PLAN, of="states")
    for leaf in jax.tree.leaves(effect.relative):
        assert np.isnan(leaf[0])
    assert rows(effect.summary())[-2] == ["relative", "0"]


def test_effects_of_many_trials():
    plans = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), PLAN)
    found = rows(issm.causal_effect(PARAMS, plans).summary())
    assert [row[:3] for row in found[:2]] == [["average", "0", "0"], ["average", "1", "0"]]


def test_prediction():
    prediction = issm.interventional_prediction(PARAMS, PLAN)
    first = rows(prediction.summary())[0]
    assert first == ["0", "4", "±", "0", "0", "±", "1", "14", "±", "1.2"]


def test_responses():
    response = issm.impulse_response(PARAMS, 2, source=0)
    assert rows(response.summary()) == [["0", "1", "0", "1"], ["1", "0.5", "1", "1.5"], ["2", "0.25", "2.5", "2.75"]]
    effects = issm.total_effects(PARAMS)
    lines = effects.summary().splitlines()
    assert lines[-1] == "no limit for source 0: the other states run away"
    assert lines[4].split() == ["1", "nan", "1"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(np.int32(3), "3"), (np.True_, "yes"), (0.123456, "0.1235"), (np.nan, ""), (np.inf, "inf"), ("a", "a")],
)
def test_cells(value, text):
    assert format_number(value) == text


def test_columns_are_aligned():
    table = format_table(["", "b"], [["long name", 1], ["x", 22]], title="T")
    assert table.splitlines() == ["T", "            b", "---------  --", "long name   1", "x          22"]
    assert join_words([1]) == "1"
    assert join_words([1, 2, 3]) == "1, 2 and 3"
