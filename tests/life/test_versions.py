"""Neighbouring versions of the protocol in one deployment, as during a rolling upgrade."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from backends.protocol import LOWEST, VERSION
from gateway.admission import WorkerRecord
from tests.life import version_2
from tests.life.cluster import DECODE, PREFILL, Cluster, Heard, cluster

SECRET = "sesame"


async def text(made: Cluster, **job: Any) -> dict[int, list[int]]:
    heard = Heard()
    await made.carry(made.job(list(range(50)), **job), heard)
    return heard.tokens


@pytest.mark.parametrize(
    ("gateway", "prefill", "decode"),
    [(LOWEST, VERSION, VERSION), (VERSION, LOWEST, VERSION), (VERSION, VERSION, LOWEST)],
)
async def test_one_part_that_is_a_version_behind_changes_no_answer(
    redis_url: str, gateway: int, prefill: int, decode: int
) -> None:
    async with cluster(redis_url, fleet={"version": gateway}) as made:
        await made.start("p", "prefill", host={"protocol": prefill}, **PREFILL)
        await made.start("d", "decode", host={"protocol": decode}, **DECODE)
        await made.paired()
        agreed = {worker.id: worker.welcome.version for worker in made.fleet.workers}
        assert agreed == {"p": min(gateway, prefill), "d": min(gateway, decode)}
        mixed = await text(made, n=2)
        await made.balanced()
    async with cluster(redis_url) as made:
        await made.start("b", "both", **DECODE)
        await made.until(lambda: made.fleet.workers)
        assert await text(made, n=2) == mixed


async def test_a_gateway_of_the_version_before_is_served(redis_url: str) -> None:
    async with cluster(redis_url, fleet={"secret": SECRET}) as made:
        await made.start("p", "prefill", host={"secret": SECRET}, **PREFILL)
        await made.start("d", "decode", host={"secret": SECRET}, **DECODE)
        p, d = [
            version_2.End(*await asyncio.open_unix_connection(f"{made.folder}/{name}.sock"))
            for name in "pd"
        ]
        assert (await version_2.greet(p, SECRET))["role"] == "prefill"
        theirs = await version_2.greet(d, SECRET)
        assert theirs["version"] == 2
        meeting = {"worker": "d", "incarnation": theirs["incarnation"]}
        p.say(
            type="Meet",
            **meeting,
            layout=theirs["info"]["layout"],
            endpoints=theirs["endpoints"],
        )
        met = await p.hear("Met")
        assert not met.get("refusal")
        d.say(type="Reserve", spec=version_2.SPEC, prefill="p", transport=met["transport"])
        landing = (await d.hear("Granted"))["landing"]
        p.say(type="Prefill", spec=version_2.SPEC, landing=landing)
        tokens = [(await p.hear("FirstToken"))["first"][0][1]]
        await d.hear("Landed")
        while len(tokens) < version_2.SPEC["max_tokens"]:
            tokens += [row[3] for row in (await d.hear("Tokens"))["rows"]]
        assert (await p.hear("HandedOver"))["handle"] == version_2.SPEC["handle"]
        p.say(type="Cancel", handle=1)
        d.say(type="Flow", handle=1, index=0, paused=True)
        d.say(type="Inspect", ticket=5)
        book = await d.hear("Ledger")
        assert (book["ticket"], book["balanced"]) == (5, True)
        await made.paired()
        heard = Heard()
        await made.carry(made.job(version_2.SPEC["prompt"], max_tokens=5), heard)
        assert heard.tokens[0] == tokens
        for end in (p, d):
            end.close()


async def test_a_worker_of_the_version_before_serves_us(redis_url: str, tmp_path: Path) -> None:
    worker = version_2.Worker("old", SECRET)
    path = str(tmp_path / "s")
    record = WorkerRecord(
        id="old",
        incarnation=1,
        role="both",
        model="m",
        address=f"unix:{path}",
        prefill_tokens=1 << 20,
        decode_tokens=1 << 20,
    )
    async with (
        version_2.serving(worker, path),
        cluster(redis_url, fleet={"secret": SECRET}) as made,
    ):
        made.fleet.update({"old": record})
        await made.until(lambda: made.fleet.workers)
        assert (await text(made, n=2, max_tokens=4)) == {i: [100, 101, 102, 103] for i in range(2)}
        await made.balanced()
        assert {one["type"] for one in worker.heard} <= {
            "Hello",
            "Proof",
            "Prefill",
            "Cancel",
            "Inspect",
        }
