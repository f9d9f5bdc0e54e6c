"""llama-cpp-python behind the face of `LLM`: every GGUF architecture that our engine does not run.

No hidden rows, no exits and no layer ranges here, only whole steps; `llm.backend` says why this engine was taken.
The sampler, the constraint and the stop rules are ours, and so is the tokenizer where it knows the file. This is
the only importer of llama_cpp (extra `[llama]`), and only of its C interface: its Python layer would compile the chat
template that the file brings along.
"""

from __future__ import annotations

import ctypes
import functools
import time
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.cancel import Cancel
from nearfar.constraint import Constraint
from nearfar.engine import Token
from nearfar.errors import (
    ContextError,
    MissingExtraError,
    TokenizerError,
    UnsupportedError,
    UsageError,
    WeightsError,
)
from nearfar.exit import max_softmax
from nearfar.gguf_reader import GGUFFile
from nearfar.llm import LLM
from nearfar.sampling import Sampling, sample
from nearfar.sequence import Sequence
from nearfar.tokenizer import Tokenizer, tokenizer_from_metadata
from nearfar.vocab import Vocab

N_BATCH = 512  # prompt tokens of one call to llama_decode


def open_llama(path: Path, *, n_ctx: int | None = None, threads: int | None = None, why: str = "asked for") -> LLM:
    """Open `path` with llama.cpp, after our own reader has checked the container: llama.cpp trusts files more."""
    try:
        import llama_cpp
    except ImportError as error:
        raise MissingExtraError("llama-cpp-python", "llama", "this model") from error
    with GGUFFile.open(path) as file:
        metadata = dict(file.metadata)
    model = _Model(llama_cpp, path)
    try:
        tokenizer = tokenizer_from_metadata(metadata)
    except (TokenizerError, UnsupportedError):  # a kind that ours does not know; a damaged one fails below as well
        vocab = Vocab.from_metadata(metadata, bos=None, eos=None, unk=None, add_bos=model.adds_bos)
        tokenizer = Tokenizer(vocab, LlamaSubwords(model, vocab))
    if model.n_vocab != tokenizer.n_vocab:
        raise WeightsError(f"{path}: llama.cpp sees {model.n_vocab} tokens, the tokenizer has {tokenizer.n_vocab}")
    max_len = n_ctx or model.n_ctx_train
    stepper = LlamaEngine(model, max_len, threads)
    return LLM(stepper, tokenizer, metadata, max_len=max_len, backend=f"llama ({why})")


class LlamaEngine:
    """`engine.Stepper` on llama.cpp: every token is computed at full depth."""

    def __init__(self, model: _Model, max_len: int, threads: int | None = None) -> None:
        self.model, self.max_len, self.threads = model, max_len, threads

    def new_sequence(self, sampling: Sampling, use_exits: bool) -> Sequence:
        return Sequence(LlamaKV(self.model, self.max_len, self.threads), sampling=sampling, use_exits=use_exits)

    def close(self) -> None:
        """Nothing to give back: memory goes with the object."""

    def step(self, s: Sequence, constraint: Constraint | None = None, cancel: Cancel | None = None) -> Token:
        """As `Engine.step`; `source` is always "full"."""
        started = time.perf_counter()
        kv = s.kv
        assert isinstance(kv, LlamaKV), "a cache of another engine"
        try:
            logits = kv.decode(s.pending(), cancel)  # [V]
            if constraint is not None:
                logits = constraint.mask(logits)
            token = sample(logits, s.sampling, position=len(s.ids), recent=s.ids)
            if constraint is not None:
                constraint.accept(token)
        except BaseException:
            kv.truncate(s.n_run)
            raise
        s.n_run = len(s.ids)
        s.ids.append(token)
        return Token(token, "full", max_softmax(logits), 1000 * (time.perf_counter() - started))


class _Model:
    """Owns a llama_model."""

    def __init__(self, api: Any, path: Path) -> None:
        self.api = api
        api.llama_log_set(_silent(api), ctypes.c_void_p(0))
        api.llama_backend_init()
        self.handle = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        if not self.handle:
            raise UnsupportedError(f"{path}: llama.cpp cannot load this file either (a newer version might)")
        self.vocab = api.llama_model_get_vocab(self.handle)
        self.n_vocab: int = api.llama_vocab_n_tokens(self.vocab)
        self.adds_bos: bool = api.llama_vocab_get_add_bos(self.vocab)
        self.n_ctx_train: int = api.llama_model_n_ctx_train(self.handle)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.api.llama_model_free(self.handle)
            self.handle = None


class LlamaSubwords:
    """`tokenizer.Subwords` by llama.cpp, for kinds of tokenizers that ours does not know."""

    add_space_prefix = False

    def __init__(self, model: _Model, vocab: Vocab) -> None:
        self._model, self._ids = model, vocab.ids

    def encode(self, text: str, *, after_special: bool) -> list[int]:
        """Ids of text that holds no special token."""
        api, data = self._model.api, text.encode()
        room = len(data) + 8  # a token is at least a byte; some kinds add a space
        tokens = (api.llama_token * room)()
        n = api.llama_tokenize(self._model.vocab, data, len(data), tokens, room, False, False)
        if n < 0:
            raise TokenizerError(f"llama.cpp needs {-n} tokens for {len(data)} bytes: expected at most {room}")
        return list(tokens[:n])

    def text_bytes(self, token: str) -> bytes:
        """The bytes that a normal token's text stands for."""
        api = self._model.api
        room = 8 * len(token.encode(errors="surrogateescape")) + 64
        buffer = ctypes.create_string_buffer(room)
        n = api.llama_token_to_piece(self._model.vocab, self._ids[token], buffer, room, 0, False)
        return buffer.raw[: max(n, 0)]


@functools.cache
def _silent(api: Any) -> Any:
    """A log callback that says nothing; cached for good, because llama.cpp keeps calling it."""
    return api.llama_log_callback(lambda level, text, data: None)


class LlamaKV:
    """Owns a llama_context: the cache and the scratch memory of one sequence."""

    def __init__(self, model: _Model, max_len: int, threads: int | None) -> None:
        self._model, self._n = model, 0
        api = model.api
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = max_len, N_BATCH, N_BATCH
        if threads:
            params.n_threads = params.n_threads_batch = threads
        self._context = api.llama_init_from_model(model.handle, params)
        if not self._context:
            raise ContextError(f"llama.cpp cannot make a context of {max_len} positions: try a smaller n_ctx")

    def decode(self, ids: np.ndarray[Any, np.dtype[np.int32]], cancel: Cancel | None) -> np.ndarray[Any, Any]:
        """Run ids [T]; returns the logits f32 [V] of the last one."""
        if not len(ids):
            raise UsageError("no tokens to run")
        api = self._model.api
        # Without a cancel no Python runs within llama.cpp: there a Ctrl-C would be printed and lost.
        abort = api.ggml_abort_callback(0) if cancel is None else api.ggml_abort_callback(lambda data: cancel.is_set())
        api.llama_set_abort_callback(self._context, abort, None)
        try:
            for start in range(0, len(ids), N_BATCH):
                chunk = np.ascontiguousarray(ids[start : start + N_BATCH], np.int32)
                tokens = (ctypes.c_int32 * len(chunk)).from_buffer_copy(chunk.tobytes())
                status = api.llama_decode(self._context, api.llama_batch_get_one(tokens, len(chunk)))
                if cancel is not None:
                    cancel.check()
                if status:
                    raise ContextError(f"llama.cpp could not run {len(ids)} tokens (status {status})")
                self._n += len(chunk)
        finally:
            api.llama_set_abort_callback(self._context, api.ggml_abort_callback(0), None)
        row = api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(row, (self._model.n_vocab,)).astype(np.float32, copy=True)

    def length(self, layer: int = 0) -> int:
        return self._n

    def truncate(self, n: int) -> None:
        api = self._model.api
        self._n = min(self._n, n)
        if not api.llama_memory_seq_rm(api.llama_get_memory(self._context), 0, self._n, -1):
            # recurrent models cannot forget a part: start over
            api.llama_memory_seq_rm(api.llama_get_memory(self._context), 0, -1, -1)
            self._n = 0

    def fork(self, n: int | None = None) -> LlamaKV:
        raise UnsupportedError("llama.cpp's cache is not forked: run the ids again in a new sequence")

    @property
    def n_bytes(self) -> int:
        """Bytes of the saved state, which is nearly all cache."""
        return int(self._model.api.llama_state_get_size(self._context))

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._model.api.llama_free(self._context)
            self._context = None
