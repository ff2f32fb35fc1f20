"""What a run of tuning shows of itself: the loss, as a table and as a picture."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from tav_opt.files import whole


def save_losses(losses: list[float], folder: Path) -> None:
    """Writes `loss.csv` (step, loss) and `loss.png`, where a running mean lies over the single steps."""
    from matplotlib.figure import Figure

    with whole(folder / "loss.csv") as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([("step", "loss"), *enumerate(losses, start=1)])
    window = max(1, len(losses) // 20)
    sums = np.cumsum([0.0, *losses])
    means = (sums[window:] - sums[:-window]) / window
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, ".", color="#9bb8d3", markersize=4, label="each step")
    axes.plot(range(window, len(losses) + 1), means, color="#1f5a8f", linewidth=2, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss", xlim=(0, len(losses) + 1), ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    with whole(folder / "loss.png") as temporary:
        figure.savefig(temporary, dpi=120)
