"""What `pip install .` puts on a device: a wheel is built and installed into an empty environment."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from line import show

ROOT = Path(__file__).parents[1]


def size_mb(folder: Path) -> float:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and not f.is_symlink()) / 1e6


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "site"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", f"-Cbuild-dir={folder}/build"]
        subprocess.run([*pip, "--target", str(target), str(ROOT)], check=True)
        parts = {path.name: size_mb(path) for path in target.iterdir() if path.is_dir()}
    own = sum(mb for name, mb in parts.items() if name.startswith("nearfar"))
    numpy = sum(mb for name, mb in parts.items() if name.startswith("numpy"))
    total = sum(parts.values())
    show(
        "installed size of the core",
        f"{total:.1f} MB ({total / 1.048576:.1f} MiB): nearfar {own:.1f}, numpy {numpy:.1f}",
        "under 60 MB",
    )


if __name__ == "__main__":
    main()
