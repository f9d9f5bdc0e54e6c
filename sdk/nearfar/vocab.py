"""The vocabulary of a GGUF file: texts, ids, what kind each token is, which end an answer.

`Vocab.from_metadata` is the door for the `tokenizer.ggml.*` keys: lists that disagree, ids out of range and double
tokens are refused here, so the encoders behind it check nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from nearfar.errors import TokenizerError
from nearfar.text_table import TextIndex, TextTable, Without


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # never made from text, never shown
    USER_DEFINED = 4  # found in text before anything else
    UNUSED = 5
    BYTE = 6  # <0xXX>


# Tokens that end an answer wherever a vocabulary has them, whatever type the file gives them: the names llama.cpp
# knows (turn, text and message ends; padding and separators of fill-in-the-middle models).
_END_NAMES = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
)  # fmt: skip
# Further tokens that are control tokens whatever type the file gives them (fill in the middle).
_CONTROL_NAMES = (
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
    "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
    "<|prefix|>", "<|suffix|>", "<|middle|>",
)  # fmt: skip
_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")


@dataclass(frozen=True, slots=True)
class Vocab:
    """Tokens by id and by text.

    `written` holds what ordinary text may become: every token but control, unknown and byte tokens, so that text that
    spells a control token stays text.  `marked` are the tokens that are looked for in the text itself, longest first.
    """

    tokens: Sequence[str]
    ids: Mapping[str, int]
    written: Mapping[str, int]
    control: frozenset[int]
    unknown: frozenset[int]
    user_defined: frozenset[int]
    silent: frozenset[int]  # unused and undefined: they have no text
    byte_values: dict[int, int]  # byte token -> its byte
    marked: tuple[int, ...]
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    eog_ids: frozenset[int]
    add_bos: bool
    add_eos: bool

    @property
    def hidden(self) -> frozenset[int]:
        """Tokens that are not part of a text for people."""
        return self.control | self.unknown

    @classmethod
    def from_metadata(
        cls, meta: Mapping[str, Any], *, bos: int | None, eos: int | None, unk: int | None, add_bos: bool
    ) -> Vocab:
        """Read the keys; `bos`, `eos`, `unk` and `add_bos` hold where the file does not say.  Raises TokenizerError."""
        tokens = _texts(meta)
        n = len(tokens)
        ids = _ids(tokens)
        kinds = _kinds(meta, tokens, ids)
        control = kinds[TokenType.CONTROL]
        shy = control | kinds[TokenType.UNKNOWN] | kinds[TokenType.BYTE]
        marked = control | kinds[TokenType.UNKNOWN] | kinds[TokenType.USER_DEFINED]

        ends = {ids[name] for name in _END_NAMES if name in ids}
        ends |= {i for i in (_special_id(meta, key, n, None) for key in _END_KEYS) if i is not None}
        eos_id = _special_id(meta, "eos", n, eos)
        bos_id = _special_id(meta, "bos", n, bos)
        add_bos, add_eos = _flag(meta, "add_bos_token", add_bos), _flag(meta, "add_eos_token", False)
        for wanted, name, i in ((add_bos, "bos", bos_id), (add_eos, "eos", eos_id)):
            if wanted and i is None:
                raise TokenizerError(f"tokenizer.ggml.add_{name}_token is on, but no {name}_token_id is given")
        return cls(
            tokens=tokens,
            ids=ids,
            written=_without(ids, shy, tokens),
            control=control,
            unknown=kinds[TokenType.UNKNOWN],
            user_defined=kinds[TokenType.USER_DEFINED],
            silent=kinds[TokenType.UNUSED],
            byte_values={i: _byte_value(i, tokens[i]) for i in kinds[TokenType.BYTE]},
            marked=tuple(sorted(marked, key=lambda i: (-len(utf8(tokens[i])), i))),
            bos_id=bos_id,
            eos_id=eos_id,
            unk_id=_special_id(meta, "unknown", n, unk),
            eog_ids=frozenset(ends if eos_id is None else ends | {eos_id}),
            add_bos=add_bos,
            add_eos=add_eos,
        )


def numbers(meta: Mapping[str, Any], key: str, n: int, kinds: tuple[type, ...]) -> list[Any] | None:
    """The list of `n` numbers under `tokenizer.ggml.{key}`, None where the file has none."""
    values = meta.get(f"tokenizer.ggml.{key}")
    if values is None:
        return None
    if not isinstance(values, (list, tuple)) or not set(map(type, values)) <= set(kinds):
        raise TokenizerError(f"tokenizer.ggml.{key}: expected a list of {' or '.join(k.__name__ for k in kinds)}")
    if len(values) != n:
        raise TokenizerError(f"tokenizer.ggml.{key} has {len(values)} entries, tokenizer.ggml.tokens {n}")
    return list(values)


def _texts(meta: Mapping[str, Any]) -> Sequence[str]:
    tokens = meta.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise TokenizerError("the file has no tokenizer.ggml.tokens: it carries no tokenizer")
    if isinstance(tokens, TextTable):
        if not tokens.has_empty:
            return tokens
        tokens = list(tokens)
    if not isinstance(tokens, (list, tuple)) or set(map(type, tokens)) != {str}:
        raise TokenizerError("tokenizer.ggml.tokens: expected a list of texts, at least one")
    return [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)] if "" in tokens else list(tokens)


def _ids(tokens: Sequence[str]) -> Mapping[str, int]:
    """text -> id; a text that is two tokens is refused."""
    found: Mapping[str, int]
    if isinstance(tokens, TextTable):
        found = TextIndex(tokens)
        doubles = found.doubles()
    else:
        found = dict(zip(tokens, range(len(tokens)), strict=True))
        doubles = None if len(found) == len(tokens) else _doubles(tokens)
    if doubles:
        a, b = doubles
        raise TokenizerError(f"tokenizer.ggml.tokens: {tokens[a][:40]!r} is token {a} and token {b}")
    return found


def _doubles(tokens: Sequence[str]) -> tuple[int, int]:
    first: dict[str, int] = {}
    return next((first[text], i) for i, text in enumerate(tokens) if first.setdefault(text, i) != i)


def _without(ids: Mapping[str, int], hidden: frozenset[int], tokens: Sequence[str]) -> Mapping[str, int]:
    """`ids` less the tokens `hidden`."""
    if not isinstance(ids, dict):
        return Without(ids, hidden)
    left = ids.copy()
    for i in hidden:
        del left[tokens[i]]
    return left


def _kinds(meta: Mapping[str, Any], tokens: Sequence[str], ids: Mapping[str, int]) -> dict[int, frozenset[int]]:
    """The ids of each type but NORMAL; 0 and unknown numbers count as UNUSED.  No list: all are NORMAL."""
    found: dict[int, set[int]] = {kind: set() for kind in TokenType}
    types = numbers(meta, "token_type", len(tokens), (int,)) or []
    for i in np.flatnonzero(np.array(types) != TokenType.NORMAL).tolist():
        found.get(types[i], found[TokenType.UNUSED]).add(i)
    for name in _END_NAMES + _CONTROL_NAMES:
        if name in ids:
            for members in found.values():
                members.discard(ids[name])
            found[TokenType.CONTROL].add(ids[name])
    return {kind: frozenset(members) for kind, members in found.items()}


def _byte_value(i: int, text: str) -> int:
    match = re.fullmatch("<0x([0-9A-Fa-f]{2})>", text)
    if match is None:
        raise TokenizerError(f"token {i} is a byte token named {text[:40]!r}: expected <0x00> to <0xFF>")
    return int(match[1], 16)


def _special_id(meta: Mapping[str, Any], name: str, n: int, default: int | None) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = meta.get(key)
    if value is None:
        return default if default is not None and default < n else None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < n:
        raise TokenizerError(f"{key}={str(value)[:40]}: expected a token, 0..{n - 1}")
    return value


def _flag(meta: Mapping[str, Any], name: str, default: bool) -> bool:
    value = meta.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise TokenizerError(f"tokenizer.ggml.{name}={str(value)[:40]}: expected true or false")
    return value


def utf8(text: str) -> bytes:
    """The bytes of a token's text: the reader keeps bytes that are no UTF-8 as surrogate escapes."""
    return text.encode("utf-8", "surrogateescape")
