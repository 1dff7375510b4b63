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
        if request.content.is_eof():  # all there already, as it mostly is: nothing to wait for
            return _bounded([request.content.read_nowait()], max_bytes)
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
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            break
    return _bounded(parts, max_bytes)


def _bounded(parts: list[bytes], max_bytes: int) -> bytes:
    if sum(map(len, parts)) > max_bytes:
        raise BodyTooLarge(f"the body exceeds {max_bytes} bytes")
    return b"".join(parts)
