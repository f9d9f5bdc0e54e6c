"""A folder from Hugging Face is served with its own tokenizer: ids are those of the library, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [cloud])")
pytest.importorskip("fastapi", reason="fastapi is not installed (extra [cloud])")
pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra [dev])")

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from nearfar.errors import FileError, TokenizerError, UnsupportedError, UsageError
from nearfar.tokenizer import tokenizer_from_metadata
from nearfar_cloud.gateway.hf_tokenizer import _SPLITS, folder_metadata
from nearfar_cloud.gateway.served import open_served
from nearfar_cloud.model.packed import can_pack
from tests.cloud.gateway import CHATML, serving, tiny_path
from tests.cloud.serving import loaded
from tests.cloud.test_serving_models import write_folder

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = (
    "Hello there, it's 1234567 o'clock  \n\n and I'LL go",
    "naïve Straße 東京 🙂 é",
    "\tif (x==1) {\r\n  return;\n}   ",
    "",
)
SPLITS = {name: regex for regex, name in _SPLITS.items()}


def pre_tokenizer(kind: str) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt-2", "smollm"))
    if kind == "gpt-2":
        return byte_level
    first = pre_tokenizers.Digits(True) if kind == "smollm" else pre_tokenizers.Split(Regex(SPLITS[kind]), "isolated")
    return pre_tokenizers.Sequence([first, byte_level])


def write_tokenizer(folder: Path, kind: str = "qwen2", **config: Any) -> Tokenizer:
    """A tokenizer of 320 tokens with merges learned from the texts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizer(kind)
    if kind == "qwen2":
        made.normalizer = normalizers.NFC()
    marks = ["<|im_start|>", "<|im_end|>", "<|begin|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=317, special_tokens=[], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(TEXTS * 5, trainer)
    made.add_special_tokens(marks)
    if kind == "dbrx":
        first = ("<|begin|>", made.token_to_id("<|begin|>"))
        made.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[first])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    said = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|begin|>"}, "chat_template": CHATML} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return made


@pytest.mark.parametrize("kind", ["qwen2", "dbrx", "gpt-2", "smollm"])
def test_ids_are_those_of_the_library(tmp_path: Path, kind: str) -> None:
    theirs = write_tokenizer(tmp_path / "model", kind)
    ours = tokenizer_from_metadata(folder_metadata(tmp_path / "model"))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    # Marks that somebody writes stay text; the library would read them as marks.
    written = ours.encode("<|im_end|>")
    assert theirs.token_to_id("<|im_end|>") not in written
    assert ours.eog_ids == {theirs.token_to_id("<|im_end|>")}
    assert ours.add_bos == (kind == "dbrx")


@pytest.mark.parametrize("form", [None, "bf16", "q8_0"])
def test_a_folder_is_served(tmp_path: Path, form: Any) -> None:
    if form == "q8_0" and not can_pack():
        pytest.skip("the compiled extension is not built")
    folder = write_folder(tmp_path / "model", loaded("qwen2"), "qwen2")
    write_tokenizer(folder)
    with serving(open_served(str(folder), form=form, kv_bytes=1 << 22)) as (client, gateway, _):
        client.model = "model"
        assert gateway.served.tokenizer.n_vocab == gateway.served.engine.facts.n_vocab == 320
        found = client.ok("chat/completions", messages=[{"role": "user", "content": "hello"}], max_tokens=8)
        assert found["usage"]["completion_tokens"] > 0
        assert len(client.ok("embeddings", input="hello")["data"][0]["embedding"]) == 64


def test_a_form_that_a_model_cannot_have_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", loaded("qwen2"), "qwen2")
    with pytest.raises(UsageError, match="of folders bf16"):
        open_served(str(folder), form="file")
    with pytest.raises(UsageError, match="made of folders"):
        open_served(str(tiny_path()), form="q8_0")
    with pytest.raises(UsageError, match="needs at least"):
        open_served(str(tiny_path()), kv_bytes=1000)


def test_a_tokenizer_that_is_not_known_is_refused_and_never_guessed(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_tokenizer(folder)
    good = json.loads((folder / "tokenizer.json").read_text())

    def refused(error: type[Exception], message: str, **changes: Any) -> None:
        (folder / "tokenizer.json").write_text(json.dumps(good | changes))
        with pytest.raises(error, match=message):
            folder_metadata(folder)

    refused(UnsupportedError, "not byte-level BPE", model=good["model"] | {"type": "WordPiece"})
    refused(UnsupportedError, "not byte-level BPE", model=good["model"] | {"byte_fallback": True})
    refused(UnsupportedError, "changes texts", normalizer={"type": "Lowercase"})
    refused(UnsupportedError, "cuts words", pre_tokenizer={"type": "Whitespace"})
    refused(UnsupportedError, "cuts words", pre_tokenizer=None)
    refused(TokenizerError, "model", model=5)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="not JSON"):
        folder_metadata(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileError, match="no such file"):
        folder_metadata(folder)
