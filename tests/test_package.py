import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

IMPORT_PROBE = """
import json, sys, time
start = time.perf_counter()
import jax, equinox
peers = time.perf_counter()
before = {k: repr(v) for k, v in jax.config.values.items()}
import issm
end = time.perf_counter()
after = {k: repr(v) for k, v in jax.config.values.items()}
print(json.dumps(dict(
    heavy=sorted({"tensorflow_probability", "matplotlib", "pandas", "yaml"} & set(sys.modules)),
    changed={k: [before.get(k), v] for k, v in after.items() if before.get(k) != v},
    jax_and_equinox=peers - start,
    issm=end - peers,
)))
"""


@pytest.fixture(scope="module")
def imported():
    out = subprocess.run([sys.executable, "-c", IMPORT_PROBE], check=True, capture_output=True, text=True)
    return json.loads(out.stdout)


def test_import_is_light(imported, record_property):
    assert imported["heavy"] == []
    times = f"jax and equinox {imported['jax_and_equinox']:.2f} s, issm {imported['issm']:.2f} s more"
    record_property("import time", times)


def test_import_changes_no_jax_setting(imported):
    assert imported["changed"] == {}


def test_no_machine_paths():
    """No tracked text file names a directory of somebody's machine."""
    machine_path = re.compile(r"(?<![\w./-])/(?:home|root|Users|work|opt|tmp|mnt|scratch)/\w|[A-Z]:\\Users")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, tracked.stdout.split("\0")):
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        found += [
            f"{name}:{number}: {line.strip()}"
            for number, line in enumerate(text.splitlines(), 1)
            if machine_path.search(line)
        ]
    assert not found, "\n".join(found)


INDEPENDENT_SOLVES = """
import issm, jax, jax.numpy as jnp
left = 5 * jnp.eye(8) + jnp.tril(jnp.ones((4, 4000, 8, 8)))
solve = lambda a: jax.scipy.linalg.solve_triangular(a, a, lower=True).sum()
total = jax.jit(lambda all: sum(solve(all[i]) for i in range(4)))
for _ in range(20):
    total(left).block_until_ready()
"""


def test_independent_batches_of_solves_come_to_an_end():
    """Without more threads than processors they wait for each other for ever, on machines with up to four of them."""
    subprocess.run([sys.executable, "-c", INDEPENDENT_SOLVES], check=True, timeout=120)
