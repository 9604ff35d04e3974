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

COLOURS = {"real": "#2d2f36", "codec": "#8a8f9c", "generated": "#2f6fde", "hold": "#e0663c"}
NAMES = {
    "real": "real play", "codec": "codec's reconstruction", "generated": "generated", "hold": "first frame held",
    "right": "right actions", "shuffled": "another episode's actions", "none": "no actions",
    "returned": "after turning away and back", "idle": "after standing still as long",
    "away": "turned away", "another rollout": "another start's rollout, returned",
}  # fmt: skip
Report = dict[str, Any]


class Compared(NamedTuple):
    """What a page shows of a model beside others."""

    page: str  # the model's page, relative to the page that shows this; empty on the model's page
    method: str
    checkpoint: str
    figures: dict[str, str]  # the main ones, by name, as text
    by_frame: np.ndarray  # PSNR in dB of each frame after the first


def compared(report: Report, page: str) -> Compared:
    """The part of a report that is compared. Raises errors of any kind if `report`, from any file, is none."""
    by_frame = np.array(report["psnr_db"]["generated"]["by_frame"], dtype=np.float64)
    if by_frame.ndim != 1 or not np.isfinite(by_frame).all():
        raise UserError("psnr_db.generated.by_frame must be numbers")
    if not isinstance(report["method"], str) or not isinstance(report["checkpoint"], str):
        raise TypeError("method and checkpoint must be text")
    return Compared(page, report["method"], report["checkpoint"], main_figures(report), by_frame)


def write_page(path: Path, report: Report, videos: Sequence[VideoGrid], others: Sequence[Compared] = ()) -> None:
    """Writes the page of `report` with `videos` that lie beside it; `others` are models on the same recordings."""
    models = [compared(report, ""), *others]
    psnr = {name: figures["by_frame"] for name, figures in report["psnr_db"].items()}
    beside = {f"{model.method}, generated": model.by_frame for model in models}
    after = "frames after the first"
    plots = {
        "psnr": plot({"PSNR, dB": psnr}, after),
        "beside": plot({"PSNR, dB": {**beside, "hold": psnr["hold"]}}, after),
    }
    if "long" in report:
        lines = report["long"]["by_second"].items()
        plots["long"] = plot({name: {"generated": values} for name, values in lines}, "second")
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
    for frame, row in report["at_frames"].items():
        error = f" ± {row['standard_error_db']:.1f}" if "standard_error_db" in row else ""
        figures[f"PSNR above the first frame held, frame {frame}"] = f"{row['above_hold_db']:+.1f}{error} dB"
        figures[f"grid, frame {frame}"] = f"{row['generated']['grid']:.2f} ({row['codec']['grid']:.2f} codec)"
        figures[f"sharpness over the codec's, frame {frame}"] = f"{row['sharpness_over_codec']:.2f}"
    for command, held in report["held"].items():
        still = f"; still {held['still']:.2f}" if "still" in held else ""
        figures[f"held {_spaced(command)}"] = f"{held['obeyed']:.0%} ({held['idle']:.0%} with nothing pressed){still}"
    if "return" in report:
        shares = report["return"]["likeness"]
        figures["the first frame after turning away and back"] = ", ".join(
            f"{NAMES[name]} {shares[name]['psnr_db']:.1f} dB" for name in ("returned", "idle", "away")
        )
    if "long" in report:
        long = report["long"]
        for name, ratio in long["ratio"].items():
            figures[f"{name} at the end of {long['seconds']:g} s"] = f"{ratio:.0%}"
        if "turns" in long:
            figures[f"turns at the end of {long['seconds']:g} s"] = f"{long['turns']['obeyed']:.0%}"
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
