"""Every test runs in float64, without implicit promotion, and with shapes checked at run time.

The tests run hundreds of programs on small arrays: what they wait for is the compiler. On the CPU they therefore use its
quickest settings, which take a seventh of the time. Your own `XLA_FLAGS` come after these and win.
"""

import os
import random
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    f"--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}"
)

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

install_import_hook("issm", "beartype.beartype")


MOST_MEMORY_MAPS = 20_000  # of the 65530 that Linux grants a process; every compiled program takes some


@pytest.fixture(autouse=True, scope="module")
def drop_compiled_programs():
    """Forget what earlier modules have compiled before the process runs out of memory maps, which it would not survive."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MEMORY_MAPS:
        jax.clear_caches()


@pytest.fixture
def getkey():
    """A function that returns a new PRNG key on every call."""
    seeds = random.Random(0)

    def _getkey():
        return jax.random.key(seeds.randint(0, 2**31 - 1))

    return _getkey


def pytest_report_header():
    """What decides how long the tests take."""
    return f"{os.cpu_count()} processors, jaxlib {jax.lib.__version__}, XLA_FLAGS={os.environ['XLA_FLAGS']}"


def pytest_terminal_summary(terminalreporter):
    """Print what tests have measured (`record_property`), from all workers."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")
