"""The page that a person opens: one sentence, one plot and one evaluator's name per question."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

from configs.errors import UserError

matplotlib.use("agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from configs import storage
from data_pipeline.page import Html, as_utf8, h, page_of

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


@dataclass(frozen=True)
class Section:
    """One question: what the plot or film shows, in one sentence, and who judged."""

    title: str
    sentence: str
    body: Html
    evaluator: str = ""


class Compared(NamedTuple):
    """What a page shows of a model beside others."""

    page: str  # its own page, relative to the one that shows it; empty for that one
    method: str
    checkpoint: str
    figures: dict[str, str]  # the main ones, by name, as text
    by_frame: np.ndarray  # PSNR in dB of each frame after the 9 given ones


def compared(report: dict[str, Any], page: str) -> Compared:
    """Those parts of a report that may be another's. Of what they are not it makes errors of any kind."""
    by_frame = np.array(report["psnr_db"]["from_context"]["by_frame"], dtype=np.float64)
    if by_frame.ndim != 1 or not np.isfinite(by_frame).all():
        raise UserError("psnr_db.from_context.by_frame must be numbers")
    if not isinstance(report["method"], str) or not isinstance(report["checkpoint"], str):
        raise TypeError("method and checkpoint must be text")
    return Compared(page, report["method"], report["checkpoint"], main_figures(report), by_frame)


def write_page(
    path: Path, report: dict[str, Any], films: Sequence[tuple[str, str, str]], others: Sequence[Compared] = ()
) -> None:
    """Writes the page of `report`; `films` are (file name without suffix, title, sentence), beside the page; `others`
    are of other models on the same recordings."""
    comparison = [comparison_section(report, others)] if others else []
    sections = [*comparison, *judgement_sections(report), *(film_section(*film) for film in films)]
    settings = report["settings"]
    how = f"rollouts of {settings['steps']} steps per piece, guidance by actions {settings['guidance']:g}"
    parts = [h("h1", "How well does it play?"), h("p", f"{report['checkpoint']}; {how}", class_="faint")]
    for section in sections:
        parts += [h("h2", section.title), h("p", section.sentence), section.body]
        if section.evaluator:
            parts.append(h("p", f"Evaluator: {section.evaluator}", class_="faint"))
    storage.write_text(path, page_of(report["checkpoint"], *parts))


def judgement_sections(report: dict[str, Any]) -> list[Section]:
    """A section per question that `report` has figures for."""
    own = "the model's own flow-matching loss on held-out clips, the same noise for all actions"
    flow = f"{report['evaluator']}; only comparable on the same recordings"
    sections = []
    for kind, figures in report["velocity_loss"].items():
        table = {name: figures[name] for name in ("right", "shuffled", "none") if name in figures}
        title = "What are the actions worth: " + kind.replace("_", " ")
        sections.append(Section(title, loss_sentence(table), plot_losses(table), own))
    sections.append(
        Section("How far ahead does it see?", psnr_sentence(report), plot_psnr(report), "PSNR of uint8 RGB frames")
    )
    if report["held"]:
        sections.append(
            Section("One command held: does the picture obey?", held_sentence(report), plot_held(report), flow)
        )
    if any("agreement" in figures for figures in report["replay_turns"].values()):
        sections.append(
            Section("Recorded turns: does the picture obey?", turn_sentence(report), plot_turns(report), flow)
        )
    drift = "Brightness, contrast and sharpness per chunk: a stable rollout stays beside the codec's line."
    sections.append(Section("Does it drift?", drift, plot_drift(report), "grey values (0-255) and their Laplacian"))
    return sections


def comparison_section(report: dict[str, Any], others: Sequence[Compared]) -> Section:
    """This page's model and others, a column each."""
    models = [compared(report, ""), *others]
    names = list(dict.fromkeys(name for model in models for name in model.figures))
    heads = [h("a", model.method, href=model.page) if model.page else model.method for model in models]
    rows = [h("tr", *(h("th", head) for head in ("", *heads)))]
    rows += [h("tr", h("td", name), *(h("td", model.figures.get(name, "")) for model in models)) for name in names]
    paths = "; ".join(f"{model.method}: {model.checkpoint}" for model in models)
    sentence = f"The same recordings, places and commands for all ({paths}). Losses are of each model's own clips."
    repeated = report["psnr_db"]["repeat_prompt"]["by_frame"]
    return Section("Beside other models", sentence, h("div", h("table", *rows), plot_psnr_beside(models, repeated)))


def main_figures(report: dict[str, Any]) -> dict[str, str]:
    """The figures by which models are compared, by name, as text."""
    figures = {}
    for kind, table in report["velocity_loss"].items():
        figures[f"loss, {kind.replace('_', ' ')}"] = f"{table['right']['loss']:.4f}"
        if "shuffled" in table:
            error = table["shuffled"].get("standard_error")
            gap = f"{table['shuffled']['minus_right']:+.4f}" + (f" ± {error:.4f}" if error is not None else "")
            figures[f"shuffled actions, {kind.replace('_', ' ')}"] = gap
    for name in ("from_context", "from_frame", "repeat_prompt", "codec"):
        figures[f"PSNR, {NAMES[name]}"] = f"{report['psnr_db'][name]['mean']:.1f} dB"
    for name, turns in report["replay_turns"].items():
        if "agreement" in turns:
            figures[f"recorded turns, {NAMES[name]}"] = f"{turns['agreement']:.0%}"
    for command, held in report["held"].items():
        beside = f" ({held['idle']:.0%} with nothing pressed)" if "idle" in held else ""
        figures[f"held {command.replace('_', ' ')}"] = f"{held['obeyed']:.0%}{beside}"
    contrast = report["drift"]["from_context"]["std"]
    figures["contrast, first and last chunk"] = f"{contrast[0]:.1f}, {contrast[-1]:.1f}"
    return figures


def film_section(name: str, title: str, sentence: str) -> Section:
    video = h("video", src=f"{name}.mp4", controls="", loop="", muted="", autoplay="", playsinline="")
    sheet = h("p", h("a", "one picture per chunk", href=f"{name}.png"))
    return Section(title, sentence, h("div", video, sheet))


def loss_sentence(table: dict[str, dict[str, float]]) -> str:
    parts = [f"With the right actions the held-out velocity loss is {table['right']['loss']:.4f}"]
    for variant in ("shuffled", "none"):
        if variant in table:
            error = table[variant].get("standard_error")
            beside = f" ± {error:.4f}" if error is not None else ""
            parts.append(f"with {NAMES[variant]} it is {table[variant]['minus_right']:+.4f}{beside}")
    return (
        ", ".join(parts) + " (± one standard error of the paired difference); the gap is what the model uses them for."
    )


def psnr_sentence(report: dict[str, Any]) -> str:
    means = {name: figures["mean"] for name, figures in report["psnr_db"].items()}
    return (
        f"Along the recorded actions the rollouts reach {means['from_context']:.1f} dB on average; repeating the last "
        f"given frame reaches {means['repeat_prompt']:.1f} dB, the codec alone, which is the ceiling, "
        f"{means['codec']:.1f} dB."
    )


def held_sentence(report: dict[str, Any]) -> str:
    worst = min(report["held"].items(), key=lambda item: item[1]["obeyed"])
    return (
        f"The share of chunks whose picture moves as commanded; the least obeyed is {worst[0].replace('_', ' ')} with "
        f"{worst[1]['obeyed']:.0%}. Grey: how often the same motion comes with nothing pressed; black: recorded "
        "chunks in which the command was held."
    )


def turn_sentence(report: dict[str, Any]) -> str:
    shares = [
        f"{NAMES[name]} {figures['agreement']:.0%}"
        for name, figures in report["replay_turns"].items()
        if "agreement" in figures
    ]
    return f"The picture moves against the turn in these shares of the turning chunks: {', '.join(shares)}."


def plot_losses(table: dict[str, dict[str, float]]) -> Html:
    bins = [name for name in table["right"] if name.startswith("loss/")]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.2))
    _grouped_bars(left, [_range(name) for name in bins], {v: [table[v][name] for name in bins] for v in table})
    left.set(xlabel="noise level sigma", ylabel="velocity loss")
    others = [variant for variant in table if variant != "right"]
    gaps = {v: [table[v][f"minus_right/{name.removeprefix('loss/')}"] for name in bins] for v in others}
    _grouped_bars(right, [_range(name) for name in bins], gaps)
    right.axhline(0, color=COLOURS["real"], linewidth=0.8)
    right.set(xlabel="noise level sigma", ylabel="minus the right actions' loss")
    figure.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=9, ncols=3, loc="upper center")
    return _svg(figure)


def plot_psnr(report: dict[str, Any]) -> Html:
    figure, axes = pyplot.subplots(figsize=(10, 3.4))
    for name, figures in report["psnr_db"].items():
        axes.plot(
            np.arange(1, 1 + len(figures["by_frame"])), figures["by_frame"], color=COLOURS[name], label=NAMES[name]
        )
    axes.set(xlabel="frames after the last given one", ylabel="PSNR, dB")
    axes.legend(frameon=False, fontsize=9, ncols=2)
    return _svg(figure)


def plot_psnr_beside(models: Sequence[Compared], repeated: list[float]) -> Html:
    figure, axes = pyplot.subplots(figsize=(10, 3.0))
    for model in models:
        label = f"{_label(model.method)}, from 9 frames"
        axes.plot(np.arange(1, 1 + len(model.by_frame)), model.by_frame, label=label)
    axes.plot(np.arange(1, 1 + len(repeated)), repeated, color=COLOURS["repeat_prompt"], label=NAMES["repeat_prompt"])
    axes.set(xlabel="frames after the last given one", ylabel="PSNR, dB")
    axes.legend(frameon=False, fontsize=9, ncols=3)
    return _svg(figure)


def plot_held(report: dict[str, Any]) -> Html:
    figure, axes = pyplot.subplots(figsize=(10, 3.2))
    commands = list(report["held"])
    series = {"obeyed": [report["held"][command]["obeyed"] for command in commands]}
    if all("idle" in figures for figures in report["held"].values()):
        series["idle"] = [report["held"][command]["idle"] for command in commands]
    series["real"] = [report["held"][command].get("real", math.nan) for command in commands]  # no bar where none
    _grouped_bars(axes, [command.replace("_", " ") for command in commands], series)
    axes.axhline(0.5, color=COLOURS["real"], linewidth=0.8, linestyle=":")
    axes.set(ylim=(0, 1.05), ylabel="share of chunks")
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    return _svg(figure)


def plot_turns(report: dict[str, Any]) -> Html:
    figure, axes = pyplot.subplots(figsize=(10, 1.9))
    shown = {name: f["agreement"] for name, f in report["replay_turns"].items() if "agreement" in f}
    axes.barh([NAMES[name] for name in shown], list(shown.values()), color=[COLOURS[name] for name in shown])
    axes.axvline(0.5, color=COLOURS["real"], linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, 1), xlabel="share of turning chunks with the right sign")
    axes.invert_yaxis()
    return _svg(figure)


def plot_drift(report: dict[str, Any]) -> Html:
    quantities = {"mean": "brightness", "std": "contrast", "sharpness": "sharpness"}
    figure, panels = pyplot.subplots(1, 3, figsize=(10, 2.8))
    for axes, (quantity, label) in zip(panels, quantities.items(), strict=True):
        for name, figures in report["drift"].items():
            axes.plot(
                np.arange(1, 1 + len(figures[quantity])), figures[quantity], color=COLOURS[name], label=NAMES[name]
            )
        axes.set(xlabel="chunk", title=label)
        axes.set_ylim(0)
    panels[0].legend(frameon=False, fontsize=8)
    return _svg(figure)


def _grouped_bars(axes: Axes, groups: Sequence[str], series: dict[str, list[float]]) -> None:
    width = 0.8 / max(1, len(series))
    for i, (name, values) in enumerate(series.items()):
        places = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
        axes.bar(places, values, 0.92 * width, color=COLOURS[name], label=NAMES.get(name, name))
    axes.set_xticks(np.arange(len(groups)), [_label(group) for group in groups])


def _label(text: str) -> str:
    """`text` for matplotlib, which would read a formula between dollars."""
    return as_utf8(text)[:60].replace("$", r"\$")


def _range(name: str) -> str:
    return name.removeprefix("loss/sigma_").replace("-", " - ")


def _svg(figure: Figure) -> Html:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(rect=(0, 0, 1, 0.92 if figure.legends else 1))
    text = io.StringIO()
    figure.savefig(text, format="svg")
    pyplot.close(figure)
    return Html(text.getvalue()[text.getvalue().index("<svg") :])
