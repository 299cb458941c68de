r"""What the stimulated steps of each channel say about the states: the spectral part of `learn_targets`, in NumPy.

A perfect clamp of state i by channel m makes a functional $w_i^\top x_t$ of the state exactly $g u_t$ at its steps: variance
that the dynamics would have put there is gone. States that the channel does not clamp arrive as their dynamics say, so
their functionals do not notice the stimulus.
"""

import dataclasses

import numpy as np
import scipy.linalg
import scipy.stats
from jaxtyping import Bool, Float

Array = np.ndarray
FREE = 0.7  # share of variance left that the least free direction of a few hundred steps still shows; 1 and more on average
MODEL_ERROR = 0.05  # standard error of a share of variance from the errors of the model itself
THRESHOLD = 0.4  # between 0 (clamped in all channels of a set) and FREE (free in one of them)
SURE = 3.0  # log likelihood ratio below which a channel is undecided
SAME = 4.0  # standard errors up to which a functional has no variance left
SURE_SOFT, SURE_NONE = 1e-3, 1e-2  # p-values of "does nothing"
CLAMP, SOFT, NONE, UNDECIDED = "clamp", "soft", "none", "undecided"


@dataclasses.dataclass
class Steps:
    """Stimulated steps, each with what was seen of the state and what it would have been.

    Attributes:
        estimate: The state from the emissions alone, unbiased whatever the stimulus did, `(steps, state_dim)`.
        error: Its error covariance, `(steps, state_dim, state_dim)`.
        expected: Mean of the state had nothing been done, given the past.
        spread: Covariance of that prediction.
        amplitude: `(steps, num_channels)`, zero where a channel is off.
        active: Which channels are on.
    """

    estimate: Float[Array, "steps state_dim"]
    error: Float[Array, "steps state_dim state_dim"]
    expected: Float[Array, "steps state_dim"]
    spread: Float[Array, "steps state_dim state_dim"]
    amplitude: Float[Array, "steps num_channels"]
    active: Bool[Array, "steps num_channels"]


@dataclasses.dataclass
class Channel:
    """Moments of the steps at which one channel acts alone.

    Attributes:
        left: Covariance of the state given the amplitude: zero along what is clamped.
        free: What it would have been, given the amplitude, had nothing been done.
        moved: Covariance of the systematic departure from the prediction: zero along what is not clamped.
        error: Mean error covariance of the estimates.
        eigenvalues: Of `left` in units of `free`, ascending.
        errors: Standard errors of the eigenvalues.
        evidence: Logarithm of the likelihood ratio of clamped (eigenvalue 0) against free (at least `FREE`), for each.
        soft_p: p-value of no linear effect of the amplitude.
        num_steps: Number of steps.
        num_clamped: Number of eigenvalues that speak for a clamp.
    """

    left: Array
    free: Array
    moved: Array
    error: Array
    eigenvalues: Array
    errors: Array
    evidence: Array
    soft_p: float
    num_steps: int
    num_clamped: int


def describe(steps: Steps, channel: int) -> Channel | None:
    """Moments of one channel, or None if it acts alone too rarely to tell."""
    state_dim = steps.estimate.shape[1]
    alone = steps.active[:, channel] & (steps.active.sum(axis=1) == 1)
    if alone.sum() < 3 * (state_dim + 2):
        return None
    estimate, expected = steps.estimate[alone], steps.expected[alone]
    error, spread = steps.error[alone].mean(axis=0), steps.spread[alone].mean(axis=0)
    amplitude = steps.amplitude[alone, channel]
    count = len(amplitude)
    design = np.column_stack([np.ones(count), amplitude])
    rank = np.linalg.matrix_rank(design)
    scale = count / (count - rank)
    left = np.cov(_residual(design, estimate).T, bias=True).reshape(state_dim, state_dim) * scale - error
    free = np.cov(_residual(design, expected).T, bias=True).reshape(state_dim, state_dim) * scale + spread
    eigenvalues, vectors = scipy.linalg.eigh(left, free)
    noise = np.einsum("ij,ik,kj->j", vectors, error, vectors)
    unit = np.sqrt(2 / (count - rank))
    errors = (np.maximum(eigenvalues, 0.0) + noise) * unit
    evidence = _evidence(eigenvalues, noise * unit, (FREE + noise) * unit)
    design = np.column_stack([design, expected])
    departure = estimate - expected
    rest = _residual(design, departure)
    used = np.linalg.matrix_rank(design)
    inside = departure - rest
    noise_cov = rest.T @ rest / max(count - used, 1)
    moved = inside.T @ inside / count - noise_cov * used / count
    return Channel(
        left=left,
        free=free,
        moved=moved,
        error=error,
        eigenvalues=eigenvalues,
        errors=errors,
        evidence=evidence,
        soft_p=_no_effect(design, departure),
        num_steps=count,
        num_clamped=int((evidence > 0).sum()),
    )


def _evidence(shares: Array, error_if_clamped: Array, error_if_free: Array) -> Array:
    clamped = np.hypot(error_if_clamped, MODEL_ERROR)
    free = np.hypot(error_if_free, MODEL_ERROR)
    return (np.maximum(FREE - shares, 0.0) / free) ** 2 / 2 - (np.maximum(shares, 0.0) / clamped) ** 2 / 2


def _residual(design: Array, target: Array) -> Array:
    return target - design @ np.linalg.lstsq(design, target, rcond=None)[0]


def _no_effect(design: Array, departure: Array) -> float:
    """p-value that the amplitude, column 1 of the design, has no effect: Hotelling's test, by Wilks' lambda."""
    amplitude = design[:, 1]
    others = np.delete(design, 1, axis=1)
    rest = _residual(others, departure)
    own = _residual(others, amplitude[:, None])[:, 0]
    power = own @ own
    if power <= 1e-12 * max(amplitude @ amplitude, 1e-300):
        return 1.0
    slope = own @ rest / power
    noise = rest.T @ rest - power * np.outer(slope, slope)
    dim, degrees = departure.shape[1], len(departure) - np.linalg.matrix_rank(design)
    if degrees - dim + 1 < 1:
        return 1.0
    hotelling = power * slope @ np.linalg.solve(noise / degrees, slope)
    ratio = hotelling * (degrees - dim + 1) / (degrees * dim)
    return float(scipy.stats.f.sf(ratio, dim, degrees - dim + 1))


def soft_effect(steps: Steps, channel: int) -> Float[Array, " state_dim"]:
    """Least-squares effect of a unit amplitude on the state."""
    alone = steps.active[:, channel] & (steps.active.sum(axis=1) == 1)
    departure, amplitude = (steps.estimate - steps.expected)[alone], steps.amplitude[alone, channel]
    return amplitude @ departure / (amplitude @ amplitude)


def judge(channel: Channel | None) -> tuple[str, str]:
    """Kind of a channel and, where it is undecided, the reason."""
    if channel is None:
        return UNDECIDED, "acts alone at too few steps"
    unsure = np.abs(channel.evidence) < SURE
    if unsure.any():
        share = channel.eigenvalues[unsure][0]
        return UNDECIDED, f"whether it clamps is not clear (share of variance left {share:.2f}, between 0 and 1)"
    if channel.num_clamped:
        return CLAMP, ""
    if channel.soft_p < SURE_SOFT:
        return SOFT, ""
    if channel.soft_p > SURE_NONE:
        return NONE, ""
    return UNDECIDED, f"whether it does anything is not clear (p = {channel.soft_p:.3g})"


def share_states(channels: dict[int, Channel], state_dim: int) -> list[tuple[int, ...]] | None:
    """For each clamped state the channels that clamp it; None where no such list fits what each channel clamps.

    The states that all of several channels clamp are the functionals without variance in all of them. Larger sets of channels
    come first, and account for the states of their subsets.
    """
    common: dict[tuple[int, ...], int] = {(m,): channel.num_clamped for m, channel in channels.items()}
    frontier = list(common)
    while frontier:
        larger = {
            (*group, m) for group in frontier for m in channels if m > group[-1] and common.get((*group[:-1], m), 1) > 0
        }
        found = {group: _num_common([channels[m] for m in group]) for group in larger}
        frontier = [group for group, count in found.items() if count > 0]
        common |= {group: found[group] for group in frontier}
    states: list[tuple[int, ...]] = []
    for group in sorted(common, key=lambda g: (-len(g), g)):
        accounted = sum(set(group) <= set(other) for other in states)
        states += [group] * max(common[group] - accounted, 0)
    fits = all(sum(m in group for group in states) == channel.num_clamped for m, channel in channels.items())
    return sorted(states) if fits and len(states) <= state_dim else None


def _num_common(channels: list[Channel]) -> int:
    """Number of functionals that all of the channels clamp."""
    shares, vectors = scipy.linalg.eigh(sum(c.left for c in channels), sum(c.free for c in channels))
    # A functional that is free in one of them keeps its share of the variance there.
    common = shares < THRESHOLD / len(channels)
    for channel in channels:
        left, free, error = (
            np.einsum("ij,ik,kj->j", vectors, matrix, vectors) for matrix in (channel.left, channel.free, channel.error)
        )
        doubt = np.hypot(error / free * np.sqrt(2 / channel.num_steps), MODEL_ERROR / 2)
        common &= left / free < SAME * doubt
    return int(common.sum())


def functionals(channels: dict[int, Channel], states: list[tuple[int, ...]], state_dim: int) -> Float[Array, "d d"]:
    """Rows that give the clamped states, in the order of `states`, and then those that are never clamped.

    The functionals of a group of states are those that have no variance left in its channels, and do not notice the others.
    """
    free = [()] * (state_dim - len(states))
    groups = sorted(set(states)) + ([()] if free else [])
    rows = []
    for group in groups:
        size = (states + free).count(group)
        total = np.zeros((state_dim, state_dim))
        scale = np.zeros((state_dim, state_dim))
        for m, channel in channels.items():
            total += channel.num_steps * (channel.left if m in group else channel.moved)
            scale += channel.num_steps * channel.free
        _, vectors = scipy.linalg.eigh(total, scale) if channels else (None, np.eye(state_dim))
        norms = np.sqrt(sum(channel.num_steps for channel in channels.values()) or 1)
        rows.append((vectors[:, :size] * norms).T)
    return np.concatenate(rows)


def mix_evenly(rows: Array, gains: Array) -> Array:
    """A rotation of the states of one group after which all gains are far from zero, `(size, size)`."""
    size = len(rows)
    best, score = np.eye(size), -1.0
    rng = np.random.default_rng(0)
    candidates = [np.eye(size)] + [
        np.linalg.qr(rng.normal(size=(size, size)))[0] for _ in range(200 if size > 1 else 0)
    ]
    for rotation in candidates:
        smallest = np.abs(gains @ rotation.T).min()
        if smallest > score:
            best, score = rotation, smallest
    return best
