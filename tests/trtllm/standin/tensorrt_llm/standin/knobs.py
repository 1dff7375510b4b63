"""How the stand-in is made to behave badly: JSON in the variable `TLLM_STANDIN_KNOBS`.

A *gate* is a file in the folder `gates`: while it is there, every rank waits at the point of that
name (see `Executor`), and says so by a file `NAME.reached`.
"""

import dataclasses
import json
import os
import time
from pathlib import Path

from tensorrt_llm.standin.flavour import since


@dataclasses.dataclass(frozen=True)
class Knobs:
    order: str = "shuffled"
    cancel: str = "recycle" if since("1.3") else "hook"  # is request_finished called then?
    respond: str = "after" if since("1.3") else "before"  # does the answer come after it?
    hole: bool = False  # a list of blocks has -1 in it
    first_is_end: bool = False  # token 0 is the end token
    idle_polls: bool = False
    gates: str = ""
    slow_rank: int = -1
    pass_seconds: float = 0.0
    separate_pools: bool = False  # main: layers of unlike shape, no single pool tensor

    @classmethod
    def read(cls):
        return cls(**json.loads(os.environ.get("TLLM_STANDIN_KNOBS", "{}")))

    def gate(self, name, rank):
        """Wait here while the gate is shut."""
        if not self.gates:
            return
        shut = Path(self.gates) / name
        if shut.exists():
            (Path(self.gates) / f"{name}.reached").touch()
            (Path(self.gates) / f"{name}.{rank}.reached").touch()
        while shut.exists():
            time.sleep(0.002)
        if (Path(self.gates) / f"{name}.raise").exists():
            raise RuntimeError(f"{name} was made to fail")
