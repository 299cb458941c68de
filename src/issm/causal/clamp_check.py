"""Does stimulation clamp? The assumption itself, held against the data channel by channel."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from issm._check import as_float_array, check_key, common_float_dtype, fail
from issm._compile import jit_quickly
from issm._host import to_device
from issm._tables import format_table
from issm._types import PRNGKey
from issm.causal.compare import Score, bootstrap_counts, check_count, score_of_samples
from issm.causal.history import check_plan
from issm.causal.predict import check_level
from issm.causal.stimulation import append_inputs
from issm.inference.kalman import marginal_log_prob
from issm.interventions import Intervention
from issm.models.fields import values_of
from issm.models.lgssm import ParamsLGSSM


class ClampCheck(eqx.Module):
    """Result of `check_clamps`; entry j is about the clamps of state j, NaN where the training trials never clamp it.

    Attributes:
        hard_over_soft: Held-out log-likelihood of the model that clamps state j, less that of the model in which the stimulation
            adds to it and cuts nothing; nats for each observed number, `(state_dim,)`. Both let it spill.
        spill: Held-out log-likelihood of the model in which the stimulation of state j also adds to all other states, less that
            of the model in which it does not, `(state_dim,)`.
        spill_weights: What one unit of the clamp of state j adds to state i in that model, entry (i, j) of
            `(state_dim, state_dim)`; zero on the diagonal.
        clamps: Whether the held-out trials prefer the clamp, the interval leaving out zero, `(state_dim,)`.
        adds: Whether they prefer the soft input, `(state_dim,)`.
        spills: Whether they prefer a spill, `(state_dim,)`.

    References:
        Nejatbakhsh & Wang (2025), sec. 4.

    Examples:
        >>> import jax.numpy as jnp, issm
        >>> score = issm.Score(jnp.array([0.2]), jnp.array([0.1]), jnp.array([0.3]))
        >>> zero = issm.Score(jnp.array([0.0]), jnp.array([-0.1]), jnp.array([0.1]))
        >>> check = issm.ClampCheck(score, zero, jnp.zeros((1, 1)))
        >>> check.clamps.tolist(), check.spills.tolist()
        ([True], [False])
    """

    hard_over_soft: Score
    spill: Score
    spill_weights: Float[Array, "state_dim state_dim"]

    @property
    def clamps(self) -> Bool[Array, " state_dim"]:
        """Whether the held-out trials prefer the clamp."""
        return self.hard_over_soft.lower > 0

    @property
    def adds(self) -> Bool[Array, " state_dim"]:
        """Whether they prefer the soft input."""
        return self.hard_over_soft.upper < 0

    @property
    def spills(self) -> Bool[Array, " state_dim"]:
        """Whether they prefer a spill onto other states."""
        return self.spill.lower > 0

    def summary(self) -> str:
        """A table of the clamped states, with a verdict on each.

        Returns:
            Several lines.
        """
        rows = []
        for j, tested in enumerate(~np.isnan(np.asarray(self.hard_over_soft.value))):
            if tested:
                verdict = "clamps" if self.clamps[j] else "adds" if self.adds[j] else "cannot tell"
                scores = [(s.value[j], s.lower[j], s.upper[j]) for s in (self.hard_over_soft, self.spill)]
                texts = [f"{float(v):.3f} [{float(a):.3f}, {float(b):.3f}]" for v, a, b in scores]
                strongest = int(jnp.argmax(jnp.abs(self.spill_weights[:, j])))
                spilled = (
                    f"state {strongest}, {float(self.spill_weights[strongest, j]):.2g}" if self.spills[j] else "none"
                )
                rows.append([f"state {j}", texts[0], verdict, texts[1], spilled])
        heads = ["stimulated", "hard over soft", "it", "spill over none", "spills onto"]
        return format_table(heads, rows, title="Held-out log-likelihood, nats a number, with bootstrap intervals")


def check_clamps(
    key: PRNGKey,
    fit: Callable[[Any, Any, Any], ParamsLGSSM],
    emissions: Any,
    inputs: Any = None,
    *,
    interventions: Intervention,
    test_emissions: Any,
    test_interventions: Intervention,
    test_inputs: Any = None,
    num_bootstrap: int = 1000,
    level: Any = 0.95,
) -> ClampCheck:
    r"""Test whether stimulation clamps its targets, and leaves other states alone, by held-out likelihood.

    For each stimulated state j three models are fitted to the training trials and judged on the test trials: (1) its clamps hold,
    $x_{t,j} = v_{t,j}$; (2) they hold and also add $B_{ij} v_{t,j}$ to all other states i; (3) they add to all states, j included,
    and cut nothing. Whether the channel clamps is (2) against (3), whether it spills (2) against (1). The other channels clamp in
    all of them at first; while a channel is found to add, the one that most clearly does is taken to add, and all are judged again.
    A clamp to zero has nothing to add, and its spill cannot be seen.

    Args:
        key: JAX random key for the bootstrap.
        fit: Function `(emissions, inputs, interventions)` that returns fitted parameters; `inputs` is None where the model is to
            have none. It is called once and then twice for each stimulated state, more often where some add.
        emissions: Training trials, `(num_trials, num_timesteps, emission_dim)` or one sequence.
        inputs: Their soft inputs.
        interventions: Their clamps.
        test_emissions: Held-out trials, `(num_trials, num_timesteps, emission_dim)`, at least two.
        test_interventions: Their clamps, shared or one for each trial.
        test_inputs: Their soft inputs.
        num_bootstrap: Number of resamplings of the held-out trials, at least 2.
        level: Level of the intervals.

    Returns:
        Differences in log-likelihood with intervals for each stimulated state, and how much spills where.

    Raises:
        ValueError: If there are fewer than two test trials, nothing is clamped, `fit` does not return parameters, or an argument
            has the wrong shape, type or values.

    References:
        Nejatbakhsh & Wang (2025), sec. 4; Efron & Tibshirani (1993), *An Introduction to the Bootstrap*, ch. 13.

    Examples:
        >>> import jax, jax.numpy as jnp, numpy as np, issm
        >>> truth = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.1])
        >>> plan = issm.do({0: 3.0}, num_timesteps=20, state_dim=1, start=5, stop=9)
        >>> trials = jax.tree.map(lambda leaf: leaf[None].repeat(4, 0), plan)
        >>> _, emissions = issm.lgssm_sample(jax.random.key(0), truth, 20, interventions=trials)
        >>> def fit(emissions, inputs, interventions):  # in earnest, `fit_em` from such a start
        ...     weights = np.full((1, 0 if inputs is None else inputs.shape[-1]), 0.3)
        ...     return issm.make_lgssm_params(
        ...         [0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.1], dynamics_input_weights=weights)
        >>> check = issm.check_clamps(jax.random.key(1), fit, emissions[:2], interventions=plan,
        ...     test_emissions=emissions[2:], test_interventions=plan)
        >>> check.clamps.tolist()
        [True]
    """
    check_key(key)
    check_level(level)
    check_count("num_bootstrap", num_bootstrap, 2)
    check_plan("interventions", interventions)
    check_plan("test_interventions", test_interventions)
    if not callable(fit):
        fail("fit", got=f"a {type(fit).__name__}", expected="a function", remedy="Wrap `fit_em` in one.")
    test_emissions = as_float_array("test_emissions", test_emissions, common_float_dtype(test_emissions))
    if test_emissions.ndim != 3 or test_emissions.shape[0] < 2:
        fail(
            "test_emissions",
            got=f"shape {tuple(test_emissions.shape)}",
            expected="(num_trials, num_timesteps, emission_dim) with at least two trials",
            remedy="Intervals come from the differences between trials; cut a long recording into several.",
        )
    stimulated = np.asarray(interventions.mask).any(axis=tuple(range(interventions.mask.ndim - 1)))
    if not stimulated.any():
        fail("interventions", got="no clamp", expected="at least one", remedy="There is nothing to test.")

    judge = _Judge(fit, (emissions, inputs, interventions), (test_emissions, test_inputs, test_interventions))
    channels, softened = [int(j) for j in np.flatnonzero(stimulated)], frozenset[int]()
    observed = (~jnp.isnan(test_emissions)).sum(axis=(1, 2)).astype(test_emissions.dtype)
    while True:
        by_trial, weights = judge.differences(channels, softened)
        hard_over_soft, spill = _score_differences(
            key, by_trial, observed, to_device(level, by_trial.dtype), int(num_bootstrap)
        )
        adding = [j for j in channels if j not in softened and float(hard_over_soft.upper[j]) < 0]
        if not adding:
            return ClampCheck(hard_over_soft, spill, weights)
        softened |= {min(adding, key=lambda j: float(hard_over_soft.value[j]))}


class _Judge:
    """Held-out log-likelihoods of models that differ in what the channels do, each fitted once."""

    def __init__(self, fit: Callable, train: tuple, test: tuple):
        self.fit = fit
        self.train = train
        self.test = test
        self.known: dict[tuple, tuple[Array, Array]] = {}

    def differences(self, channels: list[int], softened: frozenset[int]) -> tuple[Array, Array]:
        """For each channel, the others being as they are: hard less soft and spill less none by trial, and what spills."""
        plan = self.train[2]
        num_trials, state_dim = self.test[0].shape[0], plan.state_dim
        dtype = self.test[0].dtype
        by_trial = jnp.full((2, num_trials, state_dim), jnp.nan, dtype)
        weights = jnp.zeros((state_dim, state_dim), dtype)
        for j in channels:
            others = softened - {j}
            hard, _ = self.log_probs(others, None)
            spilling, spilled = self.log_probs(others, j)
            soft, _ = self.log_probs(others | {j}, None)
            by_trial = by_trial.at[0, :, j].set(spilling - soft).at[1, :, j].set(spilling - hard)
            weights = weights.at[:, j].set(spilled).at[j, j].set(0.0)
        return by_trial, weights

    def log_probs(self, softened: frozenset[int], spilling: int | None) -> tuple[Array, Array]:
        """By test trial, and the weights of the last input."""
        if (softened, spilling) not in self.known:
            columns = [*sorted(softened), *([] if spilling is None else [spilling])]
            emissions, inputs, plan = self.train
            params = self.fit(emissions, _with_inputs(inputs, plan, columns), _without(plan, softened))
            if not isinstance(params, ParamsLGSSM):
                fail(
                    "fit",
                    got=f"a {type(params).__name__}",
                    expected="a ParamsLGSSM",
                    remedy="Return `.params` of the fit.",
                )
            emissions, inputs, plan = self.test
            log_probs = marginal_log_prob(
                params, emissions, _with_inputs(inputs, plan, columns), interventions=_without(plan, softened)
            )
            input_weights = values_of(params.dynamics.input_weights)
            last = input_weights[:, -1] if columns else jnp.zeros(plan.state_dim, log_probs.dtype)
            self.known[softened, spilling] = log_probs, last
        return self.known[softened, spilling]


@partial(jit_quickly, static_argnames="num_bootstrap")
def _score_differences(
    key: PRNGKey, by_trial: Array, observed: Array, level: Array, num_bootstrap: int
) -> tuple[Score, Score]:
    counts = bootstrap_counts(key, observed.shape[0], num_bootstrap, observed.dtype)
    numbers = (counts @ observed)[:, None]
    hard_over_soft, spill = (score_of_samples(counts @ each / numbers, level) for each in by_trial)
    return hard_over_soft, spill


def _with_inputs(inputs: Any, plan: Intervention, columns: list[int]) -> Any:
    """Inputs followed by the clamp values of some states."""
    return append_inputs(inputs, plan.value[..., jnp.asarray(columns)]) if columns else inputs


def _without(plan: Intervention, states: frozenset[int]) -> Intervention:
    """The plan that leaves some states free."""
    if not states:
        return plan
    freed = jnp.broadcast_to(jnp.asarray(np.isin(np.arange(plan.state_dim), list(states))), plan.mask.shape)
    return Intervention(plan.mask & ~freed, plan.value, plan.variance)
