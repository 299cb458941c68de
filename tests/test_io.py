"""What is saved comes back equal, and nothing else comes in."""

import json
import pickle
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import issm
from issm import io, simulate


def assert_same(a, b):
    leaves_a, structure_a = jax.tree.flatten(a)
    leaves_b, structure_b = jax.tree.flatten(b)
    assert structure_a == structure_b
    for x, y in zip(leaves_a, leaves_b, strict=True):
        assert type(x) is type(y)
        assert getattr(x, "dtype", None) == getattr(y, "dtype", None)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def params(getkey, state_dim=3):
    return simulate.random_clamped_lgssm(getkey(), state_dim, 4)


def test_params_come_back_equal(tmp_path, getkey):
    tree = params(getkey)
    io.save(tmp_path / "model.npz", tree)
    assert_same(io.load(tmp_path / "model.npz"), tree)
    assert [file.name for file in tmp_path.iterdir()] == ["model.npz"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16, jnp.int8, jnp.bool_, jnp.complex64])
def test_dtypes(dtype, tmp_path):
    tree = jnp.asarray([0, 1, 1], dtype)
    io.save(tmp_path / "x", tree)
    assert_same(io.load(tmp_path / "x"), tree)


def test_every_kind_of_node(tmp_path, getkey):
    tree = {
        "params": params(getkey),
        "varying": issm.TimeVarying(np.ones((4, 2, 2))),
        "plan": issm.do({0: 1.0}, num_timesteps=5, state_dim=2),
        "system": simulate.Saddle(coherence=0.1),
        "many": [1, (2.5, "text", None, True), float("nan"), float("-inf"), 1e-320],
        "numpy": np.arange(6.0).reshape(2, 3),
        "empty": jnp.zeros((2, 0)),
        "big": 2**70,
    }
    io.save(tmp_path / "x.npz", tree)
    again = io.load(tmp_path / "x.npz")
    assert np.isnan(again["many"].pop(2))
    tree["many"].pop(2)
    assert_same(again, tree)
    assert isinstance(again["many"], list)
    assert isinstance(again["many"][1], tuple)
    assert again["many"][1][1:] == ("text", None, True)


class Mine(eqx.Module):
    gain: Array
    name: str = eqx.field(static=True)


def test_a_class_of_the_users_own_needs_a_template(tmp_path):
    io.save(tmp_path / "x.npz", [Mine(jnp.ones(2), "a")])
    with pytest.raises(ValueError, match=r"tree\[0\]: got the class Mine, .* pass `like`"):
        io.load(tmp_path / "x.npz")
    again = io.load(tmp_path / "x.npz", like=[Mine(jnp.zeros(7), "b")])
    assert again[0].name == "a"
    np.testing.assert_array_equal(again[0].gain, jnp.ones(2))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"f": print}, r"tree\['f'\]: got a builtin_function_or_method"),
        ([jax.random.key(0)], r"tree\[0\]: got a .* of dtype key"),
        ({1: 2.0}, "tree: got a dict"),
        (np.array(["a"]), "tree: got dtype"),
        (np.array([object()]), "tree: got dtype object"),
    ],
)
def test_what_cannot_be_saved(tree, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        io.save(tmp_path / "x.npz", tree)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file(tmp_path, getkey, monkeypatch):
    tree = params(getkey)
    io.save(tmp_path / "x.npz", tree)

    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", broken)
    with pytest.raises(OSError, match="disk full"):
        io.save(tmp_path / "x.npz", {"other": 1})
    assert_same(io.load(tmp_path / "x.npz"), tree)
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]


def _rewrite(path: Path, change):
    with np.load(path) as archive:
        arrays = dict(archive)
    structure = json.loads(arrays["structure"].tobytes())
    change(structure)
    arrays["structure"] = np.frombuffer(json.dumps(structure).encode(), dtype=np.uint8)
    with path.open("wb") as file:
        np.savez(file, **arrays)


def test_foreign_and_damaged_files(tmp_path, getkey):
    path = tmp_path / "x.npz"
    refused = "which `issm.io.save` did not write"
    for content in (b"", b"text", pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=refused):
            io.load(path)
    np.savez(path, emissions=np.ones(3))
    with pytest.raises(ValueError, match=refused):
        io.load(path)
    np.save(tmp_path / "y.npy", np.ones(3))
    with pytest.raises(ValueError, match=refused):
        io.load(tmp_path / "y.npy")
    with pytest.raises(FileNotFoundError):
        io.load(tmp_path / "absent.npz")
    io.save(path, params(getkey))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=refused):
        io.load(path)


def test_versions(tmp_path, getkey):
    path = tmp_path / "x.npz"
    io.save(path, params(getkey))
    _rewrite(path, lambda structure: structure.update(version=99))
    with pytest.raises(ValueError, match=r"got format version 99; expected at most 1. .*upgrade"):
        io.load(path)
    io.save(path, params(getkey))
    _rewrite(path, lambda structure: structure["tree"]["fields"].update(extra=1))
    with pytest.raises(ValueError, match=r"tree: got the fields .*extra.* of ParamsLGSSM"):
        io.load(path)
    io.save(path, params(getkey))
    _rewrite(path, lambda structure: structure["tree"].update({"class": "Popen"}))
    with pytest.raises(ValueError, match="tree: got the class Popen"):
        io.load(path)
