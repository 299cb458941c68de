"""More threads than processors for XLA on small machines, so that it cannot wait for itself.

On the CPU jaxlib 0.10 splits a batch of factorisations or triangular solves over the threads of XLA's pool, and the thread that has
called it waits there for the others. Programs with as many independent batches as the pool has threads then never end: two, on
a machine with two processors. XLA reads `NPROC` when its first array is made, and takes it for the number of threads.
"""

import os

ENOUGH_THREADS = 16  # a program with as many independent batches would still wait; none has been met

if (os.cpu_count() or 1) < ENOUGH_THREADS:
    os.environ.setdefault("NPROC", str(ENOUGH_THREADS))
