r"""Variational learning of a general model: parameters and recognition network up the evidence lower bound together."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from issm._check import check_key, fail
from issm._trees import all_false
from issm._types import PRNGKey
from issm.fitting.free import from_free, keep_frozen, learning_rates, split, to_free
from issm.fitting.ssm_fits import check_count, finish, prepare, rollout_length, rollout_stage
from issm.fitting.ssm_result import SSMFit
from issm.fitting.stage import AdamState, Data, ascend, run_stage, start_adam
from issm.inference.laplace import find_mode, make_problem, potentials
from issm.inference.observations import Potential
from issm.inference.recognition import Recognition
from issm.inference.variational import bound_of, check_recognition
from issm.interventions import Intervention
from issm.models.ssm import SSM, check_linear
from issm.models.trials import Plan, Trials

MIXING = 0.6  # weight of the newest Gauss-Newton potentials


def fit_vi(
    key: PRNGKey,
    model: SSM,
    recognition: Recognition | None,
    emissions: Any,
    inputs: Any = None,
    *,
    interventions: Intervention | None = None,
    trainable: Any = None,
    held_out: Any = None,
    gamma: float = 1.0,
    num_samples: int = 1,
    batch_size: int | None = None,
    num_iters: int = 300,
    num_rollout: int | None = None,
    dynamics_rate: float = 3e-2,
    emission_rate: float = 1e-2,
    recognition_rate: float = 1e-2,
    patience: int | None = None,
    progress: bool = False,
) -> SSMFit:
    r"""Fit a model with any emissions by maximising the evidence lower bound.

    $$E_q[\log p(y \mid x)] - \gamma\,KL(q \,\|\, p(x \mid do(\cdot), u))$$

    If there are clamps, the rollout stage of `fit_laplace_em` comes first. Then every update draws from q for every trial (of
    the batch), and moves model and network along the gradient of the bound by Adam, with a warm-up, a clipped norm and a
    cosine. The divergence is in closed form, its entropy included. Variances are learned as logarithms above a floor.

    Without a network q has the potentials of a Gauss-Newton step at its own mean, refreshed at every update and mixed with the
    last ones; they are held fixed while the model moves.

    Args:
        key: JAX random key; every update and trial has draws of its own.
        model: Where to start, e.g. from `initialize_ssm`.
        recognition: `PotentialNetwork` or `FreePotentials` (through the filter and the smoother), `MeanFieldLSTM`, or a
            `Recognition` of your own. None: Gauss-Newton potentials.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or `(num_trials, num_timesteps, emission_dim)`; NaN is missing.
        inputs: Soft inputs $u_t$, shared or one array for each trial.
        interventions: Clamps, shared or one for each trial. None: no clamps.
        trainable: What of the model may change: a pytree prefix of its arrays with Booleans, or Boolean arrays for single
            entries. None: everything but `TimeVarying` fields and exposures. False: the model is known, and the network
            alone learns.
        held_out: Boolean, `(num_trials,)`: trials to learn nothing from, whose bound is recorded. None: none.
        gamma: Weight of the divergence: below 1 the bound is tempered, and no longer a bound.
        num_samples: Pairs of draws for each trial and update.
        batch_size: Number of trials drawn for each update; None: all. Not together with `held_out`.
        num_iters: Number of updates, at least 0.
        num_rollout: Number of updates of the rollout stage. None: 400 if there are clamps and something of the model may change,
            else 0.
        dynamics_rate: Learning rate of dynamics, initial state and noise in the rollout stage; a fifth of it afterwards.
        emission_rate: Learning rate of the emission map in the rollout stage; a fifth of it afterwards.
        recognition_rate: Learning rate of the recognition network.
        patience: Stop a stage when the held-out trials have gained nothing for so many updates. None: never.
        progress: Whether to draw a bar on standard error.

    Returns:
        The fitted model and network, the bound before every update, and why the fit ended. Never a model that is not finite.

    Raises:
        ValueError: If an argument has the wrong shape, type or values; the message names it.

    References:
        Nejatbakhsh & Wang (2025), sec. 3; Khan & Lin (2017), for potentials that follow q; Kingma & Ba (2015).

    Examples:
        >>> import jax, issm
        >>> linear = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.01], [[1.0], [2.0]], [0.1, 0.1])
        >>> plan = issm.do({0: 1.0}, num_timesteps=30, state_dim=1, start=5, stop=10)
        >>> _, emissions = issm.lgssm_sample(jax.random.key(0), linear, 30, interventions=plan)
        >>> start = issm.initialize_ssm(jax.random.key(1), emissions, 1, widths=())
        >>> network = issm.PotentialNetwork(jax.random.key(2), emission_dim=2, state_dim=1, widths=(8,))
        >>> fit = issm.fit_vi(jax.random.key(3), start, network, emissions, interventions=plan, num_rollout=20, num_iters=20)
        >>> issm.posterior(fit.params, emissions, interventions=plan, method=fit.recognition).smoothed_means.shape
        (30, 1)
    """
    check_key(key)
    trials, data = prepare(model, emissions, inputs, interventions, held_out, patience)
    if recognition is None:
        check_linear(model, "whose divergence has no closed form, use `fit_laplace_em`")
    else:
        check_recognition(recognition, model, trials)
    _, _, masks = split(model, trainable, may_be_none=recognition is not None)
    known = all(all_false(mask) for mask in jax.tree.leaves(masks))
    num_rollout = rollout_length(num_rollout, None if known else interventions)
    check_count("num_iters", num_iters, 0)
    check_count("num_samples", num_samples, 1)
    _check_batch(batch_size, trials, held_out)
    model, rollout = rollout_stage(
        model, trials, data, trainable, num_rollout, dynamics_rate, emission_rate, patience, progress
    )
    arrays, rest = eqx.partition(to_free(model), eqx.is_inexact_array)
    network, fixed = eqx.partition(recognition, eqx.is_inexact_array)
    masks = (masks, jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), network))
    rates = (
        learning_rates(arrays, dynamics_rate / 5, emission_rate / 5),
        jax.tree.map(lambda _: recognition_rate, network),
    )
    weight = jnp.asarray(gamma, model.initial.mean.dtype)
    step = Ascent(trials, data, model, rest, fixed, masks, rates, weight, num_iters, num_samples, batch_size)
    memory = first_potentials(model, trials) if recognition is None else None
    carry = (start_adam((arrays, network), key), memory)
    label = "variational fit"
    loop = run_stage(
        step,
        (arrays, network),
        carry,
        data,
        num_iters=num_iters,
        patience=patience,
        tol=-1.0,
        label=label,
        bar=progress,
    )
    arrays, network = loop.good if patience is None else loop.best
    fitted = keep_frozen(masks[0], from_free(eqx.combine(arrays, rest), model), model)
    return finish(fitted, rollout, loop, patience=patience, recognition=eqx.combine(network, fixed))


class Ascent(eqx.Module):
    """One step of Adam up the bound."""

    trials: Trials
    data: Data
    like: SSM
    rest: Any
    fixed: Any
    masks: Any
    rates: Any
    gamma: Array
    num_iters: int = eqx.field(static=True)
    num_samples: int = eqx.field(static=True)
    batch_size: int | None = eqx.field(static=True)

    def __call__(self, params: Any, carry: tuple[AdamState, Any], index: Array) -> tuple[Array, Any, Any]:
        """Bound of every trial (zero outside of the batch), new parameters, new state."""
        adam, memory = carry
        batch_key, draw_key = jax.random.split(jax.random.fold_in(adam.key, index))
        num_trials = self.trials.num_trials
        if self.batch_size is None:
            chosen, share = jnp.arange(num_trials), 1.0
        else:
            chosen = jax.random.choice(batch_key, num_trials, (self.batch_size,), replace=False)
            share = num_trials / self.batch_size
        keys = jax.random.split(draw_key, num_trials)[chosen]
        plan = jax.tree.map(lambda leaf: leaf[chosen] if leaf.ndim == 3 else leaf, self.trials.plan)
        emissions = self.trials.emissions[chosen]
        said = None if memory is None else jax.tree.map(lambda leaf: leaf[chosen], memory)

        def objective(params: Any) -> tuple[Array, Any]:
            arrays, network = params
            model = from_free(eqx.combine(arrays, self.rest), self.like)
            recognition = eqx.combine(network, self.fixed)

            def one(key: PRNGKey, emissions: Array, plan: Plan, trial: Array, said: Any) -> tuple[Array, Any]:
                problem = make_problem(model, emissions, plan.inputs, plan.intervention)
                guess = recognition(emissions, plan.inputs, plan.intervention, trial) if said is None else said
                bound, chain = bound_of(key, problem, guess, self.gamma, self.num_samples)
                return bound, None if said is None else _refresh(problem, lax.stop_gradient(chain.means), said)

            bounds, renewed = jax.vmap(one, in_axes=(0, 0, plan.axes, 0, 0))(keys, emissions, plan, chosen, said)
            per_trial = jnp.zeros_like(self.data.counts).at[chosen].set(share * bounds)
            return self.data.mean(per_trial), (per_trial, renewed)

        gradient, (per_trial, renewed) = jax.grad(objective, has_aux=True)(params)
        if memory is not None:
            memory = jax.tree.map(lambda old, new: old.at[chosen].set(new), memory, renewed)
        how = {"masks": self.masks, "rates": self.rates, "num_iters": self.num_iters}
        params, adam = ascend(gradient, adam, params, index, **how)
        return per_trial, params, (adam, memory)


def _refresh(problem: Any, means: Array, old: Potential) -> Potential:
    """Mix in the Gauss-Newton potentials at `means`; nothing of them is differentiated."""
    held = jax.tree.map(lambda leaf: lax.stop_gradient(leaf) if eqx.is_array(leaf) else leaf, problem)
    new = _potential_at(held, means)
    return jax.tree.map(lambda a, b: (1 - MIXING) * a + MIXING * b, old, new)


def _potential_at(problem: Any, states: Array) -> Potential:
    pull, precision = potentials(problem, states)
    return Potential(precision, pull + (precision * states[:, None, :]).sum(axis=-1))


@eqx.filter_jit
def first_potentials(model: SSM, trials: Trials) -> Potential:
    """Gauss-Newton potentials at the most probable path of every trial."""

    def one(emissions: Array, plan: Plan) -> Potential:
        problem = make_problem(model, emissions, plan.inputs, plan.intervention)
        return _potential_at(problem, find_mode(problem, num_iters=20).states)

    return jax.vmap(one, in_axes=(0, trials.plan.axes))(trials.emissions, trials.plan)


def _check_batch(batch_size: int | None, trials: Trials, held_out: Any) -> None:
    if batch_size is None:
        return
    check_count("batch_size", batch_size, 1)
    if batch_size > trials.num_trials:
        fail(
            "batch_size",
            got=f"{batch_size} of {trials.num_trials} trials",
            expected=f"at most {trials.num_trials}",
            remedy="Leave it out to use all trials.",
        )
    if held_out is not None:
        fail(
            "batch_size",
            got="a batch together with `held_out`",
            expected="one of the two",
            remedy="Take the held-out trials out of the data, and compare with `elbo` afterwards.",
        )
