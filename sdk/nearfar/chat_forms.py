"""The forms in which chat models read a conversation, each a plain function from turns to parts.

A part is a control token or text.  What people wrote is always text, so it cannot end a turn or begin another one; the
exceptions are forms whose marks are text themselves (`[INST]` of Llama 2, `User:` of BitNet).  The functions follow the
templates that the models were published with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nearfar import forms
from nearfar.errors import UsageError
from nearfar.forms import Part


@dataclass(frozen=True, slots=True)
class Turn:
    """Who said what."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Ends:
    """The model's beginning and end of text, as parts (none where it has no such token)."""

    bos: tuple[Part, ...]
    eos: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class ChatForm:
    """A form by its name.

    `parts` leaves out the beginning-of-text token at the very front.  `begins`: the form has one there, whether the
    tokenizer adds it or not.
    """

    name: str
    parts: Callable[[Sequence[Turn], Ends], list[Part]]
    begins: bool = False
    roles: tuple[str, ...] = ("system", "user", "assistant")


def _mark(name: str) -> Part:
    return Part(name, control=True)


def _chatml(turns: Sequence[Turn], ends: Ends) -> list[Part]:
    parts: list[Part] = []
    for turn in turns:
        parts += [_mark("<|im_start|>"), Part(f"{turn.role}\n{turn.text}"), _mark("<|im_end|>"), Part("\n")]
    return [*parts, _mark("<|im_start|>"), Part("assistant\n")]


def _phi4(turns: Sequence[Turn], ends: Ends) -> list[Part]:
    parts: list[Part] = []
    for turn in turns:
        parts += [_mark("<|im_start|>"), Part(turn.role), _mark("<|im_sep|>"), Part(turn.text), _mark("<|im_end|>")]
    return [*parts, _mark("<|im_start|>"), Part("assistant"), _mark("<|im_sep|>")]


def _llama3_turn(role: str, text: str) -> list[Part]:
    return [*_llama3_head(role), Part(text), _mark("<|eot_id|>")]


def _llama3_head(role: str) -> list[Part]:
    return [_mark("<|start_header_id|>"), Part(role), _mark("<|end_header_id|>"), Part("\n\n")]


def _llama3(turns: Sequence[Turn], ends: Ends) -> list[Part]:
    parts = [part for turn in turns for part in _llama3_turn(turn.role, turn.text.strip())]
    return parts + _llama3_head("assistant")


def _llama31(turns: Sequence[Turn], ends: Ends) -> list[Part]:
    """Always with a system turn, which states dates.  "Today" is the template's own default, so that answers repeat."""
    system, turns = _system(turns)
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    return _llama3_turn("system", dates + (system or "").strip()) + _llama3(turns, ends)


def _bitnet(turns: Sequence[Turn], ends: Ends) -> list[Part]:
    parts: list[Part] = []
    for turn in turns:
        parts += [Part(f"{turn.role.capitalize()}: {turn.text.strip()}"), _mark("<|eot_id|>")]
    return [*parts, Part("Assistant: ")]


def _llama2(turns: Sequence[Turn], ends: Ends) -> list[Part]:
    system, turns = _system(turns)
    parts: list[Part] = []
    for i, turn in enumerate(_alternating(turns)):
        if turn.role == "user":
            text = f"<<SYS>>\n{system}\n<</SYS>>\n\n{turn.text}" if i == 0 and system is not None else turn.text
            parts += [*(ends.bos if i else ()), _mark("[INST]"), Part(f" {text.strip()} "), _mark("[/INST]")]
        else:
            parts += [Part(f" {turn.text.strip()} "), *ends.eos]
    return parts


@dataclass(frozen=True, slots=True)
class _Mistral:
    """The spaces around the marks changed with every version of the tokenizer, the place of the system text too."""

    before: str  # before [INST]
    inside: str  # after [INST]
    closing: str  # before [/INST]
    answer: str  # before the assistant's text
    system_last: bool = False  # with the last question instead of the first
    strips_answers: bool = False

    def __call__(self, turns: Sequence[Turn], ends: Ends) -> list[Part]:
        system, turns = _system(turns)
        parts: list[Part] = []
        place = len(turns) - 1 if self.system_last else 0
        for i, turn in enumerate(_alternating(turns)):
            if turn.role == "user":
                text = f"{system}\n\n{turn.text}" if i == place and system is not None else turn.text
                parts += [Part(self.before), _mark("[INST]"), Part(self.inside + text + self.closing), _mark("[/INST]")]
            else:
                text = turn.text.strip() if self.strips_answers else turn.text
                parts += [Part(self.answer + text), *ends.eos]
        return [part for part in parts if part.text]


@dataclass(frozen=True, slots=True)
class _Mistral7:
    """Mistral from v7 on: the system text has marks of its own."""

    space: str

    def __call__(self, turns: Sequence[Turn], ends: Ends) -> list[Part]:
        parts: list[Part] = []
        for turn in turns:
            if turn.role == "assistant":
                parts += [Part(self.space + turn.text), *ends.eos]
            else:
                name = "INST" if turn.role == "user" else "SYSTEM_PROMPT"
                parts += [_mark(f"[{name}]"), Part(self.space + turn.text), _mark(f"[/{name}]")]
        return parts


def _zephyr(turns: Sequence[Turn], ends: Ends) -> list[Part]:
    parts: list[Part] = []
    for turn in turns:
        parts += [_mark(f"<|{turn.role}|>"), Part(f"\n{turn.text}"), *ends.eos, Part("\n")]
    return [*parts, _mark("<|assistant|>"), Part("\n")]


@dataclass(frozen=True, slots=True)
class _Phi:
    """Phi-3 breaks the line after each mark, Phi-4-mini does not."""

    newline: str

    def __call__(self, turns: Sequence[Turn], ends: Ends) -> list[Part]:
        parts: list[Part] = []
        for turn in turns:
            parts += [_mark(f"<|{turn.role}|>"), Part(self.newline + turn.text), _mark("<|end|>"), Part(self.newline)]
        return [part for part in (*parts, _mark("<|assistant|>"), Part(self.newline)) if part.text]


def _gemma(turns: Sequence[Turn], ends: Ends) -> list[Part]:
    system, turns = _system(turns)
    parts: list[Part] = []
    for i, turn in enumerate(_alternating(turns)):
        role = "model" if turn.role == "assistant" else turn.role
        before = f"{system}\n\n" if i == 0 and system is not None else ""
        text = f"{role}\n{before}{turn.text.strip()}"
        parts += [_mark("<start_of_turn>"), Part(text), _mark("<end_of_turn>"), Part("\n")]
    return [*parts, _mark("<start_of_turn>"), Part("model\n")]


def _deepseek(turns: Sequence[Turn], ends: Ends) -> list[Part]:
    system, turns = _system(turns)
    parts = [Part(system or "")]
    for turn in turns:
        if turn.role == "user":
            parts += [_mark("<｜User｜>"), Part(turn.text)]
        else:
            parts += [_mark("<｜Assistant｜>"), Part(turn.text), _mark("<｜end▁of▁sentence｜>")]
    return [part for part in parts if part.text] + [_mark("<｜Assistant｜>")]


_NANO_MARKS = {
    "system": forms.SETTING,
    "user": forms.USER,
    "assistant": forms.ASSISTANT,
    "call": forms.CALL,
    "tool": forms.RESULT,
}


def _nano(turns: Sequence[Turn], ends: Ends) -> list[Part]:
    parts = []
    for turn in turns:
        spoken = turn.role in ("user", "assistant")  # as in the rows that nano was trained on
        parts += [_mark(_NANO_MARKS[turn.role]), Part(" " + turn.text if spoken else turn.text)]
    return [*parts, _mark(forms.ASSISTANT)]


def _system(turns: Sequence[Turn]) -> tuple[str | None, Sequence[Turn]]:
    """The system text, which may only come first, and the turns behind it."""
    if turns and turns[0].role == "system":
        system, turns = turns[0].text, turns[1:]
    else:
        system = None
    if any(turn.role == "system" for turn in turns):
        raise UsageError("this model's chat form takes a system message only as the first message")
    return system, turns


def _alternating(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The turns, which must be user, assistant, user, ..."""
    for i, turn in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if turn.role != expected:
            raise UsageError(
                f"this model's chat form takes turns: expected a message of the {expected}, not {turn.role}"
            )
    if not turns:
        raise UsageError("this model's chat form needs a message of the user")
    return turns


FORMS = {
    form.name: form
    for form in (
        ChatForm("nano", _nano, roles=tuple(_NANO_MARKS)),
        ChatForm("chatml", _chatml),
        ChatForm("phi4", _phi4),
        ChatForm("llama3", _llama3, begins=True),
        ChatForm("llama3.1", _llama31, begins=True),
        ChatForm("bitnet", _bitnet, begins=True),
        ChatForm("llama2", _llama2, begins=True),
        ChatForm("mistral", _Mistral("", " ", " ", ""), begins=True),
        ChatForm("mistral-v1", _Mistral(" ", " ", " ", " "), begins=True),
        ChatForm("mistral-v3", _Mistral("", " ", "", " ", system_last=True, strips_answers=True), begins=True),
        ChatForm("mistral-v3-tekken", _Mistral("", "", "", "", system_last=True), begins=True),
        ChatForm("mistral-v7", _Mistral7(" "), begins=True),
        ChatForm("mistral-v7-tekken", _Mistral7(""), begins=True),
        ChatForm("zephyr", _zephyr),
        ChatForm("phi3", _Phi("\n")),
        ChatForm("phi4-mini", _Phi("")),
        ChatForm("gemma", _gemma, begins=True),
        ChatForm("deepseek", _deepseek, begins=True),
    )
}
