"""One of two pytrees, as a whole or entry by entry: by Boolean masks, which entries of the parameters a fitter may change."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from issm._check import fail
from issm._host import is_concrete


def trainable_masks(
    tree: Any, trainable: Any, *, fixed: Any = None, argument: str = "trainable", may_be_none: bool = False
) -> Any:
    """Spread a pytree prefix of Booleans over a pytree of arrays.

    Args:
        tree: Pytree whose leaves are arrays.
        trainable: None (everything), a Boolean, or a pytree prefix of `tree` with a Boolean, or a Boolean array with the
            shape of the leaf, in the place of a leaf or of a whole subtree (Booleans only).
        fixed: Type of the subtrees that cannot be trained. They become False unless a True stands at their very place or
            below, which is refused.
        argument: Name for error messages.
        may_be_none: Whether it is in order to train nothing of `tree`.

    Returns:
        Boolean arrays in the structure of `tree`, every one with the shape of its leaf.

    Raises:
        ValueError: If the structure is not a prefix of that of `tree`, a leaf is not Boolean or has a wrong shape, nothing is
            left to train, or something that is fixed is asked for.
    """
    prefix = True if trainable is None else trainable
    try:
        broadcast = jax.tree.map(lambda flag, part: _Spread(flag, part), prefix, tree, is_leaf=_is_missing)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{argument}: got a structure that does not match the parameters ({error}); expected a pytree prefix of them with"
            " Booleans. Start from `jax.tree.map(lambda _: True, params)` and replace parts of it with `eqx.tree_at`."
        ) from error
    masks = jax.tree_util.tree_map_with_path(
        lambda path, spread: spread.masks(argument, path, fixed), broadcast, is_leaf=lambda x: isinstance(x, _Spread)
    )
    if not may_be_none and all(all_false(leaf) for leaf in jax.tree.leaves(masks)):
        fail(
            argument,
            got="nothing but False",
            expected="at least one entry to train",
            remedy="Set an entry to True, or use the parameters as they are.",
        )
    return masks


def apply_mask(masks: Any, new: Any, old: Any) -> Any:
    """The entries of `new` where the mask is true, of `old` elsewhere."""
    return jax.tree.map(lambda mask, a, b: jnp.where(mask, a, b), masks, new, old)


def choose(condition: Bool[Array, ""], new: Any, old: Any) -> Any:
    """One of two pytrees, in the dtypes of the second, which also gives what is no array."""

    def one(new: Any, old: Any) -> Any:
        if not eqx.is_array(old):
            return old
        return jnp.where(condition, new if new.dtype == old.dtype else new.astype(old.dtype), old)

    return jax.tree.map(one, new, old)


def all_true(mask: Any) -> bool:
    """Whether a mask is known to be true everywhere; false while its values are traced."""
    return is_concrete(mask) and bool(np.asarray(mask).all())


def all_false(mask: Any) -> bool:
    """Whether a mask is known to be false everywhere; false while its values are traced."""
    return is_concrete(mask) and not np.asarray(mask).any()


def _is_missing(flag: Any) -> bool:
    return flag is None


class _Spread:
    """One Boolean and the part of the tree that it stands for."""

    def __init__(self, flag: Any, part: Any):
        self.flag = flag
        self.part = part

    def masks(self, argument: str, path: Any, fixed: Any) -> Any:
        name = argument + jax.tree_util.keystr(path)
        flag = self.flag if isinstance(self.flag, jax.Array) else np.asarray(self.flag)
        if flag.dtype != bool:
            fail(
                name,
                got=f"{self.flag!r} of dtype {flag.dtype}",
                expected="True, False or a Boolean array",
                remedy="Pass the result of a comparison, or `x.astype(bool)`.",
            )
        inside = fixed is not None and any(
            isinstance(node, jax.tree_util.GetAttrKey) and node.name == "values" for node in path
        )
        whole = fixed is not None and isinstance(self.part, fixed)
        if (inside or whole) and not all_false(flag):
            fail(
                name,
                got="True for a field that varies in time",
                expected="False, or nothing said",
                remedy="A `TimeVarying` field has one value for each step and is always kept; set its place to False.",
            )
        is_fixed = lambda node: fixed is not None and isinstance(node, fixed)  # noqa: E731
        return jax.tree.map(lambda node: self._mask(name, flag, node, is_fixed(node)), self.part, is_leaf=is_fixed)

    def _mask(self, name: str, flag: Any, node: Any, is_fixed: bool) -> Any:
        if is_fixed:
            return jax.tree.map(lambda leaf: np.zeros(leaf.shape, dtype=bool), node)
        if flag.ndim and flag.shape != node.shape:
            fail(
                name,
                got=f"shape {tuple(flag.shape)}",
                expected=f"one Boolean, or the shape {tuple(node.shape)} of the field",
                remedy="Give one Boolean for each entry.",
            )
        return np.broadcast_to(flag, node.shape) if isinstance(flag, np.ndarray) else jnp.broadcast_to(flag, node.shape)
