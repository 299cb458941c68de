"""The loop behind `fit_sgd`: epochs of updates by an optax optimiser, judged one by one."""

import time
from dataclasses import replace
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from issm._compile import QUICKER, jit_quickly
from issm._constraints import constrain, unconstrain
from issm._host import is_concrete
from issm._trees import apply_mask, choose
from issm._types import PRNGKey
from issm.fitting.batches import Data, Likelihood, UserLoss, shuffle, take
from issm.fitting.line_search import start_lbfgs
from issm.fitting.progress import ProgressBar
from issm.fitting.sgd_result import Code, SGDResult
from issm.inference.methods import choose_method, suits
from issm.models.trials import Trials

DRAW_EVERY_SECONDS = 0.3


class Problem(eqx.Module):
    """Where a fit starts, its data and its rules, checked."""

    start: Any
    masks: Any
    data: Data | Trials
    watched: Data | Trials | None
    loss: Any
    watched_loss: Any
    tol: Float[Array, ""]
    patience: Int[Array, ""]
    key: PRNGKey

    def in_form(self, form: str) -> "Problem":
        """With a form of the likelihood's kernels chosen; "auto" leaves the losses as they are."""
        if form == "auto":
            return self
        watched = None if self.watched_loss is None else replace(self.watched_loss, method=form)
        return replace(self, loss=replace(self.loss, method=form), watched_loss=watched)


class Method(eqx.Module):
    """What a compiled run depends on.

    Attributes:
        static: Leaves of the parameters that are no floating-point arrays.
        optimizer: The optimiser, or None for L-BFGS, whose coordinates are one vector.
        batch_size: Trials in a batch, or None.
    """

    static: Any
    optimizer: optax.GradientTransformation | None
    batch_size: int | None = eqx.field(static=True)


class State(eqx.Module):
    """What the loop carries: coordinates before epoch `epoch` (of L-BFGS, after the last step), the best ones, and the logs."""

    point: Any
    memory: Any
    best: Any
    best_loss: Float[Array, ""]
    best_epoch: Int[Array, ""]
    improved_loss: Float[Array, ""]
    improved_epoch: Int[Array, ""]
    losses: Float[Array, " num_log_probs"]
    watched_losses: Float[Array, " num_log_probs"]
    epoch: Int[Array, ""]
    code: Int[Array, ""]
    broken: Int[Array, ""]

    @property
    def last(self) -> int:
        """The largest number of epochs."""
        return self.losses.shape[0] - 1


@partial(jit_quickly, jit=eqx.filter_jit)
def prepare(problem: Problem, method: Method, num_epochs: int) -> State:
    """Coordinates of the start and empty logs; what is frozen has the coordinate zero."""
    point = _enter(
        jax.tree.map(lambda mask, leaf: jnp.where(mask, leaf, 0.0), problem.masks, unconstrain(problem.start)), method
    )
    blank = jnp.full(num_epochs + 1, jnp.nan, problem.tol.dtype)
    zero, infinite = jnp.zeros((), jnp.int32), jnp.full((), jnp.inf, problem.tol.dtype)
    memory = start_lbfgs(point) if method.optimizer is None else method.optimizer.init(point)
    return State(point, memory, point, infinite, zero, infinite, zero, blank, blank, zero, zero, zero - 1)


def run(state: State, problem: Problem, method: Method, until: Int[Array, ""]) -> State:
    """Epochs until the fit has ended or `until` of them are behind it.

    In single precision a program of L-BFGS holds one form of the likelihood, and ends where the next point needs the other.
    """
    if not isinstance(problem.data, Trials):  # what a loss of the user's own computes is not known
        return _run_any(state, problem, method, until, "auto")
    # Loops over many lanes need all of LLVM's work.
    in_lanes = problem.data.have_own_patterns or (method.batch_size is not None and problem.data.num_patterns > 1)
    compiled = _run_lanes if in_lanes else _run_likelihood
    if method.optimizer is not None or state.point.dtype != jnp.float32 or not is_concrete(state.code):
        return compiled(state, problem, method, until, "auto")
    while bool(_goes_on(state, until)):
        form = choose_method("auto", _next_parameters(state, problem, method), problem.data)
        state = compiled(state, problem, method, until, form)
    return state


def _loop(state: State, problem: Problem, method: Method, until: Int[Array, ""], form: str) -> State:
    problem = problem.in_form(form)
    go_on = _try_length if method.optimizer is None else _epoch

    def running(carry: tuple[State, Array]) -> Array:
        # The first point comes whatever happens: should rounding turn the verdict that chose this program, the fit moves on.
        state, is_first = carry
        fits = True if form == "auto" else is_first | suits(form, _next_parameters(state, problem, method))
        return _goes_on(state, until) & fits

    def iterate(carry: tuple[State, Array]) -> tuple[State, Array]:
        return go_on(carry[0], problem, method), jnp.asarray(False)

    return lax.while_loop(running, iterate, (state, jnp.asarray(True)))[0]


_run_any = eqx.filter_jit(_loop)
_run_likelihood = jit_quickly(_loop, jit=eqx.filter_jit)
_run_lanes = jit_quickly(_loop, jit=eqx.filter_jit, options=QUICKER)


def _goes_on(state: State, until: Int[Array, ""]) -> Bool[Array, ""]:
    return (state.code == Code.RUNNING) & ((state.epoch < until) | (state.epoch == state.last))


@eqx.filter_jit
def _next_parameters(state: State, problem: Problem, method: Method) -> Any:
    """Those whose loss comes next in L-BFGS."""
    return _parameters(state.memory.trial(state.point), problem, method)


def _try_length(state: State, problem: Problem, method: Method) -> State:
    """Evaluate one point of the search along a line; an epoch ends with every step that is taken."""
    trial = state.memory.trial(state.point)
    objective = lambda point: problem.loss(_parameters(point, problem, method), problem.data)  # noqa: E731
    loss, gradient = jax.value_and_grad(objective)(trial)
    gradient = jnp.where(_enter(problem.masks, method), gradient, 0.0)
    taken, memory = state.memory.weigh(trial, loss.astype(trial.dtype), gradient)
    broken = _first_broken(_leave(gradient, problem, method))
    code = jnp.where(broken >= 0, jnp.int32(Code.GRADIENT_NOT_FINITE), jnp.int32(Code.RUNNING))
    at_trial = eqx.tree_at(lambda s: s.point, state, trial)
    moved = _judge(at_trial, problem, method, (trial, memory, code, broken), loss)
    stayed = eqx.tree_at(lambda s: s.memory, state, memory)
    return choose(taken, moved, stayed)


def _epoch(state: State, problem: Problem, method: Method) -> State:
    """Go through all batches; judge the parameters that the epoch began with."""
    learns = state.epoch < state.last
    num_trials = problem.data.num_trials
    carry = (state.point, state.memory, jnp.int32(Code.RUNNING), jnp.int32(-1))
    if method.batch_size is None:
        carry, loss = _step(carry, problem.data, learns, problem, method)
    else:
        loss = jnp.zeros((), state.losses.dtype)
        key = jax.random.fold_in(problem.key, state.epoch)
        for batches in shuffle(key, num_trials, method.batch_size):
            visit = lambda carry, chosen: _step(carry, take(problem.data, chosen), learns, problem, method)  # noqa: E731
            carry, parts = lax.scan(visit, carry, batches)
            loss = loss + parts.sum() * (batches.shape[1] / num_trials)
    return _judge(state, problem, method, carry, loss)


def _judge(state: State, problem: Problem, method: Method, after: tuple, loss: Array) -> State:
    """The state after an epoch that began at `state.point` with this loss, and left `after`."""
    point, memory, code, broken = after
    loss = loss.astype(state.losses.dtype)
    watched = problem.watched is not None or method.batch_size is None
    judged = loss
    if problem.watched is not None:
        judged = problem.watched_loss(_parameters(state.point, problem, method), problem.watched)
        judged = judged.astype(loss.dtype)
    finite = jnp.isfinite(judged)
    better = (judged < state.best_loss) if watched else (code == Code.RUNNING) & finite
    improved = judged < state.improved_loss - problem.tol
    improved_epoch = jnp.where(improved, state.epoch, state.improved_epoch)
    broke = code != Code.RUNNING
    stale = watched & (state.epoch - improved_epoch >= problem.patience)
    ended = [
        ((~finite | (code == Code.LOSS_NOT_FINITE)) & (state.epoch == 0), Code.START_NOT_FINITE),
        (~finite, Code.LOSS_NOT_FINITE),
        (stale, Code.CONVERGED),
        (state.epoch == state.last, Code.MAX_EPOCHS),
    ]
    code = jnp.select([c for c, _ in ended], [jnp.int32(v) for _, v in ended], code)
    goes_on = code == Code.RUNNING
    return State(
        point=choose(goes_on, point, state.point),
        memory=choose(goes_on, memory, state.memory),
        best=choose(better, state.point, state.best),
        best_loss=jnp.where(better, judged, state.best_loss),
        best_epoch=jnp.where(better, state.epoch, state.best_epoch),
        improved_loss=jnp.where(improved, judged, state.improved_loss),
        improved_epoch=improved_epoch,
        losses=state.losses.at[state.epoch].set(loss),
        watched_losses=state.watched_losses.at[state.epoch].set(judged),
        epoch=state.epoch + goes_on.astype(jnp.int32),
        code=code,
        broken=jnp.where(broke, broken, state.broken),
    )


def _step(
    carry: tuple, batch: Data | Trials, learns: Bool[Array, ""], problem: Problem, method: Method
) -> tuple[tuple, Array]:
    """One update by one batch, unless something is not finite."""
    point, memory, code, broken = carry
    objective = lambda point: problem.loss(_parameters(point, problem, method), batch)  # noqa: E731
    loss, gradient = jax.value_and_grad(objective)(point)
    masks = problem.masks
    gradient = jax.tree.map(lambda mask, leaf: jnp.where(mask, leaf, 0.0), masks, gradient)
    assert method.optimizer is not None
    optimizer = optax.with_extra_args_support(method.optimizer)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # which optax relies on
        updates, new_memory = optimizer.update(gradient, memory, point, value=loss, grad=gradient, value_fn=objective)
        new = apply_mask(masks, optax.apply_updates(point, updates), point)
    by_gradient, by_update = _first_broken(gradient), _first_broken(new)
    found = [
        (code != Code.RUNNING, code),
        (~jnp.isfinite(loss), jnp.int32(Code.LOSS_NOT_FINITE)),
        (by_gradient >= 0, jnp.int32(Code.GRADIENT_NOT_FINITE)),
        (learns & (by_update >= 0), jnp.int32(Code.UPDATE_NOT_FINITE)),
    ]
    now = jnp.select([c for c, _ in found], [v for _, v in found], jnp.int32(Code.RUNNING))
    first = (now != code) & (now != Code.LOSS_NOT_FINITE)
    broken = jnp.where(first, jnp.where(by_gradient >= 0, by_gradient, by_update), broken)
    moves = learns & (now == Code.RUNNING)
    point, memory = choose(moves, (new, new_memory), (point, memory))
    return (point, memory, now, broken), jnp.asarray(loss, problem.tol.dtype)


def _parameters(point: Any, problem: Problem, method: Method) -> Any:
    """The parameters at a point; what is frozen keeps every bit."""
    return eqx.combine(
        apply_mask(problem.masks, constrain(_leave(point, problem, method)), problem.start), method.static
    )


def _enter(tree: Any, method: Method) -> Any:
    """A tree like the parameters in the form of the coordinates."""
    return ravel_pytree(tree)[0] if method.optimizer is None else tree


def _leave(point: Any, problem: Problem, method: Method) -> Any:
    """Coordinates in the form of the parameters."""
    return ravel_pytree(problem.start)[1](point) if method.optimizer is None else point


def _first_broken(tree: Any) -> Int[Array, ""]:
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)])
    return jnp.where(finite.all(), -1, jnp.argmin(finite)).astype(jnp.int32)


def run_with_bar(state: State, problem: Problem, method: Method, num_epochs: Array) -> State:
    """The same loop in short runs, with a bar between them."""
    total, size = int(num_epochs), 1
    bar = ProgressBar("fit_sgd", total)
    try:
        while int(state.code) == Code.RUNNING:
            began = time.perf_counter()
            until = jnp.asarray(min(int(state.epoch) + size, total), jnp.int32)
            state = jax.block_until_ready(run(state, problem, method, until))
            done = int(state.epoch)
            loss = float(state.losses[max(done - 1, 0)])
            bar.draw(done, -loss * _nats(problem.loss))
            if time.perf_counter() - began < DRAW_EVERY_SECONDS / 2:
                size *= 2
    except KeyboardInterrupt:
        state = eqx.tree_at(lambda s: s.code, state, jnp.int32(Code.INTERRUPTED))
    finally:
        bar.close()
    return state


@partial(jit_quickly, jit=eqx.filter_jit)
def finish(state: State, problem: Problem, method: Method) -> SGDResult:
    """Undo the coordinates; repeat the last entry of the logs to their end."""
    places = jnp.minimum(jnp.arange(state.losses.shape[0], dtype=jnp.int32), state.epoch)
    paths, _ = jax.tree_util.tree_flatten_with_path(problem.start)
    params = apply_mask(problem.masks, constrain(_leave(state.best, problem, method)), problem.start)
    params = choose(state.best_epoch > 0, params, problem.start)
    watched = None
    if problem.watched is not None:
        watched = -state.watched_losses[places] * _nats(problem.watched_loss)
    return SGDResult(
        params=params,
        log_probs=-state.losses[places] * _nats(problem.loss),
        held_out_log_probs=watched,
        converged=state.code == Code.CONVERGED,
        num_epochs=state.epoch,
        best_epoch=state.best_epoch,
        code=state.code,
        broken=state.broken,
        fields=tuple(jax.tree_util.keystr(path).lstrip(".") for path, _ in paths),
    )


def _nats(loss: Likelihood | UserLoss) -> Any:
    """What a loss is multiplied with to be a log-likelihood."""
    return loss.num_observed if isinstance(loss, Likelihood) else 1.0
