"""Workers with credentials meet over TLS, and nobody without."""

import contextlib
import shutil

import numpy as np
import pytest

from backends.emulation.synthetic import SyntheticBackend
from backends.host import HostConfig
from backends.host.peers import Peers
from backends.protocol import Meet
from tests.support.certificates import authority

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


@contextlib.asynccontextmanager
async def peers(role, tls):
    backend = SyntheticBackend()
    info = backend.info
    pool = np.zeros(info.pool_blocks * info.layout.block_bytes, np.uint8)
    config = HostConfig(id=role, role=role, listen="unix:/x", transports=("tcp",), tls=tls)
    made = Peers(config, info, pool, lambda met: None)
    try:
        yield made
    finally:
        await made.close()


async def meet(ours, theirs):
    async with peers("prefill", ours) as prefill, peers("decode", theirs) as decode:
        endpoints = tuple(it.endpoint for it in await decode.listen())
        return await prefill.meet(Meet("decode", 1, decode._info.layout, endpoints))


async def test_workers_meet_over_tls_and_nobody_without(tmp_path):
    credentials = authority(tmp_path)
    assert (await meet(credentials, credentials)).transport == "tcp"
    assert (await meet(None, credentials)).refusal
    assert (await meet(credentials, None)).refusal
