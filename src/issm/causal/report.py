"""The report on what clamps and data can tell about the dynamics."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from issm._tables import format_table, join_words
from issm.causal.support import PlanCheck, Support, check_support
from issm.interventions import Intervention


class Identifiability(eqx.Module):
    r"""Result of `identifiability`. Entry (i, j) of a matrix is about the edge from state j to state i, $A_{ij}$.

    Attributes:
        clamped_steps: Number of steps, over all trials, in which each state was clamped, `(state_dim,)`.
        num_values: Number of distinct values it was clamped to, `(state_dim,)`.
        free_arrivals: Number of arrivals (t = 1 ... T-1) in which it was free: its row is learned from these, `(state_dim,)`.
        driven_arrivals: Number of arrivals in which i was free one step after j was clamped, `(state_dim, state_dim)`.
        driven_values: Number of distinct values j was clamped to one step before those arrivals, same shape.
        separated: Whether some step clamps one of i and j and leaves the other free, same shape.
        excitation: $G_i = \sum_{W_i} E[z_t z_t^\top]$, row by row, with $z_t = [x_{t-1}; u_t; 1]$,
            `(state_dim, num_regressors, num_regressors)`.
        rank: Rank of every $G_i$ with its regressors scaled to a second moment of one, `(state_dim,)`; `num_regressors` is full.
        condition: Condition number of the same, `(state_dim,)`; infinite below full rank.
        information: Fisher information of $Θ_i = [A_i, B_i, b_i]$ if the states were seen: $G_i / Q_{ii}$ for a diagonal Q, given
            the other rows for a full one. None without parameters.
        standard_errors: Of every edge, by the observed information of the emissions, `(state_dim, state_dim)`; infinite where
            the data are silent, zero where the edge was not estimated. None without emissions, or where A varies in time.
        silent: Edges that the data cannot speak about, `(state_dim, state_dim)`. Without emissions or parameters: that the
            clamps alone do not drive, neither i free one step after j was clamped nor told apart from other regressors.
        weights: A, for the figures; None without parameters.
        support: What the clamps reached, for `check_plan`.
        source: What the excitation was computed from: "clamps" (free states rest at zero), "model" (expected under the model)
            or "data" (smoothed).

    References:
        Ljung (1999), *System Identification*, sec. 13.2 (persistence of excitation); Nejatbakhsh & Wang (2025), sec. 3.

    Examples:
        >>> import issm
        >>> report = issm.identifiability(issm.do({0: [1.0, 2.0]}, num_timesteps=6, state_dim=2, start=2, stop=4))
        >>> report.driven_arrivals.tolist(), report.silent.tolist()
        ([[1, 0], [2, 0]], [[False, True], [False, True]])
    """

    clamped_steps: Int[Array, " state_dim"]
    num_values: Int[Array, " state_dim"]
    free_arrivals: Int[Array, " state_dim"]
    driven_arrivals: Int[Array, "state_dim state_dim"]
    driven_values: Int[Array, "state_dim state_dim"]
    separated: Bool[Array, "state_dim state_dim"]
    excitation: Float[Array, "state_dim regressors regressors"]
    rank: Int[Array, " state_dim"]
    condition: Float[Array, " state_dim"]
    information: Float[Array, "state_dim regressors regressors"] | None
    standard_errors: Float[Array, "state_dim state_dim"] | None
    silent: Bool[Array, "state_dim state_dim"]
    weights: Float[Array, "state_dim state_dim"] | None
    support: Support
    source: str = eqx.field(static=True)

    @property
    def never_clamped(self) -> Bool[Array, " state_dim"]:
        """States that no step clamps."""
        return self.clamped_steps == 0

    @property
    def one_value(self) -> Bool[Array, " state_dim"]:
        """States clamped to one value only: the slope of what they do rests on their own noise, or on the way back."""
        return self.num_values == 1

    @property
    def inseparable(self) -> Bool[Array, "state_dim state_dim"]:
        """Pairs of clamped states of which no step clamps one without the other."""
        clamped = ~self.never_clamped
        others = ~jnp.eye(clamped.shape[0], dtype=bool)
        return clamped[:, None] & clamped[None] & ~self.separated & others

    def check_plan(self, plan: Intervention) -> PlanCheck:
        """Whether the clamps behind this report reach a plan.

        Args:
            plan: Clamps of a question, `(num_timesteps, state_dim)` or with a leading trial axis.

        Returns:
            What of the plan was never done: states never clamped, values beyond the range, combinations outside the span.

        Raises:
            ValueError: If the plan is none, or has other states.
        """
        return check_support(self.support, plan)

    def summary(self) -> str:
        """The report as text: findings in words, then a table of the states and one of the edges.

        Returns:
            Several lines.
        """
        states = [
            [f"state {i}", *(field[i] for field in (self.clamped_steps, self.num_values)), self.free_arrivals[i],
             f"{int(self.rank[i])}/{self.excitation.shape[-1]}", self.condition[i]]
            for i in range(len(self.rank))
        ]  # fmt: skip
        heads = ["", "steps clamped", "values", "free arrivals", "rank", "condition"]
        edges_head = ["edge", "driven arrivals", "values", "silent"]
        estimated = self.weights is not None
        edges_head += ["weight"] * estimated + ["s.e."] * (self.standard_errors is not None)
        edges = []
        for i, j in np.ndindex(*self.silent.shape):
            row: list[Any] = [f"{j} → {i}", self.driven_arrivals[i, j], self.driven_values[i, j], self.silent[i, j]]
            row += [self.weights[i, j]] if self.weights is not None else []
            row += [self.standard_errors[i, j]] if self.standard_errors is not None else []
            edges.append(row)
        basis = {
            "clamps": "by the clamps alone, free states at rest at zero",
            "model": "as expected under the model",
            "data": "as smoothed from the data",
        }[self.source]
        parts = [*self._findings(), "", format_table(heads, states, title=f"States (excitation {basis})"), ""]
        return "\n".join([*parts, format_table(edges_head, edges, title="Edges")])

    def _findings(self) -> list[str]:
        numbers = lambda flags: [int(i) for i in np.flatnonzero(np.asarray(flags))]  # noqa: E731
        found = [
            f"state {join_words(numbers(flags))}: {words}"
            for flags, words in (
                (self.never_clamped, "never clamped"),
                (self.one_value, "clamped to one value only"),
                (self.free_arrivals == 0, "never free, its own dynamics are not seen"),
            )
            if numbers(flags)
        ]
        pairs = np.argwhere(np.triu(np.asarray(self.inseparable)))
        found += [f"states {i} and {j}: always clamped together" for i, j in pairs]
        silent = [f"{j} → {i}" for i, j in np.argwhere(np.asarray(self.silent))]
        whom = "the clamps alone do not drive" if self.source == "clamps" else "the data are silent about"
        found += [f"{whom} {', '.join(silent)}"] if silent else []
        return found or ["every edge is spoken about"]
