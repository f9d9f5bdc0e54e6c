"""Every way nearfar can say no, as one tree.  The ground floor: imports nothing of ours.

    NearfarError                 1   something failed; the message says what
    ├── UsageError               2   arguments that cannot be used (an empty prompt, a bad option)
    ├── FileError                3   a file that is missing, cut short or damaged
    │   ├── GGUFError                 ... as a GGUF container
    │   ├── WeightsError              ... as the weights of one model
    │   └── TokenizerError            ... as a tokenizer
    ├── UnsupportedError         4   a sound file that this build cannot run
    ├── ContextError             5   more tokens than the context holds
    │   └── KVTruncated               ... or a way back to what a window has forgotten
    ├── SchemaError              6   a JSON schema that is wrong or cannot be satisfied
    ├── MissingExtraError        7   an optional package is not installed
    ├── DataError                8   training or evaluation data in the wrong form
    │   └── MissingDataError          ... or not in the folder at all
    ├── EngineBusy               9   a second thread entered an engine that is at work
    ├── WireError               10   bytes or messages of another machine that make no sense
    ├── UpperError              11   whoever runs the upper layers refuses, or cannot be reached
    │   ├── MismatchError             ... its model, codec or settings are not the device's
    │   └── Diverged                  ... the two sides hold different rows: the answer ends at its last final token
    ├── EgressDenied            12   the policy forbids to send this
    └── Cancelled              130   stopped on request; everything is as it was before the call

The number is the exit code of the command line.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar


class NearfarError(Exception):
    """Base of all errors of this project: catch it to catch them all."""

    exit_code: ClassVar[int] = 1


class UsageError(NearfarError, ValueError):
    """Arguments that cannot be used."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting (an environment variable, a config field) outside its range."""


class FileError(NearfarError):
    """A file that is missing, cut short or damaged."""

    exit_code = 3


class GGUFError(FileError):
    """Bytes that do not form a GGUF file."""


class WeightsError(FileError):
    """A GGUF file whose tensors or keys do not form the model it names."""


class TokenizerError(FileError):
    """Tokenizer data that is missing or inconsistent."""


class UnsupportedError(NearfarError):
    """A sound file or request that this build cannot run."""

    exit_code = 4


class ContextError(NearfarError):
    """More tokens than the context holds."""

    exit_code = 5


class KVTruncated(ContextError):
    """A cut so deep that the window behind it has been forgotten; the text before it must be run again."""


class SchemaError(NearfarError):
    """A JSON schema that is wrong or cannot be satisfied."""

    exit_code = 6


class MissingExtraError(NearfarError):
    """An optional package is not installed."""

    exit_code = 7

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}: pip install 'nearfar[{extra}]'")
        self.package, self.extra = package, extra


class DataError(NearfarError):
    """Training or evaluation data in the wrong form."""

    exit_code = 8


class MissingDataError(DataError):
    """A file that the data folder lacks."""

    def __init__(self, path: Path, use: str, hint: str) -> None:
        super().__init__(f"{path}: missing, needed for {use}; {hint}")
        self.path = path


class EngineBusy(NearfarError):
    """A second thread entered an engine that is at work."""

    exit_code = 9


class WireError(NearfarError):
    """Bytes or messages of another machine that make no sense."""

    exit_code = 10


class UpperError(NearfarError):
    """Whoever runs the upper layers refuses, or cannot be reached."""

    exit_code = 11


class MismatchError(UpperError):
    """The model, codec or settings of the upper side are not those of the device."""


class Diverged(UpperError):
    """The two sides hold different rows; the answer ends at its last final token."""


class EgressDenied(NearfarError):
    """The policy forbids to send this."""

    exit_code = 12


class Cancelled(NearfarError):
    """Stopped on request; the cache is as it was before the call."""

    exit_code = 130
