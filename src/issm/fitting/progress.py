"""A bar on the terminal, drawn from outside the compiled loop."""

import sys
import time

WIDTH = 30


class ProgressBar:
    """Draws to standard error: `fit_em  [=====     ]  50/100  log prob -1234.5  2.1 s`."""

    def __init__(self, label: str, total: int):
        self.label = label
        self.total = total
        self.start = time.perf_counter()

    def draw(self, done: int, objective: float) -> None:
        """Show `done` of `total` steps and the objective that was reached."""
        filled = WIDTH * done // max(self.total, 1)
        bar = "=" * filled + " " * (WIDTH - filled)
        elapsed = time.perf_counter() - self.start
        sys.stderr.write(f"\r{self.label}  [{bar}]  {done}/{self.total}  log prob {objective:.6g}  {elapsed:.1f} s")
        sys.stderr.flush()

    def close(self) -> None:
        """End the line."""
        sys.stderr.write("\n")
        sys.stderr.flush()
