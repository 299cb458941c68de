"""The times of iterations, on very small data: every fit is run for as many iterations as are counted."""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import pytest

STUDY = Path(__file__).parents[1] / "benchmarks" / "iterations.py"


@pytest.fixture
def study():
    spec = importlib.util.spec_from_file_location("iterations", STUDY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs_as_many_iterations_as_it_divides_by(study):
    data = study.data(2, 30, jnp.float32, "poisson")
    assert all(leaf.dtype in (jnp.float32, bool) for leaf in (data[1], data[2].mask, data[2].value))
    for name in study.FITS:
        fit = study.runner(name, *data)(2)
        assert (fit.rollout_log_probs.size, int(fit.num_iters)) == ((41, 0) if name == "rollout stage" else (0, 2))


def test_table(study, monkeypatch, capsys):
    monkeypatch.setattr(study, "seconds_per_iteration", lambda run, few, more: 2e-3)
    study.main(["--lengths", "20", "40", "--fits", "Laplace EM", "mean-field LSTM", "--trials", "2"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[-4:] for row in rows[:2]] == [["EM", "20", "2.00", "50.00"], ["40", "2.00", "25.00", "0.50"]]
    assert len(rows) == 4
    assert rows[2][-1] == "50.00"
