"""From the data to the optimum: the study in `benchmarks/`, on two small systems."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    modules = [importlib.import_module(name) for name in ("designs", "fitting")]
    yield modules
    for name in ("designs", "fitting"):
        sys.modules.pop(name)


def test_two_small_systems(study, record_property):
    designs, fitting = study
    for seed in (0, 4):
        design = designs.random_design(seed, state_dim=2, emission_dim=4, num_trials=20, num_timesteps=50)
        mask = np.asarray(design.plan.mask)
        for free in [np.ones(2, bool), *~np.eye(2, dtype=bool)]:
            weights = np.asarray(design.truth.dynamics.weights)[np.ix_(free, free)]
            assert np.abs(np.linalg.eigvals(weights)).max() < 1
        assert all(np.unique(np.asarray(design.plan.value)[..., i][mask[..., i]]).size >= 2 for i in range(2))
        row = fitting.measure(design, 100)
        record_property(f"fit of small system {seed}", str(row))
        assert row["steps"] is not None
        assert row["steps"] <= 100
        assert row["gain"] > -1
        assert row["ratio"] < 1.1
