"""Requests that their clients may ask for again: which ones, and what is made of asking."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

import msgspec

from gateway.api.progress import LAST_HEADER, Progress
from gateway.api.service import Service
from gateway.api.wishes import Caller, Wish
from gateway.errors import BadRequest, RequestUnknown
from gateway.resume import Claim, Records, Saved
from gateway.resume.records import KEY_HEADER, body_digest
from gateway.resume.saved import Route

MAX_KEY_CHARACTERS = 255


class Asked(msgspec.Struct, frozen=True):
    """What the headers say: a key of the client's own, and the last event that it got."""

    key: str
    last: Progress | None

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> Asked | None:
        """None for nearly everybody.

        Raises:
            BadRequest: names the header that cannot be used.
        """
        key, last = headers.get(KEY_HEADER), headers.get(LAST_HEADER)
        if key is None and last is None:
            return None
        if key is not None and not 0 < len(key) <= MAX_KEY_CHARACTERS:
            message = f"`{KEY_HEADER}` must have 1 to {MAX_KEY_CHARACTERS} characters"
            raise BadRequest(message, field=KEY_HEADER)
        return cls(key or "", Progress.parse(last) if last is not None else None)


class Resuming:
    """Opens and takes over claims for the endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service

    @property
    def _records(self) -> Records:
        records = self._service.records
        if records is None:
            raise BadRequest("requests cannot be asked for again here", field=KEY_HEADER)
        return records

    def wanted(self, asked: Asked | None, wish: Wish) -> bool:
        """Whether a new request is to be kept."""
        return asked is not None or (self._service.every_stream and wish.style.stream)

    def open(
        self, asked: Asked | None, caller: Caller, route: Route, body: bytes, wish: Wish
    ) -> Wish:
        """Enter a new request; the wish with its claim.

        Raises:
            BodyTooLarge: it is larger than what is kept.
            QueueUnavailable: Redis does not answer.
        """
        saved = Saved(
            id=caller.id,
            route=route,
            body=body,
            created=wish.created,
            seed=wish.seed,
            prompts=tuple(job.prompt for job in wish.jobs),
        )
        key = asked.key if asked is not None else ""
        left = caller.deadline - asyncio.get_running_loop().time()
        claim = self._records.open(caller.tenant.name, key, saved, seconds=left)
        return owned(wish, claim, Progress(claim.id))

    async def take(self, tenant: str, route: Route, last: Progress, body: bytes) -> Claim:
        """Take over the request that an event was of.

        Raises:
            RequestUnknown: there is none of this tenant.
            KeyReused: it was another one.
            QueueUnavailable: Redis does not answer.
        """
        sent = body_digest(route, body) if body else ""
        claim = await self._records.take(tenant, last.request, body=sent)
        if claim.saved.route != route:
            claim.close()
            raise RequestUnknown("that request was made at another path", field=LAST_HEADER)
        return claim


def owned(wish: Wish, claim: Claim, progress: Progress) -> Wish:
    """The wish whose jobs are claimed, for a client that has got as far as that.

    Raises:
        BadRequest: nobody can have got there.
    """
    choices = len(wish.jobs) * wish.n
    if progress.choices and len(progress.choices) != choices:
        message = f"`{LAST_HEADER}` is of another request: this one has {choices} choices"
        raise BadRequest(message, field=LAST_HEADER)
    parts = claim.jobs(progress.tokens, wish.n)
    jobs = tuple(
        msgspec.structs.replace(job, claim=part) for job, part in zip(wish.jobs, parts, strict=True)
    )
    return replace(wish, jobs=jobs, claim=claim, progress=progress)
