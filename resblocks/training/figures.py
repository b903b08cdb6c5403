"""Figures: those of arXiv 2510.24036 from the results of runs, accuracy against depth, the loss around nets."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .extras import require
from .files import write_atomic
from .recipe import recipe_in_words
from .result import Result, by_name, seeds_in_words, title

# Okabe and Ito's colours, told apart by colour-blind readers; the line style and the marker repeat what they say.
_LOOKS: dict[str, dict[str, Any]] = {
    "baseline_cnn": {"color": "#D55E00", "linestyle": ":", "marker": "s"},
    "baseline_cnn_bn": {"color": "#CC79A7", "linestyle": "-.", "marker": "D"},
    "resnet18_noskip": {"color": "#E69F00", "linestyle": "--", "marker": "^"},
    "resnet18": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
}
_OTHERS = [("#009E73", "D"), ("#56B4E9", "P"), ("#000000", "X"), ("#CC79A7", "v"), ("#E69F00", "<"), ("#999999", "p")]
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "svg.hashsalt": "resblocks",
}


def draw_figures(results: Sequence[Result], folder: str | Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Figures 1 and 2: curves of the nets without "_noskip"; 3: gradients; 4 and 5: curves of all. Returns the files.

    Results of one name are seeds of one experiment: their mean is drawn, and a band from the smallest to the largest.

    Raises:
        ValueError: no results, results without a finished epoch, of several data sets or recipes, or of one run twice;
            seeds of one net with other numbers of epochs.
    """
    _check_together(results, "draw_figures")
    for seeds in by_name(results):
        if len(lengths := {len(run.epochs) for run in seeds}) > 1:
            raise ValueError(f"results of one name must have the same epochs, {seeds[0].name} has {sorted(lengths)}")
    some = [result for result in results if not result.name.endswith("_noskip")] or results
    split = results[0].settings["dataset"]["split"]
    part = "test set" if split == "test" else f"{split} set"
    looks = _looks(results)
    with require("matplotlib").rc_context(_STYLE):
        figures = {
            "figure1_training": _curves(some, looks, "train", "training set"),
            "figure2_validation": _curves(some, looks, "eval", part),
            "figure4_training_all": _curves(results, looks, "train", "training set"),
            "figure5_validation_all": _curves(results, looks, "eval", part),
        }
        if all(_has_gradients(result) for result in results):
            figures["figure3_gradients"] = _gradients(results, looks)
        return [path for name in sorted(figures) for path in _save(figures[name], Path(folder) / name, formats)]


def _check_together(results: Sequence[Result], who: str) -> None:
    """Raise unless the results can share axes: a figure says once what they all were trained on, and how."""
    if not results or not all(result.epochs for result in results):
        raise ValueError(f"{who} needs results with at least one finished epoch each")
    about = {_about(run) for run in results}
    if len(about) > 1 or len({run.settings["dataset"].get("sha256") for run in results}) > 1:
        raise ValueError(f"{who} needs results of one data set and recipe, got {', '.join(sorted(about))}")
    runs = [(run.name, run.settings["seed"]) for run in results]
    if twice := sorted({run for run in runs if runs.count(run) > 1}):
        raise ValueError(f"{who} needs each net and seed once, got {twice} several times")


def _about(result: Result) -> str:
    """On what a net was trained, and how."""
    return f"{result.settings['dataset']['name']}, recipe {recipe_in_words(result.settings['recipe'])}"


def draw_depths(results: Sequence[Result], folder: str | Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """The degradation problem (He et al. 2015, fig. 6): accuracy against depth, with and without skips.

    Results are of nets named resnetN and resnetN_noskip; several of one name are seeds, drawn as mean and range.

    Raises:
        ValueError: what `draw_figures` raises; no net is named so.
    """
    _check_together(results, "draw_depths")
    if not any(_by_depth(results, plain, "eval") for plain in (False, True)):
        raise ValueError(f"draw_depths needs nets named resnetN or resnetN_noskip, got {[run.name for run in results]}")
    with require("matplotlib").rc_context(_STYLE):
        figure, panels = _panels(sharey=True)
        split = results[0].settings["dataset"]["split"]
        for axes, part, where in zip(panels, ("train", "eval"), ("training set", f"{split} set"), strict=True):
            for plain, label, look in ((False, "with skips", "resnet18"), (True, "without skips", "resnet18_noskip")):
                found, drawn = _by_depth(results, plain, part), {**_LOOKS[look], "label": label}
                axes.plot(list(found), [sum(seeds) / len(seeds) for seeds in found.values()], **drawn)
                ranges = [list(map(end, found.values())) for end in (min, max)]
                axes.vlines(list(found), *ranges, color=drawn["color"], alpha=0.4, linewidth=4)
            axes.set(title=f"Accuracy, {where}", xlabel="layers")
            axes.set_xticks(sorted({x for line in axes.lines for x in line.get_xdata()}))
        panels[0].set_ylabel("accuracy (%)")
        return _save(_finish(figure, panels[0], results), Path(folder) / "depths", formats)


def draw_surfaces(
    surfaces: Mapping[str, Mapping[tuple[float, float], float]], folder: str | Path, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """The loss around several nets in one logarithmic scale of colours (Li et al. 2018, figure 5). Returns the files.

    Args:
        surfaces: a title for each, and what `resblocks.landscape.loss_surface` returned. Where the loss is not finite
            there is no colour, and where it is not above zero the lowest one.

    Raises:
        ValueError: no surfaces; one that is no grid of at least 2 x 2 points with a finite loss above zero.
    """
    if not surfaces:
        raise ValueError(f"surfaces must map titles to surfaces, at least one, got {surfaces!r}")
    grids = {str(name): _grid(name, surface) for name, surface in surfaces.items()}
    seen = [loss for *_, losses in grids.values() for row in losses for loss in row if loss > 0]
    low, high = min(seen), max(max(seen), 1.01 * min(seen))
    powers = [math.log10(low) + (math.log10(high) - math.log10(low)) * step / 24 for step in range(1, 24)]
    levels = [low, *(10**power for power in powers), high]
    with require("matplotlib").rc_context({**_STYLE, "axes.grid": False}):
        figure, panels = _square_panels(len(grids))
        norm = require("matplotlib.colors").LogNorm(low, high)
        for axes, (name, (x, y, losses)) in zip(panels, grids.items(), strict=True):
            colours = [[max(loss, low) for loss in row] for row in losses]
            filled = axes.contourf(x, y, colours, levels, norm=norm, cmap="viridis")
            axes.plot(0, 0, "+", color="white")
            axes.set(title=textwrap.fill(_no_formula(name), 26), aspect="equal")
        bar = figure.colorbar(filled, ax=panels, label="loss", ticks=levels[::6], format="{x:.3g}")
        bar.minorticks_off()
        figure.supxlabel("step along the first direction", fontsize=9)
        figure.supylabel("along the second", fontsize=9)
        return _save(figure, Path(folder) / "surfaces", formats)


def _square_panels(count: int) -> tuple[Any, list[Any]]:
    """Four to a row."""
    columns = min(4, count)
    rows = -(-count // columns)
    figure = require("matplotlib.figure").Figure((2.4 * columns + 0.8, 2.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes in panels[count:]:
        axes.remove()
    for axes in panels[max(0, count - columns) : count]:  # nothing below them, also where the last row is short
        axes.tick_params(labelbottom=True)
    return figure, panels[:count]


def _grid(name: str, surface: Any) -> tuple[list[float], list[float], list[list[float]]]:
    """The steps in each direction, in order, and the losses by row of the picture, nan where none is finite."""
    if isinstance(surface, Mapping) and all(isinstance(point, tuple) and len(point) == 2 for point in surface):
        x, y = (sorted({point[at] for point in surface}) for at in (0, 1))
        if len(surface) == len(x) * len(y) >= 4 and min(len(x), len(y)) > 1:
            rows = [[float(surface[one, other]) for one in x] for other in y]
            # max() keeps what is no number, where that comes first.
            losses = [[loss if math.isfinite(loss) else math.nan for loss in row] for row in rows]
            if any(loss > 0 for row in losses for loss in row):
                return x, y, losses
    raise ValueError(f"surfaces must be grids of 2 x 2 points or more with a loss above zero, {name!r} is none")


def _by_depth(results: Sequence[Result], plain: bool, part: str) -> dict[int, list[float]]:
    """The last accuracies of all seeds at each depth."""
    found: dict[int, list[float]] = {}
    for result in results:
        depth = result.name.removeprefix("resnet").removesuffix("_noskip")
        if depth.isdigit() and plain == result.name.endswith("_noskip"):
            found.setdefault(int(depth), []).append(result.epochs[-1][f"{part}_accuracy_percent"])
    return dict(sorted(found.items()))


def _curves(results: Sequence[Result], looks: dict[str, dict[str, Any]], part: str, where: str) -> Any:
    """Accuracy on the left, loss on the right, by epoch."""
    figure, panels = _panels()
    for seeds in by_name(results):
        epochs = [epoch["epoch"] for epoch in seeds[0].epochs]
        look = looks[seeds[0].name]
        for axes, number in zip(panels, ("accuracy_percent", "loss"), strict=True):
            _line(
                axes, epochs, [[run.epochs[epoch - 1][f"{part}_{number}"] for run in seeds] for epoch in epochs], look
            )
    left, right = panels
    left.set(title=f"Accuracy, {where}", xlabel="epoch", ylabel="accuracy (%)")
    left.set_ylim(top=min(100.5, left.get_ylim()[1]))
    smoothed = part == "train" and any(run.settings["recipe"].get("label_smoothing") for run in results)
    loss = "Loss with smoothed labels" if smoothed else "Cross-entropy loss"
    right.set(title=f"{loss}, {where}", xlabel="epoch", ylabel="loss (nats)")
    losses = [epoch[f"{part}_loss"] for result in results for epoch in result.epochs]
    if min(losses) > 0 and max(losses) > 20 * min(losses):
        right.set_yscale("log")
    for axes in (left, right):
        _whole_numbers(axes)
    return _finish(figure, left, results)


def _has_gradients(result: Result) -> bool:
    """Whether those before and after the training are there."""
    recorded = [moment["epoch"] for moment in result.gradients if moment["layers"]]
    return recorded[:1] == [0] and recorded[-1] == len(result.epochs)


def _gradients(results: Sequence[Result], looks: dict[str, dict[str, Any]]) -> Any:
    """Mean absolute gradient of each layer's weights, input to output, before and after training."""
    figure, panels = _panels(sharey=True)
    for axes, moment in zip(panels, (0, -1), strict=True):
        for seeds in by_name(results):
            sizes = [_sizes(run.gradients[moment]["layers"]) for run in seeds]
            layers = range(1, len(sizes[0]) + 1)
            _line(axes, layers, list(zip(*sizes, strict=True)), looks[seeds[0].name])
        axes.set(
            title=_after({run.gradients[moment]["epoch"] for run in results}),
            xlabel="layer, the last is the classifier",
            yscale="log",
        )
        axes.set_xlim(left=0.5)
        _whole_numbers(axes)
    panels[0].set_ylabel("mean |gradient| of the weights")
    return _finish(figure, panels[0], results)


def _after(epochs: set[int]) -> str:
    """When the gradients were taken."""
    if len(epochs) > 1:
        return "After the last epoch"
    (epoch,) = epochs
    return "At initialisation" if epoch == 0 else f"After {epoch} epoch{'s' if epoch > 1 else ''}"


def _sizes(layers: Sequence[dict[str, Any]]) -> list[float]:
    """By position between input and output: a projection lies beside that path, and would shift what comes after it."""
    return [layer["mean_abs"] or float("nan") for layer in layers if ".shortcut." not in layer["name"]]


def _line(axes: Any, x: Sequence[int], seeds: Sequence[Sequence[float]], look: dict[str, Any]) -> None:
    """At each x the mean over the seeds, and where there are several a band over all of them."""
    marked = sorted({*range(0, len(x), max(1, len(x) // 15)), len(x) - 1})  # the last point is read off most often
    axes.plot(x, [sum(values) / len(values) for values in seeds], markevery=marked, **look)
    if any(len(values) > 1 for values in seeds):
        axes.fill_between(x, list(map(min, seeds)), list(map(max, seeds)), color=look["color"], alpha=0.2, lw=0)


def _panels(**options: Any) -> tuple[Any, Any]:
    """Without pyplot, so that the caller's back end and open figures stay as they are."""
    figure = require("matplotlib.figure").Figure(figsize=(7.2, 3.0), layout="constrained")
    return figure, figure.subplots(1, 2, **options)


def _looks(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """How each net is drawn in all figures: in its colour, and without skips dashed with hollow markers."""
    names = dict.fromkeys(result.name for result in results)
    others = list(dict.fromkeys(name.removesuffix("_noskip") for name in names if name not in _LOOKS))
    looks = {}
    for name in names:
        if name in _LOOKS:
            look = _LOOKS[name]
        else:
            color, marker = _OTHERS[others.index(name.removesuffix("_noskip")) % len(_OTHERS)]
            look = {"color": color, "marker": marker, "linestyle": "-"}
            look |= {"linestyle": "--", "markerfacecolor": "white"} if name.endswith("_noskip") else {}
        looks[name] = {**look, "label": _no_formula(title(name))}
    return looks


def _no_formula(text: str) -> str:
    """For matplotlib, which takes what stands between two dollar signs for mathematics."""
    return text.replace("$", r"\$")


def _whole_numbers(axes: Any) -> None:
    axes.xaxis.set_major_locator(require("matplotlib.ticker").MaxNLocator(integer=True, min_n_ticks=1))


def _finish(figure: Any, axes: Any, results: Sequence[Result]) -> Any:
    """One legend above both panels, and below them what was run."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 4 if sum(map(len, labels[:4])) <= 66 else 2  # as many letters as fit beside four lines
    figure.legend(handles, labels, loc="outside upper center", ncols=min(columns, len(labels)), handlelength=3)
    seeds = seeds_in_words((result.name, result.settings["seed"]) for result in results)
    about = _no_formula(f"{_about(results[0])}, {seeds}")
    figure.supxlabel(about, fontsize=7, color="#555555", x=0.99, ha="right")
    return figure


def _save(figure: Any, path: Path, formats: Sequence[str]) -> list[Path]:
    written = []
    for kind in formats:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
        target = path.with_suffix(f".{kind}")
        write_atomic(target, buffer.getvalue())
        written.append(target)
    return written
