"""Answers that follow a JSON schema: compiled beside the engine's thread, a mask over the logits within it.

The parser is the one that devices use (`nearfar.constraint`, llguidance), so that device and cloud agree about every
schema.  It bounds its own work, compiling and masking; bytes and depth are bounded here, before it sees anything.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from nearfar.constraint import Constraint, Vocabulary
from nearfar.errors import SchemaError
from nearfar.tokenizer import Tokenizer
from nearfar_cloud.gateway.fields import checked_json
from nearfar_cloud.gateway.refusal import Refusal, of_error
from nearfar_cloud.types import Array

MAX_BYTES, MAX_DEPTH, MAX_S = 64 << 10, 32, 5.0
KEPT = 128  # compiled schemas


class Compiled(NamedTuple):
    """A grammar at its beginning, and what it was made of: `Grammars.make` makes it again in another process."""

    constraint: Constraint
    source: str


class GrammarHook:
    """The LogitsHook of one answer."""

    def __init__(self, constraint: Constraint, eos_id: int, source: str) -> None:
        self._constraint, self._eos_id, self.source = constraint, eos_id, source
        self.n_followed = 0  # tokens
        self._n_after = 0  # of these, behind the finished answer

    def apply(self, logits: Array) -> Array:
        """logits [V] -> a copy in which what leaves the grammar is -inf; a finished answer can only end."""
        if self._constraint.is_done:
            end = np.full_like(logits, -np.inf)
            end[self._eos_id] = logits[self._eos_id]
            return end
        return self._constraint.mask(logits)

    def accept(self, token: int) -> None:
        self.n_followed += 1
        if self._constraint.is_done:
            self._n_after += 1
        else:
            self._constraint.accept(token)

    def rollback(self, n: int) -> None:
        self.n_followed -= n
        after = min(n, self._n_after)
        self._n_after -= after
        self._constraint.rollback(n - after)


class Grammars:
    """Compiled schemas of one tokenizer, the last used ones kept.  `count` hears compiled, cached or refused."""

    def __init__(self, tokenizer: Tokenizer, count: Callable[[str], None] = lambda what: None) -> None:
        self._tokenizer, self._count = tokenizer, count
        self._kept: OrderedDict[str, Compiled] = OrderedDict()
        self._vocabulary: Vocabulary | None = None
        self._lock = threading.Lock()  # around making the vocabulary
        self._threads = ThreadPoolExecutor(2, "grammar")

    async def compile(self, schema: Mapping[str, Any], param: str, *, or_text: bool = False) -> Compiled:
        """The grammar of a schema; each answer has a hook of its own.

        Raises Refusal (400): schema_too_complex, invalid_schema.
        """
        try:
            checked_json(schema, param, MAX_BYTES, MAX_DEPTH)
            key = json.dumps([schema, or_text])
            found = self._kept.get(key)
            if found is None:
                self._count("compiled")
                found = await asyncio.wait_for(
                    asyncio.get_running_loop().run_in_executor(self._threads, self._compile, schema, or_text), MAX_S
                )
            else:
                self._count("cached")
        except TimeoutError:
            self._count("refused")
            message = f"{param}: not compiled within {MAX_S:g} s"
            raise Refusal(400, "schema_too_complex", message, param=param) from None
        except SchemaError as error:
            self._count("refused")
            if "too large" in str(error):
                raise Refusal(400, "schema_too_complex", f"{param}: {error}", param=param) from None
            raise of_error(error, param) from None
        except Refusal:
            self._count("refused")
            raise
        return self._keep(key, found)

    def hook(self, compiled: Compiled) -> GrammarHook:
        """For one answer."""
        assert self._tokenizer.eos_id is not None  # the vocabulary was made
        return GrammarHook(compiled.constraint.fork(), self._tokenizer.eos_id, compiled.source)

    def make(self, source: str) -> GrammarHook:
        """A hook out of the `source` of one that was made elsewhere, and checked there; waits, for one thread.

        As long as it takes: it was compiled within MAX_S already, where this machine was less busy.
        """
        found = self._kept.get(source)
        if found is None:
            found = self._compile(*json.loads(source))
        return self.hook(self._keep(source, found))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _keep(self, source: str, found: Compiled) -> Compiled:
        self._kept[source] = found
        self._kept.move_to_end(source)
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return found

    def _compile(self, schema: Mapping[str, Any], or_text: bool) -> Compiled:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self._tokenizer)
        return Compiled(Constraint(self._vocabulary, schema, or_text=or_text), json.dumps([schema, or_text]))
