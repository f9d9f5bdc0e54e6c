"""`doctor` says what runs, how fast the memory is, what is missing and how to get it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from nearfar import env
from nearfar.cli.doctor import EXTRAS, engine_lines, extra_facts, extra_lines, packages_of
from nearfar.errors import UsageError
from nearfar.halves import Halves, split
from nearfar.llm import LLM
from nearfar.lower import open_lower
from nearfar.probes import golden
from nearfar.share import self_test
from nearfar.upper import LocalUpper
from nearfar.weights import Weights
from nearfar.wire.fingerprint import model_fp, parts
from nearfar.wire.golden import as_json
from tests.cli.conftest import Nearfar
from tests.paths import ROOT
from tests.tiny import write_tiny


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


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Halves:
    """Halves with a self-test of two prompts."""
    folder = tmp_path_factory.mktemp("pair")
    with Weights.open(write_tiny(folder / "m.gguf", exits=(2,), n_ctx=64)) as whole:
        return split(whole, 2, folder, golden=as_json(golden(open_lower(whole), 2, [(5, 17, 3), (99, 42)], ())))


@pytest.mark.parametrize(
    ("seed", "is_known", "code", "said"),
    [
        (0, True, 0, "belongs to this model; 2 prompts of the self-test go on as they should"),
        (1, True, 11, "of 2 prompts"),  # it says that it is this model, and computes another one
        (0, False, 11, "does not serve the upper layers of this device's model"),
    ],
)
def test_an_upper_side_is_put_to_the_test(
    seed: int, is_known: bool, code: int, said: str, nearfar: Nearfar, pair: Halves, tmp_path: Path
) -> None:
    pytest.importorskip("grpc", reason="grpcio is not installed (extra [collab])")
    from tests.sdk.wire_server import Door, WireServer

    served = Weights.open(write_tiny(tmp_path / "served.gguf", exits=(2,), n_ctx=64, seed=seed))
    with Weights.open(pair.device) as device:
        fingerprint = model_fp(parts(device)) if is_known else b"another one"
    with WireServer(Door(open_lower(served), fingerprint=fingerprint)) as server:
        done = nearfar("doctor", pair.device, "--upper", server.url)
        facts = json.loads(nearfar("doctor", pair.device, "--upper", server.url, "--json").out)
    assert done.code == code
    assert said in done.out
    assert bool(facts["upper"]["error"]) == bool(code)


def test_the_self_test_needs_an_upper_side_that_decides(pair: Halves) -> None:
    upper = LocalUpper(open_lower(Weights.open(pair.upper)), 64)
    with LLM.open(pair.device, upper=upper) as llm:
        assert self_test(llm) == 2
    for options in ({}, {"upper": upper, "mode": "lossy"}):
        with LLM.open(pair.device, **options) as llm, pytest.raises(UsageError, match="wants the upper side to decide"):
            self_test(llm)
