"""blake2b without OpenSSL, which `hashlib` loads besides: 3 MB and some ms of every start.  The ground floor."""

from __future__ import annotations

try:
    from _blake2 import blake2b  # CPython's own
except ImportError:  # another Python
    from hashlib import blake2b

__all__ = ["blake2b"]
