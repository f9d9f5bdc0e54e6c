"""The C++ tests on CPUs that this machine is not: built for them, run under qemu.  An emulator's speed says nothing.

qemu kills a program at the first instruction that the CPU it plays does not have, so a kernel that is chosen where it
must not be, or flags that leak into a portable file, show here.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.paths import ROOT

fcntl = pytest.importorskip("fcntl", reason="programs of other CPUs run in qemu's user mode, which is Linux's")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Target:
    """A build of the C++ tests, in build/<name>."""

    name: str
    configure: tuple[str, ...]  # arguments of cmake
    emulator: tuple[str, ...]
    compiler: str
    nm: str
    packages: str  # what Debian calls all this


@dataclass(frozen=True)
class Machine:
    """A CPU that qemu plays, the kernels that must be found on it, and the tests that run there."""

    target: Target
    cpu: str
    isas: tuple[str, ...]
    tests: tuple[str, ...] = ()  # doctest's filter; all without


AARCH64 = Target(
    name="aarch64",
    configure=(f"-DCMAKE_TOOLCHAIN_FILE={ROOT}/native/cmake/aarch64-linux-gnu.cmake",),
    emulator=("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"),
    compiler="aarch64-linux-gnu-g++",
    nm="aarch64-linux-gnu-nm",
    packages="g++-aarch64-linux-gnu qemu-user libc6-arm64-cross",
)

# What `make native` builds.
X86_64 = Target(
    name="native",
    configure=(),
    emulator=("qemu-x86_64",),
    compiler="c++",
    nm="nm",
    packages="g++ qemu-user",
)

# What differs between CPUs of one family: which kernels are chosen, and whether the CPU can run them.  Their bits under
# all conditions are compared once for a family.
KERNELS = (
    "--source-file=*test_kernels.cc,*test_ops.cc,*test_attention.cc",
    "--test-case-exclude=*on any thread*,*at the extremes*,*do not depend on the other rows*",
)
# Once for a family: the rest, less what takes long under qemu and is portable C++.
MOST = ("--test-case-exclude=*by lookup too*,*screen*,*out of memory*,*cancelled*",)

# The longest first: an emulator uses one core, and tests may run side by side.
MACHINES = [
    Machine(AARCH64, "max", ("ref", "neon", "neon_dot", "neon_i8mm"), MOST),
    Machine(AARCH64, "cortex-a53", ("ref", "neon"), KERNELS),
    Machine(AARCH64, "cortex-a76", ("ref", "neon", "neon_dot"), KERNELS),
    Machine(X86_64, "Haswell", ("ref", "avx2"), KERNELS),
]


def _tool(name: str) -> str | None:
    """A tool of the virtual environment, or of the system."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@functools.cache
def build(target: Target) -> Path:
    """The folder with nearfar_tests, built; skips where the tools are missing."""
    if target is X86_64 and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"this machine is {platform.machine()}: its own compiler makes no x86-64 programs")
    missing = [name for name in (target.compiler, target.emulator[0], "cmake", "ninja") if _tool(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} missing: apt-get install {target.packages}")
    folder = ROOT / "build" / target.name
    folder.parent.mkdir(exist_ok=True)
    configure = [f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", "-DNEARFAR_TESTS=ON", "-DCMAKE_BUILD_TYPE=Release"]
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests that run side by side build once
        for command in (
            ["-S", f"{ROOT}/native", "-B", f"{folder}", "-G", "Ninja", *configure, *target.configure],
            ["--build", f"{folder}", "-j", "2", "--target", "nearfar_tests"],
        ):
            done = subprocess.run([str(_tool("cmake")), *command], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: f"{m.target.name}-{m.cpu}")
def test_another_cpu_finds_its_kernels_and_gives_the_bits_of_ref(machine: Machine) -> None:
    binary = build(machine.target) / "nearfar_tests"
    command = [*machine.target.emulator, "-cpu", machine.cpu, str(binary), *machine.tests]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-4000:]}{done.stderr}"
    assert f"kernels here: {', '.join(machine.isas)}\n" in done.stdout


@pytest.mark.parametrize("target", [AARCH64], ids=lambda t: t.name)
def test_kernel_objects_of_another_cpu_hold_no_weak_symbol(target: Target) -> None:
    """See tests/native/test_kernels.py."""
    objects = sorted(build(target).glob("CMakeFiles/nearfar_core.dir/src/*_neon*.o"))
    assert len(objects) >= 4
    for path in objects:
        symbols = subprocess.run([target.nm, "-C", str(path)], capture_output=True, text=True, check=True).stdout
        assert [line for line in symbols.splitlines() if line[17:18] in "WVu"] == [], path.name
