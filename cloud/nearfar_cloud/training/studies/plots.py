"""What the plots of the studies share: losses over tokens, bars with their spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def canvas(n: int) -> tuple[Any, list[Any]]:
    """A figure with `n` axes beside each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, n, figsize=(6.5 * n, 5), constrained_layout=True, squeeze=False)
    return figure, list(axes[0])


def save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def curves(axis: Any, arms: Mapping[str, Any], names: Sequence[str]) -> None:
    """Held-out loss over the tokens of each run; one colour an arm, one line a seed."""
    for i, name in enumerate(names):
        for j, run in enumerate(arms[name]["seeds"].values()):
            x, y = [tokens / 1e6 for tokens, _ in run["curve"]], [loss for _, loss in run["curve"]]
            axis.plot(x, y, ".-", color=f"C{i % 10}", lw=1, label=None if j else name)
    axis.set(title="held-out loss of answer tokens (nats)", xlabel="million tokens")
    axis.legend(fontsize=8)


def bars(axis: Any, arms: Mapping[str, Any], key: str, title: str) -> None:
    """The mean of each arm, from the smallest to the largest of its seeds as an error bar."""
    for i, arm in enumerate(arms.values()):
        values, mean = [run[key] for run in arm["seeds"].values()], arm["mean"][key]
        axis.errorbar(mean, i, xerr=[[mean - min(values)], [max(values) - mean]], fmt="o", color="C0", capsize=4)
    axis.set(title=title, yticks=range(len(arms)), yticklabels=list(arms))
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.4)
