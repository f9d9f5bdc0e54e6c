"""nearfar: a language model on the device that stops early where it is sure.

import nearfar

with nearfar.load("nano") as llm:
    print(llm.generate("Once upon a time", max_tokens=40).text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module; loaded at first use, so that `import nearfar` stays light
_PUBLIC = {
    "LLM": "llm",
    "Completion": "llm",
    "Stats": "llm",
    "Stream": "llm",
    "TokenEvent": "llm",
    "load": "llm",
    "Sampling": "sampling",
    "Cancel": "cancel",
    "ModelConfig": "config",
    "NearfarError": "errors",
}

__all__ = [
    "LLM",
    "Cancel",
    "Completion",
    "ModelConfig",
    "NearfarError",
    "Sampling",
    "Stats",
    "Stream",
    "TokenEvent",
    "__version__",
    "load",
]

if TYPE_CHECKING:
    from nearfar.cancel import Cancel
    from nearfar.config import ModelConfig
    from nearfar.errors import NearfarError
    from nearfar.llm import LLM, Completion, Stats, Stream, TokenEvent, load
    from nearfar.sampling import Sampling


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'nearfar' has no attribute {name!r}")
    return getattr(import_module(f"nearfar.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
