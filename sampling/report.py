"""The page of an evaluation: its plots, and the figures by which models are compared; its text is in report.html."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup

from configs.errors import UserError

matplotlib.use("agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from configs import storage
from data_pipeline.page import as_utf8, render
from sampling.video_grid import VideoGrid

COLOURS = {
    "right": "#2f6fde", "shuffled": "#e0663c", "none": "#8a8f9c", "real": "#2d2f36", "codec": "#8a8f9c",
    "from_context": "#2f6fde", "from_frame": "#5fb0e5", "repeat_prompt": "#e0663c",
    "idle": "#c9ccd4", "obeyed": "#2f6fde",
}  # fmt: skip
NAMES = {
    "real": "real play", "codec": "codec's reconstruction", "from_context": "generated from 9 frames",
    "from_frame": "generated from 1 frame", "repeat_prompt": "last given frame repeated",
    "obeyed": "command held", "idle": "nothing pressed",
    "right": "right actions", "shuffled": "another episode's actions", "none": "no actions",
}  # fmt: skip
SIZE = 10  # inches, width of a plot
Report = dict[str, Any]


class Compared(NamedTuple):
    """What a page shows of a model beside others."""

    page: str  # its own page, relative to the one that shows it; empty for that one
    method: str
    checkpoint: str
    figures: dict[str, str]  # the main ones, by name, as text
    by_frame: np.ndarray  # PSNR in dB of each frame after the 9 given ones


def compared(report: Report, page: str) -> Compared:
    """What is compared of a report, which may be another's file: what is not one raises errors of any kind."""
    by_frame = np.array(report["psnr_db"]["from_context"]["by_frame"], dtype=np.float64)
    if by_frame.ndim != 1 or not np.isfinite(by_frame).all():
        raise UserError("psnr_db.from_context.by_frame must be numbers")
    if not isinstance(report["method"], str) or not isinstance(report["checkpoint"], str):
        raise TypeError("method and checkpoint must be text")
    return Compared(page, report["method"], report["checkpoint"], main_figures(report), by_frame)


def write_page(path: Path, report: Report, videos: Sequence[VideoGrid], others: Sequence[Compared] = ()) -> None:
    """Writes the page of `report` with `videos` that lie beside it; `others` are models on the same recordings."""
    models = [compared(report, ""), *others]
    psnr = {name: figures["by_frame"] for name, figures in report["psnr_db"].items()}
    turns = {name: f["agreement"] for name, f in report["replay_turns"].items() if "agreement" in f}
    beside = {f"{model.method}, from 9 frames": model.by_frame for model in models}
    plots = {
        "losses": {kind: plot_losses(table) for kind, table in report["velocity_loss"].items()},
        "psnr": plot_psnr(psnr),
        "held": report["held"] and plot_held(report["held"]),
        "drift": plot_drift(report["drift"]),
        "beside": plot_psnr({**beside, "repeat_prompt": psnr["repeat_prompt"]}),
    }
    page = render(
        Path(__file__).with_name("report.html"),
        title=report["checkpoint"],
        report=report,
        models=models,
        others=others,
        figure_names=list(dict.fromkeys(name for model in models for name in model.figures)),
        turns=turns,
        videos=videos,
        plots=plots,
        names=NAMES,
        difference=difference,
    )
    storage.write_text(path, page)


def main_figures(report: Report) -> dict[str, str]:
    """The figures by which models are compared, by name, as text."""
    figures = {}
    for kind, table in report["velocity_loss"].items():
        figures[f"loss, {_spaced(kind)}"] = f"{table['right']['loss']:.4f}"
        if "shuffled" in table:
            figures[f"shuffled actions, {_spaced(kind)}"] = difference(table["shuffled"])
    for name in ("from_context", "from_frame", "repeat_prompt", "codec"):
        figures[f"PSNR, {NAMES[name]}"] = f"{report['psnr_db'][name]['mean']:.1f} dB"
    for name, turns in report["replay_turns"].items():
        if "agreement" in turns:
            figures[f"recorded turns, {NAMES[name]}"] = f"{turns['agreement']:.0%}"
    for command, held in report["held"].items():
        beside = f" ({held['idle']:.0%} with nothing pressed)" if "idle" in held else ""
        figures[f"held {_spaced(command)}"] = f"{held['obeyed']:.0%}{beside}"
    contrast = report["drift"]["from_context"]["std"]
    figures["contrast, first and last chunk"] = f"{contrast[0]:.1f}, {contrast[-1]:.1f}"
    return figures


def plot_losses(figures: Mapping[str, Mapping[str, float]]) -> Markup:
    table = {name: figures[name] for name in ("right", "shuffled", "none") if name in figures}
    bins = [name.removeprefix("loss/") for name in table["right"] if name.startswith("loss/")]
    ranges = [name.removeprefix("sigma_").replace("-", " - ") for name in bins]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(SIZE, 3.2))
    _grouped_bars(left, ranges, {variant: [row[f"loss/{name}"] for name in bins] for variant, row in table.items()})
    gaps = {v: [row[f"minus_right/{name}"] for name in bins] for v, row in table.items() if v != "right"}
    _grouped_bars(right, ranges, gaps)
    right.axhline(0, color=COLOURS["real"], linewidth=0.8)
    left.set(xlabel="noise level sigma", ylabel="velocity loss")
    right.set(xlabel="noise level sigma", ylabel="minus the right actions' loss")
    figure.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=9, ncols=3, loc="upper center")
    return _svg(figure)


def plot_psnr(series: Mapping[str, Sequence[float] | np.ndarray]) -> Markup:
    figure, axes = pyplot.subplots(figsize=(SIZE, 3.4))
    _lines(axes, series)
    axes.set(xlabel="frames after the last given one", ylabel="PSNR, dB")
    axes.legend(frameon=False, fontsize=9, ncols=2)
    return _svg(figure)


def plot_held(held: Mapping[str, Mapping[str, float]]) -> Markup:
    figure, axes = pyplot.subplots(figsize=(SIZE, 3.2))
    names = [name for name in ("obeyed", "idle", "real") if name != "idle" or all("idle" in f for f in held.values())]
    series = {name: [figures.get(name, math.nan) for figures in held.values()] for name in names}  # no bar where none
    _grouped_bars(axes, [_spaced(command) for command in held], series)
    axes.axhline(0.5, color=COLOURS["real"], linewidth=0.8, linestyle=":")
    axes.set(ylim=(0, 1.05), ylabel="share of chunks")
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    return _svg(figure)


def plot_drift(drift: Mapping[str, Mapping[str, Sequence[float]]]) -> Markup:
    quantities = {"mean": "brightness", "std": "contrast", "sharpness": "sharpness"}
    figure, panels = pyplot.subplots(1, 3, figsize=(SIZE, 2.8))
    for axes, (quantity, label) in zip(panels, quantities.items(), strict=True):
        _lines(axes, {name: figures[quantity] for name, figures in drift.items()})
        axes.set(xlabel="chunk", title=label)
        axes.set_ylim(0)
    panels[0].legend(frameon=False, fontsize=8)
    return _svg(figure)


def _lines(axes: Axes, series: Mapping[str, Sequence[float] | np.ndarray]) -> None:
    for name, values in series.items():
        label = NAMES.get(name) or _label(name)
        axes.plot(np.arange(1, 1 + len(values)), values, color=COLOURS.get(name), label=label)


def _grouped_bars(axes: Axes, groups: Sequence[str], series: Mapping[str, list[float]]) -> None:
    width = 0.8 / max(1, len(series))
    for i, (name, values) in enumerate(series.items()):
        places = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
        axes.bar(places, values, 0.92 * width, color=COLOURS[name], label=NAMES.get(name, name))
    axes.set_xticks(np.arange(len(groups)), [_label(group) for group in groups])


def difference(figures: Mapping[str, float]) -> str:
    """How much worse than with the right actions, ± its standard error if it has one."""
    error = figures.get("standard_error")
    return f"{figures['minus_right']:+.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _label(text: str) -> str:
    """`text` for matplotlib, which would read a formula between dollars."""
    return as_utf8(text)[:60].replace("$", r"\$")


def _svg(figure: Figure) -> Markup:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(rect=(0, 0, 1, 0.92 if figure.legends else 1))
    text = io.StringIO()
    figure.savefig(text, format="svg")
    pyplot.close(figure)
    return Markup(text.getvalue()[text.getvalue().index("<svg") :])
