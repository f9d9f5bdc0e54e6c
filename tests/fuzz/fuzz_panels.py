"""Fuzzes the files in which packed matrices stay between two openings of a model.

    python tests/fuzz/fuzz_panels.py --seconds 600 [--seed N] [--findings DIR]

Every input goes two ways.  As it is, it lies where a model looks for its panels: whatever it holds, the model must
compute the bits of fresh packing.  Then all digests and checksums are made right, as only somebody would who means
harm, and what still opens runs in the engine, by any of its kernels: the numbers are wrong then, but nothing may be
read or written outside of the file.  Inputs, limits and findings are those of fuzz_gguf.py; a crash of the engine ends
the process, and the input is `last.panels` in DIR.
"""

from __future__ import annotations

import argparse
import importlib
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from tests.fuzz.fuzz_gguf import Check, fuzz_plain, peak_mb  # noqa: E402
from tests.tiny import write_tiny  # noqa: E402

SMALL = {"n_layers": 1, "d_model": 32, "d_ff": 32, "n_vocab": 272, "n_ctx": 16}
BIG = {"n_layers": 1, "d_ff": 256, "n_heads": 2, "n_kv_heads": 1, "n_vocab": 272, "n_ctx": 16}
HEADER, ENTRY = 112, 152  # bytes; drawn in nearfar/panel_file.py


class Bench:
    """Two models, what they compute, and a store for their panels."""

    def __init__(self, folder: Path) -> None:
        names = ("errors", "lower_native", "options", "panel_file", "panel_store", "weights")
        self.errors, self.native, self.options, self.panel_file, self.store, self.weights = (
            importlib.import_module(f"nearfar.{name}") for name in names
        )
        self.folder = folder / "store"
        self.models = [
            write_tiny(folder / "ternary.gguf", "bitnet-b1.58", "TQ2_0", embedding_type="TQ2_0", **BIG),
            write_tiny(folder / "small.gguf", "qwen2", "Q8_0", tied=False, **SMALL),
            write_tiny(folder / "tiny.gguf", "llama", "Q4_0", embedding_type="F16", **SMALL),
        ]
        self.fresh = [self.run(model, "off")[0] for model in self.models]
        self.places: list[Path] = []
        for model, fresh in zip(self.models, self.fresh, strict=True):
            z, state = self.run(model, self.folder)
            assert state.state == "built"
            assert np.array_equal(z, fresh)
            self.places.append(state.path)

    def run(self, model: Path, cache: str | Path, lut: str = "off") -> tuple[np.ndarray, Any]:
        """Two tokens through a model, and what its store did."""
        options = self.options.EngineOptions(threads=1, cache=cache, lut=lut)
        lower = self.native.NativeLower(self.weights.Weights.open(model), options)
        h = lower.forward(lower.embed(np.array([1, 2], np.int32)), lower.new_kv(4), 0, lower.last)
        return lower.logits(h), lower.cache

    def seeds(self) -> list[bytes]:
        """A sound file of each model, with five trits a byte and with lookups too."""
        found = [path.read_bytes() for path in self.places]
        core = self.native._core
        chosen = core.ternary_kind
        try:
            core.ternary_kind = lambda isa, lut, n_weights: "t5"
            found.append(self.run(self.models[0], self.folder)[1].path.read_bytes())
        finally:
            core.ternary_kind = chosen
        if self.native.has_lookups():
            found.append(self.run(self.models[0], self.folder, "fast")[1].path.read_bytes())
        return found

    def as_it_is(self, data: bytes) -> str:
        """The store's own way: what it does not take is packed again."""
        which = self.which(data)
        self.places[which].write_bytes(data)
        try:
            self.panel_file.PanelFile.open(self.places[which])
            said = "opened"
        except self.errors.FileError as error:
            said = str(error).replace(str(self.places[which]), "it")
        z, state = self.run(self.models[which], self.folder)
        assert np.array_equal(z, self.fresh[which]), f"{state}: other numbers than those of fresh packing"
        return f"{state.state}, {said}"

    def signed(self, path: Path, data: bytes) -> str:
        """Past every digest: only the engine's own checks are left."""
        path.write_bytes(sign(data, self.native._core.checksums))
        try:
            found = self.panel_file.PanelFile.open(path)
            found.verify(lambda parts: self.native._core.checksums(parts, 1))
        except self.errors.FileError as error:
            return str(error).replace(str(path), "it")
        which = self.which(data)
        isas = self.native.isas_available()
        isa = isas[sum(data) % len(isas)]
        weights = self.weights.Weights.open(self.models[which])
        lower = self.native.NativeLower(weights, self.options.EngineOptions(threads=1, cache="off"))
        panels = {n: (p.kind, p.rows, p.cols, p.scale, p.data, p.row_scales) for n, p in found.matrices.items()}
        matrices = {
            name: (int(t.type), *t.shape, weights.file.raw(name))
            for name, t in weights.file.tensors.items()
            if len(t.shape) == 2
        }
        vectors = {name: weights.f32(name) for name, t in weights.file.tensors.items() if len(t.shape) == 1}
        vectors["final"] = weights.norm_gain("final")
        core = self.native._core
        lut = any(p.kind == "l3" for p in found.matrices.values())
        if lut:
            isa = isas[-1]
        try:
            spec = core.ModelSpec(**weights.config.engine_spec())
            model = core.Model(spec, matrices, vectors, panels, 0, weights.config.n_layers, 1, isa, lut)
            h = lower.embed(np.array([1, 2], np.int32))
            model.logits(model.forward(h, model.new_kv(4, "f16"), 0, weights.config.n_layers, None), "final")
        except (ValueError, core.EngineFailure) as error:
            return f"engine: {error}"
        return "ran"

    def which(self, data: bytes) -> int:
        """The model whose panels these would be."""
        for i, place in enumerate(self.places):
            if data[24:56] == self.weights.Weights.open(self.models[i]).file.fingerprint and place.parent.is_dir():
                return i
        return 0


def sign(data: bytes, checksums: Any) -> bytes:
    """The file with right magic, version, sizes, checksums and digest, as far as its table can be read."""
    from nearfar.panel_file import MAGIC, VERSION, _digest

    if len(data) < HEADER:
        return data
    out = bytearray(data)
    out[:12] = MAGIC + struct.pack("<I", VERSION)
    out[16:24] = struct.pack("<Q", len(out))
    n = min(struct.unpack_from("<I", out, 12)[0], (len(out) - HEADER) // ENTRY)
    for i in range(n):
        at = HEADER + i * ENTRY + 104
        for place in (at, at + 24):
            offset, size = struct.unpack_from("<QQ", out, place)
            if offset + size <= len(out):
                part = np.frombuffer(bytes(out[offset : offset + size]), np.uint8)
                out[place + 16 : place + 24] = struct.pack("<Q", checksums([part], 1)[0])
    table = bytes(out[HEADER : HEADER + n * ENTRY])
    out[HEADER - 16 : HEADER] = _digest(bytes(out[: HEADER - 16]), table)
    return bytes(out)


def memory_folder() -> str | None:
    """A folder in memory, where there is one: each input syncs a file."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def make_check(bench: Bench, last: Path | None = None) -> Check:
    """A function that puts a file both ways and tells how far it came: "place | message"."""

    def check(path: Path) -> str:
        data = path.read_bytes()
        if last is not None:
            last.write_bytes(data)
        first, second = bench.as_it_is(data), bench.signed(path.with_name("signed.panels"), data)
        place = " ".join(word for word in f"{first} / {second}".split() if not any(c.isdigit() for c in word))
        return f"{place[:120]} | {first} / {second}"

    return check


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=ROOT / "build" / "fuzz-findings")
    args = parser.parse_args()
    args.findings.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        bench = Bench(Path(folder))
        check = make_check(bench, args.findings / "last.panels")
        report = fuzz_plain(check, bench.seeds(), args.findings, seconds=args.seconds, seed=args.seed)
    for outcome, n in sorted(report.outcomes.items(), key=lambda item: -item[1])[:40]:
        print(f"{n:9d}  {report.messages[outcome].splitlines()[-1][:150]}")
    print(
        f"{report.runs} runs, {len(report.outcomes)} places, peak {peak_mb():.0f} MB, {len(report.findings)} findings"
    )
    for problem, path in report.findings.items():
        print(f"{path}: {problem}")
    return 1 if report.findings else 0


if __name__ == "__main__":
    import logging

    logging.getLogger("nearfar").setLevel(logging.ERROR)
    sys.exit(main())
