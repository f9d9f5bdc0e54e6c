"""The routes, and what stands behind them: the composition root of the gateway.

body -> openai (read) -> prompts (ids) -> grammar -> limits -> Answer -> service -> engine
                                                        pieces -> replies -> JSON, or events on a tape (streams)
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from traceback import format_tb
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nearfar.errors import NearfarError
from nearfar_cloud.gateway import openai, replies, streams
from nearfar_cloud.gateway.answers import Answer, Branches, Choice
from nearfar_cloud.gateway.endpoint import Budget, Endpoint
from nearfar_cloud.gateway.events import EventStream, Gone, as_json, unless_gone
from nearfar_cloud.gateway.fields import Fields, parse
from nearfar_cloud.gateway.limits import Key, Keys, Limits
from nearfar_cloud.gateway.metrics import Metrics
from nearfar_cloud.gateway.openai import Prompt, Query
from nearfar_cloud.gateway.refusal import Refusal, invalid, of_error
from nearfar_cloud.gateway.served import Served
from nearfar_cloud.gateway.service import Service, speed
from nearfar_cloud.gateway.texts import Texts
from nearfar_cloud.types import Request

if TYPE_CHECKING:
    from nearfar_cloud.gateway.collab import Collab

MAX_BODY = 8 << 20
READ_S = 30.0  # for a body to arrive

log = logging.getLogger(__name__)

Read = Callable[[Fields, str], Query]
MakeReply = Callable[[Answer, Query, str], replies.Reply]


class Gateway:
    """Everything that one served model needs."""

    def __init__(
        self,
        served: Served,
        *,
        keys: Keys | None = None,
        max_queued: int = 1024,
        kept_s: float = streams.KEPT_S,
        endpoint: Endpoint | None = None,
        budget: Budget | None = None,
    ) -> None:
        """`kept_s`: how long a stream can be read on after its reader has left.

        `endpoint`, `budget`: where devices may ask, and what they get; without an endpoint nobody may.
        """
        self.served, self.keys = served, keys or Keys()
        self.limits = Limits(max_queued, tokens_per_s=lambda: speed(served.engine))
        self.tapes = streams.Tapes(kept_s)
        self.metrics = Metrics(served.engine, self.limits, self.tapes)
        self.service = Service(served.engine, self.metrics.step)
        t = served.tokenizer
        self._texts = None if t is None else Texts(served, t, lambda what: self.metrics.grammar.labels(what).inc())
        self.collab = None if endpoint is None else self._devices(endpoint, budget or Budget())
        self.draining = False
        self.is_hurried = False  # whoever stops the server has asked twice
        self._running: dict[tuple[str, str], Answer] = {}  # tenant, id

    @property
    def texts(self) -> Texts:
        """Raises Refusal (501) where the served file reads no text."""
        if self._texts is None:
            raise Refusal(501, "no_text", "this server has the upper layers of a model alone: devices ask it, not HTTP")
        return self._texts

    def _devices(self, endpoint: Endpoint, budget: Budget) -> Collab:
        from nearfar_cloud.gateway.collab import open_collab  # gRPC, which only devices speak

        return open_collab(self.served, self.service, self.keys, self.limits, self.metrics, endpoint, budget)

    # ------------------------------------------------------------ the life of a request

    async def answer(self, request: HTTPRequest, read: Read, make: MakeReply, prefix: str) -> Response:
        """From a body to its reply."""
        key = self.keys.find(request.headers.get("authorization"))
        self.check_open()
        body = await _body(request)
        query = read(parse(body), self.served.name)
        if query.stream:
            return await self._stream(request, query, key, make, prefix, body)
        answer = await self._answer(query, key, _new_id(prefix))
        reply = make(answer, query, self.served.name)
        self._run(answer, key)
        try:
            return _json(await unless_gone(request, _whole(answer, reply)))
        finally:
            answer.stop()

    async def embed(self, request: HTTPRequest) -> Response:
        key = self.keys.find(request.headers.get("authorization"))
        self.check_open()
        query = openai.read_embeddings(parse(await _body(request)), self.served.name)
        answer = await self._answer(query, key, _new_id("embd-"), pooled=True)
        self._run(answer, key)
        try:
            await unless_gone(request, _drained(answer))
            return _json(replies.embeddings(answer, query, self.served.name))
        finally:
            answer.stop()

    async def _stream(
        self, request: HTTPRequest, query: Query, key: Key, make: MakeReply, prefix: str, body: bytes
    ) -> Response:
        """A new stream, or one that a cursor leads back to: kept, or computed again."""
        cursor, digest = _cursor(request), streams.digest(body, prefix, self.served.engine.facts.fingerprint)
        if cursor is not None:
            if cursor.digest != digest or not cursor.answer.startswith(prefix):
                raise invalid(streams.HEADER, f"{streams.HEADER}: expected the body and the model that it was sent for")
            tape = self.tapes.find(key.tenant, cursor.answer)
            if tape is not None and tape.has(cursor.n):
                return await self._read_on(tape, key, cursor.n)
            if query.n * len(query.prompts or (query.messages,)) > 1:
                raise Refusal(410, "cursor_expired", "this stream is not kept any longer, and it has several choices")
            query = replace(query, sampling=replace(query.sampling, seed=cursor.seed))
        id_ = _new_id(prefix) if cursor is None else cursor.answer
        answer = await self._answer(query, key, id_)
        reply = make(answer, query, self.served.name)
        self._run(answer, key)
        start = streams.Cursor(id_, 0, query.sampling.seed, digest)
        tape = streams.Tape(key.tenant, start, answer, reply, done_mark=not isinstance(reply, replies.ResponseReply))
        self.tapes.add(tape)
        if cursor is not None:
            self.metrics.resumed.labels("again").inc()
        return self._events(tape, 0 if cursor is None else cursor.n)

    async def resume(self, request: HTTPRequest, answer_id: str) -> Response:
        """GET on the id of an answer that was streamed: its events behind the cursor, or all of them."""
        key = self.keys.find(request.headers.get("authorization"))
        self.check_open()
        cursor = _cursor(request)
        tape = self.tapes.find(key.tenant, answer_id)
        if tape is None:
            raise Refusal(404, "not_found", "no stream of that id is kept")
        if cursor is not None and cursor.answer != answer_id:
            raise invalid(streams.HEADER, f"{streams.HEADER}: expected the id of an event of this answer")
        return await self._read_on(tape, key, 0 if cursor is None else cursor.n)

    async def _read_on(self, tape: streams.Tape, key: Key, after: int) -> Response:
        """What follows the first `after` events of a kept stream."""
        if not await self.tapes.take(tape):
            raise Refusal(404, "not_found", "no stream of that id is kept")
        try:
            if not tape.has(after):
                raise Refusal(410, "cursor_expired", "these events are not kept any longer: ask with the body again")
            if tape.answer is not None:
                await tape.answer.follow()
                if self.tapes.find(key.tenant, tape.start.answer) is not tape:  # it was cancelled meanwhile
                    raise Refusal(404, "not_found", "no stream of that id is kept")
                self._run(tape.answer, key)
        except BaseException:
            self.tapes.park(tape)
            raise
        self.metrics.resumed.labels("kept").inc()
        return self._events(tape, after)

    def _events(self, tape: streams.Tape, after: int) -> Response:
        def refused(refusal: Refusal) -> None:
            self.metrics.refusals.labels(refusal.code).inc()

        return EventStream(tape.read(after, refused), lambda: self.tapes.park(tape), tape.reader.cut)

    def cancel(self, request: HTTPRequest, answer_id: str) -> Response:
        """DELETE on an answer that is under way or kept, by the tenant who asked for it."""
        key = self.keys.find(request.headers.get("authorization"))
        answer, tape = self._running.get((key.tenant, answer_id)), self.tapes.find(key.tenant, answer_id)
        if answer is None and tape is None:
            raise Refusal(404, "not_found", "no answer of that id is under way or kept")
        if answer is not None:
            answer.end(Refusal(409, "cancelled", "the answer was cancelled"))
        if tape is not None:
            self.tapes.drop(tape)
        return _json({"id": answer_id, "deleted": True})

    def check_open(self) -> None:
        """Raises Refusal (503, 501) where nothing can be taken, before a body costs anything."""
        if self.draining:
            raise Refusal(503, "shutting_down", "this server is about to stop", retry_after_s=5)
        if self.service.failure is not None:
            raise Refusal(503, "engine_failed", "the engine has stopped: this server has to be started again")
        self.limits.check()
        _ = self.texts

    async def _answer(self, query: Query, key: Key, id_: str, *, pooled: bool = False) -> Answer:
        """Ids and grammar: an answer that is ready to run."""
        prompts = await self._ids(query)
        new_hook = await self._constraint(query)
        priority = min(query.objective.priority, key.priority)
        objective = replace(query.objective, tenant=key.tenant, priority=priority)
        branches = []
        for ids, is_text in prompts:
            request = Request(
                ids=ids,
                max_tokens=self._max_tokens(query, len(ids)),
                sampling=query.sampling,
                stop_ids=self.texts.tokenizer.eog_ids,
                n_logprobs=0 if query.n_logprobs is None else max(1, query.n_logprobs),
                pooled=pooled,
                objective=objective,
            )
            branches.append(
                Branches(request, new_hook, [self._choice(query, continues=is_text) for _ in range(query.n)])
            )
        return Answer(
            self.service,
            branches,
            id_=id_,
            n_prompt=sum(len(ids) for ids, _ in prompts),
            deadline_s=objective.deadline_s,
            on_tokens=lambda first, s: (self.metrics.ttft if first else self.metrics.tbt).observe(s),
        )

    def _run(self, answer: Answer, key: Key) -> None:
        """Limits and submission, of a new answer or of what is left of one."""
        self.check_open()  # tokenizing and compiling took a while
        left, n_before, place = answer.left, answer.n_generated, (key.tenant, answer.id)
        unfinished = [choice for choice in answer.choices if choice.finish is None]
        ticket = self.limits.admit(key, left.n_seqs, left.n_known + left.n_new)

        def stopped() -> None:
            if self._running.get(place) is answer:
                del self._running[place]
            self.limits.close(ticket, left.n_known + answer.n_generated - n_before)
            if answer.is_done:
                self.metrics.e2e.observe(time.perf_counter() - answer.started)
            for choice in unfinished:
                if choice.facts is not None:
                    self.metrics.queue.observe(choice.facts.queue_s)

        try:
            answer.run(stopped)
        except BaseException:
            self.limits.close(ticket, 0)
            raise
        self._running[place] = answer

    async def _ids(self, query: Query) -> list[tuple[tuple[int, ...], bool]]:
        """(ids, whether the answer goes on with a text) of each prompt.  Raises Refusal (400)."""
        if query.messages:
            self._check_length(query.param, sum(len(m.text.encode("utf-8", "replace")) for m in query.messages))
            constrained = query.schema is not None or query.tools is not None
            ids = await asyncio.to_thread(
                self.texts.prompts.ids, query.messages, query.tools, query.param, constrained=constrained
            )
            return [(self._checked(query.param, tuple(ids)), False)]
        return [await self._prompt_ids(query.param, prompt) for prompt in query.prompts]

    async def _prompt_ids(self, param: str, prompt: Prompt) -> tuple[tuple[int, ...], bool]:
        if isinstance(prompt, tuple):
            n = self.texts.tokenizer.n_vocab
            if wrong := next((i for i in prompt if not 0 <= i < n), None):
                raise Refusal(400, "invalid_value", f"{param}: token {wrong}, expected 0..{n - 1}", param=param)
            return self._checked(param, prompt), False
        self._check_length(param, len(prompt.encode("utf-8", "replace")))
        ids = await asyncio.to_thread(self.texts.tokenizer.encode, prompt)
        return self._checked(param, tuple(ids)), True

    def _check_length(self, param: str, n_bytes: int) -> None:
        """No token stands for more bytes than the longest one: what cannot fit need not be tokenized."""
        if n_bytes > self.texts.most_bytes:
            raise self._too_long(param, f"{n_bytes} bytes are more tokens than that")

    def _checked(self, param: str, ids: tuple[int, ...]) -> tuple[int, ...]:
        if not ids:
            raise Refusal(400, "invalid_value", f"{param}: no token is left of it", param=param)
        if len(ids) >= self.served.n_ctx:
            raise self._too_long(param, f"{len(ids)} tokens leave no room for an answer")
        return ids

    def _too_long(self, param: str, why: str) -> Refusal:
        message = f"{param}: the context holds {self.served.n_ctx} tokens, the answer included; {why}"
        return Refusal(400, "context_length_exceeded", message, param=param)

    def _max_tokens(self, query: Query, n_prompt: int) -> int:
        room = self.served.n_ctx - n_prompt
        if query.max_tokens is not None and query.max_tokens > room:
            raise self._too_long(query.param, f"a prompt of {n_prompt} and an answer of {query.max_tokens} do not fit")
        return query.max_tokens or room

    async def _constraint(self, query: Query) -> Callable[[], Any]:
        """What makes the hook of each answer."""
        if query.tools is not None:
            schema = self.texts.prompts.calls.schema(query.tools.tools)
            found = await self.texts.grammars.compile(schema, "tools", or_text=not query.tools.must)
        elif query.schema is not None:
            found = await self.texts.grammars.compile(query.schema, query.schema_param)
        else:
            return lambda: None
        return lambda: self.texts.grammars.hook(found)

    def _choice(self, query: Query, *, continues: bool) -> Choice:
        return Choice(
            self.texts.tokenizer,
            query.stops,
            continues=continues,
            strip_space=bool(query.messages) and self.texts.prompts.is_nano,
            n_logprobs=query.n_logprobs,
            call_form=self.texts.prompts.calls if query.tools is not None else None,
        )

    # ------------------------------------------------------------ coming and going

    def close(self) -> None:
        """The engine's thread and what runs beside it end."""
        self.service.stop()
        if self._texts is not None:
            self._texts.grammars.close()

    async def drain(self, grace_s: float) -> None:
        """Take nothing new, wait for what is under way, at most `grace_s`, then end it."""
        self.draining = True
        until = time.monotonic() + grace_s
        if self.collab is not None:
            await self.collab.drain(lambda: self.is_hurried or time.monotonic() >= until)
        while self._running and time.monotonic() < until and not self.is_hurried:
            await asyncio.sleep(0.02)
        for answer in list(self._running.values()):
            answer.end(Refusal(503, "shutting_down", "the server had to stop before the answer was complete"))
        until = time.monotonic() + 1
        while self._running and time.monotonic() < until:
            await asyncio.sleep(0.02)

    @property
    def is_ready(self) -> bool:
        return not self.draining and self.service.failure is None


async def _whole(answer: Answer, reply: replies.Reply) -> dict[str, Any]:
    while not answer.is_done:
        for i, piece in await answer.more():
            reply.piece(i, piece)
    return reply.whole()


async def _drained(answer: Answer) -> None:
    while not answer.is_done:
        await answer.more()


async def _body(request: HTTPRequest) -> bytes:
    """Raises Refusal: 415 for another content type (a web page could send it unasked), 413, 408; Gone."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "unsupported_media_type", "expected the header Content-Type: application/json")
    raw = bytearray()
    try:
        async with asyncio.timeout(READ_S):
            async for chunk in request.stream():
                raw += chunk
                if len(raw) > MAX_BODY:
                    raise Refusal(413, "body_too_large", f"the body has more than {MAX_BODY} bytes")
    except ClientDisconnect:
        raise Gone from None
    except TimeoutError:
        raise Refusal(408, "body_too_slow", f"the body did not arrive within {READ_S:g} s") from None
    return bytes(raw)


def _new_id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(12)}"


def _cursor(request: HTTPRequest) -> streams.Cursor | None:
    text = request.headers.get(streams.HEADER)
    return None if text is None else streams.Cursor.parse(text)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(as_json(value), status, headers, media_type="application/json")


# ---------------------------------------------------------------- routes


def create_app(gateway: Gateway, *, local: bool = True) -> FastAPI:
    """The routes of a gateway; its engine runs as long as the app does.  `local`: for clients of this machine alone."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        gateway.service.start()
        if gateway.collab is not None:
            await gateway.collab.start()
        yield
        if gateway.collab is not None:
            await gateway.collab.stop()
        gateway.close()

    app = FastAPI(title="nearfar cloud", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    served = gateway.served

    def add(method: str, path: str, handler: Callable[..., Coroutine[Any, Any, Response]]) -> None:
        app.add_api_route(path, handler, methods=[method], response_model=None)

    async def chat(request: HTTPRequest) -> Response:
        return await gateway.answer(request, openai.read_chat, replies.ChatReply, "chatcmpl-")

    async def completions(request: HTTPRequest) -> Response:
        return await gateway.answer(request, openai.read_completion, replies.CompletionReply, "cmpl-")

    async def responses(request: HTTPRequest) -> Response:
        return await gateway.answer(request, openai.read_response, replies.ResponseReply, "resp_")

    async def cancel(request: HTTPRequest, answer_id: str) -> Response:
        return gateway.cancel(request, answer_id)

    async def resume(request: HTTPRequest, answer_id: str) -> Response:
        return await gateway.resume(request, answer_id)

    async def models(request: HTTPRequest) -> Response:
        gateway.keys.find(request.headers.get("authorization"))
        return _json({"object": "list", "data": [about]})

    async def model(request: HTTPRequest, name: str) -> Response:
        gateway.keys.find(request.headers.get("authorization"))
        if name != served.name:
            raise Refusal(404, "model_not_found", f"model: this server has {served.name!r}", param="model")
        return _json(about)

    async def metrics(request: HTTPRequest) -> Response:
        if not gateway.keys.find(request.headers.get("authorization")).metrics:
            raise Refusal(403, "not_allowed", "this key may not read the metrics")
        return Response(gateway.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def health() -> Response:
        failure = gateway.service.failure
        return _json(
            {"status": "ok"} if failure is None else {"status": "engine_failed"}, 200 if failure is None else 503
        )

    async def ready() -> Response:
        return _json({"ready": gateway.is_ready}, 200 if gateway.is_ready else 503)

    f = served.engine.facts
    about = {
        "id": served.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "nearfar",
        "nearfar": {"context": served.n_ctx, "vocabulary": f.n_vocab, "layers": f.n_layers, "width": f.d_model},
    }
    for path, handler in (
        ("/v1/chat/completions", chat),
        ("/v1/completions", completions),
        ("/v1/responses", responses),
    ):
        add("POST", path, handler)
        add("GET", f"{path}/{{answer_id}}", resume)
        add("DELETE", f"{path}/{{answer_id}}", cancel)
    add("POST", "/v1/embeddings", gateway.embed)
    add("GET", "/v1/models", models)
    add("GET", "/v1/models/{name}", model)
    add("GET", "/metrics", metrics)
    add("GET", "/health", health)
    add("GET", "/ready", ready)

    @app.exception_handler(Refusal)
    async def refused(request: HTTPRequest, refusal: Refusal) -> Response:
        gateway.metrics.refusals.labels(refusal.code).inc()
        return _json(refusal.body(), refusal.status, refusal.headers())

    @app.exception_handler(NearfarError)
    async def failed(request: HTTPRequest, error: NearfarError) -> Response:
        return await refused(request, of_error(error))

    @app.exception_handler(Gone)
    async def gone(request: HTTPRequest, error: Gone) -> Response:
        return Response(status_code=499)  # nobody reads it; the number is nginx's, for the metrics

    @app.exception_handler(HTTPException)
    async def no_route(request: HTTPRequest, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        return await refused(request, Refusal(error.status_code, code, f"{error.detail}: see /v1/models for a start"))

    app.add_middleware(_Door, gateway=gateway, local=local)
    return app


class _Door:
    """Around all routes: who may come in where everybody on the machine can, faults of ours, counts.

    `local`: the name in Host has to be this machine's, or a web page could reach the server under a name of its own
    (DNS rebinding).  The label of a path that is no route of ours is "other".
    """

    ROUTES = (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/embeddings",
        "/v1/models",
        "/metrics",
        "/health",
        "/ready",
    )
    NAMES = ("localhost", "127.0.0.1", "::1")

    def __init__(self, app: ASGIApp, gateway: Gateway, *, local: bool) -> None:
        self.app, self.gateway, self.local = app, gateway, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        route = next((r for r in self.ROUTES if scope["path"] == r or scope["path"].startswith(f"{r}/")), "other")
        begun = False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self.gateway.metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        try:
            if self.local and HTTPRequest(scope).url.hostname not in self.NAMES:
                refusal = Refusal(403, "wrong_host", f"expected the header Host to be one of {', '.join(self.NAMES)}")
                await self.refuse(refusal, scope, receive, counted)
                return
            await self.app(scope, receive, counted)
        except Exception as error:  # the boundary; messages are left out, for they may repeat what somebody wrote
            log.error("%s while serving %s\n%s", type(error).__name__, route, "".join(format_tb(error.__traceback__)))
            if not begun:
                refusal = Refusal(500, "internal_error", f"a fault of this server: {type(error).__name__}")
                await self.refuse(refusal, scope, receive, counted)

    async def refuse(self, refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
        self.gateway.metrics.refusals.labels(refusal.code).inc()
        await _json(refusal.body(), refusal.status)(scope, receive, send)
