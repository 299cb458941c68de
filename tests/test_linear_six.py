"""The study of six linear states, with fewer trials: its reference points, and a fit that knows the clamps near them."""

import importlib.util
import itertools
from pathlib import Path

import numpy as np

STUDY = Path(__file__).parents[1] / "benchmarks" / "linear_six.py"


def test_clamps_recover_the_rates():
    spec = importlib.util.spec_from_file_location("linear_six", STUDY)
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    plan = study.pairs_held(np.random.default_rng(0), 40)
    assert set(map(tuple, np.argwhere(np.asarray(plan.mask).any(axis=1)).tolist())) == {
        (k, i) for k in range(30) for i in study.PAIRS[k % 15]
    }
    assert np.asarray(plan.mask).sum(axis=2).max() == 2
    first = itertools.islice(study.study(0, [()], num_sweeps=40, num_trials=30, num_timesteps=200), 3)
    rows = {name: row for name, *row in first}
    error, score = {name: row[0] for name, row in rows.items()}, {name: row[1] for name, row in rows.items()}
    assert error["true parameters"] < 1e-5
    reference = error["least squares on the true states"]
    assert 0.02 < reference < 0.2
    assert error["linear emission"] < 2 * reference  # few sweeps
    assert score["linear emission"] > score["true parameters"] - 0.02
