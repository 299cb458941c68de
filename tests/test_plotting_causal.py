"""Figures of causal questions hold what they were given."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import issm
from issm import plotting

PARAMS = issm.make_lgssm_params(
    [0.0, 0.0], [1.0, 1.0], [[0.5, 0.0], [0.4, 0.5]], [0.1, 0.1], [[1.0, 0.0], [0.0, 2.0]], [0.1, 0.1]
)


@pytest.fixture
def ax():
    return Figure(layout="constrained").subplots()


def test_connectivity_shows_certainty_as_area(ax):
    """A certain edge fills its place, one at half of 1.96 standard errors half of it; what is silent is crossed."""
    weights = np.array([[0.5, 0.3], [0.98, 0.0]])
    errors, silent = np.array([[0.0, np.inf], [1.0, 0.1]]), np.array([[False, True], [False, False]])
    plotting.plot_connectivity(weights, standard_errors=errors, silent=silent, labels=["a", "b"], ax=ax)
    areas = [patch.get_width() * patch.get_height() for patch in ax.patches]
    np.testing.assert_allclose(areas, [0.94**2, 0.94**2 / 2, 0.0])
    (cross,) = [line for line in ax.lines if line.get_marker() == "x"]
    np.testing.assert_array_equal(cross.get_xydata(), [[1, 0]])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b"]


def test_design_tells_a_clamp_to_zero_from_a_free_state(ax):
    plan = issm.do({0: [1.0, 0.0]}, num_timesteps=4, state_dim=2, start=1, stop=3)
    plans = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), plan)
    plotting.plot_design(plans, ax=ax)
    drawn = ax.images[0].get_array()
    assert drawn.shape == (4, 4)
    np.testing.assert_array_equal(np.ma.getmaskarray(drawn)[0], [True, False, False, True])
    np.testing.assert_array_equal(drawn[2, 1:3], [1.0, 0.0])


def test_comparison(ax):
    score = issm.Score(jnp.array([0.9, 0.5]), jnp.array([0.8, 0.4]), jnp.array([1.0, 0.6]))
    plotting.plot_comparison(SimpleNamespace(one_step_r2=score, names=("a", "b")), of="one_step_r2", ax=ax)
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [0.9, 0.5])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]


def test_response(ax):
    response = issm.impulse_response(PARAMS, 3, source=0)
    plotting.plot_response(response, of="emissions", ax=ax)
    np.testing.assert_allclose(ax.lines[2].get_ydata(), response.emissions[:, 1])
    assert len(ax.collections) == 0


def test_series_effect_in_three_panels():
    series = np.arange(20.0)[:, None] * np.ones((1, 2))
    effect = issm.observed_effect(PARAMS, series, start=15)
    panels = Figure().subplots(3, 1)
    assert plotting.plot_series_effect(effect, 1, time=np.arange(1900, 1920), axes=panels) is panels
    np.testing.assert_array_equal(panels[0].lines[1].get_ydata(), series[:, 1])
    for panel, part in zip(panels[1:], (effect.per_step, effect.cumulative), strict=True):
        np.testing.assert_allclose(panel.lines[1].get_xydata()[:, 1], part.mean[:, 1])
        assert panel.lines[1].get_xdata()[0] == 1915


BAD = {
    "errors of another shape": (lambda: plotting.plot_connectivity(np.eye(2), standard_errors=np.eye(3)), "standard_errors"),
    "another score": (lambda: plotting.plot_comparison(None, of="accuracy"), "of"),
    "a response of something else": (lambda: plotting.plot_response(None, of="rates"), "of"),
    "all sources at once": (lambda: plotting.plot_response(issm.total_effects(PARAMS, num_steps=2)), "response"),
    "times of another length": (
        lambda: plotting.plot_design(issm.no_intervention(4, 2), time=np.arange(3)), "time"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_figure_is_refused(name):
    call, argument = BAD[name]
    with pytest.raises(ValueError, match=f"^{argument}: got "):
        call()
