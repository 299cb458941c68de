"""What all fits of a general model share: checks of their data, the rollout stage, and how a result is gathered."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from issm._check import as_array, fail
from issm._host import is_concrete
from issm.fitting.rollout import fit_rollout
from issm.fitting.ssm_result import Code, SSMFit
from issm.fitting.stage import Data, Loop
from issm.interventions import Intervention
from issm.models.ssm import SSM, as_model_trials
from issm.models.trials import Trials


def prepare(
    model: SSM, emissions: Any, inputs: Any, interventions: Any, held_out: Any, patience: Any
) -> tuple[Trials, Data]:
    """Check the data, and say which trials are learned from."""
    trials = as_model_trials(model, emissions, inputs, interventions)
    num_trials, dtype = trials.num_trials, model.initial.mean.dtype
    held_out = np.zeros(num_trials, bool) if held_out is None else as_array("held_out", held_out)
    if held_out.dtype != bool or held_out.shape != (num_trials,):
        fail(
            "held_out",
            got=f"dtype {held_out.dtype}, shape {tuple(held_out.shape)}",
            expected=f"Booleans, (num_trials,) = ({num_trials},)",
            remedy="Mark the trials that nothing is learned from.",
        )
    known = is_concrete(held_out)
    if known and bool(np.asarray(held_out).all()):
        fail("held_out", got="nothing but True", expected="a trial to learn from", remedy="Leave one trial False.")
    if patience is not None:
        check_count("patience", patience, 1)
        if known and not np.asarray(held_out).any():
            fail(
                "patience",
                got=f"{patience} without held-out trials",
                expected="`held_out` trials that say when to stop",
                remedy="Mark some trials in `held_out`.",
            )
    counts = (~jnp.isnan(trials.emissions)).sum(axis=(1, 2)).astype(dtype)
    return trials, Data(counts, ~jnp.asarray(held_out))


def check_count(name: str, value: Any, smallest: int) -> None:
    """Refuse what is not an integer of at least `smallest`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < smallest:
        fail(name, got=repr(value), expected=f"an integer of at least {smallest}", remedy="It is a number of updates.")


def rollout_length(num_rollout: int | None, interventions: Intervention | None) -> int:
    """Number of updates of the rollout stage."""
    if num_rollout is not None:
        check_count("num_rollout", num_rollout, 0)
        return num_rollout
    if interventions is None:
        return 0
    return 400 if not is_concrete(interventions.mask) or np.asarray(interventions.mask).any() else 0


def rollout_stage(
    model: SSM, trials: Trials, data: Data, trainable: Any, num_rollout: int,
    dynamics_rate: float, emission_rate: float, patience: int | None, bar: bool,
) -> tuple[SSM, Loop | None]:  # fmt: skip
    """The rollout stage, if it has a length."""
    if not num_rollout:
        return model, None
    options = {"dynamics_rate": dynamics_rate, "emission_rate": emission_rate, "patience": patience, "bar": bar}
    return fit_rollout(model, trials, data, trainable, num_iters=num_rollout, **options)


def finish(
    model: SSM, rollout: Loop | None, loop: Loop, *, patience: int | None = None, recognition: Any = None
) -> SSMFit:
    """Gather the result; a rollout stage that broke down says so."""
    code = loop.code
    if rollout is not None:
        broken = (rollout.code >= Code.START_NOT_FINITE) & (code < Code.START_NOT_FINITE)
        code = jnp.where(broken, rollout.code, code)
    last = _last_known(loop)
    best = last if patience is None else jnp.argmax(jnp.nan_to_num(loop.held_out, nan=-jnp.inf, neginf=-jnp.inf))
    return SSMFit(
        params=model,
        rollout_log_probs=jnp.zeros(0, loop.log.dtype)
        if rollout is None
        else _ended(rollout.log, _last_known(rollout)),
        log_probs=_ended(loop.log, last),
        held_out=_ended(loop.held_out, last),
        converged=code == Code.CONVERGED,
        num_iters=last,
        best_iter=best.astype(last.dtype),
        code=code,
        recognition=recognition,
    )


def _last_known(loop: Loop) -> Array:
    """Number of updates behind the last parameters whose objective is known and finite."""
    known = jnp.isfinite(loop.log[loop.num_updates])
    return jnp.where(known, loop.num_updates, jnp.maximum(loop.num_updates - 1, 0))


def _ended(log: Array, last: Array) -> Array:
    """A log up to entry `last`; where its length is not known, entries beyond repeat that one."""
    if is_concrete(last):
        return log[: int(last) + 1]
    return log[jnp.minimum(jnp.arange(log.shape[0], dtype=last.dtype), last)]
