"""The numbers of a run, and the files that keep them."""

import hashlib
import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from issm import io
from issm.cli.config import Config, ConfigError
from issm.cli.run import Result, fields_of


def fingerprint(config: Config, folder: Path) -> str:
    """A digest of all that a run depends on: the configuration, the data file, the version."""
    digest = hashlib.sha256(f"{version('issm')}\n{config.model_dump_json()}".encode())
    path = getattr(config.data, "path", None)
    if path is not None:
        try:
            digest.update((folder / path).read_bytes())
        except OSError as error:
            raise ConfigError(f"data.path: cannot read {path}: {error.strerror}.") from None
    return digest.hexdigest()


def report_numbers(result: Result, digest: str) -> dict[str, Any]:
    """The numbers of a run, ready for JSON."""
    models = {}
    for each in result.models:
        numbers = {
            "log_likelihood": each.log_likelihood,
            "num_iters": each.num_iters,
            "reason": each.reason,
            "seconds": round(each.seconds, 3),
            "coefficients": [vars(c) for c in each.coefficients],
            "parameters": {name: value.tolist() for name, value in fields_of(each.params).items() if value.size <= 100},
        }
        if each.rollout is not None:
            numbers |= {"rollout_r2": each.rollout.r2, "coverage_95": each.rollout.coverage}
        if not math.isnan(each.error_aligned):
            numbers |= {"drift_error": each.error, "drift_error_aligned": each.error_aligned}
        models[each.section.name] = numbers
    summary = {
        "issm": version("issm"),
        "fingerprint": digest,
        "title": result.config.title,
        "num_trials": len(result.dataset.train.emissions),
        "num_timesteps": result.dataset.train.emissions.shape[1],
        "emission_dim": result.dataset.train.emissions.shape[2],
        "models": models,
        "known_answers": [_compare(answer, result) for answer in result.config.known_answers],
        "seconds": round(result.seconds, 3),
    }
    if result.truth_rollout is not None:
        rollout = result.truth_rollout
        summary["true_parameters"] = {"rollout_r2": rollout.r2, "coverage_95": rollout.coverage}
    return summary


def write_models(result: Result, directory: Path) -> list[str]:
    """One file for each model, which `issm.io.load` reads; returns their names."""
    names = []
    for each in result.models:
        names.append(f"{slug(each.section.name)}.npz")
        io.save(directory / names[-1], each.params)
    return names


def write_text(path: Path, text: str) -> None:
    """Write a file, all or nothing."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def as_json(numbers: dict[str, Any]) -> str:
    """JSON, in which what is not finite is null."""

    def clean(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: clean(value) for key, value in node.items()}
        if isinstance(node, list):
            return [clean(value) for value in node]
        return None if isinstance(node, float) and not math.isfinite(node) else node

    return json.dumps(clean(numbers), indent=2, ensure_ascii=False) + "\n"


def slug(name: str) -> str:
    """A model's name as a file name."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split()) or "model"


def _compare(answer: Any, result: Result) -> dict[str, Any]:
    """A known answer beside ours."""
    fitted = next(each for each in result.models if each.section.name == answer.model)
    name, _, detail = answer.quantity.partition(".")
    if name == "log_likelihood" and not detail:
        got = fitted.log_likelihood
    elif detail:
        got = next((getattr(c, detail, math.nan) for c in fitted.coefficients if c.field == name), math.nan)
    else:
        value = fields_of(fitted.params).get(name, np.full(1, math.nan))
        got = float(value.ravel()[0]) if value.size == 1 else math.nan
    decimals = decimals_of(answer.value)
    tolerance = answer.tolerance or 0.5 * 10.0**-decimals
    return {
        "model": answer.model,
        "quantity": answer.quantity,
        "known": answer.value,
        "got": got,
        "agrees": bool(abs(got - answer.value) <= tolerance),
        "source": answer.source,
    }


def decimals_of(value: float) -> int:
    """How many decimals a number was written with."""
    text = f"{value:.12f}".rstrip("0")
    return len(text.partition(".")[2])
