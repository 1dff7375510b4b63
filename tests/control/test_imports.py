"""The gateway is light: what only workers need is never loaded into it."""

import subprocess
import sys

GATEWAY = "gateway.cli", "gateway.cli.check", "gateway.cli.front", "gateway.server"
HEAVY = "numba", "torch", "gguf", "transfer.session"


def test_the_gateway_loads_nothing_of_the_data_plane() -> None:
    program = (
        f"import sys, {', '.join(GATEWAY)}; print(sorted({set(HEAVY)!r} & sys.modules.keys()))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert answer.stdout.strip() == "[]"
