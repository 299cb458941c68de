"""Which trials are left out together."""

import numpy as np
from jaxtyping import Int

from issm.interventions import Intervention

KEPT = -1  # label of a trial that is never left out


def deal_out(rng: np.random.Generator, num_items: int, num_folds: int) -> Int[np.ndarray, " num_items"]:
    """Random folds whose sizes differ by one at most."""
    return rng.permutation(num_items) % num_folds


def intervention_folds(
    rng: np.random.Generator, interventions: Intervention | None, num_trials: int, num_folds: int
) -> tuple[Int[np.ndarray, " num_trials"] | None, str]:
    """Folds of whole kinds of clamps, or None and the reason.

    A kind is the set of states that a trial clamps. Where there is only one that could be left out, it is the plan itself.
    """
    name = "held_out_interventions: not scored, "
    if interventions is None or interventions.mask.ndim == 2 or not np.asarray(interventions.mask).any():
        return None, name + "trials do not differ in their clamps"
    mask, value = np.asarray(interventions.mask), np.asarray(interventions.value)
    states: np.ndarray = np.any(mask, axis=1)  # type: ignore[assignment]
    by_states = _labels([row.tobytes() for row in states])
    by_plan = _labels([m.tobytes() + v.tobytes() for m, v in zip(mask, value, strict=True)])
    for kinds in (by_states, by_plan):
        if kinds is by_plan and len(np.unique(kinds)) == num_trials:
            return None, name + "every trial has a plan of its own, so that held-out trials are held-out interventions"
        usable = [kind for kind in np.unique(kinds) if _is_covered(states, kinds == kind)]
        folds = _merge(rng, states, kinds, usable, num_folds)
        if len(np.unique(folds[folds != KEPT])) > 1:
            return folds, ""
    return None, name + "no two kinds of clamps can be left out without losing all clamps of a state"


def _labels(keys: list[bytes]) -> np.ndarray:
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def _is_covered(states: np.ndarray, held: np.ndarray) -> bool:
    """Whether the states that the held-out trials clamp are clamped in others too."""
    return not (states[held].any(axis=0) & ~states[~held].any(axis=0)).any() if (~held).any() else False


def _merge(rng: np.random.Generator, states: np.ndarray, kinds: np.ndarray, usable: list, num_folds: int) -> np.ndarray:
    """Kinds dealt out to at most `num_folds` folds, each of which leaves every state some clamps."""
    folds = np.full(len(kinds), KEPT)
    for kind in rng.permutation(usable):
        sizes = [(int((folds == fold).sum()), fold) for fold in range(num_folds)]
        for _, fold in sorted(sizes):
            if _is_covered(states, (folds == fold) | (kinds == kind)):
                folds[kinds == kind] = fold
                break
    used = np.unique(folds[folds != KEPT])
    for new, old in enumerate(used):
        folds[folds == old] = new
    return folds
