"""Programs that XLA would take long to compile, in less time."""

from collections.abc import Callable
from functools import lru_cache
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")

QUICKER = {"xla_cpu_use_fusion_emitters": False}
"""The older of XLA's two generators of fused loops for the CPU: the same speed of the loops, in less than half the compile time."""


def jit_quickly(function: Callable[P, R]) -> Callable[P, R]:
    """`jax.jit` for one large program, to be called where JAX does not trace: only there may a program have options of its own."""

    @lru_cache(maxsize=1)
    def compiled() -> Callable[P, R]:
        return jax.jit(function, compiler_options=_options())

    return lambda *args, **kwargs: compiled()(*args, **kwargs)


def _options() -> dict | None:
    """The options, where this device and this release of XLA know them."""
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda: 0, compiler_options=QUICKER)()
    except jax.errors.JaxRuntimeError:  # "No such compile option"
        return None
    return QUICKER
