"""Compiled functions are kept on disk where that is possible, and needed nowhere."""

import os
import subprocess
import sys
from pathlib import Path

NOWHERE = """
from numba.core import caching
caching.CacheImpl._locator_classes = []  # as on a machine without a folder that can be written
from transfer.warming import warm_up
warm_up()
"""


def test_a_worker_that_may_write_nowhere_compiles_for_itself() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", NOWHERE], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr


ONCE = """
from transfer.kernels import add_tiles
from transfer.warming import warm_up
warm_up()
print(sum(add_tiles.stats.cache_misses.values()))
"""


def test_of_workers_that_begin_together_one_compiles_for_all(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    workers = [
        subprocess.Popen([sys.executable, "-c", ONCE], stdout=subprocess.PIPE, env=environment)
        for _ in range(2)
    ]
    compiled = sorted(int(worker.communicate(timeout=120)[0]) for worker in workers)
    assert compiled == [0, 1]
