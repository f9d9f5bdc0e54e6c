"""docs/roofline.svg out of the JSON lines that `nearfar bench roofline --json` wrote.

    nearfar bench roofline --json > docs/roofline.jsonl
    python bench/plot_roofline.py docs/roofline.jsonl docs/roofline.svg

One picture of one thread count: operations a byte to the right, operations a second upwards.  The slopes are read
bandwidths, the level line is the int8 multiplier; a point is a kernel with its weights in memory, a numbered ring a
whole model.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Record = dict[str, Any]

INK, FAINT, PAPER = "#1f2430", "#8a93a3", "#ffffff"
ROOF = {"dram": "#1f2430", "l3": "#8a93a3", "l2": "#c3c9d3"}
LEVEL = {"dram": "memory", "l3": "last cache", "l2": "L2"}
# Families of kinds: ternary, whole numbers of few bits with group scales, int8, floats, lookups.
FAMILIES = {
    "ternary": ("#d1495b", ("t5", "i2", "i2_blocks")),
    "2 and 3 bits": ("#edae49", ("q2_k", "q3_k")),
    "4 bits": ("#00798c", ("q4", "q4_1", "q4_k")),
    "5 to 8 bits": ("#30638e", ("q5_k", "q6_k", "int8")),
    "16 and 32 bits": ("#9aa0a8", ("f16", "bf16", "f32")),
    "ternary by lookup": ("#7b4fb5", ("l3",)),
}
MARKERS = {1: "o", 2: "s", 4: "D", 8: "^", 128: "P"}
NAMED = ("t5", "i2", "q4", "q4_k", "int8", "f16", "l3")  # the kinds that are written beside their first point


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("records", type=Path, help="JSON lines of `nearfar bench roofline --json`")
    parser.add_argument("picture", type=Path, help="what to write: .svg or .png")
    parser.add_argument("--threads", type=int, help="default: the most that were measured")
    args = parser.parse_args()
    try:
        records = read(args.records)
        draw(records, args.threads or most_threads(records), args.picture)
    except (OSError, ValueError) as error:
        wanted = "expected what `nearfar bench roofline --json` printed"
        print(f"plot_roofline: {args.records}: {error}; {wanted}", file=sys.stderr)
        return 2
    return 0


def read(path: Path) -> list[Record]:
    """The records of a file.  Raises ValueError where a line is none, or none says how fast the machine is."""
    records = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        record = json.loads(text)
        if not isinstance(record, dict) or "what" not in record:
            raise ValueError(f"{path}:{number}: expected a record of `nearfar bench roofline --json`")
        records.append(record)
    if not {"read", "int8"} <= {r["what"] for r in records}:
        raise ValueError(f"{path}: no roofs; expected the records `read` and `int8`")
    return records


def most_threads(records: list[Record]) -> int:
    return max(r["threads"] for r in records if r["what"] == "int8")


def draw(records: list[Record], threads: int, picture: Path) -> None:
    found = [r for r in records if r.get("threads") == threads]
    if not found:
        raise ValueError(f"no records of {threads} threads")
    machine = next((r for r in records if r["what"] == "machine"), {})
    read_gb_s = {r["from"]: r["gb_s"] for r in found if r["what"] == "read"}
    int8 = next(r for r in found if r["what"] == "int8")
    kernels = [r for r in found if r["what"] == "kernel" and r["from"] == "dram"]
    models = [r for r in found if r["what"] in ("decode", "prefill")]
    plt.rcParams.update({"font.size": 10, "svg.hashsalt": "nearfar", "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(figsize=(11, 6.8), facecolor=PAPER, layout="constrained")
    points = [*kernels, *models]
    x_low = 0.6 * min([r["ops_per_byte"] for r in points], default=0.5)
    x_high = 2.2 * max([r["ops_per_byte"] for r in points], default=2000.0)
    y_low = 0.25 * min([r["gops"] for r in points], default=read_gb_s["dram"] * x_low)
    axes.set(xscale="log", yscale="log", xlim=(x_low, x_high), ylim=(y_low, 2.1 * int8["gops"]))
    draw_roofs(axes, read_gb_s, int8)
    draw_kernels(axes, kernels)
    draw_models(axes, models)
    cores = f"{threads} thread{'s' if threads > 1 else ''}"
    axes.set_title(
        f"{machine.get('cpu', 'this machine')}, {cores}, kernels {machine.get('isa', '?')}", loc="left", color=INK
    )
    axes.set_xlabel("int8 operations a byte of weights read (a multiply-add is 2)", color=INK)
    axes.set_ylabel("billions of operations a second", color=INK)
    axes.grid(True, which="major", color="#e8ebf0", linewidth=0.8, zorder=0)
    axes.tick_params(colors=INK, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    legend(axes, kernels, models)
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None, dpi=150)
    plt.close(figure)


def draw_roofs(axes: Axes, read_gb_s: dict[str, float], int8: Record) -> None:
    """Slopes up to the level line of the multiplier, each named along itself."""
    x_low, x_high = axes.get_xlim()
    peak = int8["gops"]
    corner = peak / read_gb_s["dram"]
    axes.fill_between(
        [x_low, corner, x_high], [read_gb_s["dram"] * x_low, peak, peak], 1e-9, color="#f4f6f9", zorder=0, linewidth=0
    )
    for level, gb_s in read_gb_s.items():
        style = "-" if level == "dram" else (0, (5, 3))
        axes.plot(
            [x_low, peak / gb_s], [gb_s * x_low, peak], color=ROOF[level], linestyle=style, linewidth=1.6, zorder=2
        )
    axes.plot([peak / max(read_gb_s.values()), x_high], [peak, peak], color=ROOF["dram"], linewidth=1.6, zorder=2)
    label = {"color": INK, "fontsize": 9, "zorder": 6}
    axes.text(x_high / 1.06, peak * 1.06, f"{int8['instruction']}: {peak:,.0f} GOPS", ha="right", va="bottom", **label)
    for level, gb_s in read_gb_s.items():
        x = max(x_low * 1.12, axes.get_ylim()[0] * 1.5 / gb_s)
        axes.text(
            x,
            gb_s * x * 1.07,
            f"{LEVEL[level]} {gb_s:.0f} GB/s",
            rotation=slope_angle(axes),
            rotation_mode="anchor",
            va="bottom",
            **label,
        )


def slope_angle(axes: Axes) -> float:
    """Degrees at which y = x rises on these axes."""
    import math

    axes.figure.canvas.draw()
    (x0, y0), (x1, y1) = axes.transData.transform([(1.0, 1.0), (10.0, 10.0)])
    return math.degrees(math.atan2(y1 - y0, x1 - x0))


def color_of(kind: str) -> str:
    return next((color for color, kinds in FAMILIES.values() if kind in kinds), FAINT)


def draw_kernels(axes: Axes, kernels: list[Record]) -> None:
    """A line a kind, a point for each number of rows."""
    for kind in dict.fromkeys(r["kind"] for r in kernels):
        path = sorted((r for r in kernels if r["kind"] == kind), key=lambda r: r["m"])
        color = color_of(kind)
        axes.plot(
            [r["ops_per_byte"] for r in path],
            [r["gops"] for r in path],
            color=color,
            linewidth=0.8,
            alpha=0.45,
            zorder=3,
        )
        for r in path:
            axes.plot(
                r["ops_per_byte"],
                r["gops"],
                MARKERS.get(r["m"], "o"),
                color=color,
                markersize=6,
                markeredgecolor=PAPER,
                markeredgewidth=0.6,
                zorder=4,
            )
        if kind in NAMED:
            last = path[-1]
            axes.annotate(
                kind,
                (last["ops_per_byte"], last["gops"]),
                xytext=(5, -4),
                textcoords="offset points",
                color=color,
                fontsize=8,
                zorder=6,
            )


def draw_models(axes: Axes, models: list[Record]) -> None:
    """Numbered rings, listed below: decode with its part of the bandwidth, prefill with its part of the multiplier."""
    lines = []
    places: list[tuple[float, float]] = []
    for number, r in enumerate(models, 1):
        x, y = beside(axes, r["ops_per_byte"], r["gops"], places)
        axes.plot([r["ops_per_byte"], x], [r["gops"], y], ".-", color=INK, linewidth=0.9, markersize=4, zorder=5)
        axes.plot(x, y, "o", color=PAPER, markersize=13, markeredgecolor=INK, markeredgewidth=1.1, zorder=5)
        axes.annotate(str(number), (x, y), ha="center", va="center", fontsize=8, color=INK, zorder=6)
        if r["what"] == "decode":
            what = f"decode {r['tokens_s']:.0f} tokens/s, {r['share_of_read']:.0%} of the bandwidth"
        else:
            what = f"prefill of {r['m']}: {r['tokens_s']:.0f} tokens/s, {r['share_of_int8']:.0%} of the multiplier"
        lines.append(f"{number:>2}  {short_name(r['model'])}: {what}")
    axes.text(0.2, 0.03, "\n".join(lines), transform=axes.transAxes, fontsize=8.5, color=INK, va="bottom", zorder=6)


def beside(axes: Axes, x: float, y: float, places: list[tuple[float, float]]) -> tuple[float, float]:
    """The place of a ring: right of those that it would hide, with a line to its measured point.

    `places` (in pixels) grows by it.
    """
    px, py = axes.transData.transform((x, y))
    width = 14 * axes.figure.dpi / 72
    while any(abs(px - qx) < width and abs(py - qy) < width for qx, qy in places):
        px += width / 4
    places.append((px, py))
    x, y = axes.transData.inverted().transform((px, py))
    return float(x), float(y)


def short_name(model: str) -> str:
    """`random llama-1b, Q4_0, embedding ...` -> llama-1b Q4_0; a file -> its name."""
    parts = model.removeprefix("random ").split(", ")
    return " ".join(parts[:2]) if len(parts) > 1 else Path(model).stem


def legend(axes: Axes, kernels: list[Record], models: list[Record]) -> None:
    def handle(marker: str, color: str, label: str, size: float = 6) -> Any:
        edge = INK if color == PAPER else PAPER
        return plt.Line2D([], [], marker=marker, color=color, linestyle="", label=label, markersize=size, mec=edge)

    kinds = {r["kind"] for r in kernels}
    handles = [handle("o", color, name) for name, (color, its) in FAMILIES.items() if kinds & set(its)]
    rows = sorted({r["m"] for r in kernels})
    handles += [handle(MARKERS.get(m, "o"), FAINT, f"{m} row{'s' if m > 1 else ''}") for m in rows]
    handles += [handle("o", PAPER, "whole model, numbered", 11)] if models else []
    axes.legend(handles=handles, loc="lower right", frameon=False, fontsize=9, ncols=2, labelcolor=INK)


if __name__ == "__main__":
    sys.exit(main())
