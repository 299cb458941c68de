"""Figures hold what they were given, in their own axes, without pyplot's state."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from issm import plotting, simulate


@pytest.fixture
def ax():
    return Figure(layout="constrained").subplots()


def test_log_probs(ax):
    assert plotting.plot_log_probs([-3.0, -2.0, -1.5], label="fit", ax=ax) is ax
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[0, -3.0], [1, -2.0], [2, -1.5]])
    assert ax.get_legend_handles_labels()[1] == ["fit"]


def test_prediction(ax):
    mean, time = np.arange(4.0), np.arange(1900, 1904)
    plotting.plot_prediction(mean, mean - 1, mean + 1, emissions=mean + 0.1, time=time, label="m", ax=ax)
    points, line = ax.lines
    np.testing.assert_array_equal(points.get_ydata(), mean + 0.1)
    np.testing.assert_array_equal(line.get_xdata(), time)
    band = ax.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == (-1.0, 4.0)


def test_interventions(ax):
    plotting.plot_interventions([True, False, True, True], time=[0.0, 0.5, 1.0, 1.5], label="held", ax=ax)
    spans = [(patch.get_x(), patch.get_width()) for patch in ax.patches]
    assert spans == [(-0.25, 0.5), (0.75, 1.0)]
    assert ax.get_legend_handles_labels()[1] == ["held"]


def test_flow_field(ax):
    trajectories = np.zeros((2, 5, 2))
    plotting.plot_flow_field(simulate.Saddle(), (-2.0, 2.0, -1.0, 1.0), states=trajectories, ax=ax)
    assert ax.get_xlim() == (-2.0, 2.0)
    assert len(ax.lines) == 2


def test_effect(ax):
    mean = np.array([[0.0, 5.0], [1.0, 6.0]])
    plotting.plot_effect(SimpleNamespace(mean=mean, lower=mean - 1, upper=mean + 1), 1, ax=ax)
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), [5.0, 6.0])


@pytest.mark.parametrize("kind", ["autocorrelation", "quantiles", "time"])
def test_residuals(ax, kind):
    innovations = np.array([[[0.0, 2.0], [0.0, np.nan], [0.0, -1.0]], [[0.0, 0.5], [0.0, 1.0], [0.0, 3.0]]])
    rows = np.array([[0.0, 0.3], [0.0, -0.2]])
    diagnostics = SimpleNamespace(innovations=innovations, autocorrelation=rows, autocorrelation_sd=abs(rows))
    assert plotting.plot_residuals(diagnostics, 1, kind=kind, ax=ax) is ax
    if kind == "autocorrelation":
        segments = ax.collections[1].get_segments()
        np.testing.assert_allclose(segments, [[[1, 0], [1, 0.3]], [[2, 0], [2, -0.2]]])
        assert ax.collections[0].get_paths()[0].get_extents().ymax == 0.6
    elif kind == "quantiles":
        np.testing.assert_array_equal(ax.lines[1].get_ydata(), [-1.0, 0.5, 1.0, 2.0, 3.0])
        np.testing.assert_allclose(ax.lines[1].get_xdata()[[0, 2, 4]], [-1.2815515655, 0.0, 1.2815515655], atol=1e-9)
    else:
        np.testing.assert_array_equal(ax.lines[0].get_xdata(), [0, 1, 2, 0, 1, 2])


def test_state_dim_selection(ax):
    scores = {"aic": ([-3.0, -1.0, -1.5], [0.0] * 3), "held_out_trials": ([-3.0, -1.1, -1.0], [0.2, 0.3, 0.0])}
    selection = SimpleNamespace(
        dims=(1, 2, 4), criterion="held_out_trials", choices={"aic": 2, "held_out_trials": 2}, score=scores.get
    )
    plotting.plot_state_dim_selection(selection, ax=ax)
    np.testing.assert_array_equal(ax.containers[0].lines[0].get_xydata(), [[1, -3.0], [2, -1.1], [4, -1.0]])
    assert ax.lines[-1].get_xdata() == [2, 2]
    plotting.plot_state_dim_selection(selection, "aic", label="AIC", ax=ax)
    np.testing.assert_array_equal(ax.containers[1].lines[0].get_ydata(), scores["aic"][0])


def test_a_new_figure_where_no_axes_are_given():
    from matplotlib import pyplot

    made = plotting.plot_log_probs([-1.0, -0.5])
    assert made.figure is pyplot.gcf()
    pyplot.close(made.figure)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plotting.plot_log_probs([[1.0]]), "log_probs: got shape"),
        (lambda: plotting.plot_prediction([1.0], [1.0]), "lower, upper: got one"),
        (lambda: plotting.plot_prediction([1.0, 2.0], time=[1.0]), "time: got shape"),
        (lambda: plotting.plot_flow_field(simulate.Saddle(), (1.0, 0.0, 0.0, 1.0)), "extent: got"),
        (lambda: plotting.plot_flow_field(lambda x: x[0], (0.0, 1.0, 0.0, 1.0)), "drift: got shape"),
        (lambda: plotting.plot_effect(SimpleNamespace(mean=np.ones(3), lower=0, upper=0)), "effect, index: got"),
        (lambda: plotting.plot_residuals(SimpleNamespace(innovations=np.ones((3, 1))), kind="qq"), "kind: got 'qq'"),
        (lambda: plotting.plot_residuals(SimpleNamespace(innovations=np.ones((3, 1))), 1), "index: got 1"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_matplotlib_is_imported_when_needed():
    probe = "import sys, issm.plotting; print('matplotlib' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "False"
