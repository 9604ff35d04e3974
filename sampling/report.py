"""The page of an evaluation: its plots, and the figures that compare models. Its text is in report.html."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from configs import storage
from configs.errors import UserError
from data_pipeline.page import as_utf8, render
from sampling.video_grid import VideoGrid

COLOURS = {
    "real": "#2d2f36", "codec": "#8a8f9c", "from_context": "#2f6fde", "from_frame": "#5fb0e5",
    "repeat_prompt": "#e0663c",
}  # fmt: skip
NAMES = {
    "real": "real play", "codec": "codec's reconstruction", "from_context": "generated from 9 frames",
    "from_frame": "generated from 1 frame", "repeat_prompt": "last given frame repeated",
    "right": "right actions", "shuffled": "another episode's actions", "none": "no actions",
}  # fmt: skip
Report = dict[str, Any]


class Compared(NamedTuple):
    """What a page shows of a model beside others."""

    page: str  # the model's page, relative to the page that shows this; empty on the model's page
    method: str
    checkpoint: str
    figures: dict[str, str]  # the main ones, by name, as text
    by_frame: np.ndarray  # PSNR in dB of each frame after the 9 given ones


def compared(report: Report, page: str) -> Compared:
    """The part of a report that is compared. Raises errors of any kind if `report`, from any file, is none."""
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
    beside = {f"{model.method}, from 9 frames": model.by_frame for model in models}
    statistics = {"brightness": "mean", "contrast": "std", "sharpness": "sharpness"}
    drift = {
        title: {name: figures[key] for name, figures in report["drift"].items()} for title, key in statistics.items()
    }
    after = "frames after the last given one"
    plots = {
        "psnr": plot({"PSNR, dB": psnr}, after),
        "beside": plot({"PSNR, dB": {**beside, "repeat_prompt": psnr["repeat_prompt"]}}, after),
        "drift": plot(drift, "chunk"),
    }
    page = render(
        Path(__file__).with_name("report.html"),
        title=report["checkpoint"],
        report=report,
        models=models,
        figure_names=list(dict.fromkeys(name for model in models for name in model.figures)),
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
        figures[f"held {_spaced(command)}"] = f"{held['obeyed']:.0%} ({held['idle']:.0%} with nothing pressed)"
    contrast = report["drift"]["from_context"]["std"]
    figures["contrast, first and last chunk"] = f"{contrast[0]:.1f}, {contrast[-1]:.1f}"
    return figures


def difference(figures: Mapping[str, float]) -> str:
    """How much worse than with the right actions, ± its standard error if it has one."""
    error = figures.get("standard_error")
    return f"{figures['minus_right']:+.4f}" + (f" ± {error:.4f}" if error is not None else "")


def plot(panels: Mapping[str, Mapping[str, Sequence[float] | np.ndarray]], x: str) -> Markup:
    """An SVG of lines by name, one panel beside the other by title."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")  # inches
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, values in lines.items():
            label = NAMES.get(name) or as_utf8(name)[:60].replace("$", r"\$")  # a formula stands between dollars
            axes.plot(np.arange(1, 1 + len(values)), values, color=COLOURS.get(name), label=label)
        axes.set(xlabel=x, title=title)
        axes.spines[["top", "right"]].set_visible(False)
    names = figure.axes[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside upper center", frameon=False, fontsize=9, ncols=4)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return Markup(text.getvalue()[text.getvalue().index("<svg") :])


def _spaced(name: str) -> str:
    return name.replace("_", " ")
