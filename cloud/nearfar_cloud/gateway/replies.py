"""What goes back: the replies of each route, whole or as events, made from the pieces of an answer.

A reply gathers every piece, so the events of a stream and the whole reply say the same.  Ids within a reply are made of
the answer's: an answer that is computed again has them again.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from nearfar_cloud.gateway.answers import Answer, Piece, TokenInfo
from nearfar_cloud.gateway.openai import Query
from nearfar_cloud.gateway.refusal import Refusal
from nearfar_cloud.gateway.tools import Call

A_CHOSEN, A_LIKELY = 140, 90  # bytes of a TokenInfo, and of each alternative; those of the tokens are the tokenizer's


class Event(NamedTuple):
    """One server-sent event; `name` is None on routes that name none."""

    data: dict[str, Any]
    name: str | None = None


@dataclass(slots=True)
class Told:
    """One choice so far."""

    call_id: str  # of its call, if it comes to one
    text: str = ""
    tokens: list[TokenInfo] = field(default_factory=list)
    call: Call | None = None
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.call = piece.call or self.call
        self.finish = piece.finish or self.finish


class Reply(Protocol):
    """A route's way to say an answer."""

    @property
    def n_bytes(self) -> int: ...  # about what it holds, token ids left out
    def begin(self) -> list[Event]: ...
    def piece(self, i: int, piece: Piece) -> list[Event]: ...
    def end(self) -> list[Event]: ...
    def failed(self, refusal: Refusal) -> Event: ...
    def whole(self) -> dict[str, Any]: ...


def _n_bytes(query: Query, told: Iterable[Told]) -> int:
    """What was asked, and what was told so far."""
    n = sum(map(_size, (query.messages, query.schema, query.tools, query.stops)))
    n += sum(map(sys.getsizeof, query.prompts))
    for one in told:
        n += sys.getsizeof(one.text) + sum(A_CHOSEN + A_LIKELY * len(token.top) for token in one.tokens)
    return n


def _size(value: Any) -> int:
    """Bytes of what a body holds, and of all that is within."""
    n = sys.getsizeof(value)
    if isinstance(value, Mapping):
        return n + sum(_size(k) + _size(v) for k, v in value.items())
    if isinstance(value, (tuple, list)):
        return n + sum(map(_size, value))
    if is_dataclass(value):
        return n + sum(_size(getattr(value, f.name)) for f in fields(value))
    return n


def facts(answer: Answer) -> dict[str, Any]:
    """The extension object of a reply: how the answer was served."""
    told = answer.facts
    return {
        "queue_ms": round(1000 * max((f.queue_s for f in told), default=0.0), 3),
        "ttft_ms": None if answer.first_s is None else round(1000 * answer.first_s, 3),
        "cached_tokens": (cached := sum(f.cached for f in told)),
        "cache": "exact" if cached else "none",
        "drafted": sum(f.drafted for f in told),
        "accepted": sum(f.accepted for f in told),
        "preempted": sum(f.preempted for f in told),
        "lossy": [],
    }


def _usage(answer: Answer) -> dict[str, Any]:
    cached = sum(f.cached for f in answer.facts)
    return {
        "prompt_tokens": answer.n_prompt,
        "completion_tokens": answer.n_generated,
        "total_tokens": answer.n_prompt + answer.n_generated,
        "prompt_tokens_details": {"cached_tokens": min(cached, answer.n_prompt)},
    }


def _token(data: bytes) -> str:
    """A token's text; where a character is cut its bytes, in the form that OpenAI gives them."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class _Streamed:
    """What chat and completions share."""

    kind, chunk_kind = "", ""

    def __init__(self, answer: Answer, query: Query, model: str) -> None:
        self.answer, self.query, self.model = answer, query, model
        self.told = [Told(f"call_{answer.key}{i}") for i in range(len(answer.choices))]

    @property
    def n_bytes(self) -> int:
        return _n_bytes(self.query, self.told)

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.answer.id, "object": kind, "created": self.answer.created, "model": self.model}

    def begin(self) -> list[Event]:
        return []

    def end(self) -> list[Event]:
        """The usage, if it was asked for."""
        if not self.query.include_usage:
            return []
        usage = {"choices": [], "usage": _usage(self.answer), "nearfar": facts(self.answer)}
        return [Event(self.head(self.chunk_kind) | usage)]

    def failed(self, refusal: Refusal) -> Event:
        return Event(refusal.body())

    def chunk(self, choice: dict[str, Any]) -> Event:
        data = self.head(self.chunk_kind) | {"choices": [choice]}
        if choice["finish_reason"] is not None and self.answer.is_done and not self.query.include_usage:
            data["nearfar"] = facts(self.answer)
        return Event(data)

    def whole_of(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = self.head(self.kind)
        return head | {"choices": choices, "usage": _usage(self.answer), "nearfar": facts(self.answer)}


class ChatReply(_Streamed):
    """/v1/chat/completions"""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def begin(self) -> list[Event]:
        return [self._chunk(i, {"role": "assistant", "content": ""}) for i in range(len(self.told))]

    def piece(self, i: int, piece: Piece) -> list[Event]:
        self.told[i].add(piece)
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if piece.call is not None:
            delta["tool_calls"] = [{"index": 0} | self._call(self.told[i])]
        return [self._chunk(i, delta, self._logprobs(piece.tokens), piece.finish)]

    def whole(self) -> dict[str, Any]:
        choices = []
        for i, told in enumerate(self.told):
            message: dict[str, Any] = {"role": "assistant", "content": told.text if told.call is None else None}
            if told.call is not None:
                message["tool_calls"] = [self._call(told)]
            logprobs = self._logprobs(told.tokens)
            choices.append({"index": i, "message": message, "logprobs": logprobs, "finish_reason": told.finish})
        return self.whole_of(choices)

    def _chunk(self, i: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> Event:
        return self.chunk({"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": finish})

    def _call(self, told: Told) -> dict[str, Any]:
        assert told.call is not None
        function = {"name": told.call.name, "arguments": told.call.arguments}
        return {"id": told.call_id, "type": "function", "function": function}

    def _logprobs(self, tokens: Any) -> dict[str, Any] | None:
        if self.query.n_logprobs is None:
            return None
        return {
            "content": [
                _likely(t.data, t.logprob) | {"top_logprobs": [_likely(*other) for other in t.top]} for t in tokens
            ]
        }


def _likely(data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _token(data), "logprob": logprob, "bytes": list(data)}


class CompletionReply(_Streamed):
    """/v1/completions"""

    kind = chunk_kind = "text_completion"

    def __init__(self, answer: Answer, query: Query, model: str) -> None:
        super().__init__(answer, query, model)
        self._offsets = [0] * len(self.told)  # characters of the tokens told

    def piece(self, i: int, piece: Piece) -> list[Event]:
        self.told[i].add(piece)
        logprobs, self._offsets[i] = self._logprobs(piece.tokens, self._offsets[i])
        return [self.chunk({"index": i, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish})]

    def whole(self) -> dict[str, Any]:
        return self.whole_of(
            [
                {"index": i, "text": t.text, "logprobs": self._logprobs(t.tokens, 0)[0], "finish_reason": t.finish}
                for i, t in enumerate(self.told)
            ]
        )

    def _logprobs(self, tokens: Any, offset: int) -> tuple[dict[str, Any] | None, int]:
        if self.query.n_logprobs is None:
            return None, 0
        offsets = []
        for t in tokens:
            offsets.append(offset)
            offset += len(t.data.decode("utf-8", "replace"))
        told = {
            "tokens": [_token(t.data) for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{_token(data): p for data, p in t.top} for t in tokens],
            "text_offset": offsets,
        }
        return told, offset


class ResponseReply:
    """/v1/responses: one output item, a message or a call; its events are numbered."""

    def __init__(self, answer: Answer, query: Query, model: str) -> None:
        self.answer, self.query, self.model = answer, query, model
        self.told = Told(f"call_{answer.key}0")
        self._item_id = f"msg_{answer.key}"
        self._numbers = 0
        self._is_open = False  # the message has been begun

    @property
    def n_bytes(self) -> int:
        return _n_bytes(self.query, [self.told])

    def begin(self) -> list[Event]:
        response = self._response("in_progress")
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def piece(self, i: int, piece: Piece) -> list[Event]:
        self.told.add(piece)
        events = []
        if piece.text:
            events += self._open()
            events.append(self._event("response.output_text.delta", **self._at(), delta=piece.text, logprobs=[]))
        return events

    def end(self) -> list[Event]:
        events = []
        item = self._item()
        if self.told.call is None:
            events += self._open()
            text = self.told.text
            events.append(self._event("response.output_text.done", **self._at(), text=text, logprobs=[]))
            events.append(self._event("response.content_part.done", **self._at(), part=item["content"][0]))
        else:
            started = item | {"arguments": "", "status": "in_progress"}
            where = {"output_index": 0, "item_id": item["id"]}
            arguments = self.told.call.arguments
            events.append(self._event("response.output_item.added", output_index=0, item=started))
            events.append(self._event("response.function_call_arguments.delta", **where, delta=arguments))
            events.append(self._event("response.function_call_arguments.done", **where, arguments=arguments))
        events.append(self._event("response.output_item.done", output_index=0, item=item))
        name = "response.incomplete" if self.told.finish == "length" else "response.completed"
        events.append(self._event(name, response=self.whole()))
        return events

    def failed(self, refusal: Refusal) -> Event:
        event = self._event("error", code=refusal.code, message=refusal.message, param=refusal.param)
        self._numbers -= 1  # the answer itself may go on
        return event

    def whole(self) -> dict[str, Any]:
        cut = self.told.finish == "length"
        usage = _usage(self.answer)
        return self._response("incomplete" if cut else "completed") | {
            "output": [self._item()],
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
            "nearfar": facts(self.answer),
        }

    def _response(self, status: str) -> dict[str, Any]:
        return {
            "id": self.answer.id,
            "object": "response",
            "created_at": self.answer.created,
            "status": status,
            "model": self.model,
            "output": [],
            "error": None,
            "incomplete_details": None,
            "usage": None,
            "store": False,
        }

    def _item(self) -> dict[str, Any]:
        told = self.told
        if told.call is not None:
            called = {"call_id": told.call_id, "name": told.call.name, "arguments": told.call.arguments}
            return {"type": "function_call", "id": self._item_id, "status": "completed"} | called
        content = [{"type": "output_text", "text": told.text, "annotations": []}]
        status = "incomplete" if told.finish == "length" else "completed"
        return {"type": "message", "id": self._item_id, "status": status, "role": "assistant", "content": content}

    def _open(self) -> list[Event]:
        if self._is_open:
            return []
        self._is_open = True
        item = {"type": "message", "id": self._item_id, "status": "in_progress", "role": "assistant", "content": []}
        part = {"type": "output_text", "text": "", "annotations": []}
        return [
            self._event("response.output_item.added", output_index=0, item=item),
            self._event("response.content_part.added", **self._at(), part=part),
        ]

    def _at(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **data: Any) -> Event:
        self._numbers += 1
        return Event({"type": kind, "sequence_number": self._numbers - 1} | data, kind)


def embeddings(answer: Answer, query: Query, model: str) -> dict[str, Any]:
    """/v1/embeddings: the mean row of each prompt, of length 1."""
    data = []
    for i, choice in enumerate(answer.choices):
        assert choice.pooled is not None
        row = choice.pooled.astype(np.float64)
        unit = (row / max(float(np.sqrt(row @ row)), 1e-12)).astype("<f4")
        told: Any = base64.b64encode(unit.tobytes()).decode() if query.base64 else unit.tolist()
        data.append({"object": "embedding", "index": i, "embedding": told})
    usage = {"prompt_tokens": answer.n_prompt, "total_tokens": answer.n_prompt}
    return {"object": "list", "data": data, "model": model, "usage": usage, "nearfar": facts(answer)}
