"""One request that may be asked for again, in the hands of the gateway that owns it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gateway.errors import DeadlineExceeded, Draining, GatewayError, Repeated, TakenOver
from gateway.resume.saved import Answer, JobAnswer, Saved

if TYPE_CHECKING:
    from gateway.resume.records import Records

ATTEMPT_BITS = 16
Release = Callable[[bool], None]
"""Have the workers let go of what they keep of a job that has ended; True: of its tokens too."""


class Claim:
    """A request of which this gateway is the owner, as far as it knows.

    `answer` is there when it has ended. A claim is closed once, by whoever opened it.
    """

    def __init__(
        self,
        records: Records,
        saved: Saved,
        *,
        epoch: int,
        left: float,
        resumed: bool,
        answer: Answer | None = None,
    ) -> None:
        self._records = records
        self._opened: asyncio.Future[GatewayError | None] = (
            asyncio.get_running_loop().create_future()
        )
        self._ended: dict[int, tuple[JobAnswer, Release]] = {}
        self.saved = saved
        self.epoch = epoch
        self._deadline = asyncio.get_running_loop().time() + left
        self.resumed = resumed
        self.answer = answer
        self.open = True
        if resumed:
            self._opened.set_result(None)

    @property
    def id(self) -> str:
        """The request's."""
        return self.saved.id

    @property
    def left(self) -> float:
        """Seconds until its deadline."""
        return self._deadline - asyncio.get_running_loop().time()

    @property
    def keep_seconds(self) -> float:
        """How long workers keep what nobody owns."""
        return self._records.retention.keep_seconds

    def jobs(self, told: Sequence[int], n: int) -> list[JobClaim]:
        """One for each of its jobs; `told` says of each sequence what its client has already."""
        return [
            JobClaim(self, number, tuple(told[number * n : (number + 1) * n]))
            for number in range(len(self.saved.prompts))
        ]

    def opened(self, failure: GatewayError | None) -> None:
        """The record is there, or why it is not."""
        if not self._opened.done():
            self._opened.set_result(failure)

    async def secured(self) -> None:
        """Return once the record is there.

        Raises:
            Repeated: there was one already.
            GatewayError: there can be none.
        """
        await asyncio.wait([self._opened])
        failure = self._opened.result()
        if failure is not None:
            raise failure

    async def outbid(self, seen: int) -> None:
        """Have an epoch above `seen`, which a worker knows.

        Raises:
            TakenOver: it is another gateway's by now.
            QueueUnavailable: Redis does not answer.
        """
        self.epoch = await self._records.outbid(self, seen)

    def ended(self, number: int, answer: JobAnswer, release: Release) -> None:
        """A job has ended; after the last one the answer goes into the record."""
        self._ended[number] = answer, release
        if len(self._ended) == len(self.saved.prompts) and self.open:
            self.open = False
            jobs = tuple(self._ended[place][0] for place in sorted(self._ended))
            releases = [release for _, release in self._ended.values()]
            self._records.settle(self, Answer(jobs), releases)

    def failed(self, error: GatewayError, *, told: bool) -> None:
        """The answer could not be made. Nothing is kept where asking again must begin anew.

        `told`: the client has some of it.
        """
        elsewhere = isinstance(error, TakenOver | Draining | Repeated)
        if (
            self.open
            and not elsewhere
            and (isinstance(error, DeadlineExceeded) or not (told or self.resumed))
        ):
            self.open = False
            self._records.drop(self)

    def close(self) -> None:
        """This gateway does no more for it; what the workers keep is for the next owner."""
        if self.open:
            self.open = False
            for _, release in self._ended.values():
                release(False)
        self._records.close(self)


class JobClaim:
    """The part of a claim that is one job's. `told`: tokens of each sequence that are known."""

    def __init__(self, claim: Claim, number: int, told: tuple[int, ...]) -> None:
        self._claim = claim
        self._number = number
        self.told = told
        self.name = f"{claim.id}/{number}"
        self.keep_seconds = claim.keep_seconds

    @property
    def epoch(self) -> int:
        """The owner's; each attempt adds its own number below it."""
        return self._claim.epoch << ATTEMPT_BITS

    @property
    def resumed(self) -> bool:
        """Whether another gateway, or an earlier connection, may have left something."""
        return self._claim.resumed

    @property
    def answer(self) -> JobAnswer | None:
        """How it ended."""
        answer = self._claim.answer
        return answer.jobs[self._number] if answer is not None else None

    def knows(self, index: int) -> int:
        """How many tokens of that sequence the client has already."""
        return self.told[index] if index < len(self.told) else 0

    async def secured(self) -> None:
        """See `Claim.secured`."""
        await self._claim.secured()

    async def outbid(self, seen: int) -> None:
        """See `Claim.outbid`."""
        await self._claim.outbid(seen >> ATTEMPT_BITS)

    def ended(self, answer: JobAnswer, release: Release) -> None:
        """See `Claim.ended`."""
        self._claim.ended(self._number, answer, release)
