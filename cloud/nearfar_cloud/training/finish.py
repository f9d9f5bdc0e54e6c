"""The end of a run: held-out figures once more, report, curves, card and the GGUF file.  Follows run.py's loop."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nearfar.gguf_reader import TensorType
from nearfar.machine import cpu_name
from nearfar.quant import TERNARY
from nearfar_cloud.training import dev
from nearfar_cloud.training.card import card, markdown
from nearfar_cloud.training.dev import DevRows
from nearfar_cloud.training.export import export
from nearfar_cloud.training.mix import Mix
from nearfar_cloud.training.tokenizer import RowTokenizer
from nearfar_cloud.training.trainer import Trainer


def finish(
    trainer: Trainer,
    tokenizer: RowTokenizer,
    mix: Mix,
    held_out: Mapping[str, DevRows],
    out: Path,
    *,
    linear: TensorType = TensorType.TQ2_0,
    code: str = "",
) -> Path:
    """Write `report.json`, `curves.png`, the card and the GGUF file into `out`; returns the file's path.

    `code` is the commit that the training began with; left out, it is that of now.
    """
    trainer.model.eval()
    figures = {
        # f32 and the embedding as the file stores it: the nearest that training comes to the device.
        name: dev.evaluate(trainer.model, rows, torch.float32, q8=True)
        for name, rows in held_out.items()
    }
    made = card(
        trainer.recipe, facts=facts(trainer, mix, code or commit()), sources=mix.description(), held_out=figures
    )
    name = trainer.recipe.name
    if linear in TERNARY and not trainer.recipe.shape.packs:  # widths of the studies: the same numbers, written out
        linear = TensorType.F16
    path = export(trainer.model, tokenizer, out / f"{name}.gguf", card=made, linear=linear)
    log = read_log(out / "log.jsonl")
    report = {
        "card": made,
        "recipe": asdict(trainer.recipe),
        "file_bytes": path.stat().st_size,
        "dev": [r for r in log if r.get("kind") == "dev"],
    }
    (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (out / f"{name}.md").write_text(markdown(made), encoding="utf-8")
    curves(log, out / "curves.png")
    return path


def facts(trainer: Trainer, mix: Mix, code: str) -> dict[str, Any]:
    """How and where the model was trained."""
    return {
        "tokens": trainer.tokens,
        "steps": trainer.n,
        "seconds": round(trainer.seconds, 1),
        "tokens_per_s": round(trainer.tokens / max(trainer.seconds, 1e-9)),
        "precision": trainer.precision,
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "torch": torch.__version__,
        "commit": code,
        "data_sha256": mix.data_sha256,
        "rows_left_out": ", ".join(mix.without) or "none",
        **({"teacher_sha256": trainer.teacher_sha256} if trainer.teacher is not None else {}),
    }


def machine() -> str:
    """ "AMD EPYC, 2 cores", as far as the system says."""
    return f"{cpu_name()}, {os.cpu_count()} cores"


def commit() -> str:
    """The git commit of the code that ran, "unknown" outside a repository."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a run; a line that a kill cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def curves(log: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Losses, learning rate, gradient norm and held-out figures over the tokens, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = list(log)
    progress = [r for r in records if r.get("kind") == "progress"]
    tokens_at = {r["step"]: r["tokens"] / 1e6 for r in records if r.get("kind") == "step"}
    looks = [r for r in records if r.get("kind") == "dev" and r["step"] in tokens_at]
    x = [r["tokens"] / 1e6 for r in progress]
    at = [tokens_at[r["step"]] for r in looks]
    sources = sorted({name for r in looks for name in r["sources"]})
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), constrained_layout=True)

    axes[0, 0].plot(x, [r["loss"] for r in progress], label="full depth")
    for e in progress[0]["exits"] if progress else ():
        axes[0, 0].plot(x, [r["exits"][e] for r in progress], label=f"exit {e}")
    axes[0, 0].set_title("training loss (nats a token)")
    axes[0, 1].plot(x, [r["lr"] for r in progress])
    axes[0, 1].set_title("learning rate")
    axes[0, 2].plot(x, [r["grad_norm"] for r in progress])
    axes[0, 2].set_title("gradient norm before clipping")
    for axis, key, title in (
        (axes[1, 0], "loss.final", "held-out loss of answer tokens"),
        (axes[1, 1], "exact.final", "held-out answers exact"),
    ):
        for name in sources:
            axis.plot(at, [r["sources"][name][key] for r in looks], label=name)
        axis.set_title(title)
    agree = [key for key in (looks[0]["sources"][sources[0]] if looks else ()) if key.startswith("agree.exit")]
    for key in agree:
        for name in sources:
            axes[1, 2].plot(at, [r["sources"][name][key] for r in looks], label=f"{name} {key[6:]}")
    axes[1, 2].set_title("exit agrees with full depth")
    for axis in axes.flat:
        axis.set_xlabel("million tokens")
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=90)
    plt.close(figure)
