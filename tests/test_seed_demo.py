"""The study of the two systems, very small: it runs to its figures, and clamps already win."""

import importlib.util
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).parents[1]


def test_study_runs(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("seed_demo", ROOT / "examples" / "seed_demo.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    config = yaml.safe_load((ROOT / "examples" / "configs" / "seed_demo.yaml").read_text(encoding="utf-8"))
    config |= {
        "systems": ["DynamicAttractor"], "num_trials": 4, "num_timesteps": 60, "num_seeds": 2, "num_baseline_seeds": 2, "widths": [10],
        "num_rollout": 150, "num_sweeps": 2, "stimulation": config["stimulation"] | {"duration": 8, "gap": [3, 8]},
    }  # fmt: skip
    rows = study.run(config, tmp_path)["DynamicAttractor"]
    assert {name: scores.shape for name, scores in rows.items()} == {
        name: (1 if name == "true parameters" else 2, 5) for name in ("true parameters", *study.VARIANTS)
    }
    assert rows["true parameters"][0, :2].min() > 0.999
    assert rows["true parameters"][0, 2] < 1e-5
    assert np.isfinite(rows["iSSM"]).all()
    assert rows["iSSM"][:, 0].min() > max(0.5, rows["additive SSM"][:, 0].max())
    assert "rollout R2" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.png"))) == 4
