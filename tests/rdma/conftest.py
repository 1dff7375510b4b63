"""In the guest of `vm/` only; elsewhere nothing here is collected."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "transfer"))
collect_ignore = [] if os.environ.get("RDMA_VM") == "1" else ["test_verbs.py"]


class Wire:
    """The pair of network devices under rxe0 and rxe1."""

    def set(self, *what):
        subprocess.run([HERE / "vm" / "rdma_net", *what], check=True)

    def packets(self):
        counters = Path("/sys/class/infiniband/rxe0/ports/1/hw_counters")
        return int((counters / "sent_pkts").read_text())

    def sent_bytes(self):
        return int(Path("/sys/class/net/vA/statistics/tx_bytes").read_text())


@pytest.fixture
def wire():
    wire = Wire()
    wire.set("reset")
    yield wire
    wire.set("reset")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    session.config.stash[_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    # The system's libibverbs, preloaded for its Soft-RoCE driver, brings a second libnl along;
    # the process would crash in their destructors.
    if os.environ.get("RDMA_VM") == "1":
        sys.stdout.flush()
        os._exit(config.stash.get(_STATUS, 1))


_STATUS = pytest.StashKey[int]()
