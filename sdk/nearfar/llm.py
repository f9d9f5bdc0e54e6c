"""The face of nearfar: open a model, ask it, read the tokens as they come.

    prompt -> ids -> Sequence -> engine.step, until the end -> text

Everything here is bookkeeping around `engine.step`: which ids to feed, when to stop, which text is safe to show.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nearfar import env
from nearfar.cancel import Cancel
from nearfar.config import ModelConfig
from nearfar.constraint import Constraint, Vocabulary
from nearfar.detokenize import Detokenizer
from nearfar.engine import Engine, Stepper, Token
from nearfar.errors import Cancelled, ContextError, TokenizerError, UnsupportedError, UsageError
from nearfar.forms import Part
from nearfar.kv_cache import FULL, KVDtype, Lambda, Policy, check_dtype
from nearfar.lower import open_lower
from nearfar.options import EngineOptions, Head, Lut
from nearfar.panel_store import vouches_for
from nearfar.provisional import Provisional
from nearfar.sampling import Sampling
from nearfar.sequence import Notice, Sequence, SharedStats
from nearfar.speculate import MAX_DRAFTS, Speculative
from nearfar.stop import StopMatcher
from nearfar.tokenizer import Tokenizer, tokenizer_from_metadata
from nearfar.weights import Weights

if TYPE_CHECKING:
    from nearfar.collab_options import Collab
    from nearfar.share import CodecName, ModeName, RowsName
    from nearfar.upper import Upper
    from nearfar.wire.egress import Policy as EgressPolicy
    from nearfar.wire.tls import Credentials

FinishReason = Literal["stop", "eos", "length", "cancelled"]
Prompt = str | Seq[int] | Seq[Part]  # text, token ids, or the parts that nearfar.forms builds

ANY_LENGTH = 2**31 - 1  # positions of a cache whose memory does not grow with them
MODELS = Path(__file__).parent / "models"  # what the wheel ships


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of the answer.

    `text` is what may be shown now: whole characters, nothing of a stop string, so it may be "" or belong to earlier
    tokens too.  `source` is the head that decided ("exit.2", "full"; "draft.2": full depth, as exit 2 had
    foreseen; with an upper side "upper", and "verified.2" where exit 2 had foreseen its token), `conf` how sure the
    device was (0..1), `ms` the time, `where` the machine: "device", "edge" or "cloud".
    `state`: "provisional" for a draft that an upper side has not decided yet (`stream(..., provisional=True)`); the
    final token of that index comes later.  `gen` counts how often rows were taken back.
    """

    index: int
    id: int
    text: str
    source: str
    conf: float
    ms: float
    where: str = "device"
    state: Literal["final", "provisional"] = "final"
    gen: int = 0


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts and times of one answer.  `first_token_ms` runs from the call; `tokens_per_s` counts the others.

    With `speculate`, `n_drafted` tokens were drafted, and those of a source "draft.{layer}" were right.
    """

    n_prompt: int
    n_cached: int  # prompt tokens whose keys and values were still there from the previous call
    n_generated: int
    first_token_ms: float
    tokens_per_s: float
    by_source: dict[str, int]
    n_drafted: int = 0
    total_ms: float = 0.0  # from the call to the last token
    shared: SharedStats | None = None  # with an upper side


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer.  `finish_reason`: a stop string or a finished schema, the model's end, the limit, a cancel."""

    text: str
    ids: list[int]
    finish_reason: FinishReason
    events: list[TokenEvent]
    stats: Stats


class LLM:
    """A model that is ready to answer.  One answer at a time; a second thread gets EngineBusy."""

    def __init__(
        self,
        stepper: Stepper,
        tokenizer: Tokenizer,
        metadata: Mapping[str, Any],
        *,
        max_len: int,
        backend: str,
        config: ModelConfig | None = None,
    ) -> None:
        self.stepper, self.tokenizer, self.metadata = stepper, tokenizer, metadata
        self.max_len, self.backend, self.config = max_len, backend, config
        self._vocabulary: Vocabulary | None = None
        self._warm: Sequence | None = None  # the last answer's cache: a chat's next turn begins with the same ids

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        backend: str | None = None,
        threads: int | None = None,
        n_ctx: int | None = None,
        kv_dtype: KVDtype = "f16",
        kv_policy: Policy = FULL,
        lut: Lut = "off",
        head: Head = "file",
        cache: str | Path | None = None,
        upper: str | Seq[str] | Upper | None = None,
        mode: ModeName = "lossless",
        rows: RowsName | None = None,
        codec: CodecName = "int8",
        collab: Collab | None = None,
        policy: EgressPolicy | None = None,
        credentials: Credentials | None = None,
    ) -> LLM:
        """Open a GGUF file.

        `backend`: "native" (the C++ engine), "numpy" (the readable reference), "llama" (llama-cpp-python), or None
        for the best one: ours, or llama-cpp-python for an architecture or tensor type that ours does not run.
        `n_ctx`: positions to keep at most (default: what the model was trained for; with Lambda, any number).
        `kv_dtype`: keys and values as "f16", "f32", or "int8" (half the memory, near f16 and not equal to it).
        `kv_policy`: Lambda(sink, window) sees the first `sink` and the last `window` positions, so that prompt and
        answer may go on far beyond the trained length in constant memory; what has left the window is gone.
        `lut`: "fast" multiplies ternary matrices by table lookup: faster, near the exact answer and not equal to it.
        `head`: "q4" requantises the head to 4.5 bits (other logits); "screened" gives the same tokens and may read less
        of it where only the largest logit counts.
        `cache`: where the native engine keeps packed matrices for the next time: "auto" (beside the model, else in the
        user's cache folder; small models are packed at once), "off", or a folder.

        With `upper` two machines make an answer: "grpcs://host:port" of a server, several (the next one where one
        fails), or an object.
        `mode`: "lossless" (the exits draft, the upper layers decide every token), "lossy" (a sure exit decides) or
        "cloud-only" (the other side generates).
        `rows`: "hidden" (of a device half that `nearfar split` made; packed by `codec`: "fp16", "int8", "int4") or
        "ids"; None: what the file is for.  `collab` says all that in one object, and more.
        `policy`: what may leave this device, `credentials`: who it is.  Hidden rows are not privacy.

        Raises FileError, UnsupportedError, MissingExtraError; with `upper` also EgressDenied.
        """
        if upper is None and (collab, policy, credentials) != (None, None, None):
            raise UsageError("collab, policy and credentials belong to answers with an upper side: expected upper too")
        backend, path = backend or env.backend(), Path(path)
        options = EngineOptions(threads=threads, lut=lut, cache=env.cache() if cache is None else cache, head=head)
        ours = _only_ours(lut, head, kv_dtype, kv_policy)
        if backend == "llama":
            if upper is not None:
                raise UsageError("an upper side shares answers with nearfar's own engine: not with backend 'llama'")
            if ours:
                raise UsageError(f"{ours} belongs to nearfar's own engine: leave it out, or backend 'llama'")
            return _open_llama(path, n_ctx, threads, why="asked for")
        try:
            llm, weights = cls._open_own(path, backend, options, n_ctx, kv_dtype, kv_policy)
            if upper is not None:
                from nearfar.share import how_of, share

                assert isinstance(llm.stepper, Engine)
                how = collab or how_of(weights, mode, rows, codec)
                llm.stepper = share(llm.stepper, weights, upper, how, policy, credentials)
            return llm
        except (UnsupportedError, TokenizerError) as error:  # perhaps llama.cpp knows its kind, or its tokenizer
            if backend is not None or ours or upper is not None or not _has_llama():
                raise
            reason = error
        try:
            return _open_llama(path, n_ctx, threads, why=str(reason))
        except UnsupportedError:
            raise reason from None  # llama.cpp does not run it either: our reason says more

    @classmethod
    def _open_own(
        cls,
        path: Path,
        backend: str | None,
        options: EngineOptions,
        n_ctx: int | None,
        kv_dtype: KVDtype,
        kv_policy: Policy,
    ) -> tuple[LLM, Weights]:
        weights = Weights.open(path, vouched=None if backend == "numpy" else partial(vouches_for, cache=options.cache))
        config = weights.config
        if config.role == "upper":
            raise UsageError(
                f"{path} is the upper half of a split model, layers [{config.row_layer}, {config.n_layers}), which "
                "takes rows and no text: open the device half, and serve this one to it"
            )
        check_dtype(kv_dtype)
        trained = ANY_LENGTH if isinstance(kv_policy, Lambda) else config.n_ctx
        max_len = trained if n_ctx is None else n_ctx
        if max_len < 2:
            raise UsageError(f"n_ctx={max_len}: expected at least 2 positions")
        try:
            tokenizer = tokenizer_from_metadata(weights.file.metadata)
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from error
        lower = open_lower(weights, backend, options)
        engine = Engine(lower, max_len, kv_dtype, kv_policy)
        llm = cls(engine, tokenizer, weights.file.metadata, max_len=max_len, backend=lower.name, config=config)
        return llm, weights

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        stop: Seq[str] = (),
        stop_ids: Collection[int] = (),
        schema: Mapping[str, Any] | None = None,
        exits: bool = True,
        speculate: bool | int = False,
        cancel: Cancel | None = None,
    ) -> Completion:
        """The whole answer at once; arguments as in `stream`."""
        stream = self.stream(
            prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            stop_ids=stop_ids,
            schema=schema,
            exits=exits,
            speculate=speculate,
            cancel=cancel,
        )
        for _ in stream:
            pass
        return stream.completion

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        stop: Seq[str] = (),
        stop_ids: Collection[int] = (),
        schema: Mapping[str, Any] | None = None,
        exits: bool = True,
        speculate: bool | int = False,
        cancel: Cancel | None = None,
        journal: str | Path | None = None,
        on_notice: Callable[[Notice], None] | None = None,
        provisional: bool = False,
    ) -> Stream:
        """Tokens as they are made.

        `prompt`: text (control tokens in it stay text), ids, or parts from `nearfar.forms`.
        `stop`: strings that end the answer and are not part of it; `stop_ids`: ids that do, beside the model's own.
        `schema`: a JSON schema that the answer must satisfy (extra `[schema]`).
        `exits=False` computes every token at full depth.
        `speculate`: the same tokens as `exits=False`, several for each pass through the upper layers, because the
        lowest exit drafts them; True, or how many drafts a pass at most (1..7).  The exits then decide nothing.
        `journal`: with an upper side, a file in which every token stands before you see it; it goes with the answer.
        If the process was killed, the same call with the same file tells those tokens again and goes on behind them.
        `on_notice`: with an upper side, told of waits, of a link that is lost or back, and of rows that are sent again.
        `provisional`: with an upper side, drafts are told when they are made, in state "provisional".  Each stands at
        the end of what was told so far, until the notice "retract" says from which index on that is void, or the final
        token of its index comes and takes its place.  Final ones come in order, each once, as without it.
        Raises UsageError (nothing to compute), ContextError (prompt longer than the context), SchemaError.
        """
        if max_tokens < 1:
            raise UsageError(f"max_tokens={max_tokens}: expected at least 1")
        ids = self._ids(prompt)
        if not ids:
            raise UsageError("the prompt is empty: expected at least one token")
        if len(ids) >= self.max_len:
            raise ContextError(
                f"the prompt has {len(ids)} tokens; the context holds {self.max_len}, the answer included"
            )
        ends = frozenset(stop_ids) | self.tokenizer.eog_ids
        self._stepper(speculate, ends)  # says no before anything is computed
        return Stream(
            self,
            ids,
            continues=isinstance(prompt, str),
            max_tokens=max_tokens,
            sampling=sampling,
            stops=StopMatcher(stop),
            stop_ids=ends,
            constraint=None if schema is None else self._constraint(schema),
            exits=exits and not speculate,
            speculate=speculate,
            cancel=cancel,
            journal=None if journal is None else Path(journal),
            on_notice=on_notice,
            provisional=provisional,
        )

    def chat(self, messages: Seq[Mapping[str, str]], *, template: str | None = None, **options: Any) -> Completion:
        """Answer a conversation: messages are {"role": "system" | "user" | "assistant", "content": text}.

        `template` names a chat form for files that carry none; the options are those of `stream`.
        """
        stream = self.stream_chat(messages, template=template, **options)
        for _ in stream:
            pass
        return stream.completion

    def stream_chat(self, messages: Seq[Mapping[str, str]], *, template: str | None = None, **options: Any) -> Stream:
        """As `chat`, token by token."""
        from nearfar.chat import render

        return self.stream(render(messages, self.metadata, self.tokenizer, template=template), **options)

    def close(self) -> None:
        """Give the memory back.  The object cannot answer afterwards."""
        self._warm = None
        self._vocabulary = None
        self.stepper.close()
        self.stepper = _Closed()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt) if prompt else []
        items = list(prompt)
        parts = [item for item in items if isinstance(item, Part)]
        if parts and len(parts) == len(items):
            return self.tokenizer.encode_parts(parts)
        n = self.tokenizer.n_vocab
        ids = [int(item) for item in items if isinstance(item, (int, np.integer)) and 0 <= item < n]
        if len(ids) < len(items):
            wrong = next(item for item in items if not isinstance(item, (int, np.integer)) or not 0 <= item < n)
            raise UsageError(f"the prompt holds {wrong!r:.60}: expected text, ids of 0..{n - 1}, or parts")
        return ids

    def _constraint(self, schema: Mapping[str, Any]) -> Constraint:
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self.tokenizer)
        return Constraint(self._vocabulary, schema)

    def _stepper(self, speculate: bool | int, ends: frozenset[int]) -> Stepper:
        if not speculate or isinstance(self.stepper, _Closed):
            return self.stepper
        if not isinstance(self.stepper, Engine):
            raise UsageError(f"speculate: the {self.backend.split()[0]} backend has no exits that could draft")
        return Speculative(self.stepper, MAX_DRAFTS if speculate is True else speculate, ends)

    def _take_sequence(self, sampling: Sampling, exits: bool) -> Sequence:
        """The warm sequence if its cache was made the same way, else a new one; two streams never share one."""
        warm, self._warm = self._warm, None
        if warm is None or warm.use_exits != exits:
            return self.stepper.new_sequence(sampling, exits)
        warm.sampling = sampling
        return warm


class Stream(Iterator[TokenEvent]):
    """Iterate to get the tokens; `completion` is the answer so far, and the whole one after the last token."""

    def __init__(
        self,
        llm: LLM,
        ids: list[int],
        *,
        continues: bool,
        max_tokens: int,
        sampling: Sampling,
        stops: StopMatcher,
        stop_ids: frozenset[int],
        constraint: Constraint | None,
        exits: bool,
        speculate: bool | int,
        cancel: Cancel | None,
        journal: Path | None,
        on_notice: Callable[[Notice], None] | None,
        provisional: bool,
    ) -> None:
        self._speculate = speculate
        self._llm, self._stops, self._stop_ids, self._constraint = llm, stops, stop_ids, constraint
        self._n_prompt, self._max_tokens, self._cancel = len(ids), max_tokens, cancel
        self._detokenizer = Detokenizer(llm.tokenizer, continues=continues)
        self._events: list[TokenEvent] = []
        self._tail = ""  # text that a cancel left without an event
        self._finish: FinishReason | None = None
        self._started = time.perf_counter()
        self._first_s = self._last_s = 0.0
        self._n_drafted = 0
        self._shared: SharedStats | None = None
        self._sequence: Sequence | None = llm._take_sequence(sampling, exits)
        self._drafts: Provisional | None = None
        if provisional:
            most = min(max_tokens, llm.max_len + 1 - len(ids))
            self._drafts = Provisional(self._detokenizer, stops, stop_ids, most)
            on_notice = partial(_notice, self._drafts, on_notice)
        self._sequence.ends, self._sequence.on_notice = stop_ids, on_notice
        self._sequence.tells_drafts, self._sequence.n_most = provisional, max_tokens
        if journal is not None:
            self._sequence.keep_in(journal)
        self._n_cached = self._sequence.continue_with(ids)

    def __next__(self) -> TokenEvent:
        s = self._sequence
        if s is None:
            raise StopIteration
        try:
            stepper = self._llm._stepper(self._speculate, self._stop_ids)
            while not (token := stepper.step(s, self._constraint, self._cancel)).is_final:
                if (draft := self._draft(token)) is not None:
                    return draft
        except Cancelled:
            self._end("cancelled")
            self._tail = self._stops.push(self._detokenizer.flush()) + self._stops.flush()
            raise StopIteration from None
        except BaseException:
            self._end("cancelled", done=False)
            raise
        self._last_s = time.perf_counter() - self._started
        self._first_s = self._first_s or self._last_s
        self._n_drafted += token.n_drafted

        text = "" if token.id in self._stop_ids else self._stops.push(self._detokenizer.push(token.id))
        if self._drafts is not None:
            self._drafts.final(token.id)
        finish = self._finish_reason(token.id)
        if finish is not None:
            text += self._stops.push(self._detokenizer.flush()) + self._stops.flush()
            self._end(finish)
        index = len(self._events)
        event = TokenEvent(index, token.id, text, token.source, token.conf, token.ms, token.where, gen=token.gen)
        self._events.append(event)
        return event

    def _draft(self, token: Token) -> TokenEvent | None:
        """The event of a draft; None behind the end of the answer."""
        assert self._drafts is not None
        index, text = self._drafts.n, self._drafts.push(token.id)
        if text is None:
            return None
        where, gen = token.where, token.gen
        return TokenEvent(index, token.id, text, token.source, token.conf, token.ms, where, "provisional", gen)

    def __del__(self) -> None:
        """A stream that nobody reads to its end must not hold a link open."""
        if getattr(self, "_sequence", None) is not None:
            self.close()

    def close(self) -> None:
        """End early, as if cancelled; the cache stays warm for the next call."""
        if self._sequence is not None:
            self._end("cancelled")

    @property
    def completion(self) -> Completion:
        """The answer so far."""
        n = len(self._events)
        sources: dict[str, int] = {}
        for event in self._events:
            sources[event.source] = sources.get(event.source, 0) + 1
        decode_s = self._last_s - self._first_s
        stats = Stats(
            n_prompt=self._n_prompt,
            n_cached=self._n_cached,
            n_generated=n,
            first_token_ms=1000 * self._first_s,
            tokens_per_s=(n - 1) / decode_s if n > 1 and decode_s > 0 else 0.0,
            by_source=sources,
            n_drafted=self._n_drafted,
            total_ms=1000 * self._last_s,
            shared=self._shared if self._sequence is None else self._sequence.shared_stats(),
        )
        text = "".join(event.text for event in self._events) + self._tail
        return Completion(text, [e.id for e in self._events], self._finish or "cancelled", list(self._events), stats)

    def _finish_reason(self, token: int) -> FinishReason | None:
        """Whether `token`, the next one told, is the last; a sequence may hold provisional ones behind it."""
        if token in self._stop_ids:
            return "eos"
        if self._stops.stopped or (self._constraint is not None and self._constraint.is_done):
            return "stop"
        n = len(self._events) + 1
        if n >= self._max_tokens or self._n_prompt + n > self._llm.max_len:
            return "length"
        return None

    def _end(self, finish: FinishReason, done: bool = True) -> None:
        self._finish = finish
        if self._sequence is not None:
            if self._drafts is not None and self._drafts.n > self._drafts.n_final:
                self._sequence.tell(Notice("retract", self._drafts.n_final))
            self._sequence.finish(done, in_haste=finish == "cancelled")
            self._shared = self._sequence.shared_stats()
        self._llm._warm, self._sequence = self._sequence, None


def _notice(drafts: Provisional, tell: Callable[[Notice], None] | None, notice: Notice) -> None:
    """No method: a sequence that knew its stream would keep it alive."""
    if notice.kind == "retract":
        drafts.retract(notice.n)
    if tell is not None:
        tell(notice)


class _Closed:
    """The stepper of an LLM that was closed."""

    def close(self) -> None:
        """Nothing is left."""

    def new_sequence(self, sampling: Sampling, use_exits: bool) -> Sequence:
        raise UsageError("this LLM was closed")

    def step(self, s: Sequence, constraint: Constraint | None = None, cancel: Cancel | None = None) -> Any:
        raise UsageError("this LLM was closed")


def load(name: str = "nano", **options: Any) -> LLM:
    """Open a model that the package ships, by name; the options are those of `LLM.open`."""
    known = sorted(path.stem for path in MODELS.glob("*.gguf"))
    if name not in known:
        raise UsageError(
            f"no model named {name!r} is shipped (known: {', '.join(known) or 'none'}); LLM.open takes a path"
        )
    return LLM.open(MODELS / f"{name}.gguf", **options)


def _only_ours(lut: Lut, head: Head, kv_dtype: KVDtype, kv_policy: Policy) -> str:
    """The first option that llama.cpp could not follow, or ""."""
    chosen = {
        f"lut={lut!r}": lut != "off",
        f"head={head!r}": head != "file",
        f"kv_dtype={kv_dtype!r}": kv_dtype == "int8",
        f"kv_policy={kv_policy!r}": kv_policy != FULL,
    }
    return next((option for option, is_ours in chosen.items() if is_ours), "")


def _open_llama(path: Path, n_ctx: int | None, threads: int | None, why: str) -> LLM:
    from nearfar.backend_llama import open_llama

    return open_llama(path, n_ctx=n_ctx, threads=threads, why=why)


def _has_llama() -> bool:
    from importlib.util import find_spec

    return find_spec("llama_cpp") is not None
