"""Imports point down: apps -> speech -> sdk -> native, and the cloud stands on the sdk's ground floor only."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.arrows import HOUSES, ROOT, Import, all_imports, circle, house, imports_of, modules

_GROUND = ("errors", "env", "config", "gguf_reader", "gguf_writer", "quant", "weights", "splits", "forms", "home")
_GROUND += ("arguments", "digest", "machine", "text_table", "corpora", "master", "pack", "sampling")
# Text to ids and back, chat forms, grammars: they stand on the ground floor alone and count as a part of it.
_GROUND += ("tokenizer", "vocab", "bpe", "spm", "pretokenize", "detokenize", "stop", "chat", "chat_forms", "constraint")
# What the two sides of a network share.
_GROUND += ("wire", "wire.messages", "wire.codec", "wire.hashes", "wire.fingerprint", "wire.golden", "wire.session")
_GROUND += ("wire.nearfar_pb2", "wire.pack", "wire.unpack", "wire.rpc", "wire.loop_thread")
GROUND_FLOOR = {f"nearfar.{name}" for name in _GROUND}
# What each house may import of another one: all of it, or the modules named.
ARROWS = {
    "nearfar": {"nearfar_native": {"nearfar_native", "nearfar_native._core"}},
    "nearfar_cloud": {"nearfar": GROUND_FLOOR, "nearfar_native": {"nearfar_native", "nearfar_native._core"}},
    "nearfar_native": {},
}
# Third-party package -> the modules, or the packages with all below them, that may import it.
PLACES = {
    "numpy": {"nearfar", "nearfar_cloud", "nearfar_native"},
    "nearfar_native": {
        "nearfar.lower_native",
        "nearfar_cloud.model.attention",
        "nearfar_cloud.model.packed",
        "nearfar_cloud.model.sampler",
        "nearfar_native",
    },
    "grpc": {"nearfar.wire.rpc", "nearfar.wire.dial", "nearfar_cloud.gateway.collab"},
    "google": {"nearfar.wire.nearfar_pb2", "nearfar.wire.pack", "nearfar.wire.unpack"},
    "llguidance": {"nearfar.constraint"},
    "llama_cpp": {"nearfar.backend_llama"},
    "sklearn": {"nearfar.eval.baselines"},
    "scipy": {"nearfar_cloud.training.studies"},
    "torch": {"nearfar_cloud"},
    "fastapi": {"nearfar_cloud.gateway.app"},
    "starlette": {"nearfar_cloud.gateway"},
    "uvicorn": {"nearfar_cloud.gateway.server"},
    "prometheus_client": {"nearfar_cloud.gateway.metrics"},
    "cryptography": {"nearfar_cloud.gateway.certificates"},
    "msgspec": {"nearfar_cloud.executors.transport", "nearfar_cloud.fleet"},
    "ray": {"nearfar_cloud.fleet.ray_cluster"},
    "tokenizers": {"nearfar_cloud.training"},
    "safetensors": {"nearfar_cloud.model.hf", "nearfar_cloud.training"},
    "hassil": {"nearfar.eval.home", "nearfar_cloud.training"},
    "yaml": {"nearfar.eval.home", "nearfar_cloud.training"},
    "matplotlib": {
        "nearfar.bench.collab.plot",
        "nearfar.eval.calibrate",
        "nearfar.eval.exits",
        "nearfar_cloud.training",
        "nearfar_cloud.planning.report",
    },
}


def wrong_arrows(imports: list[Import]) -> list[str]:
    """Imports of another house that ARROWS does not draw, and imports upwards out of the ground floor."""
    wrong = []
    for i in imports:
        here, there = house(i.importer), house(i.imported)
        if here != there and there in HOUSES and i.imported not in ARROWS[here].get(there, set()):
            wrong.append(str(i))
        if i.importer in GROUND_FLOOR and there == "nearfar" and i.imported not in GROUND_FLOOR:
            wrong.append(f"{i}, which is above the ground floor")
    return wrong


def misplaced(imports: list[Import]) -> list[str]:
    """Imports of a package outside the files that the plan gives it."""
    wrong = []
    for i in imports:
        package = house(i.imported)
        if package in sys.stdlib_module_names or (package in HOUSES and package not in PLACES):
            continue
        places = PLACES.get(package, set())
        if not any(i.importer == place or i.importer.startswith(f"{place}.") for place in places):
            wrong.append(f"{i}; its places: {sorted(places) or 'none'}")
    return wrong


def test_every_import_follows_the_arrows() -> None:
    assert wrong_arrows(all_imports()) == []


def test_each_third_party_package_is_imported_only_where_the_plan_puts_it() -> None:
    assert misplaced(all_imports()) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(all_imports()) == []


def test_every_place_of_the_plan_exists() -> None:
    """A renamed file must not leave a permission behind."""
    known = modules()
    assert sorted(place for places in PLACES.values() for place in places if place not in known) == []
    assert sorted(GROUND_FLOOR - set(known)) == []


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("nearfar.llm", "import nearfar_cloud"),
        ("nearfar.llm", "def f():\n    from nearfar_cloud.training import model"),
        ("nearfar_cloud.training.trainer", "from nearfar.llm import LLM"),
        ("nearfar.quant", "from nearfar import engine"),
        ("nearfar_native", "import nearfar.errors"),
    ],
)
def test_an_arrow_upwards_is_noticed(importer: str, source: str) -> None:
    known = [*modules(), "nearfar_cloud.training.model", "nearfar.engine", "nearfar.llm", "nearfar.errors"]
    assert wrong_arrows(list(imports_of(importer, source, known)))


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("nearfar.engine", "import torch"),
        ("nearfar.engine", "import nearfar_native._core"),
        ("nearfar.llm", "def f():\n    import llguidance.numpy"),
        ("nearfar.cli.show", "import requests"),
    ],
)
def test_a_package_outside_its_place_is_noticed(importer: str, source: str) -> None:
    assert misplaced(list(imports_of(importer, source, modules())))


def test_a_circle_is_noticed() -> None:
    assert circle([Import("a", "b", True), Import("b", "a", True)]) == ["a", "b", "a"]
    assert circle([Import("a", "b", True), Import("b", "a", False)]) == []


# One process for all: each module is imported in a fork of an interpreter that has none of ours loaded.
_IMPORT_ALONE = """
import importlib, os, sys, traceback, importlib.util
known = "numpy torch tokenizers safetensors yaml hassil fastapi uvicorn prometheus_client msgspec"
for package in known.split():
    try: importlib.import_module(package)
    except ImportError: pass
for name in sys.argv[1:]:
    pid = os.fork()
    if pid == 0:
        try:
            importlib.import_module(name)
        except ImportError as error:
            ours = (error.name or "").startswith("nearfar")
            missing_extra = not ours and importlib.util.find_spec((error.name or "nearfar").split(".")[0]) is None
            if not missing_extra: traceback.print_exc()
            os._exit(0 if missing_extra else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        sys.exit(f"{name} does not import alone")
"""


@pytest.mark.skipif(not hasattr(sys, "getandroidapilevel") and sys.platform == "win32", reason="needs fork")
def test_each_module_imports_alone() -> None:
    result = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALONE, *modules()], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


def test_importing_nearfar_loads_nothing_heavy() -> None:
    """numpy is the only package beside the standard library; extras and the compiled engine come when used."""
    code = "import nearfar, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) & {*PLACES, "gguf", "jinja2", "requests"} <= {"numpy"}
