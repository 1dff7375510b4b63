"""The two endpoints that generate text, and the two that only count it."""

from __future__ import annotations

import msgspec
from aiohttp import web

from gateway.api.body import read_body
from gateway.api.checks import check_ids
from gateway.api.errors import JSON
from gateway.api.limits import timeout_of
from gateway.api.messages import plain_messages
from gateway.api.progress import Progress
from gateway.api.resuming import Asked, Resuming, owned
from gateway.api.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    decode,
)
from gateway.api.service import Service
from gateway.api.stream import Stream
from gateway.api.tally import Tally
from gateway.api.whole import answer_whole
from gateway.api.wishes import Caller, Wish, chat_wish, completion_wish
from gateway.errors import BadRequest, GatewayError, Repeated
from gateway.quota import Quota
from gateway.resume import Claim
from gateway.resume.saved import Route
from gateway.tenants import Tenant
from gateway.text import TemplateFailed, TemplateMissing

JOB = web.RequestKey("job", str)
TALLY = web.RequestKey("tally", Tally)
QUOTA = web.RequestKey("quota", Quota)


class Endpoints:
    """Handlers over one service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._resuming = Resuming(service)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        return await self._generate(request, "chat")

    async def completion(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        return await self._generate(request, "completion")

    async def tokenize(self, request: web.Request) -> web.Response:
        """POST /tokenize."""
        self._tenant(request)
        wanted = decode(TokenizeRequest, await self._body(request))
        self._service.check_model(wanted.model)
        vocabulary = self._service.text
        if (wanted.prompt is None) == (wanted.messages is None):
            raise BadRequest("give either `prompt` or `messages`", field="prompt")
        text, special = wanted.prompt or "", wanted.add_special_tokens is not False
        if wanted.messages is not None:
            special = bool(wanted.add_special_tokens)
            try:
                text = vocabulary.chat_prompt(
                    plain_messages(wanted.messages),
                    add_generation_prompt=wanted.add_generation_prompt is not False,
                )
            except (TemplateFailed, TemplateMissing) as error:
                raise BadRequest(str(error), field="messages", code="chat_template") from error
        tokens = await vocabulary.tokens_of(text, add_special_tokens=special)
        answer = {
            "count": len(tokens),
            "max_model_len": vocabulary.context_tokens,
            "tokens": tokens,
            "token_strs": None,
        }
        if wanted.return_token_strs:
            answer["token_strs"] = [
                vocabulary.token_bytes(token).decode(errors="replace") for token in tokens
            ]
        return _json(answer)

    async def detokenize(self, request: web.Request) -> web.Response:
        """POST /detokenize."""
        self._tenant(request)
        wanted = decode(DetokenizeRequest, await self._body(request))
        self._service.check_model(wanted.model)
        check_ids("tokens", wanted.tokens, self._service.text.size)
        text = self._service.text.decode(wanted.tokens, skip_special_tokens=False)
        return _json({"prompt": text})

    def _tenant(self, request: web.Request) -> Tenant:
        return self._service.tenant(request.headers.get("Authorization", ""))

    def _caller(self, request: web.Request, tally: Tally) -> Caller:
        tenant = self._tenant(request)
        seconds = timeout_of(request.headers, self._service.request_timeout_seconds)

        def told(quota: Quota) -> None:
            request[QUOTA] = quota

        return Caller(tenant, request[JOB], tally.arrived, tally.arrived + seconds, told)

    async def _body(self, request: web.Request) -> bytes:
        service = self._service
        return await read_body(
            request, max_bytes=service.max_body_bytes, seconds=service.body_timeout_seconds
        )

    async def _generate(self, request: web.Request, route: Route) -> web.StreamResponse:
        tally = request[TALLY]
        caller = self._caller(request, tally)
        asked = Asked.of(request.headers)
        if asked is not None and asked.last is not None:
            body = await self._body(request) if request.body_exists else b""
            claim = await self._resuming.take(caller.tenant.name, route, asked.last, body)
            return await self._again(request, caller, claim, asked.last)
        body = await self._body(request)
        wish = await self._wish(route, body, caller)
        if not self._resuming.wanted(asked, wish):
            return await self._answer(request, wish)
        wish = self._resuming.open(asked, caller, route, body, wish)
        try:
            return await self._answer_owned(request, wish)
        except Repeated as repeated:
            claim = repeated.claim
        return await self._again(request, caller, claim, Progress(claim.id))

    async def _again(
        self, request: web.Request, caller: Caller, claim: Claim, progress: Progress
    ) -> web.StreamResponse:
        """Tell what of a request was not told yet."""
        try:
            wish = await self._wish(claim.saved.route, claim.saved.body, caller.again(claim))
            return await self._answer_owned(request, owned(wish, claim, progress))
        finally:
            claim.close()

    async def _wish(self, route: Route, body: bytes, caller: Caller) -> Wish:
        if route == "chat":
            return await chat_wish(self._service, decode(ChatRequest, body), caller)
        return await completion_wish(self._service, decode(CompletionRequest, body), caller)

    async def _answer_owned(self, request: web.Request, wish: Wish) -> web.StreamResponse:
        claim = wish.claim
        assert claim is not None
        try:
            return await self._answer(request, wish)
        except GatewayError as error:
            claim.failed(error, told=False)
            raise
        finally:
            claim.close()

    async def _answer(self, request: web.Request, wish: Wish) -> web.StreamResponse:
        tally = request[TALLY]
        tally.prompt_tokens = wish.prompt_tokens
        if wish.style.stream:
            return await Stream(self._service, wish, request, tally).run()
        body = await answer_whole(self._service, wish, tally)
        return web.Response(body=body, content_type=JSON)


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type=JSON)
