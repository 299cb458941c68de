"""How many states: held-out trials, held-out interventions, co-smoothing and information criteria, side by side."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from issm._check import as_float_array, check_key, common_float_dtype, fail
from issm._host import is_concrete
from issm._types import PRNGKey
from issm.fitting.criteria import information_criteria
from issm.fitting.em import fit_em
from issm.fitting.folds import deal_out, intervention_folds
from issm.fitting.initialize import initialize_lgssm
from issm.inference.held_out import emission_groups, predict_held_out
from issm.inference.kalman import marginal_log_prob
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM

CRITERIA = ("held_out_trials", "held_out_interventions", "co_smoothing", "aic", "bic")


class StateDimSelection(eqx.Module):
    r"""Scores of each number of states, and the number chosen.

    Scores of held-out data are log densities of whole trials, nats, of fits that have not seen them; NaN for a trial that was
    never held out.

    Attributes:
        dims: Numbers of states that were tried, in ascending order.
        state_dim: The one chosen by `criterion`.
        criterion: Which score chose it.
        held_out_trials: $\log p(y_k)$ of each trial when its random fold was left out, `(num_dims, num_trials)`.
        held_out_interventions: The same when all trials of its kind of clamps were left out; None where the clamps do not allow it.
        co_smoothing: $\sum_H \log p(y_{k,H} \mid y_{k,-H})$ over groups H of emissions of held-out trials; None for one emission.
        aic: Akaike's criterion of the fits to all data, `(num_dims,)`; the smaller the better.
        bic: Schwarz's criterion, likewise.
        num_observed: Observed numbers in each trial, `(num_trials,)`.
        params: The fit to all trials for each number of states.
        notes: What could not be scored and why, and which fits did not converge.

    References:
        Hastie, Tibshirani & Friedman (2009), sec. 7.10; `docs/how-to/choosing-the-number-of-states.md`.

    Examples:
        >>> from issm import StateDimSelection
        >>> sorted(StateDimSelection.__annotations__)[:3]
        ['aic', 'bic', 'co_smoothing']
    """

    dims: tuple[int, ...] = eqx.field(static=True)
    state_dim: int = eqx.field(static=True)
    criterion: str = eqx.field(static=True)
    held_out_trials: Float[Array, "num_dims num_trials"]
    held_out_interventions: Float[Array, "num_dims num_trials"] | None
    co_smoothing: Float[Array, "num_dims num_trials"] | None
    aic: Float[Array, " num_dims"]
    bic: Float[Array, " num_dims"]
    num_observed: Float[Array, " num_trials"]
    params: tuple[ParamsLGSSM, ...]
    notes: tuple[str, ...] = eqx.field(static=True)

    @property
    def best_params(self) -> ParamsLGSSM:
        """The fit to all trials with the number of states that was chosen."""
        return self.params[self.dims.index(self.state_dim)]

    @property
    def choices(self) -> dict[str, int]:
        """What each criterion would choose: the minimum of AIC and BIC, the one-standard-error rule for held-out scores."""
        found = {}
        for name in CRITERIA:
            if getattr(self, name) is not None:
                mean, error = self.score(name)
                found[name] = next(d for d, m, e in zip(self.dims, mean, error, strict=True) if m + e >= mean.max())
        return found

    def score(self, criterion: str) -> tuple[Float[np.ndarray, " num_dims"], Float[np.ndarray, " num_dims"]]:
        """Score per observed number, the larger the better, and the standard error of its distance to the best."""
        values = getattr(self, criterion) if criterion in CRITERIA else None
        if values is None:
            fail(
                "criterion",
                got=repr(criterion),
                expected=f"one of {', '.join(self.choices)}",
                remedy="The notes of the result say what could not be scored.",
            )
        count = np.asarray(self.num_observed)
        if criterion in ("aic", "bic"):
            return -np.asarray(values) / 2 / count.sum(), np.zeros(len(self.dims))
        return _mean_and_error(np.asarray(values), count)

    def summary(self) -> str:
        """A table of scores per observed number, and what each criterion chooses."""
        names = list(self.choices)
        lines = ["states  " + "  ".join(f"{name:>24}" for name in names)]
        scores = [self.score(name) for name in names]
        for d, dim in enumerate(self.dims):
            cells = [
                f"{mean[d]:24.4f}" if name in ("aic", "bic") else f"{mean[d]:14.4f} ± {error[d]:.4f}".rjust(24)
                for name, (mean, error) in zip(names, scores, strict=True)
            ]
            lines.append(f"{dim:6d}  " + "  ".join(cells))
        lines.append("chosen  " + "  ".join(f"{self.choices[name]:24d}" for name in names))
        lines.append("nats per observed number (± standard error of the distance to the best); aic, bic: times -1/2")
        lines.append(f"state_dim = {self.state_dim}, by {self.criterion}")
        return "\n".join([*lines, *self.notes])


def select_state_dim(
    key: PRNGKey,
    emissions: Any,
    dims: Any,
    inputs: Any = None,
    *,
    interventions: Intervention | None = None,
    criterion: str = "held_out_trials",
    num_folds: int = 5,
    num_iters: int = 100,
    tol: float = 1e-6,
) -> StateDimSelection:
    r"""Fit models with several numbers of states, and score each on what it has not seen.

    Each fit is `fit_em` from `initialize_lgssm`. Trials are left out twice: in random folds, and in folds of the kind of
    clamps that they received, which asks for predictions of interventions that the fit has never met (a kind is the set of
    states that a trial clamps; where only one set occurs, the plan itself. A kind is left out only if each of its states is
    clamped in other trials too, since without that its coordinates would not be known).

    The one-standard-error rule chooses the smallest number of states whose held-out score is within one standard error of the
    best, the error being that of the difference between the two, trial by trial.

    Args:
        key: JAX random key: folds and starts.
        emissions: $y_t$, `(num_trials, num_timesteps, emission_dim)`, at least `num_folds` trials; NaN is missing.
        dims: Numbers of states to try; at least the number of states that `interventions` speaks of.
        inputs: Soft inputs, shared or one array for each trial.
        interventions: Clamps, shared or one for each trial. States beyond theirs are never clamped.
        criterion: What chooses: "held_out_trials", "held_out_interventions", "co_smoothing", "aic" or "bic".
        num_folds: Number of folds, at least 2.
        num_iters: Largest number of EM updates of each fit.
        tol: Tolerance of `fit_em`.

    Returns:
        All scores, what each would choose, the choice, and the fits to all data.

    Raises:
        ValueError: If an argument has the wrong shape, type or values, or the criterion cannot be computed from these data.

    References:
        Hastie, Tibshirani & Friedman (2009), *The Elements of Statistical Learning*, sec. 7.10; Pei et al. (2021), on
        co-smoothing; Akaike (1974); Schwarz (1978).

    Examples:
        >>> import jax, issm
        >>> from issm.simulate import random_clamped_lgssm
        >>> truth = random_clamped_lgssm(jax.random.key(0), 1, 3)
        >>> keys = jax.random.split(jax.random.key(1), 6)
        >>> emissions = jax.vmap(lambda key: issm.lgssm_sample(key, truth, 20)[1])(keys)
        >>> issm.select_state_dim(jax.random.key(2), emissions, [1, 2], num_folds=2, num_iters=3).state_dim
        1
    """
    check_key(key)
    if not all(is_concrete(leaf) for leaf in jax.tree.leaves((emissions, inputs, interventions))):
        fail("emissions", got="data that JAX traces", expected="concrete arrays", remedy="Call it outside `jit`.")
    emissions = as_float_array("emissions", emissions, common_float_dtype(emissions))
    _check_options(emissions, criterion, num_folds)
    dims = _as_dims(dims, interventions)
    fold_key, start_key = jax.random.split(key)
    rng = np.random.default_rng(np.asarray(jax.random.randint(fold_key, (4,), 0, 2**31 - 1)))
    folds, notes = {"held_out_trials": deal_out(rng, len(emissions), num_folds)}, []
    by_plan, note = intervention_folds(rng, interventions, len(emissions), num_folds)
    if by_plan is not None:
        folds["held_out_interventions"] = by_plan
    notes += [note] if note else []
    if emissions.shape[2] < 2:
        notes.append("co_smoothing: not scored, there is one emission")
    scored = [*folds, *(["co_smoothing"] if emissions.shape[2] > 1 else []), "aic", "bic"]
    if criterion not in scored:
        fail(
            "criterion",
            got=repr(criterion),
            expected=f"one of {', '.join(scored)} for these data",
            remedy="; ".join(notes),
        )

    data = _Data(emissions, inputs, interventions)
    scores: dict[str, list] = {name: [] for name in scored}
    fits = []
    for dim in dims:
        fit, note = _fit(start_key, data, dim, num_iters, tol)
        notes += [note] if note else []
        fits.append(fit)
        size = information_criteria(fit, *data.arguments(dim)[0], **data.arguments(dim)[1])
        scores["aic"].append(size.aic)
        scores["bic"].append(size.bic)
        for name, labels in folds.items():
            rows = np.full((2, len(emissions)), np.nan)
            for fold in range(labels.max() + 1):
                held = labels == fold
                params, _ = _fit(start_key, data.trials(~held), dim, num_iters, tol)
                with_groups = name == "held_out_trials" and "co_smoothing" in scores
                rows[:, held] = _held_out_scores(params, data.trials(held), dim, with_groups)
            scores[name].append(rows[0])
            if name == "held_out_trials" and "co_smoothing" in scores:
                scores["co_smoothing"].append(rows[1])
    return _selection(dims, criterion, scores, emissions, fits, notes)


class _Data:
    """Trials, and parts of them."""

    def __init__(self, emissions: Array, inputs: Any, interventions: Intervention | None):
        self.emissions, self.inputs, self.interventions = emissions, inputs, interventions

    def trials(self, chosen: np.ndarray) -> "_Data":
        """Some of the trials."""
        own = lambda leaf: leaf[chosen] if np.ndim(leaf) == 3 else leaf  # noqa: E731
        inputs = None if self.inputs is None else own(jnp.asarray(self.inputs))
        return _Data(self.emissions[chosen], inputs, jax.tree.map(own, self.interventions))

    def arguments(self, dim: int) -> tuple[tuple, dict]:
        """What inference takes after `params`; states beyond those of the clamps are never clamped."""
        plan = self.interventions
        if plan is not None and plan.state_dim < dim:
            more = lambda leaf: jnp.pad(leaf, ((0, 0),) * (leaf.ndim - 1) + ((0, dim - leaf.shape[-1]),))  # noqa: E731
            plan = jax.tree.map(more, plan)
        return (self.emissions, self.inputs), {"interventions": plan}


def _fit(key: PRNGKey, data: _Data, dim: int, num_iters: int, tol: float) -> tuple[ParamsLGSSM, str]:
    (emissions, inputs), plan = data.arguments(dim)
    start = initialize_lgssm(key, emissions, dim, inputs=inputs, **plan).params
    fit = fit_em(start, emissions, inputs, **plan, num_iters=num_iters, tol=tol)
    return fit.params, "" if fit.converged else f"{dim} states: the fit to all trials {fit.reason}"


def _held_out_scores(params: ParamsLGSSM, data: _Data, dim: int, with_groups: bool) -> np.ndarray:
    """Log density of each trial, and the sum of those of its groups of emissions given all others."""
    (emissions, inputs), plan = data.arguments(dim)
    whole = np.asarray(marginal_log_prob(params, emissions, inputs, **plan))
    parts = np.full(len(emissions), np.nan)
    if with_groups:
        groups = emission_groups(emissions.shape[2])
        parts = sum(
            np.asarray(
                predict_held_out(params, emissions, inputs, plan["interventions"], jnp.asarray(groups == group))[0]
            )
            for group in range(groups.max() + 1)
        )
    return np.stack([whole, parts])


def _selection(
    dims: tuple[int, ...], criterion: str, scores: dict, emissions: Array, fits: list, notes: list
) -> StateDimSelection:
    arrays = {name: jnp.asarray(np.stack(rows), emissions.dtype) for name, rows in scores.items()}
    selection = StateDimSelection(
        dims=dims,
        state_dim=dims[0],
        criterion=criterion,
        **{name: arrays.get(name) for name in CRITERIA},  # type: ignore[arg-type]
        num_observed=(~jnp.isnan(emissions)).sum(axis=(1, 2)).astype(emissions.dtype),
        params=tuple(fits),
        notes=tuple(notes),
    )
    return dataclasses.replace(selection, state_dim=selection.choices[criterion])


def _mean_and_error(values: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Score per observed number, and the standard error of its distance to the best, over trials."""
    scored = ~np.isnan(values).any(axis=0)
    values, total = values[:, scored], count[scored].sum()
    mean = values.sum(axis=1) / total
    distance = values - values[np.argmax(mean)]
    return mean, distance.std(axis=1, ddof=1) * np.sqrt(scored.sum()) / total


def _as_dims(dims: Any, interventions: Intervention | None) -> tuple[int, ...]:
    values = np.asarray(dims)
    if values.ndim != 1 or not len(values) or values.dtype.kind not in "iu" or values.min() < 1:
        fail(
            "dims",
            got=repr(dims),
            expected="a list of integers of at least 1",
            remedy="Give the numbers of states to try.",
        )
    smallest = 1 if interventions is None else interventions.state_dim
    if values.min() < smallest:
        fail(
            "dims",
            got=f"{values.min()} for clamps of {smallest} states",
            expected=f"at least {smallest}",
            remedy="Every clamped state must be there; cut never clamped states from the end of the plan.",
        )
    return tuple(int(dim) for dim in np.unique(values))


def _check_options(emissions: Array, criterion: str, num_folds: int) -> None:
    if criterion not in CRITERIA:
        fail("criterion", got=repr(criterion), expected=f"one of {', '.join(CRITERIA)}", remedy="Choose one.")
    if emissions.ndim != 3:
        fail(
            "emissions",
            got=f"shape {tuple(emissions.shape)}",
            expected="(num_trials, num_timesteps, emission_dim)",
            remedy="Held-out scores need trials; cut a long sequence into some.",
        )
    integer = isinstance(num_folds, (int, np.integer)) and not isinstance(num_folds, bool)
    if not integer or not 2 <= num_folds <= len(emissions):
        fail(
            "num_folds",
            got=repr(num_folds),
            expected=f"an integer from 2 to the number of trials, {len(emissions)}",
            remedy="Every fold leaves out at least one trial.",
        )
