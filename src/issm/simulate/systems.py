r"""Drifts $f(x)$ of systems with known dynamics, $\dot x = f(x)$, one state vector in and its rate of change out.

A drift is a pytree that can be called, so it passes through `jit` and `vmap`, and its constants can be differentiated.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from issm._check import as_float_array, check_finite, check_shape, fail
from issm._types import PRNGKey


class Linear(eqx.Module):
    r"""Rate network without a nonlinearity, $f(x) = (A - I)\,x + b$: a leak of one and recurrent weights A.

    Attributes:
        rates: A, `(state_dim, state_dim)`, per unit of time.
        bias: b, `(state_dim,)`, units of the states per unit of time.

    Raises:
        ValueError: If `rates` is not square, `bias` has another length, or an entry is not finite.

    References:
        Nejatbakhsh & Wang (2025), sec. 4.

    Examples:
        >>> from issm.simulate import Linear
        >>> Linear([[1.0, -2.0], [2.0, 1.0]])([1.0, 0.0]).tolist()
        [0.0, 2.0]
    """

    rates: Float[Array, "state_dim state_dim"]
    bias: Float[Array, " state_dim"]

    def __init__(self, rates: Any, bias: Any = None):
        rates = as_float_array("rates", rates)
        if rates.ndim != 2 or rates.shape[0] != rates.shape[1]:
            fail(
                "rates",
                got=f"shape {tuple(rates.shape)}",
                expected="(state_dim, state_dim)",
                remedy="Entry (i, j) is the influence of state j on the rate of state i.",
            )
        check_finite("rates", rates)
        state_dim = rates.shape[0]
        bias = jnp.zeros(state_dim, rates.dtype) if bias is None else as_float_array("bias", bias, rates.dtype)
        check_shape("bias", bias, (state_dim,), ("state_dim",), "Give one number for each state.")
        check_finite("bias", bias)
        self.rates = rates
        self.bias = bias

    @property
    def state_dim(self) -> int:
        """Number of states D."""
        return self.rates.shape[0]

    def __call__(self, state: Any) -> Float[Array, " state_dim"]:
        """The rate of change at one state, `(state_dim,)`."""
        state = _as_state(state, self.state_dim).astype(self.rates.dtype)
        return self.rates @ state - state + self.bias

    def discretize(self, dt: float) -> tuple[Float[Array, "state_dim state_dim"], Float[Array, " state_dim"]]:
        r"""Weights $I + dt\,(A - I)$ and bias $dt\,b$ of the Euler step."""
        eye = jnp.eye(self.state_dim, dtype=self.rates.dtype)
        return eye + dt * (self.rates - eye), dt * self.bias


class Saddle(eqx.Module):
    r"""Decision model with a saddle at the origin, $f(x) = (a x_1^3 + b x_1 + h,\ c x_2 + h)$.

    With $a < 0 < b$ and $c < 0$ it has two stable points $x_1 = \pm\sqrt{-b/a}$ (for $h = 0$) and an unstable one between them.

    Attributes:
        a: Cubic rate of the first state.
        b: Linear rate of the first state.
        c: Linear rate of the second state.
        coherence: Constant drive h of both states.

    References:
        Galgali, Sahani & Mante (2023), *Nature Neuroscience* 26, 326-338.

    Examples:
        >>> from issm.simulate import Saddle
        >>> Saddle(a=-1.0, b=1.0, c=-2.0)([1.0, 0.5]).tolist()
        [0.0, -1.0]
    """

    a: float | Float[Array, ""] = -0.6
    b: float | Float[Array, ""] = 2.0
    c: float | Float[Array, ""] = -1.0
    coherence: float | Float[Array, ""] = 0.0

    @property
    def state_dim(self) -> int:
        """Number of states, 2."""
        return 2

    def __call__(self, state: Any) -> Float[Array, "2"]:
        """The rate of change at one state, `(2,)`."""
        first, second = _as_state(state, 2)
        return jnp.stack([self.a * first**3 + self.b * first + self.coherence, self.c * second + self.coherence])


class RotationalDynamics(eqx.Module):
    r"""A radius that stays and an angle that turns in proportion to it, $f(x) = (0,\ a x_1)$.

    Attributes:
        a: Turning rate per unit of radius, radians per unit of time.

    References:
        Galgali, Sahani & Mante (2023), *Nature Neuroscience* 26, 326-338; Nejatbakhsh & Wang (2025), sec. 4.

    Examples:
        >>> from issm.simulate import RotationalDynamics
        >>> system = RotationalDynamics(a=1.5)
        >>> system([2.0, 0.0]).tolist()
        [0.0, 3.0]
        >>> system.emit([[2.0, 0.0]]).tolist()
        [[2.0, 0.0]]
    """

    a: float | Float[Array, ""] = 1.2

    @property
    def state_dim(self) -> int:
        """Number of states, 2."""
        return 2

    def __call__(self, state: Any) -> Float[Array, "2"]:
        """The rate of change at one state, `(2,)`."""
        first, _ = _as_state(state, 2)
        return jnp.stack([jnp.zeros_like(first), self.a * first])

    def emit(self, states: Any, lift: Any = None) -> Float[Array, "*axes emission_dim"]:
        r"""Noise-free emissions $x_1 (\cos x_2, \sin x_2)$, times `lift` `(2, emission_dim)` if there is one."""
        states = as_float_array("states", states)
        return _polar(states[..., 0], states[..., 1], lift)


class DynamicAttractor(eqx.Module):
    r"""A ring that attracts and along which the state moves, $f(x) = (a_1 x_1,\ a_2 (1 - x_1))$.

    Attributes:
        a1: Rate of the distance from the ring; negative for an attractor.
        a2: Angular velocity on the ring, radians per unit of time.

    References:
        Galgali, Sahani & Mante (2023), *Nature Neuroscience* 26, 326-338; Nejatbakhsh & Wang (2025), sec. 4.

    Examples:
        >>> from issm.simulate import DynamicAttractor
        >>> system = DynamicAttractor(a1=-20.0, a2=1.25)
        >>> system([0.5, 0.0]).tolist()
        [-10.0, 0.625]
        >>> system.emit([0.5, 0.0]).tolist()
        [0.5, 0.0]
    """

    a1: float | Float[Array, ""] = -20.0
    a2: float | Float[Array, ""] = 1.2

    @property
    def state_dim(self) -> int:
        """Number of states, 2."""
        return 2

    def __call__(self, state: Any) -> Float[Array, "2"]:
        """The rate of change at one state, `(2,)`."""
        first, _ = _as_state(state, 2)
        return jnp.stack([self.a1 * first, self.a2 * (1 - first)])

    def emit(self, states: Any, lift: Any = None) -> Float[Array, "*axes emission_dim"]:
        r"""Noise-free emissions $(1 - x_1)(\cos x_2, \sin x_2)$, times `lift` `(2, emission_dim)` if there is one."""
        states = as_float_array("states", states)
        return _polar(1 - states[..., 0], states[..., 1], lift)


def point_attractor(a1: float = 1.0, a2: float = 1.0) -> Linear:
    r"""Two states that decay to the origin independently, $f(x) = -(|a_1| x_1,\ |a_2| x_2)$.

    Args:
        a1: Decay rate of the first state, per unit of time; its sign is ignored.
        a2: Decay rate of the second state, likewise.

    Returns:
        The drift, a `Linear` system with two states.

    Raises:
        ValueError: If a rate is not finite.

    References:
        Galgali, Sahani & Mante (2023), *Nature Neuroscience* 26, 326-338.

    Examples:
        >>> from issm.simulate import point_attractor
        >>> point_attractor(1.0, 3.0)([1.0, 1.0]).tolist()
        [-1.0, -3.0]
    """
    return _from_drift_matrix(np.diag([-abs(a1), -abs(a2)]))


def line_attractor(right: Any = (1.0, 0.0), left: Any = (0.0, 1.0), decay: float = -1.0) -> Linear:
    r"""A line of fixed points, $f(x) = M R\,\mathrm{diag}(0, \lambda) R^{-1} M^\top x$, turned by 45° by the rotation M.

    Args:
        right: Direction of the line before the turn, `(2,)`: the eigenvector of eigenvalue 0.
        left: The other eigenvector before the turn, `(2,)`, along which states return to the line; scaled to length one.
        decay: Its eigenvalue $\lambda$, per unit of time; negative for an attractor.

    Returns:
        The drift, a `Linear` system with two states.

    Raises:
        ValueError: If the two directions are parallel or a number is not finite.

    References:
        Galgali, Sahani & Mante (2023), *Nature Neuroscience* 26, 326-338.

    Examples:
        >>> import numpy as np
        >>> from issm.simulate import line_attractor
        >>> bool(np.allclose(line_attractor()([1.0, 1.0]), 0.0, atol=1e-6))
        True
    """
    given = [as_float_array(name, value) for name, value in (("right", right), ("left", left))]
    for name, value in zip(("right", "left"), given, strict=True):
        check_shape(name, value, (2,), ("state_dim",), "The line attractor has two states.")
        check_finite(name, value)
    basis = np.stack([np.asarray(value, np.float64) for value in given], axis=1)
    basis /= np.maximum(np.linalg.norm(basis, axis=0), np.finfo(float).tiny)
    if abs(np.linalg.det(basis)) < 1e-8:
        fail(
            "right, left", got="parallel directions", expected="two different directions", remedy="Change one of them."
        )
    turn = np.array([[1.0, -1.0], [1.0, 1.0]]) / np.sqrt(2)
    return _from_drift_matrix(turn @ basis @ np.diag([0.0, decay]) @ np.linalg.inv(basis) @ turn.T)


def ff_integrator(key: PRNGKey, state_dim: int) -> Linear:
    r"""Feedforward chain in random coordinates, $f(x) = (-I + O S O^\top)\,x$.

    S moves every state up by one ($S_{i,i+1} = 1$) and has 1/2 added to all of its last column; O is a random orthogonal
    matrix. The chain holds activity for far longer than one leak.

    Args:
        key: JAX random key, for O.
        state_dim: Number of states D, at least 1.

    Returns:
        The drift, a `Linear` system.

    Raises:
        ValueError: If `state_dim` is below 1.

    References:
        Goldman (2009), *Neuron* 61, 621-634; Nejatbakhsh & Wang (2025), sec. 4.

    Examples:
        >>> import jax
        >>> from issm.simulate import ff_integrator
        >>> ff_integrator(jax.random.key(0), 4).rates.shape
        (4, 4)
    """
    rotation = orthogonal_lift(key, state_dim, state_dim)
    chain = jnp.eye(state_dim, k=1, dtype=rotation.dtype).at[:, -1].add(0.5)
    return Linear(rotation @ chain @ rotation.T)


def lr_integrator(key: PRNGKey, state_dim: int) -> Linear:
    r"""Low-rank-like integrator in random coordinates, $f(x) = (-I + O\,\mathrm{diag}(e^{0} \dots e^{-1})\,O^\top)\,x$.

    The eigenvalues of the recurrent part fall from 1 to 1/e, so that one direction integrates and the others leak.

    Args:
        key: JAX random key, for the random orthogonal matrix O.
        state_dim: Number of states D, at least 1.

    Returns:
        The drift, a `Linear` system.

    Raises:
        ValueError: If `state_dim` is below 1.

    References:
        Nejatbakhsh & Wang (2025), sec. 4.

    Examples:
        >>> import jax, numpy as np
        >>> from issm.simulate import lr_integrator
        >>> drift = lr_integrator(jax.random.key(0), 3)
        >>> np.linalg.eigvalsh(drift.rates).round(3).tolist()[::-1] == [1.0, 0.607, 0.368]
        True
    """
    rotation = orthogonal_lift(key, state_dim, state_dim)
    return Linear(rotation * jnp.exp(jnp.linspace(0.0, -1.0, state_dim, dtype=rotation.dtype))[None, :] @ rotation.T)


def orthogonal_lift(key: PRNGKey, num_rows: int, num_columns: int) -> Float[Array, "num_rows num_columns"]:
    r"""A random matrix with orthonormal rows, $L L^\top = I$: takes few dimensions to many without changing distances.

    Args:
        key: JAX random key.
        num_rows: Dimension before the lift.
        num_columns: Dimension after it, at least `num_rows`.

    Returns:
        L, `(num_rows, num_columns)`, uniform (Haar) among such matrices; lift a row vector y by `y @ L`.

    Raises:
        ValueError: If a size is below 1 or there are fewer columns than rows.

    References:
        Mezzadri (2007), *Notices of the AMS* 54, 592-604.

    Examples:
        >>> import jax, numpy as np
        >>> from issm.simulate import orthogonal_lift
        >>> lift = orthogonal_lift(jax.random.key(0), 2, 5)
        >>> bool(np.allclose(lift @ lift.T, np.eye(2), atol=1e-5))
        True
    """
    if num_rows < 1 or num_columns < num_rows:
        fail(
            "num_rows, num_columns",
            got=f"{num_rows} and {num_columns}",
            expected="1 <= num_rows <= num_columns",
            remedy="A lift goes from few dimensions to many.",
        )
    factor, triangle = jnp.linalg.qr(jax.random.normal(key, (num_columns, num_rows)))
    return (factor * jnp.sign(jnp.diagonal(triangle))[None, :]).T


def _from_drift_matrix(matrix: np.ndarray) -> Linear:
    return Linear(matrix + np.eye(len(matrix)))


def _as_state(state: Any, state_dim: int) -> Array:
    state = as_float_array("state", state)
    check_shape("state", state, (state_dim,), ("state_dim",), "A drift takes one state; use `jax.vmap` for many.")
    return state


def _polar(radius: Array, angle: Array, lift: Any) -> Array:
    plane = radius[..., None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return plane if lift is None else plane @ as_float_array("lift", lift, plane.dtype)
