"""A picture of the comparison: how long an answer takes on each link, and how often the device asks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.errors import MissingExtraError


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel for each kind of prompt; a group of bars for each link.  Raises MissingExtraError."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingExtraError("matplotlib", "train", "--plot") from error
    kinds, links = (list(dict.fromkeys(row[key] for row in rows)) for key in ("prompts", "link"))
    names = [name for name in dict.fromkeys(row["system"] for row in rows) if _is_drawn(name)]
    figure, panels = pyplot.subplots(len(kinds), 1, figsize=(11, 3.6 * len(kinds)), squeeze=False)
    width = 0.8 / len(names)
    for panel, kind in zip(panels[:, 0], kinds, strict=True):
        for i, name in enumerate(names):
            found = {row["link"]: row for row in rows if (row["system"], row["prompts"]) == (name, kind)}
            at = np.arange(len(links)) + i * width
            bars = panel.bar(at, [found[link]["total_s"] for link in links], width, label=name)
            panel.bar_label(bars, [f"{found[link]['asks_per_token']:.2f}" for link in links], fontsize=6)
        panel.set_xticks(np.arange(len(links)) + 0.4, links)
        panel.set_ylabel("s an answer")
        panel.set_title(f"{kind}: time of an answer, and asks per token above the bars", loc="left", fontsize=10)
        panel.legend(fontsize=7, ncols=3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _is_drawn(system: str) -> bool:
    """`resend` takes so long that nothing else could be seen; one router is enough."""
    return system != "resend" and (system == "routing (lossy .8)" or not system.startswith("routing"))
