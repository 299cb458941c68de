"""One loop for every fit of a general model: it records, guards against what is not finite, and stops early."""

import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from issm._host import is_concrete
from issm._linalg import safe_sqrt
from issm._trees import choose
from issm._types import PRNGKey
from issm.fitting.progress import ProgressBar
from issm.fitting.ssm_result import Code

CLIP_NORM, WARMUP_STEPS, LAST_RATE = 10.0, 50, 0.01
DECAY_FIRST, DECAY_SECOND = 0.9, 0.99
DRAW_EVERY_SECONDS = 0.3


class Data(eqx.Module):
    """What every stage knows of the trials.

    Attributes:
        counts: Number of observed entries of each trial.
        training: Whether a trial is learned from; the others are held out.
    """

    counts: Float[Array, " num_trials"]
    training: Bool[Array, " num_trials"]

    def mean(self, per_trial: Array) -> Array:
        """Objective per observed entry, over the trials that are learned from."""
        chosen = lambda values: jnp.where(self.training, values, 0.0).sum()  # noqa: E731
        return chosen(per_trial) / chosen(self.counts)

    def held_out(self, per_trial: Array) -> Array:
        """The same over the trials that are held out; zero if there are none."""
        chosen = lambda values: jnp.where(self.training, 0.0, values).sum()  # noqa: E731
        return chosen(per_trial) / jnp.maximum(chosen(self.counts), 1.0)


class Loop(eqx.Module):
    """What the loop carries.

    Attributes:
        params: Parameters whose objective comes next.
        good: The last parameters whose objective is known and finite.
        best: Those with the best objective on held-out trials.
        carry: What the step keeps for itself: the state of an optimiser, paths.
        log, held_out: Objective per observed entry before every update, on the two kinds of trials.
        best_held_out: The largest of the latter.
        since: Number of updates since then.
        num_updates: Number of updates.
        code: Why the loop ended, or `Code.RUNNING`.
    """

    params: Any
    good: Any
    best: Any
    carry: Any
    log: Float[Array, " num_log"]
    held_out: Float[Array, " num_log"]
    best_held_out: Float[Array, ""]
    since: Int[Array, ""]
    num_updates: Int[Array, ""]
    code: Int[Array, ""]


Step = Callable[[Any, Any, Array], tuple[Array, Any, Any]]
"""`(params, carry, index) -> (objective of every trial at params, new params, new carry)`; a pytree."""


def run_stage(
    step: Step,
    params: Any,
    carry: Any,
    data: Data,
    *,
    num_iters: int,
    patience: int | None,
    tol: float,
    label: str,
    bar: bool,
) -> Loop:
    """Update `num_iters` times, or until an objective is not finite or that of the held-out trials has stopped to rise."""
    dtype = data.counts.dtype
    blank = jnp.full(num_iters + 1, jnp.nan, dtype)
    zero = jnp.zeros((), jnp.int32)
    loop = Loop(params, params, params, carry, blank, blank, -jnp.full((), jnp.inf, dtype), zero, zero, zero)
    rules = Rules(
        jnp.asarray(num_iters + 1 if patience is None else patience, jnp.int32),
        jnp.asarray(tol, dtype),
        patience is not None,
    )
    if bar and is_concrete(data.counts) and all(map(is_concrete, jax.tree.leaves(params))):
        return _run_with_bar(loop, step, data, rules, num_iters, label)
    return _run(loop, step, data, rules, jnp.asarray(num_iters + 1, jnp.int32))


class Rules(eqx.Module):
    """When to stop."""

    patience: Int[Array, ""]
    tol: Float[Array, ""]
    early: bool = eqx.field(static=True)


def _run_with_bar(loop: Loop, step: Step, data: Data, rules: Rules, num_iters: int, label: str) -> Loop:
    bar, stride = ProgressBar(label, num_iters), 1
    try:
        while int(loop.code) == Code.RUNNING:
            began = time.perf_counter()
            loop = _run(loop, step, data, rules, loop.num_updates + stride)
            done = int(loop.num_updates)
            bar.draw(min(done, num_iters), float(loop.log[min(done, num_iters + 1) - 1]))
            if time.perf_counter() - began < DRAW_EVERY_SECONDS:
                stride *= 2
    except KeyboardInterrupt:
        loop = eqx.tree_at(lambda x: x.code, loop, jnp.asarray(Code.INTERRUPTED, jnp.int32))
    finally:
        bar.close()
    return loop


@eqx.filter_jit
def _run(loop: Loop, step: Step, data: Data, rules: Rules, until: Int[Array, ""]) -> Loop:
    last = loop.log.shape[0] - 1
    arrays, rest = eqx.partition(loop, eqx.is_array)

    def running(arrays: Any) -> Array:
        return (arrays.code == Code.RUNNING) & (arrays.num_updates < until)

    def iterate(arrays: Any) -> Any:
        return eqx.filter(_advance(eqx.combine(arrays, rest), step, data, rules, last), eqx.is_array)

    return eqx.combine(lax.while_loop(running, iterate, arrays), rest)


def _advance(loop: Loop, step: Step, data: Data, rules: Rules, last: int) -> Loop:
    k = loop.num_updates
    per_trial, updated, carry = step(loop.params, loop.carry, k)
    value, held_out = data.mean(per_trial), data.held_out(per_trial)
    finite = jnp.isfinite(value)
    whole = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(updated) if eqx.is_inexact_array(x)]).all()
    better = finite & (held_out > loop.best_held_out)
    since = jnp.where(better, 0, loop.since + 1).astype(jnp.int32)
    before = loop.log[jnp.maximum(k - 1, 0)]
    ended = [
        (~finite & (k == 0), Code.START_NOT_FINITE),
        (~finite, Code.OBJECTIVE_NOT_FINITE),
        ((k > 0) & (jnp.abs(value - before) <= rules.tol), Code.CONVERGED),
        (since >= rules.patience, Code.STOPPED_EARLY),
        (k == last, Code.MAX_ITERS),
        (~whole, Code.UPDATE_NOT_FINITE),
    ]
    code = jnp.select([condition for condition, _ in ended], [jnp.int32(c) for _, c in ended], jnp.int32(Code.RUNNING))
    goes_on = code == Code.RUNNING
    good = choose(finite, loop.params, loop.good)
    return Loop(
        params=choose(goes_on, updated, good),
        good=good,
        best=choose(better, loop.params, loop.best) if rules.early else loop.best,
        carry=choose(goes_on, carry, loop.carry),
        log=loop.log.at[k].set(value),
        held_out=loop.held_out.at[k].set(held_out),
        best_held_out=jnp.maximum(loop.best_held_out, jnp.where(finite, held_out, -jnp.inf)),
        since=since,
        num_updates=jnp.where(goes_on, k + 1, k),
        code=code,
    )


class AdamState(eqx.Module):
    """Running means of the gradient and of its square, and the key that the next draws are made from."""

    first: Any
    second: Any
    key: PRNGKey


def start_adam(arrays: Any, key: PRNGKey) -> AdamState:
    """Both means at zero."""
    zeros = jax.tree.map(jnp.zeros_like, arrays)
    return AdamState(zeros, zeros, key)


def ascend(
    gradient: Any, state: AdamState, arrays: Any, index: Array, *, masks: Any, rates: Any, num_iters: int
) -> tuple[Any, AdamState]:
    """One step of Adam up the gradient, where the masks allow it; the rate rises for 50 steps and then falls by a cosine."""
    dtype = jax.tree.leaves(arrays)[0].dtype
    count = index.astype(dtype) + 1
    gradient = jax.tree.map(lambda g, mask: jnp.where(mask, g, 0.0), gradient, masks)
    norm = safe_sqrt(sum(((g**2).sum() for g in jax.tree.leaves(gradient)), jnp.zeros((), dtype)))
    gradient = jax.tree.map(lambda g: g * jnp.minimum(1.0, CLIP_NORM / jnp.maximum(norm, 1e-30)), gradient)
    first = jax.tree.map(lambda m, g: DECAY_FIRST * m + (1 - DECAY_FIRST) * g, state.first, gradient)
    second = jax.tree.map(lambda m, g: DECAY_SECOND * m + (1 - DECAY_SECOND) * g**2, state.second, gradient)
    warmup = min(WARMUP_STEPS, num_iters // 4)
    part = jnp.clip((count - warmup) / max(num_iters - warmup, 1), 0.0, 1.0)
    cosine = LAST_RATE + (1 - LAST_RATE) * (1 + jnp.cos(jnp.pi * part)) / 2
    share = jnp.minimum(1.0, count / max(warmup, 1)) * cosine
    unbias_first, unbias_second = 1 - DECAY_FIRST**count, 1 - DECAY_SECOND**count

    def move(x: Array, m: Array, v: Array, mask: Array, rate: float) -> Array:
        step = share * rate * (m / unbias_first) / (safe_sqrt(v / unbias_second) + 1e-8)
        return jnp.where(mask, x + step, x)

    return jax.tree.map(move, arrays, first, second, masks, rates), AdamState(first, second, state.key)
