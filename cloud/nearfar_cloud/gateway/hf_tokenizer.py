"""The tokenizer of a Hugging Face folder, as the keys that a GGUF file has for it: one tokenizer reads both.

Byte-level BPE whose way of cutting words is known (Llama 3, Qwen 2 and 3, GPT-2, SmolLM).  A guess would give wrong ids
without a word, so everything else is refused.  Texts are read as they were written: composing accents (NFC),
which Qwen's files ask for, is left out here as for GGUF files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nearfar.errors import FileError, TokenizerError, UnsupportedError
from nearfar.vocab import TokenType

_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
# How tokenizer.json cuts words -> the name that GGUF files have for it.
_SPLITS = {f"{_HEAD}\\p{{N}}{{1,3}}{_TAIL}": "dbrx", f"{_HEAD}\\p{{N}}{_TAIL}": "qwen2"}
_HINT = "convert the model to GGUF and serve that file"


def folder_metadata(folder: Path) -> dict[str, Any]:
    """`tokenizer.*` keys.  Raises FileError, TokenizerError, UnsupportedError."""
    said = _read(folder / "tokenizer.json")
    config = _read(folder / "tokenizer_config.json", missing_is_empty=True)
    model = _object(said.get("model"), folder, "model")
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UnsupportedError(f"{folder}: its tokenizer is not byte-level BPE; {_HINT}")
    tokens, types = _tokens(folder, model, said.get("added_tokens") or [])
    ids = {text: i for i, text in enumerate(tokens)}
    meta: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre(folder, said, bool(model.get("ignore_merges"))),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])],
    }
    for name in ("bos", "eos"):
        named = config.get(f"{name}_token")
        text = named.get("content") if isinstance(named, dict) else named
        if isinstance(text, str) and text in ids:
            meta[f"tokenizer.ggml.{name}_token_id"] = ids[text]
    meta["tokenizer.ggml.add_bos_token"] = _begins(said) and "tokenizer.ggml.bos_token_id" in meta
    if template := _template(folder, config):
        meta["tokenizer.chat_template"] = template
    return meta


def _tokens(folder: Path, model: Mapping[str, Any], added: list[Any]) -> tuple[list[str], list[int]]:
    """Texts by id, and what kind each token is; ids that nothing has are unused."""
    vocab = _object(model.get("vocab"), folder, "model.vocab")
    places: dict[int, tuple[str, TokenType]] = {}
    for text, i in vocab.items():
        places[i] = (text, TokenType.NORMAL)
    for token in added:
        kind = TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED
        places[token["id"]] = (token["content"], kind)
    if not places or not all(isinstance(i, int) and 0 <= i < 1 << 22 for i in places):
        raise TokenizerError(f"{folder / 'tokenizer.json'}: expected tokens with ids from 0 on")
    found = [places.get(i, (f"[UNUSED_{i}]", TokenType.UNUSED)) for i in range(max(places) + 1)]
    return [text for text, _ in found], [int(kind) for _, kind in found]


def _pre(folder: Path, said: Mapping[str, Any], ignore_merges: bool) -> str:
    """The name of the way to cut words."""
    normalizer = said.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise UnsupportedError(f"{folder}: its tokenizer changes texts ({normalizer.get('type')}); {_HINT}")
    step = said.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", []) if step.get("type") == "Sequence" else [step]
    kinds = [s.get("type") for s in steps]
    if kinds == ["Split", "ByteLevel"]:
        name = _SPLITS.get(str(steps[0].get("pattern", {}).get("Regex")))
        if name is not None:
            return "llama-bpe" if name == "dbrx" and ignore_merges else name
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    raise UnsupportedError(f"{folder}: its tokenizer cuts words in a way that this build does not know; {_HINT}")


def _begins(said: Mapping[str, Any]) -> bool:
    """Whether texts begin with a special token."""
    step = said.get("post_processor") or {}
    steps = step.get("processors", []) if step.get("type") == "Sequence" else [step]
    single = [s["single"] for s in steps if s.get("type") == "TemplateProcessing" and s.get("single")]
    return any("SpecialToken" in pieces[0] for pieces in single)


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name
        found = next((t.get("template") for t in found if t.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _read(path: Path, *, missing_is_empty: bool = False) -> dict[str, Any]:
    try:
        return _object(json.loads(path.read_bytes()), path.parent, path.name)
    except FileNotFoundError:
        if missing_is_empty:
            return {}
        raise FileError(f"{path}: no such file; expected a folder as Hugging Face writes it") from None
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not JSON: {error}") from None


def _object(value: Any, folder: Path, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TokenizerError(f"{folder}: {name}: expected an object")
    return value
