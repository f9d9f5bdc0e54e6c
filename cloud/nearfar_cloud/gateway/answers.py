"""One answer on its way: outputs of its sequences become pieces of text, as they may be shown.

Output ──> Choice: detokenize, hold back what may become a stop string, collect a call ──> Piece ──> replies
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from nearfar.detokenize import Detokenizer
from nearfar.stop import StopMatcher
from nearfar.tokenizer import Tokenizer
from nearfar_cloud.gateway.refusal import Refusal
from nearfar_cloud.gateway.service import Mailbox, Service
from nearfar_cloud.gateway.tools import Call, CallForm
from nearfar_cloud.types import Array, Facts, LogitsHook, Logprobs, Output, Request

NO_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot say


class TokenInfo(NamedTuple):
    """A token that was chosen, for log-probabilities: its bytes, its own and the likeliest ones."""

    data: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one output adds to a choice; `finish` (stop, length, tool_calls) with the last one."""

    text: str = ""
    tokens: tuple[TokenInfo, ...] = ()
    call: Call | None = None
    finish: str | None = None


class Choice:
    """The text of one sequence.  `call_form`: an answer that begins with a brace is a call, held back until it ends."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: tuple[str, ...],
        *,
        continues: bool,
        strip_space: bool = False,
        n_logprobs: int | None = None,
        call_form: CallForm | None = None,
    ) -> None:
        """`continues`: the answer goes on with the prompt's text; `strip_space`: the form begins answers with one."""
        self._tokenizer, self._n_logprobs, self._form = tokenizer, n_logprobs, call_form
        self._detokenizer, self._stops = Detokenizer(tokenizer, continues=continues), StopMatcher(stops)
        self._strip = strip_space
        self._held: str | None = None  # the beginning of a call
        self._begun = False
        self.ids: list[int] = []  # told so far
        self.facts: Facts | None = None
        self.pooled: Array | None = None
        self.finish: str | None = None

    @property
    def stopped(self) -> bool:
        """A stop string has come: the sequence may end."""
        return self._stops.stopped

    def push(self, out: Output) -> list[Piece]:
        """What `out` adds: a piece for every token that adds something, and one of its own for the end.

        So the pieces depend on the tokens alone, not on how many of them a step decided.  Raises Refusal for a sequence
        that failed.
        """
        if out.error:
            raise _failed(out.error)
        pieces = []
        for i, token in enumerate(out.ids):
            if self.stopped:
                break
            self.ids.append(token)
            text = self._shown(self._stops.push(self._detokenizer.push(token)))
            told = () if self._n_logprobs is None else (self._info(token, out.logprobs[i]),)
            pieces.append(Piece(text, told))
        if out.finish is not None:
            pieces.append(self._end(out))
        return [piece for piece in pieces if piece != Piece()]

    def _end(self, out: Output) -> Piece:
        text = self._shown(self._stops.push(self._detokenizer.flush()) + self._stops.flush())
        self.facts, self.pooled = out.facts, out.pooled
        self.finish = "stop" if self.stopped or out.finish == "stop" else "length"
        call = None
        if self._held is not None:
            call = self._form.read(self._held) if self._form is not None else None  # None: it was cut
            if call is None:
                text = self._held
            else:
                self.finish = "tool_calls"
        return Piece(text, call=call, finish=self.finish)

    def _shown(self, text: str) -> str:
        """What of `text` may be told now: nothing of a call before its end."""
        if text and self._strip:
            self._strip, text = False, text.removeprefix(" ")
        if text and not self._begun:
            self._begun = True
            if self._form is not None and text.startswith("{"):
                self._held = ""
        if self._held is None:
            return text
        self._held += text
        return ""

    def _info(self, token: int, told: Logprobs) -> TokenInfo:
        top = tuple((self._tokenizer.token_bytes(i), _finite(p)) for i, p in told.top[: self._n_logprobs])
        return TokenInfo(self._tokenizer.token_bytes(token), _finite(told.own), top)


def _finite(p: float) -> float:
    return max(p, NO_LOGPROB)


def _failed(error: str) -> Refusal:
    if error.startswith("SchemaError: "):
        return Refusal(400, "invalid_schema", error.removeprefix("SchemaError: "))
    return Refusal(500, "request_failed", f"this request failed: {error}")


@dataclass(frozen=True, slots=True)
class Branches:
    """The choices of one prompt: what the engine runs, what makes the hook of each, and how their texts are shown."""

    request: Request
    new_hook: Callable[[], LogitsHook | None]
    choices: list[Choice]

    def runs(self) -> list[tuple[Request, list[Choice]]]:
        """What is to be submitted: all choices together, or each unfinished one from the tokens that it has."""
        if not any(choice.ids or choice.finish for choice in self.choices):
            return [(self.request, self.choices)]
        return [(self._rest(i, choice), [choice]) for i, choice in enumerate(self.choices) if choice.finish is None]

    def _rest(self, i: int, choice: Choice) -> Request:
        """Tokens are a function of those before them, of seed and position: it goes on as it would have."""
        r = self.request
        left = max(1, r.max_tokens - len(choice.ids))  # where a stop string has come, one token more brings the end
        sampling = replace(r.sampling, seed=(r.sampling.seed + i) % (1 << 64))
        return replace(r, ids=r.ids + tuple(choice.ids), max_tokens=left, sampling=sampling)

    def hook(self, choice: Choice) -> LogitsHook | None:
        """Where the tokens of a choice have led it."""
        hook = self.new_hook()
        if hook is not None:
            for token in choice.ids:
                hook.accept(token)
        return hook


class Left(NamedTuple):
    """Of an answer that is not finished."""

    n_seqs: int
    n_known: int  # tokens of them, each with its prompt
    n_new: int  # tokens that they may come to, at most


class Answer:
    """All choices of one request: `run` submits them, `more` is what comes, `stop` ends what runs.

    A stopped answer goes on with the next `run` where it was, after `follow`.  `stop` must be called whatever happens.
    `on_tokens` hears of tokens as they come: (the first ones of their choice?, seconds since the ones before).
    `n_prompt`: tokens of all prompts, each counted once however many choices it has.
    """

    def __init__(
        self,
        service: Service,
        prompts: list[Branches],
        *,
        id_: str,
        n_prompt: int,
        deadline_s: float | None,
        on_tokens: Callable[[bool, float], None],
    ) -> None:
        self.id, self.created = id_, int(time.time())
        self.choices = [choice for prompt in prompts for choice in prompt.choices]
        self.n_prompt = n_prompt
        self.started = time.perf_counter()
        self.first_s: float | None = None  # to the first token of any choice
        self._service, self._prompts = service, prompts
        self._deadline_s, self._on_tokens = deadline_s, on_tokens
        self._mailbox = Mailbox()
        self._on_stop: Callable[[], None] | None = None  # None: nothing of it runs
        self._last = [self.started] * len(self.choices)
        self._open: dict[int, int] = {}  # sequence -> choice
        self._followed: dict[int, LogitsHook | None] = {}  # by the id() of their choice: for the next `run`

    @property
    def key(self) -> str:
        """What is its own in the id."""
        return re.split("[-_]", self.id)[1]

    @property
    def left(self) -> Left:
        """What `run` would submit."""
        runs = [run for prompt in self._prompts for run in prompt.runs()]
        return Left(
            sum(len(choices) for _, choices in runs),
            sum(len(choices) * len(request.ids) for request, choices in runs),
            sum(len(choices) * request.max_tokens for request, choices in runs),
        )

    async def follow(self) -> None:
        """Lead the hooks of a stopped answer over all that was told, in a thread: a grammar takes its time for that."""
        left = [(prompt, choice) for prompt in self._prompts for choice in prompt.choices if choice.finish is None]
        hooks = await asyncio.to_thread(lambda: [prompt.hook(choice) for prompt, choice in left])
        self._followed = {id(choice): hook for (_, choice), hook in zip(left, hooks, strict=True)}

    def run(self, on_stop: Callable[[], None]) -> None:
        """Submit what is not finished.  `on_stop` is called once nothing of it runs any longer.

        Raises what Service.submit raises; then nothing has been submitted.
        """
        assert self._on_stop is None
        now = time.perf_counter()
        self._last = [now if choice.ids else self.started for choice in self.choices]  # it may have been stopped long
        self._mailbox = Mailbox()
        of_choice = {id(choice): i for i, choice in enumerate(self.choices)}
        followed, self._followed = self._followed, {}
        try:
            for prompt in self._prompts:
                for request, choices in prompt.runs():
                    hooks = [followed.get(id(choice)) or prompt.hook(choice) for choice in choices]
                    seqs = self._service.submit(request, self._mailbox, hooks)
                    self._open |= {seq: of_choice[id(c)] for seq, c in zip(seqs, choices, strict=True)}
        except BaseException:
            self._forget()
            raise
        self._on_stop = on_stop

    async def more(self) -> list[tuple[int, Piece]]:
        """(choice, piece) of what was decided next.  Raises Refusal for an answer that fails."""
        out = await self._next()
        i = self._open[out.seq]
        choice = self.choices[i]
        was_stopped = choice.stopped
        pieces = choice.push(out)
        if out.ids and not was_stopped:
            now = time.perf_counter()
            self._on_tokens(self._last[i] == self.started, now - self._last[i])
            self._last[i] = now
            self.first_s = self.first_s or now - self.started
        if out.finish is not None:
            del self._open[out.seq]
        elif choice.stopped and not was_stopped:
            self._service.abort(out.seq)  # its last output brings the facts
        return [(i, piece) for piece in pieces]

    async def _next(self) -> Output:
        if self._deadline_s is None:
            return await self._mailbox.get()
        left = self._deadline_s - (time.perf_counter() - self.started)
        try:
            async with asyncio.timeout(left):
                return await self._mailbox.get()
        except TimeoutError:
            message = f"not answered within {1000 * self._deadline_s:g} ms"
            raise Refusal(504, "deadline_exceeded", message, param="nearfar.deadline_ms") from None

    def end(self, reason: Refusal) -> None:
        """End it from outside: whoever reads it gets `reason`."""
        self._mailbox.end(reason)

    def stop(self) -> None:
        """Nothing of it runs any longer."""
        self._forget()
        self._mailbox = Mailbox()  # what was not read is computed again
        if self._on_stop is not None:
            on_stop, self._on_stop = self._on_stop, None
            on_stop()

    def _forget(self) -> None:
        for seq in self._open:
            self._service.forget(seq)
        self._open.clear()

    # ------------------------------------------------------------ counts

    @property
    def is_done(self) -> bool:
        """Every choice has finished."""
        return all(choice.finish is not None for choice in self.choices)

    @property
    def n_generated(self) -> int:
        return sum(len(choice.ids) for choice in self.choices)

    @property
    def facts(self) -> list[Facts]:
        """Of the choices that have ended."""
        return [choice.facts for choice in self.choices if choice.facts is not None]
