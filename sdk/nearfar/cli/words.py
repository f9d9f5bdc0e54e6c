"""Text from outside: arguments, files, stdin.  It is UTF-8 and not empty, or the error says where it is not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from nearfar.errors import FileError, UsageError

_CONVERT = "convert it, for example with iconv -t utf-8"


def checked_text(text: str, what: str = "the prompt") -> str:
    """Text as it came from the command line.  Raises UsageError where it is empty or was not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # Python keeps such bytes of an argument as surrogates
        raise UsageError(f"{what} is not UTF-8; {_CONVERT}") from None
    if not text.strip():
        raise UsageError(f"{what} is empty; expected some text")
    return text


def decoded(data: bytes, source: str) -> str:
    """Bytes as text.  Raises UsageError with the place of the first byte that is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{source} is not UTF-8 (byte {error.start}); {_CONVERT}") from None


def read_text(path: str) -> str:
    """A whole text file (`-` is stdin).  Raises FileError, UsageError."""
    if path == "-":
        return decoded(sys.stdin.buffer.read(), "stdin")
    try:
        return decoded(Path(path).read_bytes(), path)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from None


def lines(prompt: str = "") -> Iterator[str]:
    """Non-empty lines of stdin as they come; a person at a terminal sees `prompt`.

    At a prompt Ctrl-C starts a new line, as in a shell, and Ctrl-D ends.  Raises UsageError for what is not UTF-8.
    """
    while True:
        try:
            line = input(prompt) if prompt else _piped_line()
        except EOFError:
            if prompt:
                print()
            return
        except KeyboardInterrupt:
            if not prompt:
                raise
            print("  (Ctrl-D leaves)")
            continue
        except UnicodeDecodeError:
            raise UsageError(f"stdin is not UTF-8; {_CONVERT}") from None
        if line.strip():
            yield checked_text(line.strip(), "the line")


def _piped_line() -> str:
    data = sys.stdin.buffer.readline()
    if not data:
        raise EOFError
    return decoded(data, "stdin")
