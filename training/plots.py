"""The plots of a report. Needs matplotlib, which nothing else imports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from models.taxonomy import Severity

Report = Mapping[str, Any]

_HARM, _SAFE, _GREY = "#b3362b", "#2b6cb3", "#888888"
_DOTS_PER_INCH: Final = 120
_MOST_PANELS: Final = 12


def draw(result: Report, directory: Path) -> list[str]:
    """Writes the plots for which the report has figures, and returns their file names."""
    names = []
    for name, figure in _figures(result):
        figure.savefig(directory / name, dpi=_DOTS_PER_INCH)
        names.append(name)
    return names


def _figures(result: Report) -> Iterator[tuple[str, Figure]]:
    sets = result["sets"]
    yield "sets.png", _sets(sets)
    curves = {name: one for name, one in sets.items() if one["ece"] is not None}
    if curves:
        yield "calibration.png", _panels(curves, _calibration)
    graded = {name: one for name, one in sets.items() if len(one.get("by_severity", {})) > 1}
    if graded:
        yield "severity.png", _panels(graded, _confusion)
    sorted_out = {name: one for name, one in sets.items() if one.get("by_category")}
    if sorted_out:
        yield "categories.png", _categories(sorted_out)
    if found := result.get("robustness"):
        yield "robustness.png", _robustness(found)
    if found := result.get("long_texts"):
        yield "long_texts.png", _long_texts(found)


def _sets(sets: Report) -> Figure:
    """Each set's F1, or what is defined in its place, with its interval."""
    figure = Figure((8, 1.2 + 0.32 * len(sets)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(sets)
    _dots(left, names, [(sets[name], "f1") for name in names], _HARM)
    left.set_title("F1")
    _dots(right, names, [(sets[name], "fpr") for name in names], _SAFE)
    right.set_title("False-positive rate")
    return figure


def _dots(
    axes: Axes, names: Sequence[str], figures: Sequence[tuple[Report, str]], colour: str
) -> None:
    """Figures as dots in rows, the first on top; an undefined one leaves its row empty."""
    for place, (node, key) in enumerate(figures):
        if node[key] is not None:
            low, high = node["intervals"][key]
            axes.plot([low, high], [place, place], color=colour, linewidth=2, alpha=0.5)
            axes.plot([node[key]], [place], "o", color=colour)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.grid(axis="x", alpha=0.3)


def _panels(sets: Report, fill: Any) -> Figure:
    """One small plot a set, the largest sets first where there are many."""
    chosen = sorted(sets, key=lambda name: -sets[name]["n"])[:_MOST_PANELS]
    columns = min(len(chosen), 4)
    rows = -(-len(chosen) // columns)
    figure = Figure((max(2.7 * columns, 4), 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for name, axes in zip(chosen, panels, strict=False):
        axes.set_title(f"{name} (n={sets[name]['n']})", fontsize=9)
        fill(axes, sets[name])
    for axes in panels[len(chosen) :]:
        axes.set_visible(False)
    return figure


def _calibration(axes: Axes, report: Report) -> None:
    bins = list(report["calibration_curve"].values())
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle="--")
    for part in bins:
        axes.plot([part["predicted"]] * 2, part["intervals"]["observed"], color=_HARM, alpha=0.4)
    predicted = [part["predicted"] for part in bins]
    observed = [part["observed"] for part in bins]
    # Their areas are as the numbers of rows.
    areas = [8 + 150 * part["n"] / report["n"] for part in bins]
    axes.plot(predicted, observed, color=_HARM, linewidth=1)
    axes.scatter(predicted, observed, s=areas, color=_HARM)
    axes.set_xlabel(f"predicted P({report['positive']})", fontsize=8)
    axes.set_ylabel(f"share {report['positive']}", fontsize=8)
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)


def _confusion(axes: Axes, report: Report) -> None:
    """Shares of each true level, with the counts written in."""
    counts = report["severity_confusion"]
    shares = [[cell / max(sum(row), 1) for cell in row] for row in counts]
    axes.imshow(shares, cmap="Reds", vmin=0, vmax=1)
    for true, row in enumerate(counts):
        for judged, count in enumerate(row):
            colour = "white" if shares[true][judged] > 0.6 else "black"
            axes.text(judged, true, str(count), ha="center", va="center", color=colour, fontsize=8)
    labels = [level.label for level in Severity]
    axes.set_xticks(range(len(labels)), labels, fontsize=7)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_xlabel("judged", fontsize=8)
    axes.set_ylabel("true", fontsize=8)


def _categories(sets: Report) -> Figure:
    """F1 of each category in the sets that label them."""
    names = list(dict.fromkeys(name for one in sets.values() for name in one["by_category"]))
    size = (2.5 + 3 * len(sets), 1.2 + 0.28 * len(names))
    figure = Figure(size, layout="constrained")
    panels = figure.subplots(1, len(sets), sharey=True, squeeze=False).ravel()
    absent: Report = {"f1": None}
    for axes, (title, one) in zip(panels, sets.items(), strict=True):
        _dots(axes, names, [(one["by_category"].get(name, absent), "f1") for name in names], _HARM)
        axes.set_title(f"{title}: F1", fontsize=9)
    return figure


def _robustness(found: Report) -> Figure:
    names = [name for name, part in found.items() if isinstance(part, Mapping)]
    figure = Figure((8, 1.2 + 0.32 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _dots(left, names, [(found[name], "recall") for name in names], _HARM)
    left.set_title("Recall")
    _dots(right, names, [(found[name], "fpr") for name in names], _SAFE)
    right.set_title("False-positive rate")
    return figure


def _long_texts(found: Report) -> Figure:
    lengths = [name for name in found if name != "alone"]
    figure = Figure((5.5, 3.4), layout="constrained")
    axes = figure.subplots()
    alone = found["alone"]["found"]
    axes.axhline(alone, color=_GREY, linestyle="--", linewidth=1, label="harmful text alone")
    for key, label, colour in (
        ("found", "one harmful text inside", _HARM),
        ("flagged", "harmless", _SAFE),
    ):
        values = [found[name][key] for name in lengths]
        places = [int(name) for name in lengths]
        bounds = [found[name]["intervals"][key] for name in lengths]
        axes.fill_between(
            places,
            [low for low, _ in bounds],
            [high for _, high in bounds],
            color=colour,
            alpha=0.15,
        )
        axes.plot(places, values, "o-", color=colour, label=label)
    axes.set_xscale("log")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("characters")
    axes.set_ylabel("share flagged")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
