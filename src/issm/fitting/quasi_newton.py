r"""Steps beyond those of EM: limited-memory BFGS on the exact score, preconditioned by the information of the complete data.

EM moves by the inverse of the information that complete data would carry: too short by some factor in every direction that
the states hide. Differences of the score along the way tell by how much.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from issm._trees import choose
from issm.fitting.gauge import Clamps, GaugeStep, count_clamps, follow, has_gauge
from issm.fitting.m_step import Rules
from issm.fitting.score import Preconditioner, from_coordinates, keep_frozen, log_variances, score, to_coordinates
from issm.fitting.silent import find_silent, keep_silent
from issm.fitting.statistics import SufficientStatistics
from issm.models.lgssm import ParamsLGSSM
from issm.models.trials import Trials

MEMORY = 12
WARM_UP = 5  # updates of EM at first: far from the optimum they are the safer ones
MOST_TRIALS = 3  # lengths of one direction, before EM is asked again
SUFFICIENT = 1e-4  # share of the gain promised by the slope that a step has to bring
LESS_TRUST = 0.25  # after a step that did not gain enough
LARGEST_STEP = 2.0  # in any logarithm of a variance


class Memory(eqx.Module):
    r"""The last moves and what they did to the score, newest last; what says nothing is zero.

    Attributes:
        moves: $s_j$, differences of coordinates.
        changes: $y_j$, differences of the score with the sign turned.
        inverses: $1 / s_j^\top y_j$.
    """

    moves: Float[Array, "memory coordinates"]
    changes: Float[Array, "memory coordinates"]
    inverses: Float[Array, " memory"]


class Search(eqx.Module):
    """What is known at the best parameters so far, and how the next ones come from there.

    Attributes:
        point, gradient: Coordinates of the best parameters, and the score there.
        direction: The direction that belongs to it.
        slope: Gain that the direction promises for a unit step, to first order.
        memory: Earlier moves.
        update: What EM makes of the best parameters.
        clamps: How often each state is clamped, and to what.
        trust: Share of the correction for changes of coordinates that is believed, from 1 down.
        length: Length of the step along the direction that is tried; zero for an update of EM.
        trials: Number of lengths that have failed.
    """

    point: Float[Array, " coordinates"]
    gradient: Float[Array, " coordinates"]
    direction: Float[Array, " coordinates"]
    slope: Float[Array, ""]
    memory: Memory
    update: ParamsLGSSM
    clamps: Clamps
    trust: Float[Array, ""]
    length: Float[Array, ""]
    trials: Int[Array, ""]

    @property
    def by_em(self) -> Bool[Array, ""]:
        """Whether the parameters on trial are an update of EM."""
        return self.length == 0


def start_search(params: ParamsLGSSM, trials: Trials) -> Search:
    """Before the first likelihood is known."""
    point = to_coordinates(params)
    nothing, zero = jnp.zeros_like(point), jnp.zeros((), point.dtype)
    memory = Memory(
        jnp.zeros((MEMORY, point.size), point.dtype),
        jnp.zeros((MEMORY, point.size), point.dtype),
        jnp.zeros(MEMORY, point.dtype),
    )
    return Search(
        point, nothing, nothing, zero, memory, params, count_clamps(trials), zero + 1, zero, jnp.zeros((), jnp.int32)
    )


def look_around(
    search: Search,
    params: ParamsLGSSM,
    update: ParamsLGSSM,
    stats: SufficientStatistics,
    rules: Rules,
    floor: Float[Array, " emission_dim"],
) -> Search:
    """The search at parameters that have been accepted, with the direction to go next."""
    point, gradient = to_coordinates(params), score(params, stats, rules, floor)
    memory = _remember(search.memory, point - search.point, search.gradient - gradient, search.slope > 0)
    trust = jnp.where(search.by_em, search.trust, jnp.minimum(1.0, 2 * search.trust))
    step = Preconditioner(params, stats, rules)
    if has_gauge(params, rules):
        turn = GaugeStep(params, stats, search.clamps)
        direction = _two_loops(memory, gradient, lambda vector: step(vector) + trust * turn(vector))
    else:
        direction = _two_loops(memory, gradient, step)
    slope = direction @ gradient
    sound = jnp.isfinite(point).all() & jnp.isfinite(direction).all() & (slope > 0)
    return Search(
        point=point,
        gradient=jnp.where(sound, gradient, 0.0),
        direction=jnp.where(sound, direction, 0.0),
        slope=jnp.where(sound, slope, 0.0),
        memory=memory,
        update=update,
        clamps=search.clamps,
        trust=trust,
        length=jnp.zeros_like(slope),
        trials=jnp.zeros_like(search.trials),
    )


def shorten(search: Search, gain: Float[Array, ""]) -> Search:
    """The search after a step that did not gain enough: a shorter one, and in the end none, with an empty memory."""
    length, trials = search.length, search.trials + 1
    curvature = 2 * (search.slope * length - gain)  # of the parabola through both values and the slope, times length^2
    best = search.slope * length**2 / jnp.where(curvature > 0, curvature, jnp.inf)
    shorter = jnp.clip(jnp.where(jnp.isfinite(best), best, 0.0), 0.1 * length, 0.5 * length)
    given_up = trials >= MOST_TRIALS
    memory = jax.tree.map(lambda leaf: jnp.where(given_up, 0.0, leaf), search.memory)
    return eqx.tree_at(
        lambda s: (s.length, s.trials, s.memory, s.trust),
        search,
        (jnp.where(given_up, 0.0, shorter), trials, memory, LESS_TRUST * search.trust),
    )


def propose(
    search: Search,
    current: ParamsLGSSM,
    stats: SufficientStatistics,
    rules: Rules,
    floor: Float[Array, " emission_dim"],
    num_updates: Int[Array, ""],
    size: Float[Array, ""],
) -> tuple[Search, ParamsLGSSM]:
    """The next parameters to try: along the direction, or the update of EM where that is safer or nothing can be told.

    Args:
        search: What is known at `current`.
        current: The best parameters so far.
        stats: Those of the last E step; only what does not depend on the parameters is used.
        rules: What is frozen.
        floor: Smallest emission variances.
        num_updates: Number of the update that is asked for.
        size: Absolute value of the objective, whose rounding hides small gains.
    """
    fresh = search.trials == 0
    audible = search.slope > 10 * jnp.finfo(size.dtype).eps * size
    able = (num_updates > WARM_UP) & audible & fresh
    largest = jnp.abs(log_variances(search.direction, current)).max(initial=0.0)
    whole = jnp.minimum(1.0, LARGEST_STEP / jnp.where(largest > 0, largest, 1.0))
    length = jnp.where(fresh, jnp.where(able, whole, 0.0), search.length)
    at = lambda vector: from_coordinates(vector, current, rules, floor)  # noqa: E731
    step = length * search.direction
    if has_gauge(current, rules):
        trial = keep_frozen(follow(search.point, step, at, current), current, rules)
        trial = keep_silent(trial, current, find_silent(current, stats, rules))
    else:
        trial = at(search.point + step)
    search = eqx.tree_at(lambda s: s.length, search, length)
    return search, choose(length > 0, trial, search.update)


def _remember(memory: Memory, move: Array, change: Array, known: Array) -> Memory:
    product = move @ change
    told = known & jnp.isfinite(product) & (product > jnp.finfo(move.dtype).eps * jnp.abs(move * change).sum())
    push = lambda old, new: jnp.where(told, jnp.concatenate([old[1:], new[None]]), old)  # noqa: E731
    return Memory(
        push(memory.moves, jnp.where(told, move, 0.0)),
        push(memory.changes, jnp.where(told, change, 0.0)),
        push(memory.inverses, 1 / jnp.where(told, product, 1.0)),
    )


def _two_loops(memory: Memory, gradient: Array, precondition: Callable[[Array], Array]) -> Array:
    """Nocedal & Wright (2006), algorithm 7.4."""

    def down(vector: Array, entry: Memory) -> tuple[Array, Array]:
        share = entry.inverses * (entry.moves @ vector)
        return vector - share * entry.changes, share

    def up(vector: Array, entry: tuple[Memory, Array]) -> tuple[Array, None]:
        past, share = entry
        return vector + past.moves * (share - past.inverses * (past.changes @ vector)), None

    vector, shares = lax.scan(down, gradient, memory, reverse=True)
    direction, _ = lax.scan(up, precondition(vector), (memory, shares))
    return direction
