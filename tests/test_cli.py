"""The command: what it computes, what it writes, and what it says when something is wrong."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import issm
from issm import io
from issm.cli import main
from issm.cli.config import read_config

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "configs"


def run(config, directory, *options):
    return main(["run", "-q", "-c", str(config), "-o", str(directory), *options])


def numbers_in(directory):
    return json.loads((directory / "metrics.json").read_text(encoding="utf-8"))


# The Nile


@pytest.fixture(scope="module")
def nile(tmp_path_factory):
    directory = tmp_path_factory.mktemp("nile")
    assert run(CONFIGS / "nile.yaml", directory) == 0
    return directory, numbers_in(directory)["models"]


def test_nile_log_likelihood(nile):
    level = nile[1]["local level, published variances"]
    assert f"{level['log_likelihood']:.10f}" == "-641.5855784594"


def test_nile_variances(nile):
    """Durbin & Koopman (2012), sec. 2.10, from a diffuse start: 15099 and 1469.1."""
    fitted = nile[1]["local level, fitted"]["parameters"]
    assert fitted["emissions_cov"] == pytest.approx([15099], abs=2)
    assert fitted["dynamics_cov"] == pytest.approx([1469.1], abs=2)


def test_nile_effect_of_the_dam(nile):
    step = nile[1]["local level and step"]
    assert step["parameters"]["dynamics_cov"] == [0.0]
    assert "at its boundary" in step["reason"]
    (dam,) = (c for c in step["coefficients"] if c["field"] == "emissions_input_weights")
    assert dam["name"] == "effect of dam on volume"
    assert dam["value"] == pytest.approx(-247.15, abs=0.005)
    assert f"{dam['se_scores']:.1f}" == "28.8"
    assert f"{dam['se_information']:.2f}" == "28.29"
    (dam,) = (c for c in nile[1]["constant level and step"]["coefficients"] if c["field"] == "emissions_input_weights")
    assert f"{dam['value']:.2f}" == "-247.78"


def test_nile_is_at_the_maximum_of_the_peers_likelihood(nile):
    statsmodels = pytest.importorskip("statsmodels.api")
    table = np.loadtxt(ROOT / "examples" / "data" / "nile.csv", delimiter=",", skiprows=1)
    model = statsmodels.tsa.UnobservedComponents(table[:, 1], "llevel", exog=(table[:, 0] >= 1899).astype(float))
    step = nile[1]["local level and step"]["parameters"]
    ours = model.loglike([step["emissions_cov"][0], 0.0, step["emissions_input_weights"][0][0]])
    published = model.loglike([16145.1723, 6.87857354e-07, -247.155017])
    assert published < ours < published + 1e-4


def test_nile_known_answers_agree(nile):
    assert all(answer["agrees"] for answer in numbers_in(nile[0])["known_answers"])


# The demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "made" / "on the way"
    assert main(["demo", "-q", "-o", str(directory)]) == 0
    return directory, numbers_in(directory)


def test_demo_shows_what_clamps_are_good_for(demo):
    models = demo[1]["models"]
    clamped, additive, truth = models["iSSM"], models["additive SSM"], demo[1]["true_parameters"]
    assert clamped["rollout_r2"] > truth["rollout_r2"] - 0.01 > 0.9
    assert additive["rollout_r2"] < 0.5
    assert clamped["coverage_95"] == pytest.approx(0.95, abs=0.02)
    assert clamped["drift_error"] < 0.05
    assert min(additive["drift_error"], additive["drift_error_aligned"]) > 0.2


def test_demo_writes_all_files(demo):
    directory, numbers = demo
    found = {str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()}
    assert found == {*numbers["files"], "metrics.json"}
    assert {"figures/rollout.png", "figures/flow.png", "issm.npz", "report.html"} <= found


def test_report_stands_alone(demo):
    page = (demo[0] / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == sum(name.endswith(".png") for name in demo[1]["files"])
    assert not re.search(r"(src|href)\s*=\s*['\"](?!data:)", page)
    assert "http" not in page
    assert "rollout R²" in page


def test_fitted_models_reload(demo):
    params = io.load(demo[0] / "issm.npz")
    assert isinstance(params, issm.ParamsLGSSM)
    assert params.dynamics.weights.tolist() == demo[1]["models"]["iSSM"]["parameters"]["dynamics_weights"]


def test_a_finished_run_is_not_repeated(demo, capsys):
    directory, _ = demo
    before = (directory / "metrics.json").read_bytes()
    assert main(["demo", "-o", str(directory)]) == 0
    assert "--force runs it again" in capsys.readouterr().out
    assert (directory / "metrics.json").read_bytes() == before


def test_example_is_the_demo():
    assert read_config(CONFIGS / "clamped_linear.yaml") == read_config(ROOT / "src" / "issm" / "cli" / "demo.yaml")


# Files of one's own


SMALL = {
    "title": "small",
    "data": {"kind": "csv", "path": "table.csv", "emissions": ["a", "b"]},
    "models": [{"name": "m", "state_dim": 1, "fit": {"num_iters": 3}}],
}
TABLE = """trial,year,a,b,u,held
1,0,0.1,0.3,1,
1,1,0.2,,0,0
1,2,0.1,0.1,1,2.0
1,3,0.4,0.4,0,
2,0,0.3,0.2,1,
2,1,0.1,0.4,1,
2,2,0.2,0.5,0,
2,3,0.6,0.7,0,1.0
"""


@pytest.fixture
def write(tmp_path):
    """Write the table and a configuration: SMALL with changes at dotted places."""

    def _write(changes=(), table=TABLE):
        config = yaml.safe_load(yaml.safe_dump(SMALL))
        for place, value in dict(changes).items():
            *parents, last = [int(part) if part.isdigit() else part for part in place.split(".")]
            node = config
            for part in parents:
                node = node[part]
            node[last] = value
        (tmp_path / "table.csv").write_text(table, encoding="utf-8")
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        return tmp_path / "config.yaml"

    return _write


def test_csv(write, tmp_path):
    config = write({
        "data.trial": "trial",
        "data.time": "year",
        "data.inputs": [{"name": "u", "column": "u"}, {"name": "late", "step_from": 2}],
        "data.clamps": [{"state": 0, "value": "held"}],
        "data.test": {"num_trials": 1, "history": 1},
    })  # fmt: skip
    from issm.cli.data import load_data

    data = load_data(read_config(config).data, 0, tmp_path)
    assert data.train.emissions.shape == (1, 4, 2)
    assert np.isnan(data.train.emissions[0, 1, 1])
    np.testing.assert_array_equal(data.train.inputs[0], [[1, 0], [0, 0], [1, 1], [0, 1]])
    assert data.train.clamps.mask[0, :, 0].tolist() == [
        False,
        True,
        True,
        False,
    ]  # an empty cell is free, a zero is not
    assert data.train.clamps.value[0, :, 0].tolist() == [0.0, 0.0, 2.0, 0.0]
    assert data.test.emissions[0, 3].tolist() == [0.6, 0.7]
    assert data.time.tolist() == [0, 1, 2, 3]
    assert run(config, tmp_path / "out") == 0
    numbers = numbers_in(tmp_path / "out")
    assert np.isfinite(numbers["models"]["m"]["rollout_r2"])


def test_npz(write, tmp_path):
    rng = np.random.default_rng(0)
    mask = rng.random((3, 30, 1)) < 0.2
    arrays = {"y": rng.normal(size=(3, 30, 2)), "c": mask, "v": rng.normal(size=(3, 30, 1))}
    np.savez(tmp_path / "data.npz", **arrays)
    section = {"kind": "npz", "path": "data.npz", "emissions": "y", "mask": "c", "value": "v"}
    from issm.cli.data import load_data

    data = load_data(read_config(write({"data": section})).data, 0, tmp_path)
    np.testing.assert_array_equal(data.train.emissions, arrays["y"])
    np.testing.assert_array_equal(data.train.clamps.mask, mask)


SIMULATED = {
    "kind": "simulated",
    "system": {"name": "saddle"},
    "dt": 0.05,
    "num_trials": 2,
    "num_timesteps": 30,
    "noise_scale": 0.1,
    "stimulation": {"duration": [3, 5], "gap": [2, 6]},
    "emissions": {"dim": 3, "noise_scale": 0.1},
}
SYSTEMS = [
    {"name": "linear", "rates": [[0.5, -1.0], [1.0, 0.5]]},
    {"name": "saddle"},
    {"name": "point_attractor", "a1": 0.5},
    {"name": "line_attractor"},
    {"name": "ff_integrator", "state_dim": 3},
    {"name": "lr_integrator", "state_dim": 3},
    {"name": "rotational_dynamics"},
    {"name": "dynamic_attractor", "a1": -5.0},
]


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s["name"])
def test_every_system_can_be_simulated(system, write, tmp_path):
    from issm.cli.data import load_data

    data = load_data(read_config(write({"data": SIMULATED | {"system": system}})).data, 0, tmp_path)
    assert data.train.emissions.shape == (2, 30, 3)
    assert np.isfinite(data.train.emissions).all()
    assert (data.truth is None) == (system["name"] == "saddle")
    if data.truth is not None:
        state = np.full(data.system.state_dim, 0.3)
        step = data.truth.dynamics.weights @ state + data.truth.dynamics.bias
        np.testing.assert_allclose(step, state + 0.05 * np.asarray(data.system(state)), rtol=1e-10)


# What is wrong


WRONG = [
    ({"titel": "x"}, "titel: got an unknown key; .* Did you mean `title`"),
    ({"title": None}, "title: got None; expected: a valid string"),
    ({"data.kind": "excel"}, "data: .*'excel'.*'simulated', 'csv', 'npz'"),
    ({"data.emision": 1}, "data.emision: got an unknown key; expected one of .*emissions.* Did you mean `emissions`"),
    ({"data.emissions": []}, r"data.emissions: got \[\]; expected: .*at least 1 item"),
    ({"data.inputs": [{"name": "u"}]}, r"data.inputs\[0\]: needs either `column` or `step_from`"),
    ({"data.inputs": [{"name": "u", "step_from": 1}]}, "data: an input with `step_from` needs `time`"),
    ({"models": []}, r"models: got \[\]; expected: .*at least 1 item"),
    ({"models.0.state_dim": 0}, r"models\[0\].state_dim: got 0; expected: greater than or equal to 1"),
    ({"models.0.stimulation": "clamp"}, r"models\[0\].stimulation: got 'clamp'; expected: 'clamps', 'inputs' or 'ignored'"),
    ({"models.0.fit.tol": -1}, r"models\[0\].fit.tol: got -1; expected: greater than or equal to 0"),
    ({"models.0.fit.tol": float("nan")}, r"models\[0\].fit.tol: got nan; expected: .*finite"),
    ({"models.0.fit.iters": 3}, r"models\[0\].fit.iters: got an unknown key; expected one of .* Did you mean `num_iters`"),
    ({"models.0.start": {"A": [1]}}, r"models\[0\].start.A \(a key\): got 'A'; expected: 'initial_mean'"),
    ({"models.0.trainable": ["cov"]}, r"models\[0\].trainable\[0\]: got 'cov'; expected: 'initial_mean'"),
    ({"known_answers": [{"model": "x", "quantity": "q", "value": 1, "source": "s"}]}, "`known_answers` names the model 'x'"),
    ({"data": SIMULATED | {"dt": 0}}, "data.dt: got 0; expected: greater than 0"),
    ({"data": SIMULATED | {"system": {"name": "saddel"}}}, "data.system: .*'saddel'.*'saddle'"),
    ({"data": SIMULATED | {"system": {"name": "saddle", "d": 1}}}, "data.system.d: .*expected one of a, b, c, coherence, name"),
    ({"data": SIMULATED | {"stimulation": {"duration": [5, 3], "gap": [0, 1]}}}, "data.stimulation: `duration` must be"),
    ({"data": SIMULATED | {"initial_state": [1.0]}}, "data.initial_state: got 1 numbers; expected 2"),
    ({"data": SIMULATED | {"system": {"name": "linear", "rates": [[1.0, 2.0]]}}}, "data.system.rates: got shape"),
    ({"data.path": "absent.csv"}, "data.path: cannot read absent.csv"),
    ({"data.emissions": ["z"]}, r"data.emissions\[0\]: got 'z'; expected a column of table.csv: trial, year, a"),
    ({"data.trial": "run"}, "data.trial: got 'run'; expected a column"),
    ({"data.trial": "trial", "data.test": {"num_trials": 2}}, "data.test.num_trials: got 2; expected fewer than the 2 trials"),
    ({"data.trial": "trial", "data.test": {"num_trials": 1}}, "data.test.history: got 10; expected fewer than the 4 steps"),
    ({"data": {"kind": "npz", "path": "table.csv"}}, "data.path: table.csv is not a NumPy archive"),
    ({"models.0.inputs": ["dam"]}, r"models\[0\] \(m\): inputs: got \['dam'\]; expected names among \[\]"),
    ({"models.0.start": {"emissions_cov": [-1.0, 1.0]}}, r"models\[0\] \(m\): start.emissions_cov: got a smallest variance"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[next(iter(changes)) for changes, _ in WRONG])
def test_wrong_values_are_named(changes, message, write, tmp_path, capsys):
    assert run(write(changes), tmp_path / "out") == 2
    complaint = capsys.readouterr().err
    assert re.search(message, complaint), complaint
    assert "Traceback" not in complaint
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_all_errors_are_named_at_once(write, tmp_path, capsys):
    assert run(write({"seed": -1, "models.0.state_dim": "two", "extra": 1}), tmp_path / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("config.yaml: 3 errors")
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file: got None"),
        ("title: [", "is not valid YAML.*line 1"),
        ("title: a\ntitle: b", "the key 'title' is given twice.*line 2"),
        ("- 1", r"the file: got \[1\]"),
    ],
)
def test_files_that_are_no_configuration(text, message, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    assert run(tmp_path / "config.yaml", tmp_path / "out") == 2
    assert re.search(message, capsys.readouterr().err, flags=re.DOTALL)


def test_no_configuration_and_no_place_to_write(write, tmp_path, capsys):
    assert run(tmp_path / "absent.yaml", tmp_path / "out") == 2
    assert "cannot read the configuration" in capsys.readouterr().err
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    assert run(write(), tmp_path / "file") == 2
    assert "cannot write to" in capsys.readouterr().err


def test_bad_cells_are_found(write, tmp_path, capsys):
    table = TABLE.replace("0.6,0.7", "0.6,n/a")
    assert run(write(table=table), tmp_path / "out") == 2
    assert "data.emissions[1]: row 9 of table.csv has 'n/a' in 'b'; expected a number" in capsys.readouterr().err


def test_a_missing_extra_is_named(write, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("issm.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert run(write(), tmp_path / "out") == 2
    assert "yaml is missing; the command needs an extra: pip install 'issm[cli]'" in capsys.readouterr().err


def test_help_and_version(capsys):
    for option, expected in (("--help", "issm.io.load"), ("--version", "issm 0")):
        with pytest.raises(SystemExit) as ended:
            main([option])
        assert ended.value.code == 0
        assert expected in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["run"])
    assert ended.value.code == 2
