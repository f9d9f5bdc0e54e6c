"""A person at a terminal: colours, a prompt, Ctrl-C and Ctrl-D.  Runs the command line on a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import select
import sys
import time
from pathlib import Path

import pytest

from nearfar.halves import split
from nearfar.lower import open_lower
from nearfar.weights import Weights
from nearfar.wire.fingerprint import model_fp, parts
from tests.tiny import write_tiny


class Terminal:
    """`nearfar ARGS...` on a terminal of its own."""

    def __init__(self, *args: str) -> None:
        self.seen = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            env = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
            env.pop("NO_COLOR", None)
            os.execve(sys.executable, [sys.executable, "-m", "nearfar.cli.main", *args], env)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, text: str, timeout_s: float = 60) -> str:
        """What was shown up to and with `text`, since the last call."""
        if not self._shows(text, timeout_s):
            pytest.fail(f"{text!r} was not shown; this was: {self.seen[-2000:]!r}")
        shown, self.seen = self.seen.split(text, 1)
        return shown + text

    def press_until(self, key: str, text: str) -> None:
        """Press a key until `text` is shown: a Ctrl-C just before the prompt reads is seen with the next key."""
        for _ in range(30):
            self.type(key)
            if self._shows(text, timeout_s=2):
                self.wait_for(text)
                return
        self.wait_for(text)

    def _shows(self, text: str, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        while text not in self.seen:
            if not select.select([self.fd], [], [], max(0, until - time.monotonic()))[0]:
                return False
            try:
                self.seen += os.read(self.fd, 65536).decode("utf-8", "replace")
            except OSError:  # the other side has closed
                return False
        return True

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_requests_are_typed_at_a_prompt_and_answered_in_colour(model: Path) -> None:
    terminal = Terminal("run", "--model", str(model))
    assert "kitchen: light ceiling light" in terminal.wait_for("> ")
    terminal.type("turn on the fan\n")
    shown = terminal.wait_for("first token")
    assert "\x1b[32m" in shown  # exit 2
    assert "\x1b[33m" in shown  # full depth
    terminal.wait_for("> ")
    terminal.press_until("\x03", "(Ctrl-D leaves)")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(model: Path) -> None:
    long = ("--n-ctx", "60000", "--max-tokens", "50000", "--backend", "numpy")
    terminal = Terminal("chat", str(model), "--template", "chatml", *long)
    terminal.wait_for("you> ")
    terminal.type("the inn\n")
    terminal.wait_for("\x1b[3")  # the first token
    terminal.type("\x03")
    terminal.wait_for("tokens/s")
    terminal.wait_for("you> ")
    terminal.type("/quit\n")
    assert terminal.exit_code() == 0


def test_a_chat_with_an_upper_side_shows_what_is_not_final_yet(tmp_path: Path) -> None:
    pytest.importorskip("grpc", reason="grpcio is not installed (extra [collab])")
    from tests.sdk.wire_server import Door, WireServer

    with Weights.open(write_tiny(tmp_path / "m.gguf", exits=(1, 2), tau=0.01, n_ctx=256)) as whole:
        halves = split(whole, 2, tmp_path)
    with Weights.open(halves.device) as device:
        fingerprint = model_fp(parts(device))
    door = Door(open_lower(Weights.open(halves.upper)), fingerprint=fingerprint)
    with WireServer(door) as server:
        upper = ("--upper", server.url, "--template", "chatml", "--max-tokens", "24")
        terminal = Terminal("chat", str(halves.device), *upper)
        terminal.wait_for("you> ")
        terminal.type("the inn and\n")
        shown = terminal.wait_for("asks/token")
        assert "\x1b[2m" in shown  # dimmed
        assert "\x1b[K" in shown  # and replaced
        terminal.wait_for("you> ")
        terminal.type("/quit\n")
        assert terminal.exit_code() == 0


def test_a_chat_that_outgrows_the_context_goes_on(story_model: Path) -> None:
    terminal = Terminal("chat", str(story_model), "--template", "chatml", "--max-tokens", "2")
    terminal.wait_for("you> ")
    terminal.type(f"{'the inn and ' * 60}\n")
    terminal.wait_for("/new starts over")
    terminal.wait_for("you> ")
    terminal.type("the inn\n")
    terminal.wait_for("tokens/s")
    terminal.wait_for("you> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0
