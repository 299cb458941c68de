"""Options of the compiler: those that XLA knows and the user has not set."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp

from issm._compile import QUICKER, QUICKEST, _known, jit_quickly

ON_CPU = jax.default_backend() == "cpu"  # elsewhere there are no options


def test_flags_of_the_user_win(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert _known(QUICKEST) == (QUICKEST if ON_CPU else None)
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3 --xla_force_host_platform_device_count=1")
    assert _known(QUICKEST) == (QUICKER if ON_CPU else None)


def test_a_release_that_does_not_know_an_option_compiles_without():
    assert _known({**QUICKEST, "xla_of_a_release_to_come": True}) is None


def test_a_program_of_its_own_and_one_within_another():
    double = jit_quickly(lambda x: 2 * x)
    inside = jax.jit(lambda x: double(x) + 1)
    for call, expected in ((double, 6.0), (inside, 7.0), (jax.grad(double), 2.0)):
        assert call(jnp.float64(3.0)) == expected


def test_the_benchmark_of_first_calls_measures_two_calls(capsys):
    path = Path(__file__).parents[1] / "benchmarks" / "first_calls.py"
    runpy.run_path(str(path))["measure"]("marginal_log_prob", "float64")
    first, second = map(float, capsys.readouterr().out.split())
    assert min(first, second) > 0
