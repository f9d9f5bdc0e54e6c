"""`doctor` says what runs, how fast the memory is, what is missing and how to get it."""

from __future__ import annotations

import json
import tomllib

import pytest

from nearfar import env
from nearfar.cli.doctor import EXTRAS, engine_lines, extra_facts, extra_lines, packages_of
from tests.cli.conftest import Nearfar
from tests.paths import ROOT


def test_the_report_names_kernels_bandwidth_extras_and_every_variable(nearfar: Nearfar) -> None:
    pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")
    done = nearfar("doctor")
    assert done.code == 0
    assert "GB/s" in done.out
    assert all(f"\n  {name} " in done.out for name in (*env.VARIABLES, *EXTRAS))


def test_json_holds_the_same_facts(nearfar: Nearfar) -> None:
    facts = json.loads(nearfar("doctor", "--json").out)
    assert set(facts["env"]) == set(env.VARIABLES)
    assert facts["cores"] >= 1
    if facts["engine"]["native"]:
        assert facts["engine"]["isa"] == facts["engine"]["isas"][-1]
        assert all(gbs > 0 for gbs in facts["engine"]["read_gb_per_s"].values())


def test_scalar_kernels_are_never_silent(nearfar: Nearfar) -> None:
    pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")
    out = nearfar("doctor", NEARFAR_ISA="ref").out
    if "this CPU has: ref," in out:
        assert "NEARFAR_ISA=ref holds it back" in out
    assert "ref kernels" in out


def test_a_missing_engine_is_explained() -> None:
    lines = "\n".join(engine_lines({"native": False, "why": "No module named 'nearfar_native._core'"}))
    assert "slowly" in lines
    assert "pip install" in lines


def test_a_missing_package_comes_with_its_command() -> None:
    missing = {"llama": {"packages": {"llama-cpp-python": None}, "installed": False, "purpose": "others"}}
    assert extra_lines(missing)[-1].strip() == "missing llama-cpp-python: pip install 'nearfar[llama]'"


def test_the_extras_are_those_of_the_package() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in EXTRAS:
        assert len(packages_of(name)) == len(declared[name])
        assert extra_facts(name)["purpose"] == EXTRAS[name]
