"""Text to token ids and back, as the tokenizer inside a GGUF file says.

First stop of text -> ids: special tokens are found here, the text between them goes to bpe or spm.

    "<|u|>turn it off"  ->  7 (control: only with parse_special)  |  "turn it off"  ->  bpe | spm  ->  ids
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from nearfar.bpe import ByteLevelBPE
from nearfar.detokenize import Detokenizer
from nearfar.errors import TokenizerError, UnsupportedError, UsageError
from nearfar.forms import Part
from nearfar.spm import SentencePieces
from nearfar.vocab import Vocab, utf8

_ASCII_SPACES = " \t\n\v\f\r"


class Subwords(Protocol):
    """What bpe and spm have in common."""

    add_space_prefix: bool

    def encode(self, text: str, *, after_special: bool) -> list[int]: ...

    def text_bytes(self, token: str) -> bytes: ...


class Tokenizer:
    """Text <-> ids.  Ids agree with llama.cpp's for the same file; text that spells a control token stays text."""

    def __init__(self, vocab: Vocab, subwords: Subwords, *, strips_after: frozenset[int] = frozenset()) -> None:
        """`strips_after`: special tokens that swallow the whitespace behind them."""
        self.vocab = vocab
        self._subwords, self._strips_after = subwords, strips_after
        self._user_defined = tuple(i for i in vocab.marked if i in vocab.user_defined)
        self._bytes: dict[int, bytes] = {}

    @property
    def n_vocab(self) -> int:
        return len(self.vocab.tokens)

    @property
    def bos_id(self) -> int | None:
        return self.vocab.bos_id

    @property
    def eos_id(self) -> int | None:
        return self.vocab.eos_id

    @property
    def eog_ids(self) -> frozenset[int]:
        """Every token that ends an answer: eos, and end-of-turn tokens known by key or name."""
        return self.vocab.eog_ids

    @property
    def add_bos(self) -> bool:
        """Whether texts begin with `bos_id` unless told otherwise."""
        return self.vocab.add_bos

    @property
    def add_eos(self) -> bool:
        """Whether the file wants texts to end with `eos_id`; `encode` adds it only when asked, a prompt goes on."""
        return self.vocab.add_eos

    @property
    def add_space_prefix(self) -> bool:
        """Whether `encode` puts a space before the text, which `decode` takes away again."""
        return self._subwords.add_space_prefix

    def encode(
        self, text: str, *, add_bos: bool | None = None, add_eos: bool = False, parse_special: bool = False
    ) -> list[int]:
        """Ids of any text; lone surrogates count as U+FFFD.

        `parse_special=True` reads control tokens in the text as such: only for text that we wrote ourselves.
        """
        marks = self.vocab.marked if parse_special else self._user_defined
        ids = self._encode_fragments(self._fragments(text, marks), add_bos)
        return ids + self._eos() if add_eos else ids

    def encode_parts(self, parts: Iterable[Part], *, add_bos: bool | None = None) -> list[int]:
        """Ids of text in parts: a control part is one token, what stands between two of them is encoded as one text.

        A control part that the vocabulary does not have is text like the rest.  No text becomes one of the control
        parts, not even where the file calls those tokens user-defined.
        """
        fragments: list[str | int] = []
        for part in parts:
            i = self.token_id(part.text) if part.control else None
            if i is not None:
                fragments.append(i)
            elif fragments and isinstance(fragments[-1], str):
                fragments[-1] += part.text
            else:
                fragments.append(part.text)
        controls = frozenset(f for f in fragments if isinstance(f, int))
        marks = [i for i in self._user_defined if i not in controls]
        cut: list[str | int] = []
        for fragment in fragments:
            if isinstance(fragment, int):
                cut.append(fragment)
                continue
            strip = bool(cut) and cut[-1] in self._strips_after
            cut += self._fragments(fragment.lstrip(_ASCII_SPACES) if strip else fragment, marks)
        return self._encode_fragments(cut, add_bos, forbidden=controls)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ids, U+FFFD for bytes that are no UTF-8.  `skip_special=False` shows control tokens by name."""
        detokenizer = Detokenizer(self, skip_special=skip_special)
        return "".join([detokenizer.push(i) for i in ids]) + detokenizer.flush()

    def token_bytes(self, i: int) -> bytes:
        """What token `i` adds to the text; a control token's bytes are its name.  Raises UsageError out of range."""
        if not 0 <= i < self.n_vocab:
            raise UsageError(f"token {i}: expected 0..{self.n_vocab - 1}")
        found = self._bytes.get(i)
        if found is None:
            found = self._bytes[i] = self._make_bytes(i)
        return found

    def token_id(self, name: str) -> int | None:
        """The special token of that name, None if there is none."""
        i = self.vocab.ids.get(name)
        return i if i is not None and self.is_special(i) else None

    def is_control(self, i: int) -> bool:
        """Whether token `i` is no text for people: a control token, or the unknown token."""
        return i in self.vocab.control or i in self.vocab.unknown

    def is_special(self, i: int) -> bool:
        """Whether token `i` is found by its name in a text: control, unknown and user-defined tokens."""
        return self.is_control(i) or i in self.vocab.user_defined

    def _make_bytes(self, i: int) -> bytes:
        vocab = self.vocab
        if self.is_special(i):
            return utf8(vocab.tokens[i])
        if i in vocab.silent:
            return b""
        if i in vocab.byte_values:
            return bytes([vocab.byte_values[i]])
        return self._subwords.text_bytes(vocab.tokens[i])

    def _fragments(self, text: str, marks: Iterable[int]) -> list[str | int]:
        """`text` cut at the special tokens `marks`, longest first; what a longer one took, a shorter one cannot."""
        text = _without_surrogates(text)
        fragments: list[str | int] = [text] if text else []
        for i in marks:
            if self.vocab.tokens[i] in text:
                fragments = [piece for f in fragments for piece in ([f] if isinstance(f, int) else self._cut(f, i))]
        return fragments

    def _cut(self, text: str, i: int) -> list[str | int]:
        first, *others = text.split(self.vocab.tokens[i])
        pieces: list[str | int] = [first]
        for other in others:
            pieces += [i, other.lstrip(_ASCII_SPACES) if i in self._strips_after else other]
        return [piece for piece in pieces if piece != ""]

    def _encode_fragments(
        self, fragments: Iterable[str | int], add_bos: bool | None, *, forbidden: frozenset[int] = frozenset()
    ) -> list[int]:
        ids: list[int] = []
        if self.add_bos if add_bos is None else add_bos:
            if self.bos_id is None:
                raise UsageError("add_bos: this tokenizer has no beginning-of-text token")
            ids.append(self.bos_id)
        after_special = True
        for fragment in fragments:
            if isinstance(fragment, int):
                ids.append(fragment)
            else:
                written = self._subwords.encode(fragment, after_special=after_special)
                if not forbidden.isdisjoint(written):
                    raise UsageError("the text spells a control token that this tokenizer cannot keep apart")
                ids += written
            after_special = isinstance(fragment, int)
        return ids

    def _eos(self) -> list[int]:
        if self.eos_id is None:
            raise UsageError("add_eos: this tokenizer has no end-of-text token")
        return [self.eos_id]


def tokenizer_from_metadata(meta: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a file's `tokenizer.ggml.*` keys describe.

    Raises TokenizerError where it is missing or inconsistent, UnsupportedError for a kind that this build lacks.
    """
    kind = meta.get("tokenizer.ggml.model")
    if kind is None or kind in ("none", "no_vocab"):
        raise TokenizerError("the file carries no tokenizer (key tokenizer.ggml.model): text cannot be turned into ids")
    subwords: Subwords
    if kind == "llama":
        vocab, subwords = SentencePieces.from_metadata(meta)
    elif kind == "gpt2":
        vocab, subwords = ByteLevelBPE.from_metadata(meta)
    else:
        raise UnsupportedError(f"tokenizer.ggml.model={str(kind)[:40]!r}: this build knows llama (SPM) and gpt2 (BPE)")
    return Tokenizer(vocab, subwords, strips_after=_strips_after(meta, vocab))


def _strips_after(meta: Mapping[str, Any], vocab: Vocab) -> frozenset[int]:
    """Phi-3's special tokens swallow the whitespace behind them.  No key says so; as in llama.cpp the name does."""
    name = meta.get("general.name")
    if not isinstance(name, str) or not ("phi-3" in name.lower() or "phi3" in name.lower()):
        return frozenset()
    return frozenset(i for i in vocab.marked if vocab.tokens[i] not in ("<unk>", "<s>", "<|endoftext|>"))


def _without_surrogates(text: str) -> str:
    """Surrogate pairs joined, lone surrogates replaced by U+FFFD: what remains can be written as UTF-8."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
