"""Recognition networks: pytrees that turn the data of one trial into a variational posterior of its states."""

import abc
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from issm._check import as_float_array, check_shape, fail
from issm._types import PRNGKey
from issm.inference.observations import Rows
from issm.interventions import Intervention
from issm.models.maps import MLP


class MeanField(eqx.Module):
    """Independent normal states: `means` and `scales` (standard deviations), `(num_timesteps, state_dim)`."""

    means: Float[Array, "num_timesteps state_dim"]
    scales: Float[Array, "num_timesteps state_dim"]


class Recognition(eqx.Module):
    r"""What every recognition network is: a callable from one trial to what it says of the states.

    A network of your own inherits from it. It returns either pseudo-observations
    $z_t = U_t x_t + N(0, I)$ (`issm.inference.observations.Rows`), which go through the filter and the smoother, or
    `MeanField`.

    References:
        Johnson et al. (2016); Nejatbakhsh & Wang (2025), sec. 3.

    Examples:
        >>> import issm
        >>> issubclass(issm.MeanFieldLSTM, issm.Recognition)
        True
    """

    @abc.abstractmethod
    def __call__(
        self,
        emissions: Float[Array, "num_timesteps emission_dim"],
        inputs: Float[Array, "num_timesteps input_dim"],
        intervention: Intervention,
        trial: Int[Array, ""],
    ) -> Rows | MeanField:
        """What the data of one trial say; `trial` counts the trials from 0."""

    @abc.abstractmethod
    def check(self, num_trials: int, num_timesteps: int, emission_dim: int, state_dim: int) -> None:
        """Refuse data of other sizes."""


class PotentialNetwork(Recognition):
    r"""Gaussian potentials from a network over a window of steps: $z_t = U_t x_t + N(0, I)$, $(U_t, z_t) = g(y_{t-w:t+w})$.

    The potentials go through the filter and the smoother of the clamped model, so that q has the model's own correlations in
    time and its clamps. A window without an observed entry gives no potential. It serves trials of any length.

    Args:
        key: JAX random key.
        emission_dim: Number of emissions N.
        state_dim: Number of states D.
        widths: Numbers of hidden units.
        window: w, steps on either side that it sees.
        center: Typical emissions, subtracted first, `(emission_dim,)`; None: zero.
        scale: Their standard deviations, divided by, `(emission_dim,)`; None: one.
        dtype: Of all weights. None: JAX's default.

    Attributes:
        network: From the window, missing entries as zeros, and what is observed in it, to $U_t$ and $z_t$.
        center: Subtracted from the emissions.
        scale: Divided by.
        window: w.

    References:
        Johnson et al. (2016); Archer et al. (2015).

    Examples:
        >>> import jax, issm
        >>> issm.PotentialNetwork(jax.random.key(0), emission_dim=5, state_dim=2).window
        1
    """

    network: MLP
    center: Float[Array, " emission_dim"]
    scale: Float[Array, " emission_dim"]
    window: int = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKey,
        emission_dim: int,
        state_dim: int,
        widths: Sequence[int] = (64,),
        *,
        window: int = 1,
        center: Any = None,
        scale: Any = None,
        dtype: Any = None,
    ):
        dtype = jnp.result_type(float) if dtype is None else dtype
        size = 2 * emission_dim * (2 * window + 1)
        start = jnp.concatenate([jnp.eye(state_dim, dtype=dtype).ravel(), jnp.zeros(state_dim, dtype)])
        self.network = MLP(key, size, state_dim * (state_dim + 1), widths, bias=start, dtype=dtype)
        filled = [
            jnp.full(emission_dim, default, dtype) if given is None else as_float_array(name, given, dtype)
            for name, given, default in (("center", center, 0.0), ("scale", scale, 1.0))
        ]
        for name, array in zip(("center", "scale"), filled, strict=True):
            check_shape(name, array, (emission_dim,), ("emission_dim",), "One number for each emission.")
        self.center, self.scale = filled
        self.window = window

    def __call__(
        self,
        emissions: Float[Array, "num_timesteps emission_dim"],
        inputs: Float[Array, "num_timesteps input_dim"],
        intervention: Intervention,
        trial: Int[Array, ""],
    ) -> Rows:
        """Pseudo-observations of one trial."""
        num_timesteps, state_dim = intervention.mask.shape
        center, scale = lax.stop_gradient(self.center), lax.stop_gradient(self.scale)
        observed = ~jnp.isnan(emissions)
        values = jnp.where(observed, (emissions - center[None]) / scale[None], 0.0)
        features = jnp.concatenate([values, observed.astype(values.dtype)], axis=1)
        padded = jnp.pad(features, ((self.window, self.window), (0, 0)))
        spans = jnp.concatenate([padded[i : i + num_timesteps] for i in range(2 * self.window + 1)], axis=1)
        said = jax.vmap(self.network)(spans)
        seen = jnp.pad(observed.any(axis=1), (self.window, self.window))
        some = jnp.stack([seen[i : i + num_timesteps] for i in range(2 * self.window + 1)]).any(axis=0)
        weights = said[:, : state_dim**2].reshape(num_timesteps, state_dim, state_dim)
        return Rows(
            jnp.where(some[:, None, None], weights, 0.0), jnp.where(some[:, None], said[:, state_dim**2 :], 0.0)
        )

    def check(self, num_trials: int, num_timesteps: int, emission_dim: int, state_dim: int) -> None:
        """Refuse data of other sizes."""
        sizes = (self.center.shape[0], self.network.biases[-1].shape[0])
        if sizes != (emission_dim, state_dim * (state_dim + 1)):
            fail(
                "recognition",
                got=f"a network for {sizes[0]} emissions with {sizes[1]} outputs",
                expected=f"one for {emission_dim} emissions and {state_dim} states",
                remedy="Build it with the emission_dim and state_dim of the model.",
            )


class FreePotentials(Recognition):
    r"""Gaussian potentials of their own for every step of every trial: $z_{k,t} = U_{k,t} x_t + N(0, I)$.

    No network, and nothing that carries over to other trials: the most flexible q of this family for a given data set.

    Args:
        num_trials: Number of trials K.
        num_timesteps: Number of steps T.
        state_dim: Number of states D.
        dtype: Of its arrays. None: JAX's default.

    Attributes:
        weights: U, `(num_trials, num_timesteps, state_dim, state_dim)`; starts at the identity.
        values: z, `(num_trials, num_timesteps, state_dim)`; starts at zero.

    References:
        Khan & Lin (2017), for potentials as the parameters of q.

    Examples:
        >>> import issm
        >>> issm.FreePotentials(3, 10, 2).weights.shape
        (3, 10, 2, 2)
    """

    weights: Float[Array, "num_trials num_timesteps state_dim state_dim"]
    values: Float[Array, "num_trials num_timesteps state_dim"]

    def __init__(self, num_trials: int, num_timesteps: int, state_dim: int, *, dtype: Any = None):
        dtype = jnp.result_type(float) if dtype is None else dtype
        shape = (num_trials, num_timesteps, state_dim)
        self.weights = jnp.broadcast_to(jnp.eye(state_dim, dtype=dtype), (*shape, state_dim))
        self.values = jnp.zeros(shape, dtype)

    def set(self, precisions: Any, shifts: Any) -> "FreePotentials":
        r"""The same with potentials $\exp(-\tfrac12 x^\top J x + h^\top x)$.

        Args:
            precisions: J, positive semidefinite, `(num_trials, num_timesteps, state_dim, state_dim)`.
            shifts: h, in the range of J, `(num_trials, num_timesteps, state_dim)`.
        """
        dtype = self.weights.dtype
        precisions, shifts = as_float_array("precisions", precisions, dtype), as_float_array("shifts", shifts, dtype)
        axes = ("num_trials", "num_timesteps", "state_dim")
        check_shape("precisions", precisions, self.weights.shape, (*axes, "state_dim"), "One matrix for each step.")
        check_shape("shifts", shifts, self.values.shape, axes, "One vector for each step.")
        values, vectors = jnp.linalg.eigh(precisions)
        tiny = precisions.shape[-1] * jnp.finfo(dtype).eps * values.max(axis=-1, keepdims=True)
        roots = jnp.sqrt(jnp.where(values > tiny, values, 0.0))
        weights = roots[..., :, None] * jnp.swapaxes(vectors, -1, -2)
        turned = (jnp.swapaxes(vectors, -1, -2) @ shifts[..., None])[..., 0]
        seen = jnp.where(roots > 0, turned / jnp.where(roots > 0, roots, 1.0), 0.0)
        return eqx.tree_at(lambda f: (f.weights, f.values), self, (weights, seen))

    def __call__(
        self,
        emissions: Float[Array, "num_timesteps emission_dim"],
        inputs: Float[Array, "num_timesteps input_dim"],
        intervention: Intervention,
        trial: Int[Array, ""],
    ) -> Rows:
        """Pseudo-observations of one trial."""
        return Rows(self.weights[trial], self.values[trial])

    def check(self, num_trials: int, num_timesteps: int, emission_dim: int, state_dim: int) -> None:
        """Refuse data of other sizes."""
        if self.values.shape != (num_trials, num_timesteps, state_dim):
            fail(
                "recognition",
                got=f"potentials of shape {self.values.shape}",
                expected=f"(num_trials, num_timesteps, state_dim) = {(num_trials, num_timesteps, state_dim)}",
                remedy="Free potentials belong to one data set; a `PotentialNetwork` serves others.",
            )


class MeanFieldLSTM(Recognition):
    r"""Independent states with means and scales from an LSTM over the trial; clamped states have their values.

    The recognition network of the method's authors, with scales that stay positive. A q without correlations in time
    understates how uncertain the states are, and biases the process noise that is learned under it.

    Args:
        key: JAX random key.
        emission_dim: Number of emissions N.
        state_dim: Number of states D.
        input_dim: Number of inputs M.
        width: Number of hidden units, in each direction.
        bidirectional: Whether a second LSTM runs backwards in time.
        dtype: Of all weights. None: JAX's default.

    Attributes:
        forward: The LSTM that runs forwards over emissions, what is observed, clamps and inputs.
        backward: The one that runs backwards, or None.
        readout: From hidden units to means and scales.

    References:
        Hochreiter & Schmidhuber (1997), for the LSTM; Nejatbakhsh & Wang (2025), sec. 3.

    Examples:
        >>> import jax, issm
        >>> issm.MeanFieldLSTM(jax.random.key(0), emission_dim=5, state_dim=2, bidirectional=True).backward is None
        False
    """

    forward: eqx.nn.LSTMCell
    backward: eqx.nn.LSTMCell | None
    readout: eqx.nn.Linear

    def __init__(
        self,
        key: PRNGKey,
        emission_dim: int,
        state_dim: int,
        input_dim: int = 0,
        *,
        width: int = 32,
        bidirectional: bool = False,
        dtype: Any = None,
    ):
        dtype = jnp.result_type(float) if dtype is None else dtype
        keys = jax.random.split(key, 3)
        size = 2 * emission_dim + 2 * state_dim + input_dim
        self.forward = eqx.nn.LSTMCell(size, width, key=keys[0], dtype=dtype)
        self.backward = eqx.nn.LSTMCell(size, width, key=keys[1], dtype=dtype) if bidirectional else None
        readout = eqx.nn.Linear(width * (1 + bidirectional), 2 * state_dim, key=keys[2], dtype=dtype)
        start = jnp.concatenate([jnp.zeros(state_dim, dtype), jnp.full(state_dim, -1.0, dtype)])
        self.readout = eqx.tree_at(lambda layer: layer.bias, readout, start)

    def __call__(
        self,
        emissions: Float[Array, "num_timesteps emission_dim"],
        inputs: Float[Array, "num_timesteps input_dim"],
        intervention: Intervention,
        trial: Int[Array, ""],
    ) -> MeanField:
        """Means and scales of one trial."""
        observed, clamped = ~jnp.isnan(emissions), intervention.mask
        values = jnp.where(observed, emissions, 0.0)
        flags = [flag.astype(values.dtype) for flag in (observed, clamped)]
        features = jnp.concatenate([values, *flags, intervention.value, inputs], axis=1)
        hidden = _run_lstm(self.forward, features, reverse=False)
        if self.backward is not None:
            hidden = jnp.concatenate([hidden, _run_lstm(self.backward, features, reverse=True)], axis=1)
        means, raw = jnp.split(jax.vmap(self.readout)(hidden), 2, axis=1)
        floor = jnp.asarray(1e-4, raw.dtype)
        return MeanField(jnp.where(clamped, intervention.value, means), floor + jax.nn.softplus(raw))

    def check(self, num_trials: int, num_timesteps: int, emission_dim: int, state_dim: int) -> None:
        """Refuse data of other sizes."""
        got = self.readout.bias.shape[0] // 2 if self.readout.bias is not None else 0
        if got != state_dim or self.forward.input_size < 2 * (emission_dim + state_dim):
            fail(
                "recognition",
                got=f"a network of {self.forward.input_size} features for {got} states",
                expected=f"one for {emission_dim} emissions and {state_dim} states",
                remedy="Build it with the emission_dim, state_dim and input_dim of the model.",
            )


def _run_lstm(cell: eqx.nn.LSTMCell, features: Array, *, reverse: bool) -> Array:
    zeros = jnp.zeros(cell.hidden_size, features.dtype)

    def step(carry: tuple[Array, Array], at: Array) -> tuple[tuple[Array, Array], Array]:
        carry = cell(at, carry)
        return carry, carry[0]

    return lax.scan(step, (zeros, zeros), features, reverse=reverse)[1]
