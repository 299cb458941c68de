"""The study of the two systems, very small: it runs to its figures, and clamps already win, also with counts."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture
def study():
    spec = importlib.util.spec_from_file_location("seed_demo", ROOT / "examples" / "seed_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_of(name, **changes):
    """A config of the study, made very small."""
    config = yaml.safe_load((ROOT / "examples" / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    small = {
        "systems": ["DynamicAttractor"], "num_trials": 4, "num_timesteps": 60, "num_seeds": 2, "num_baseline_seeds": 2, "widths": [10],
        "num_rollout": 150, "num_sweeps": 2, "stimulation": config["stimulation"] | {"duration": 8, "gap": [3, 8]},
    }  # fmt: skip
    return config | small | changes


def test_study_runs(study, tmp_path, capsys):
    rows = study.run(config_of("seed_demo"), tmp_path)["DynamicAttractor"]
    assert {name: scores.shape for name, scores in rows.items()} == {
        name: (1 if name == "true parameters" else 2, 5) for name in ("true parameters", *study.VARIANTS)
    }
    assert rows["true parameters"][0, :2].min() > 0.999
    assert rows["true parameters"][0, 2] < 1e-5
    assert np.isfinite(rows["iSSM"]).all()
    assert rows["iSSM"][:, 0].min() > max(0.5, rows["additive SSM"][:, 0].max())
    assert "rollout R2" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_noise_is_found_where_the_emissions_are_known(study, monkeypatch, capsys):
    """Also a check of what is printed as drawn: of 2200 free arrivals a standard deviation is known to 1.5 %."""
    monkeypatch.setattr(study, "VARIANTS", ())
    config = config_of("seed_demo_noisy", num_trials=10, num_timesteps=200, num_sweeps=30)
    scores = study.run(config)["DynamicAttractor"]["iSSM, true emissions"][0]
    words = capsys.readouterr().out.split()
    process, emission = float(words[-4].strip(",")), float(words[-1])
    np.testing.assert_allclose([process, emission], [0.05, 0.1], rtol=0.06)
    np.testing.assert_allclose(scores[3:], [process, emission], rtol=0.05)


def test_counts(study, monkeypatch):
    monkeypatch.setattr(study, "VARIANTS", ("iSSM", "additive SSM"))
    config = config_of("seed_demo_poisson", num_trials=12, num_seeds=1, num_baseline_seeds=1)
    _, _, counts, expected = study.simulate(jax.random.key(0), "DynamicAttractor", config)
    counts, expected = np.asarray(counts), np.asarray(expected)
    assert (counts == np.round(counts)).all()
    assert abs((counts - expected).mean()) < 5 * np.sqrt(expected.mean() / counts.size)
    assert abs(((counts - expected) ** 2 / expected).mean() - 1) < 0.1
    rows = study.run(config)["DynamicAttractor"]
    assert {scores.shape for scores in rows.values()} == {(1, 4)}
    assert rows["true parameters"][0, :2].min() > 0.999
    assert rows["iSSM"][0, 0] > max(0.5, rows["additive SSM"][0, 0])
