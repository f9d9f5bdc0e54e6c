r"""Cutting text into words before byte-level BPE: the patterns that `tokenizer.ggml.pre` names.

Second stop of text -> ids: tokenizer -> pretokenize -> bpe | spm.

The patterns use `\p{L}` and its kin, which Python's `re` lacks.  So each text gets a *shape* of the same length: ASCII
stays, any other character becomes one fixed member of its Unicode class (an upper-case letter `Ā`, a mark U+0301 ...).
The pattern, with `\p{L}` written out as the letters that a shape can hold, is matched on the shape, and its cuts are
applied to the text.  Classes come from `unicodedata`, that is from the Unicode version of the running Python.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from unicodedata import category

from nearfar.errors import TokenizerError

# One member of each class, so that `category(member)` is the class: (first letters of the category, member).
_STAND_INS = {
    "Lu": "Ā",
    "Ll": "ā",
    "Lt": "ǅ",
    "Lm": "ʰ",
    "Lo": "ª",
    "M": "\u0301",
    "N": "²",
    "P": "«",
    "S": "£",
}
_SPACE, _OTHER = "\u00a0", "\u00ad"  # whitespace; controls, formats, private and unassigned characters
_ALPHABET = [*map(chr, range(128)), *_STAND_INS.values(), _SPACE, _OTHER]  # all that a shape is made of

# What `\s` is in these patterns.  (Python's own `\s` adds U+001C..U+001F.)
_ASCII_SPACES = r"\t\n\v\f\r "
_ALL_SPACES = _ASCII_SPACES + r"\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

_MAX_MEMO = 1 << 16  # code points whose class is remembered


class _Shapes(dict[int, str]):
    """code point -> character of the shape, filled as characters are met (`str.translate` asks `__missing__`)."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        if code < 128:
            shape = char
        elif char.isspace():
            shape = _SPACE
        else:
            kind = category(char)
            shape = _STAND_INS.get(kind) or _STAND_INS.get(kind[0], _OTHER)
        if len(self) < _MAX_MEMO:
            self[code] = shape
        return shape


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    r"""One `tokenizer.ggml.pre`.

    Each pattern cuts the pieces that the one before left; what lies between two matches is a piece as well.  A pattern
    with non-ASCII literals is matched on the text, one with `\p{..}` on the shape.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is that token, whatever the merges say
    add_bos: bool = False  # unless the file says otherwise
    _stages: tuple[tuple[re.Pattern[str], bool], ...] = field(init=False, repr=False, compare=False)
    _shapes: _Shapes = field(init=False, repr=False, compare=False, default_factory=_Shapes)

    def __post_init__(self) -> None:
        stages = ((re.compile(_translate(p)), p.isascii()) for p in self.patterns)
        object.__setattr__(self, "_stages", tuple(stages))

    def split(self, text: str) -> list[str]:
        """The words of `text`; joined they are `text` again."""
        shape = text if text.isascii() else text.translate(self._shapes)
        cuts = [0, len(text)]
        for pattern, on_shape in self._stages:
            finer = [0]
            for start, end in pairwise(cuts):
                for match in pattern.finditer(shape if on_shape else text, start, end):
                    finer += [cut for cut in match.span() if cut > finer[-1]]
                if end > finer[-1]:
                    finer.append(end)
            cuts = finer
        return [text[start:end] for start, end in pairwise(cuts)]


def _members(prefix: str) -> str:
    """The inside of a `[...]` that holds the characters of a shape whose category begins with `prefix`."""
    return "".join(re.escape(c) for c in _ALPHABET if category(c).startswith(prefix))


def _translate(pattern: str) -> str:
    r"""`\p{..}`, `\s` and `\S` written out for Python's `re`, inside and outside of `[...]`."""
    spaces = _ASCII_SPACES + _SPACE if pattern.isascii() else _ALL_SPACES
    inside = False

    def replace(match: re.Match[str]) -> str:
        nonlocal inside
        found = match[0]
        if found in "[]":
            inside = found == "["
            return found
        if found == r"\S":
            return f"[^{spaces}]"
        if found == r"\s" or match[1]:
            members = _members(match[1]) if match[1] else spaces
            return members if inside else f"[{members}]"
        return found

    return re.sub(r"\\p\{(\w+)\}|\\.|[\[\]]", replace, pattern)


# --- the patterns; names as in llama.cpp and in the tokenizer.json files they come from

_SUFFIXES = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = rf"(?:{_SUFFIXES})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}"
_QWEN35 = (
    rf"(?:{_SUFFIXES})|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_JAIS2 = _LLAMA3.removesuffix(r"\s+(?!\S)|\s+") + "".join(
    rf"\s{{{n}}}(?!\S)|" for n in (512, 256, 128, 64, 32, 16, 8, 4)
) + r"\s{1,2}(?!\S)|\s{1}"  # fmt: skip

# Words that begin in capitals and end in small letters; letters without case are both.
_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FALLING = rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALL}+"
_RISEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALL}*"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_FALLING}|{_RISEN}|\p{{N}}|{_SIGNS}|{_BLANKS}"
_GPT4O = rf"{_FALLING}(?:{_SUFFIXES})?|{_RISEN}(?:{_SUFFIXES})?|\p{{N}}{{1,3}}|{_SIGNS}|{_BLANKS}"

_DEEPSEEK_LETTERS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-"
    "\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-"
    "\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-"
    "\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2"
    "\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-"
    "\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_MARKS = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_DEEPSEEK_CJK = "\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff"
_DEEPSEEK3_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _BLANKS
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"


def _pre(*patterns: str, ignore_merges: bool = False, add_bos: bool = False) -> tuple[tuple[str, ...], bool, bool]:
    return patterns, ignore_merges, add_bos


# names -> (patterns, ignore_merges, add_bos)
_KNOWN = {
    "default": _pre(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0"
    " mellum modern-bert jina-v1-en jina-v2-code roberta-bpe": _pre(_GPT2),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": _pre(r"\p{N}", _GPT2),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": _pre(
        _LLAMA3, ignore_merges=True, add_bos=True
    ),
    "glm4 glm5": _pre(_LLAMA3, ignore_merges=True),
    "dbrx smaug-bpe chatglm-bpe": _pre(_LLAMA3),
    "jais-2": _pre(_JAIS2),
    "minicpm5": _pre(r"\p{N}{1,3}", _QWEN2.replace(r"|\p{N}|", r"|\p{N}+|"), ignore_merges=True),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": _pre(_QWEN2),
    "qwen35": _pre(_QWEN35),
    "ufakzeka": _pre(_QWEN2.removeprefix(rf"(?:{_SUFFIXES})|")),
    "seed-coder": _pre(_QWEN2.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+")),
    "bailingmoe bailingmoe2 llada-moe": _pre(
        _QWEN2.replace(_SUFFIXES, "'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])").replace(r"\s*[\r\n]+", r"\s*[\r\n]")
    ),
    "tekken": _pre(_TEKKEN, ignore_merges=True, add_bos=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": _pre(_GPT4O),
    "falcon": _pre(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    "deepseek-llm": _pre(
        r"[\r\n]",
        rf"\s?[{_DEEPSEEK_LETTERS}]+",
        rf"\s?[{_DEEPSEEK_MARKS}]+",
        r"\s+\Z",
        f"[{_DEEPSEEK_CJK}]+",
        r"\p{N}+",
    ),
    "deepseek-coder": _pre(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", f"[{_DEEPSEEK_CJK}]+", r"\p{N}"),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": _pre(r"\p{N}{1,3}", _DEEPSEEK3_CJK, _DEEPSEEK3_WORDS),
    "poro-chat bloom gpt3-finnish": _pre(_BLOOM),
    "viking": _pre(_BLOOM, r"\p{N}"),
}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer that `tokenizer.ggml.pre` names.  Raises TokenizerError for one that is not known: a guess
    would give wrong ids without a word."""
    for names, (patterns, ignore_merges, add_bos) in _KNOWN.items():
        if name in names.split():
            return PreTokenizer(patterns, ignore_merges, add_bos)
    raise TokenizerError(f"tokenizer.ggml.pre={name[:40]!r}: this build knows {', '.join(known_pre_tokenizers())}")


def known_pre_tokenizers() -> list[str]:
    """Every value of `tokenizer.ggml.pre` that `pre_tokenizer` takes."""
    return [name for names in _KNOWN for name in names.split()]
