"""The report's plots, as SVG within the page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from tav_opt.suite import results
from tav_opt.suite.results import Cell
from tav_opt.suite.rows import Row

COLOURS = ("#2f6db3", "#d9822b", "#4f9d69", "#b5484b", "#7c63b0", "#8a6d4f", "#c76ba6", "#6f7a86")
INK, GRID = "#808890", "#80889040"
"""Readable on white and on black."""


def plots(compared: Sequence[Row], table: dict[str, dict[str, Cell]]) -> list[str]:
    """Means with their intervals, and every edit by the paper's two metrics, as far as these are there."""
    colours = {method: COLOURS[index % len(COLOURS)] for index, method in enumerate(table)}
    found = [_means(table, colours)]
    if all(name in results.metrics(compared) for name in results.PAPER):
        found.append(_scatter(compared, colours))
    return found


def _means(table: dict[str, dict[str, Cell]], colours: dict[str, str]) -> str:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for row in table.values() for name in row))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.7 * columns, (0.55 + 0.3 * len(table)) * lines + 0.3), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, name in zip(axes, names, strict=False):
        for index, (method, row) in enumerate(table.items()):
            if name in row:
                cell = row[name]
                ends = [cell.mean if end is None else end for end in (cell.low, cell.high)]
                axis.plot(ends, [index, index], color=colours[method], linewidth=2)
                axis.plot([cell.mean], [index], "o", color=colours[method], markersize=6)
        good = "low is good" if name in results.LOW_IS_GOOD else "high is good"
        axis.set_title(f"{name} ({good})", fontsize=9, color=INK)
        axis.set(ylim=(len(table) - 0.5, -0.5))
        axis.set_yticks(range(len(table)), list(table), fontsize=8)
        _plain(axis)
    for axis in axes[len(names) :]:
        axis.remove()
    return _svg(figure, "means of each metric by method, with 95 % intervals")


def _scatter(compared: Sequence[Row], colours: dict[str, str]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axis = figure.subplots()
    for method, colour in colours.items():
        own = [row.values for row in compared if row.method == method and set(results.PAPER) <= set(row.values)]
        points = [[values[name] for values in own] for name in results.PAPER]
        axis.plot(*points, "o", color=colour, markersize=5, alpha=0.7, markeredgewidth=0, label=method)
    axis.set_xlabel(results.PAPER[0], color=INK)
    axis.set_ylabel(results.PAPER[1], color=INK)
    axis.set_title("every edit: how much frames agree, and how well they show the prompt", fontsize=9, color=INK)
    axis.legend(frameon=False, labelcolor=INK, fontsize=8)
    _plain(axis)
    return _svg(figure, "every edit by frame consistency and textual alignment")


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(INK)
    axis.tick_params(colors=INK, labelsize=8)
    axis.locator_params(axis="x", nbins=5)
    axis.grid(axis="x", color=GRID)
    axis.set_axisbelow(True)
    axis.patch.set_alpha(0)


def _svg(figure: Any, what: str) -> str:
    """The picture's element alone, with what it shows for who cannot see it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    element = file.getvalue()
    element = element[element.index("<svg") :]
    return element.replace("<svg", f'<svg role="img" aria-label="{what}"', 1)
