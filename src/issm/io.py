"""Parameters and results on disk: one file, without pickle.

The file is a NumPy `.npz` archive. Its entry `structure` is a JSON text that names the classes and fields of the tree and says
where its arrays are; the other entries are the arrays. Loading runs no code of the file's choosing.
"""

import dataclasses
import io
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from issm._check import fail
from issm._host import is_concrete

_FORMAT = "issm"
_VERSION = 1
_STRUCTURE = "structure"
_NAMESPACES = ("issm", "issm.simulate")


def save(path: str | os.PathLike, tree: Any) -> None:
    """Write parameters, a fit or any other tree to one file, all or nothing.

    The tree may consist of this library's classes, other `eqx.Module`s, dicts with string keys, lists, tuples, None, arrays,
    numbers, Booleans and strings. A file that is there already is replaced only once the new one is complete.

    Args:
        path: Where to write, used as it is; `.npz` is the customary ending.
        tree: What to write.

    Returns:
        None.

    Raises:
        ValueError: If the tree holds something else, such as a function or a PRNG key; the message says where.
        OSError: If the file cannot be written.

    References:
        `docs/api/io.md`, "The format".

    Examples:
        >>> import pathlib, tempfile, issm
        >>> from issm.io import load, save
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(pathlib.Path(folder) / "model.npz", params)
        ...     again = load(pathlib.Path(folder) / "model.npz")
        >>> bool((again.dynamics.weights == params.dynamics.weights).all())
        True
    """
    arrays: dict[str, np.ndarray] = {}
    structure = {"format": _FORMAT, "version": _VERSION, "tree": _encode(tree, "tree", arrays)}
    arrays[_STRUCTURE] = np.frombuffer(json.dumps(structure).encode(), dtype=np.uint8)
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike, like: Any = None) -> Any:
    """Read what `save` wrote.

    Args:
        path: The file.
        like: A tree of which only the classes are used. Needed if the file holds classes that are not this library's, an
            emission map of your own for example.

    Returns:
        The tree. JAX arrays come back as JAX arrays (in float32 where x64 is off), NumPy arrays as NumPy arrays.

    Raises:
        ValueError: If the file is not one of ours, is of a newer format, or holds a class that is not known here or whose
            fields have changed.
        FileNotFoundError: If there is no such file.

    References:
        `docs/api/io.md`, "The format".

    Examples:
        >>> import pathlib, tempfile, issm
        >>> from issm.io import load, save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(pathlib.Path(folder) / "plan.npz", issm.do({0: 1.0}, num_timesteps=5, state_dim=2))
        ...     plan = load(pathlib.Path(folder) / "plan.npz")
        >>> type(plan).__name__, plan.num_timesteps
        ('Intervention', 5)
    """
    path = Path(path)
    content = path.read_bytes()
    try:
        if not zipfile.is_zipfile(io.BytesIO(content)):
            raise zipfile.BadZipFile
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        structure = json.loads(arrays.pop(_STRUCTURE).tobytes().decode())
        if structure.get("format") != _FORMAT:
            raise KeyError(_STRUCTURE)
    except (KeyError, ValueError, AttributeError, EOFError, zipfile.BadZipFile):
        raise ValueError(
            f"path: got {path}, which `issm.io.save` did not write or which is damaged; expected a file that it wrote."
        ) from None
    if structure["version"] > _VERSION:
        fail(
            "path",
            got=f"format version {structure['version']}",
            expected=f"at most {_VERSION}",
            remedy="It was written by a newer version of issm; upgrade.",
        )
    known = _known_classes() | _classes_of(like)
    return _decode(structure["tree"], "tree", arrays, known)


def _encode(node: Any, where: str, arrays: dict[str, np.ndarray]) -> Any:
    """The node as JSON; arrays go to `arrays` and leave their name."""
    if node is None or isinstance(node, bool | int | str):
        return node
    if isinstance(node, float):
        return {"float": node.hex()}  # exact, NaN and infinity included
    if isinstance(node, np.ndarray | np.generic | jax.Array):
        return _encode_array(node, where, arrays)
    if isinstance(node, dict) and all(isinstance(key, str) for key in node):
        return {"dict": {key: _encode(value, f"{where}[{key!r}]", arrays) for key, value in node.items()}}
    if type(node) in (list, tuple):
        return {type(node).__name__: [_encode(value, f"{where}[{i}]", arrays) for i, value in enumerate(node)]}
    if isinstance(node, eqx.Module):
        fields = {f.name: _encode(getattr(node, f.name), f"{where}.{f.name}", arrays) for f in dataclasses.fields(node)}
        return {"class": type(node).__name__, "fields": fields}
    fail(
        where,
        got=f"a {type(node).__name__}",
        expected="a module, dict with string keys, list, tuple, array, number, string or None",
        remedy="Save the parts that are data.",
    )


def _encode_array(node: Any, where: str, arrays: dict[str, np.ndarray]) -> Any:
    if not is_concrete(node) or jnp.issubdtype(node.dtype, jax.dtypes.extended):
        fail(
            where,
            got=f"a {type(node).__name__} of dtype {node.dtype}",
            expected="an array of numbers",
            remedy="Save outside `jit`; save a PRNG key as `jax.random.key_data(key)`.",
        )
    array = np.asarray(node)
    if array.dtype.kind not in "biufcV" or array.dtype.names:
        fail(where, got=f"dtype {array.dtype}", expected="numbers or Booleans", remedy="Save the parts that are data.")
    name = f"array_{len(arrays)}"
    # bfloat16 and its like are foreign to NumPy's file format: their bits are stored
    arrays[name] = array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array
    return {"array": name, "dtype": array.dtype.name, "jax": isinstance(node, jax.Array)}


def _decode(node: Any, where: str, arrays: dict[str, np.ndarray], known: dict[str, type]) -> Any:
    if not isinstance(node, dict):
        return node
    if "float" in node:
        return float.fromhex(node["float"])
    if "array" in node:
        array = arrays[node["array"]]
        if array.dtype.name != node["dtype"]:
            array = array.view(jnp.dtype(node["dtype"]))
        return jnp.asarray(array, jax.dtypes.canonicalize_dtype(array.dtype)) if node["jax"] else array
    if "dict" in node:
        return {key: _decode(value, f"{where}[{key!r}]", arrays, known) for key, value in node["dict"].items()}
    for kind in (list, tuple):
        if kind.__name__ in node:
            return kind(_decode(v, f"{where}[{i}]", arrays, known) for i, v in enumerate(node[kind.__name__]))
    name = node["class"]
    if name not in known:
        fail(
            where,
            got=f"the class {name}, which this version of issm does not have",
            expected="classes of issm",
            remedy="If it is a class of your own, pass `like`, a tree that holds one.",
        )
    fields = {key: _decode(value, f"{where}.{key}", arrays, known) for key, value in node["fields"].items()}
    expected = {field.name for field in dataclasses.fields(known[name])}
    if set(fields) != expected:
        fail(
            where,
            got=f"the fields {', '.join(sorted(fields))} of {name}",
            expected=", ".join(sorted(expected)),
            remedy="The class has changed since the file was written.",
        )
    module = object.__new__(known[name])  # as JAX does: the values were checked when the module was made
    for key, value in fields.items():
        object.__setattr__(module, key, value)
    return module


def _known_classes() -> dict[str, type]:
    """The public classes of the library, by name."""
    from importlib import import_module

    found = {}
    for namespace in _NAMESPACES:
        for name, value in vars(import_module(namespace)).items():
            if isinstance(value, type) and issubclass(value, eqx.Module) and not name.startswith("_"):
                found[name] = value
    return found


def _classes_of(tree: Any) -> dict[str, type]:
    """The module classes that a template holds, by name."""
    if isinstance(tree, eqx.Module):
        children = [getattr(tree, field.name) for field in dataclasses.fields(tree)]
        own = {type(tree).__name__: type(tree)}
    else:
        children = (
            list(tree.values()) if isinstance(tree, dict) else list(tree) if isinstance(tree, list | tuple) else []
        )
        own = {}
    for child in children:
        own |= _classes_of(child)
    return own


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
