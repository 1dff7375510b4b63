"""Read a request's body, bounded in bytes and in time."""

from __future__ import annotations

import asyncio

from aiohttp import web

from gateway.errors import BadRequest, BodyTooLarge


async def read_body(request: web.Request, *, max_bytes: int, seconds: float) -> bytes:
    """The whole body, after decompression where the client compressed it.

    Raises:
        BadRequest: it is not declared as JSON, or breaks off.
        BodyTooLarge: it has more than `max_bytes`; no more than that is kept.
        web.HTTPRequestTimeout: it does not arrive within `seconds`.
    """
    kind = request.content_type
    if kind != "application/json" and not kind.endswith("+json"):
        raise BadRequest(
            f"the body is declared as {kind[:100]}; send it with `Content-Type: application/json`",
            code="unsupported_content_type",
        )
    if (request.content_length or 0) > max_bytes:
        raise BodyTooLarge(f"the body exceeds {max_bytes} bytes")
    try:
        async with asyncio.timeout(seconds):
            return await _read(request, max_bytes)
    except TimeoutError as error:
        raise web.HTTPRequestTimeout(
            text=f"the body did not arrive within {seconds:g} s"
        ) from error
    except web.RequestPayloadError as error:
        message = "the body breaks off or is wrongly encoded"
        raise BadRequest(message, code="broken_body") from error


async def _read(request: web.Request, max_bytes: int) -> bytes:
    parts = []
    size = 0
    async for part in request.content.iter_any():
        size += len(part)
        if size > max_bytes:
            raise BodyTooLarge(f"the body exceeds {max_bytes} bytes")
        parts.append(part)
    return b"".join(parts)
