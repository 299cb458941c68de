"""Programs that XLA would take long to compile, in less time."""

import os
from collections.abc import Callable, Mapping
from functools import lru_cache, update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import jax
from jax.extend.core import get_opaque_trace_state

P = ParamSpec("P")
R = TypeVar("R")

QUICKER = {"xla_cpu_use_fusion_emitters": False}
"""The older of XLA's two generators of fused loops for the CPU: the same speed of the loops in half to three quarters of the compile
time, but networks took half as long again with it."""

QUICKEST = {**QUICKER, "xla_backend_optimization_level": 1}
"""Less of LLVM's work as well: a quarter less compile time and the same speed, but loops over many lanes take a third longer."""


NOTHING_TRACED = get_opaque_trace_state()
"""What JAX traces while this module is imported: nothing."""


class Program(Generic[P, R]):
    """A function that is compiled with options where it is called by itself; where JAX already traces, it compiles as the caller says.

    Only a program of its own may have options of its own.
    """

    def __init__(self, function: Callable[P, R], jit: Callable, options: Mapping[str, bool | int], how: dict[str, Any]):
        update_wrapper(self, function)
        self._within = jit(function, **how)
        self._alone = lru_cache(maxsize=1)(lambda: jit(function, compiler_options=_known(options), **how))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Compile what has not been compiled, and run it."""
        compiled = self._alone() if get_opaque_trace_state() == NOTHING_TRACED else self._within
        return compiled(*args, **kwargs)


def jit_quickly(
    function: Callable[P, R], *, options: Mapping[str, bool | int] = QUICKEST, jit: Callable = jax.jit, **how: Any
) -> Program[P, R]:
    """`jit(function, **how)` for one large program, in less time."""
    return Program(function, jit, options, how)


def _known(options: Mapping[str, bool | int]) -> dict | None:
    """The options, where this device and this release of XLA know them; what `XLA_FLAGS` says of one counts more."""
    if jax.default_backend() != "cpu":
        return None
    flags = os.environ.get("XLA_FLAGS", "")
    known = {name: value for name, value in options.items() if f"--{name}" not in flags}
    return known if _are_known(tuple(known.items())) else None


@lru_cache(maxsize=8)
def _are_known(options: tuple[tuple[str, bool | int], ...]) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options=dict(options))()
    except jax.errors.JaxRuntimeError:  # "No such compile option"
        return False
    return True
