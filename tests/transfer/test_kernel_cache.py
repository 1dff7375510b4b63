"""Compiled functions are kept on disk where that is possible, and needed nowhere."""

import subprocess
import sys

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
