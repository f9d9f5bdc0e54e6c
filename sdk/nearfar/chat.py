"""A conversation to token ids.  The template inside a model file is recognised, never run.

    messages -> turns -> the form's parts (control | text) -> tokenizer.encode_parts -> ids

Templates are programs (Jinja) that come with files from anywhere.  Here they are only looked at: marks that they
contain tell which of the forms in chat_forms they are, and a default system text or an opening "<think>" is read off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nearfar.chat_forms import FORMS, ChatForm, Ends, Turn
from nearfar.errors import UnsupportedError, UsageError
from nearfar.forms import CHAT_TEMPLATE, ROWS_VERSION, Part
from nearfar.tokenizer import Tokenizer

_ROLE = r"message(\['role'\]|\.role)"
_CHATML_TURN = re.compile(rf"<\|im_start\|>(user\n|\{{\{{ ?{_ROLE} ?\}}\}}\n|' ?\+ ?{_ROLE} ?\+ ?'\n)")


class Recognised(NamedTuple):
    """What a template says: its form, the system text it adds where none is given, and how an answer begins."""

    form: ChatForm
    begins: bool
    default_system: str | None = None
    opening: str = ""
    drops_thoughts: bool = False  # earlier answers are shown without what stands before </think>


def render(
    messages: Sequence[Mapping[str, str]],
    meta: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    template: str | None = None,
) -> list[int]:
    """Ids of a conversation, up to where the assistant's answer begins.

    `messages`: {"role": "system" | "user" | "assistant", "content": text}; nano also takes "call" and "tool".
    `template` names a form (`chat_forms.FORMS`) instead of the file's own.
    Raises UsageError for messages that the form cannot hold, UnsupportedError where no form is known.
    """
    return tokenizer.encode_parts(chat_parts(messages, meta, tokenizer, template=template), add_bos=False)


def chat_parts(
    messages: Sequence[Mapping[str, str]],
    meta: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    template: str | None = None,
) -> list[Part]:
    """The parts that `render` encodes; joined they are what the model reads."""
    known = _named(template) if template is not None else _of_file(meta)
    turns = _turns(messages, known.form)
    if known.drops_thoughts:
        turns = [_without_thoughts(turn, known) for turn in turns]
    if known.default_system is not None and turns[0].role != "system":
        turns.insert(0, Turn("system", known.default_system))
    ends = Ends(_token(tokenizer, tokenizer.bos_id), _token(tokenizer, tokenizer.eos_id))
    begin = ends.bos if known.begins or tokenizer.add_bos else ()
    return [*begin, *known.form.parts(turns, ends), Part(known.opening)]


def recognise(template: str) -> Recognised | None:
    """The form of a template, None if it is not known."""
    # Copies differ in how they write line breaks and quotes.
    text = template.replace("\\n", "\n").replace('"', "'")
    name = "nano" if _squeezed(template) == _squeezed(CHAT_TEMPLATE) else _form_name(text)
    if name is None:
        return None
    begins = "bos_token" in text
    if name not in ("chatml", "deepseek"):
        return Recognised(FORMS[name], begins)
    default = re.search(r"<\|im_start\|>system\n([^'{}<]*)<\|im_end\|>", text)
    return Recognised(
        FORMS[name],
        begins,
        default_system=default[1] if default else None,
        opening="<think>\n" if re.search(r"(<\|im_start\|>assistant\n|<｜Assistant｜>)<think>\n", text) else "",
        drops_thoughts="</think>" in text,
    )


def _form_name(text: str) -> str | None:
    def has(*marks: str) -> bool:
        return all(mark in text for mark in marks)

    if has("<|im_start|>", "<|im_end|>"):
        if has("<|im_sep|>"):
            return "phi4"
        is_plain = _CHATML_TURN.search(text) and not has("Reasoning Mode")  # SmolLM3 writes more than ChatML
        return "chatml" if is_plain else None
    if has("<|start_header_id|>", "<|eot_id|>"):
        return "llama3.1" if has("Cutting Knowledge Date") else "llama3"
    if has("<|eot_id|>", "capitalize", "Assistant: "):
        return "bitnet"
    if has("[INST]"):
        return _inst_form(text)
    if has("<|end|>", "<|assistant|>") and not has("<|start|>") and not has("<|begin|>"):
        return "phi3" if re.search(r"\|>(' ?\+ ?')?\n", text) else "phi4-mini"
    if re.search(r"<\|user\|>\n' ?\+ ?message(\['content'\]|\.content) ?\+ ?eos_token", text):
        return "zephyr"
    if has("<start_of_turn>", "<end_of_turn>"):
        return "gemma"
    if has("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"):
        return "deepseek"
    return None


def _inst_form(text: str) -> str:
    if "[SYSTEM_PROMPT]" in text:
        return "mistral-v7" if "[SYSTEM_PROMPT] " in text else "mistral-v7-tekken"
    if "[AVAILABLE_TOOLS]" in text:
        return "mistral-v3-tekken" if "'[INST]'" in text else "mistral-v3"
    if "' [INST] '" in text:
        return "mistral-v1"
    return "llama2" if "<<SYS>>" in text else "mistral"


def _of_file(meta: Mapping[str, Any]) -> Recognised:
    if meta.get("nearfar.rows") == ROWS_VERSION:  # nano's rows say more than its template, which other engines run
        return _named("nano")
    template = meta.get("tokenizer.chat_template")
    if not isinstance(template, str) or not template.strip():
        raise UnsupportedError(f"the file names no chat form: pass template=, one of {', '.join(FORMS)}")
    known = recognise(template)
    if known is None:
        raise UnsupportedError(
            f"the file's chat template is none that this build knows: pass template=, one of {', '.join(FORMS)}, "
            "or build the prompt yourself"
        )
    return known


def _named(name: str) -> Recognised:
    form = FORMS.get(name)
    if form is None:
        raise UsageError(f"template={name[:40]!r}: expected one of {', '.join(FORMS)}")
    return Recognised(form, form.begins)


def _turns(messages: Sequence[Mapping[str, str]], form: ChatForm) -> list[Turn]:
    turns = []
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in form.roles:
            raise UsageError(f"message {i}: role {str(role)[:40]!r}, expected one of {', '.join(form.roles)}")
        if not isinstance(content, str):
            raise UsageError(f"message {i}: content is {type(content).__name__}, expected text")
        turns.append(Turn(role, content))
    if not turns:
        raise UsageError("the conversation is empty: expected at least one message")
    if turns[-1].role == "assistant":
        raise UsageError("the last message is the assistant's: there is nothing to answer")
    return turns


def _without_thoughts(turn: Turn, known: Recognised) -> Turn:
    if turn.role != "assistant" or "</think>" not in turn.text:
        return turn
    answer = turn.text.split("</think>")[-1]
    return Turn(turn.role, answer.lstrip("\n") if known.form.name == "chatml" else answer)


def _token(tokenizer: Tokenizer, i: int | None) -> tuple[Part, ...]:
    return () if i is None else (Part(tokenizer.vocab.tokens[i], control=True),)


def _squeezed(template: str) -> str:
    """A template without the whitespace that may differ between copies."""
    return re.sub(r"\s+", " ", template).strip()
