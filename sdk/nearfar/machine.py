"""What figures are told with: the name of this machine's CPU.  Ground floor."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def cpu_name() -> str:
    """As Linux names it, else as far as Python knows."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
