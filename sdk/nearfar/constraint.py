"""Output that must satisfy a JSON schema: a mask over the vocabulary before each token.

The one seam for constrained decoding, and the only importer of llguidance (extra `[schema]`).  The output is compact
JSON (no spaces between tokens of the grammar), so that a schema of finite values has finitely many answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nearfar.errors import MissingExtraError, SchemaError

if TYPE_CHECKING:
    from nearfar.tokenizer import Tokenizer

Array = NDArray[np.float32]

_COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
_OR_TEXT = """start: (TEXT | json)?
TEXT: /[^{](?s:.*)/
json: %%json %s
"""


class Constraint:
    """Owns the parser state of one answer: `mask` the logits, sample, `accept` the token."""

    def __init__(self, vocabulary: Vocabulary, schema: Mapping[str, Any], *, or_text: bool = False) -> None:
        """`or_text`: the answer may also be any text that does not begin with a brace."""
        from llguidance import LLMatcher

        try:
            if or_text:
                grammar = LLMatcher.grammar_from_lark(_OR_TEXT % json.dumps({**schema, "x-guidance": _COMPACT}))
            else:
                grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_COMPACT)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise SchemaError(f"not a JSON schema: {error}") from error
        if problem := LLMatcher.validate_grammar(grammar, vocabulary.ll):
            raise SchemaError(f"this schema cannot be used: {_one_line(problem)}")
        self._vocabulary = vocabulary
        self._matcher = LLMatcher(vocabulary.ll, grammar, log_level=0)  # it would write pieces of answers to stderr
        self._bits = np.zeros((1, -(-vocabulary.n_vocab // 32)), np.int32)
        self._check()

    def mask(self, logits: Array) -> Array:
        """logits [V] -> a copy in which tokens that would break the schema are -inf."""
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._bits)
        self._check()
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: len(logits)].astype(bool)
        if not allowed.any():
            raise SchemaError("no token can continue the answer: the schema cannot be satisfied with this vocabulary")
        return np.where(allowed, logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """Advance by the token that was chosen under the last mask."""
        if not self._matcher.consume_token(token):
            self._check()
            raise SchemaError(f"token {token} does not continue the answer")  # only if it was not masked

    def rollback(self, n: int) -> None:
        """Take back the last `n` tokens accepted."""
        if n and not self._matcher.rollback(n):
            raise SchemaError(f"{n} tokens back: the answer is shorter")

    def fork(self) -> Constraint:
        """An independent parser in the same state: drafts may run ahead in it."""
        other = object.__new__(Constraint)
        other._vocabulary, other._matcher = self._vocabulary, self._matcher.deep_copy()
        other._bits = np.zeros_like(self._bits)
        return other

    @property
    def is_done(self) -> bool:
        """The answer is complete: nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise SchemaError(
                f"this schema cannot be satisfied: no text fits it ({_first_line(self._matcher.get_error())})"
            )


class Vocabulary:
    """A tokenizer in llguidance's form.  Building it takes a while for large vocabularies: make one per model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError as error:
            raise MissingExtraError("llguidance", "schema", "output that follows a JSON schema") from error
        self.n_vocab = tokenizer.n_vocab
        self.ll = LLTokenizer(TokenizerWrapper(_Words(tokenizer)))


class _Words:
    """The attributes that llguidance reads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.eos_id is None:
            raise SchemaError("this model names no end-of-text token: constrained output needs one")
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        ids = range(tokenizer.n_vocab)
        # The bytes of a control token are never text; llguidance marks such tokens by a leading 0xff byte.
        self.tokens = [
            b"\xff" + f"[{i}]".encode() if tokenizer.is_control(i) else tokenizer.token_bytes(i) for i in ids
        ]
        self.special_token_ids = [i for i in ids if tokenizer.is_control(i)]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_bos=False)


def _first_line(text: str) -> str:  # the state of the parser follows
    return _one_line(text.strip().partition("\n")[0])


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200] or "unknown reason"
