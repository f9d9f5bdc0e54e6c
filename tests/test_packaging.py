"""The wheel holds what a device needs and nothing else, and installs into an empty environment."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import nearfar
from tests.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REQUEST = "turn off the kitchen lights in ten minutes"


def requirements() -> list[Requirement]:
    """Every third-party requirement: core, extras, build."""
    lines = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    lines += [line for extra in PROJECT["project"]["optional-dependencies"].values() for line in extra]
    return [r for line in lines if (r := Requirement(line)).name != "nearfar"]


def pins() -> dict[str, str]:
    """Package -> version of constraints.txt, names in PEP 503's form."""
    found = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return {normal(name): version for name, version in found}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_pins_lie_within_the_ranges() -> None:
    for requirement in requirements():
        version = pins().get(normal(requirement.name))
        assert version is None or requirement.specifier.contains(version), requirement


@pytest.mark.parametrize("extra", ["schema", "llama", "train", "cloud", "dev"])
def test_what_the_makefile_installs_is_pinned(extra: str) -> None:
    named = [Requirement(line) for line in PROJECT["project"]["optional-dependencies"][extra]]
    assert {normal(r.name) for r in named} - {"nearfar"} <= set(pins())


def test_an_extra_names_only_extras_that_exist() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [Requirement(line) for extra in extras.values() for line in extra]
    assert {e for r in lines if r.name == "nearfar" for e in r.extras} <= set(extras)


def test_the_core_needs_numpy_alone() -> None:
    assert [Requirement(line).name for line in PROJECT["project"]["dependencies"]] == ["numpy"]


def test_the_wheel_takes_only_folders_that_exist() -> None:
    packages = PROJECT["tool"]["scikit-build"]["wheel"]["packages"]
    assert all((ROOT / package / "py.typed").is_file() for package in packages)


def test_one_version_everywhere() -> None:
    assert PROJECT["project"]["version"] == nearfar.__version__


def test_every_entry_point_leads_somewhere() -> None:
    points = {**PROJECT["project"]["scripts"], **PROJECT["project"]["entry-points"]["nearfar.verbs"]}
    for target in points.values():
        module, name = target.split(":")
        assert callable(getattr(import_module(module), name))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the tree as a user's pip would build it, in a build folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"-Cbuild-dir={folder}/build"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True, timeout=1200)
    return next(folder.glob("nearfar-*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_engine_the_model_and_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        model = archive.getinfo("nearfar/models/nano.gguf")
    assert any(re.fullmatch(r"nearfar_native/_core\.[\w.-]*so", name) for name in names)
    assert model.file_size > 1_000_000
    assert {"nearfar/py.typed", "nearfar_cloud/py.typed", "nearfar_native/py.typed"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"nearfar", "nearfar_cloud", "nearfar_native"}
    assert not [name for name in names if name.endswith((".cc", ".h", ".pyc")) or "__pycache__" in name]


@pytest.mark.slow
def test_pip_install_in_an_empty_environment_makes_a_call(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python, nearfar_command = tmp_path / "env" / "bin" / "python", tmp_path / "env" / "bin" / "nearfar"
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True, timeout=600)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "NEARFAR"))}

    def run(*command: str | Path) -> str:
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout

    facts = json.loads(run(nearfar_command, "run", "--json", REQUEST))
    assert facts["request"] == REQUEST
    assert facts["stats"]["n_generated"] == len(facts["tokens"]) > 0
    doctor = json.loads(run(nearfar_command, "doctor", "--json"))
    assert doctor["engine"]["native"] is True
    assert str(tmp_path) in doctor["where"]
    assert doctor["extras"]["schema"]["installed"] is False
    packages = run(python, "-m", "pip", "list", "--format=freeze").split()
    assert {line.split("==")[0] for line in packages} <= {"nearfar", "numpy", "pip", "setuptools"}
