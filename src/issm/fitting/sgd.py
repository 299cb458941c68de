r"""Fits by the gradient of any loss, for any pytree of parameters."""

from functools import lru_cache
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax

from issm._check import check_key, fail
from issm._constraints import check_interior, whole_matrices
from issm._host import is_concrete, to_device
from issm._trees import trainable_masks
from issm._types import PRNGKey
from issm.fitting.batches import Data, Likelihood, UserLoss, as_data, likelihood_data, split
from issm.fitting.centering import count_observed
from issm.fitting.descent import Method, Problem, State, finish, prepare, run, run_with_bar
from issm.fitting.sgd_result import SGDResult
from issm.interventions import Intervention
from issm.models.fields import TimeVarying
from issm.models.lgssm import ParamsLGSSM
from issm.models.trials import Trials

LARGEST_FOR_LBFGS = 2000
LEARNING_RATE = 1e-2


def fit_sgd(
    params: Any,
    emissions: Any,
    inputs: Any = None,
    *,
    interventions: Intervention | None = None,
    trainable: Any = None,
    optimizer: optax.GradientTransformation | None = None,
    loss: Any = None,
    batch_size: int | None = None,
    num_epochs: int = 200,
    held_out: Any = None,
    patience: int = 5,
    tol: float = 1e-7,
    key: PRNGKey | None = None,
    progress: bool = False,
) -> SGDResult:
    r"""Minimise a loss by its gradient, over all trials at once or in batches.

    $$θ \leftarrow θ - \mathrm{optimizer}(\nabla_θ\, \ell), \quad \ell = -\log p(y \mid do(\cdot), u) / \#y$$

    by default, in coordinates without constraints: variances (fields named `cov` or `concentration`) by their logarithm,
    covariance matrices by their Cholesky factor. An epoch visits every trial exactly once, in an order drawn
    anew; an epoch of L-BFGS is one step, whose length may take several evaluations.

    Args:
        params: Where to start: a `ParamsLGSSM`, or with a `loss` of your own any pytree; floating-point arrays are learned, and
            other leaves are kept.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or `(num_trials, num_timesteps, emission_dim)`; NaN is missing.
        inputs: Soft inputs $u_t$, `(num_timesteps, input_dim)`, shared or one such array for each trial.
        interventions: Clamps, shared or one for each trial. None: no clamps.
        trainable: What may change: a pytree prefix of `params` with Booleans, or Boolean arrays for single entries. None:
            everything but `TimeVarying` fields. A full covariance is frozen as a whole, a diagonal one entry by entry.
        optimizer: Any optax optimiser; make it once and pass the same object again, or the fit is compiled anew. None: L-BFGS
            for all trials at once and up to 2000 numbers, else Adam with a learning rate of 0.01.
        loss: `loss(params, emissions, inputs, interventions)` gives one number for the trials it is passed, as the user gave
            them; with batches, let it be a mean over trials. A function defined once, or a pytree with a `__call__`. None: minus
            the log-likelihood for each observed number.
        batch_size: Trials in a batch; None: all at once. If it does not divide their number, the last batch of an epoch is
            smaller.
        num_epochs: Largest number of passes over the trials.
        held_out: Trials that are not learned from but watched: their indices, or a Boolean for each. The fit ends when their
            loss no longer improves, and returns the best parameters for them.
        patience: Epochs without an improvement by more than `tol` after which the fit ends. The loss watched is that of the
            held-out trials, or without them that of all trials; with batches and nothing held out, no loss is watched.
        tol: Smallest improvement of that loss that counts.
        key: JAX random key for the order of the trials; needed with `batch_size`.
        progress: Whether to draw a bar on standard error. An interrupt from the keyboard then ends the fit and returns the best
            parameters so far.

    Returns:
        The fitted parameters, the log-likelihoods on the way, and why the fit ended.

    Raises:
        ValueError: If an argument has the wrong shape, type or values; the message names it.

    References:
        Liu & Nocedal (1989), *Mathematical Programming* 45 (L-BFGS); Lewis & Overton (2013), *Mathematical Programming* 141 (its
        search along a line); Kingma & Ba (2015), *ICLR* (Adam).

    Examples:
        >>> import jax, issm
        >>> truth = issm.make_lgssm_params(0.0, 1.0, 0.9, 0.1, 1.0, 0.5)
        >>> plan = issm.do({0: 2.0}, num_timesteps=50, state_dim=1, start=20, stop=40)
        >>> _, emissions = issm.lgssm_sample(jax.random.key(0), truth, 50, interventions=plan)
        >>> fit = issm.fit_sgd(truth, emissions, interventions=plan, num_epochs=3)
        >>> bool(fit.log_probs[-1] > fit.log_probs[0])
        True
    """
    options = _check_options(batch_size, num_epochs, patience, tol, progress, key)
    data, watched = split(as_data(emissions, inputs, interventions), held_out)
    masks = whole_matrices(trainable_masks(*_floats(params, trainable), fixed=TimeVarying), "trainable")
    start, static = eqx.partition(params, eqx.is_inexact_array)
    check_interior(start, masks, "params")
    data, watched, own_loss, watched_loss = _losses(params, data, watched, loss)
    if batch_size is not None and batch_size >= data.num_trials:
        batch_size = None
    size = sum(leaf.size for leaf in jax.tree.leaves(start))
    if optimizer is None and (batch_size is not None or size > LARGEST_FOR_LBFGS):
        optimizer = _default_optimizer()
    dtype = jax.tree.leaves(start)[0].dtype
    key = jax.random.key(0) if key is None else key
    ends = to_device(tol, dtype), to_device(patience, np.int32)
    problem = Problem(start, masks, data, watched, own_loss, watched_loss, *ends, key)
    method = Method(static, optimizer, batch_size)
    state = prepare(problem, method, num_epochs)
    go = run_with_bar if options and is_concrete(state.code) else run
    return _result(go(state, problem, method, to_device(num_epochs, np.int32)), problem, method)


def _result(state: State, problem: Problem, method: Method) -> SGDResult:
    fit, static = finish(state, problem, method), method.static
    fit = eqx.tree_at(lambda f: f.params, fit, eqx.combine(fit.params, static), is_leaf=lambda leaf: leaf is None)
    if not is_concrete(fit.num_epochs):
        return fit
    num_epochs = int(fit.num_epochs)
    where = lambda f: (f.num_epochs, f.best_epoch, f.converged, f.log_probs)  # noqa: E731
    logs = fit.log_probs[: num_epochs + 1]
    fit = eqx.tree_at(where, fit, (num_epochs, int(fit.best_epoch), bool(fit.converged), logs))
    if fit.held_out_log_probs is None:
        return fit
    return eqx.tree_at(lambda f: f.held_out_log_probs, fit, fit.held_out_log_probs[: num_epochs + 1])


@lru_cache(maxsize=1)
def _default_optimizer() -> optax.GradientTransformation:
    return optax.adam(LEARNING_RATE)


def _floats(params: Any, trainable: Any) -> tuple[Any, Any]:
    """The floating-point arrays of the parameters, and a mask for them."""
    floats = eqx.filter(params, eqx.is_inexact_array)
    if not jax.tree.leaves(floats):
        fail(
            "params",
            got="no floating-point JAX array",
            expected="a pytree with at least one",
            remedy="Convert its leaves with `jnp.asarray`.",
        )
    return floats, trainable


def _losses(params: Any, data: Data, watched: Data | None, loss: Any) -> tuple:
    """The data in the form that the loss takes, and the losses of both parts."""
    if loss is not None:
        if not callable(loss):
            fail(
                "loss",
                got=f"a {type(loss).__name__}",
                expected="a function of (params, emissions, inputs, interventions) or None",
                remedy="It gives one number.",
            )
        return data, watched, UserLoss(loss), UserLoss(loss)
    if not isinstance(params, ParamsLGSSM):
        fail(
            "loss",
            got=f"None for parameters of type {type(params).__name__}",
            expected="a loss of your own, or a ParamsLGSSM",
            remedy="Only a linear Gaussian model has an exact likelihood to fall back on.",
        )
    trials = likelihood_data(params, data)
    held_out = None if watched is None else likelihood_data(params, watched)
    return trials, held_out, _likelihood(trials), None if held_out is None else _likelihood(held_out)


def _likelihood(trials: Trials) -> Likelihood:
    return Likelihood(count_observed(trials), trials.num_trials)


def _check_options(batch_size: Any, num_epochs: Any, patience: Any, tol: Any, progress: Any, key: Any) -> bool:
    for name, value in (("batch_size", batch_size), ("num_epochs", num_epochs), ("patience", patience)):
        integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not (integer and value >= 1) and not (name == "batch_size" and value is None):
            fail(name, got=repr(value), expected="an integer of at least 1", remedy="Give a count.")
    if is_concrete(tol) and not (isinstance(tol, (int, float, np.number, jax.Array, np.ndarray)) and float(tol) >= 0):
        fail("tol", got=repr(tol), expected="a number of at least zero", remedy="Zero runs for as long as it improves.")
    if not isinstance(progress, bool):
        fail("progress", got=repr(progress), expected="True or False", remedy="True draws a bar.")
    if key is not None:
        check_key(key)
    elif batch_size is not None:
        fail("key", got="None", expected="a JAX random key", remedy="Batches are drawn: `key=jax.random.key(0)`.")
    return progress
