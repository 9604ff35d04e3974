"""Held-out velocity loss by actions."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from data_pipeline.types import Batch
from model.flow import FlowMatch
from model.layout import Layout, latent_ends
from model.loss import sigma_bins


def first_latents(batch: Batch, count: int, layout: Layout, frames_per_latent: int) -> Batch:
    """The batch cut to the first `count` latents of its clips and their frames."""
    return cut_clips(batch, slice(count), slice(latent_ends(layout, count, frames_per_latent)[-1] + 1))


def cut_clips(batch: Batch, latents: slice, frames: slice) -> Batch:
    """The batch cut to some latents of its clips, and the actions of their frames."""
    image_latents = batch.image_latents
    return replace(
        batch,
        latents=batch.latents[:, :, latents],
        keyboard=batch.keyboard[:, frames],
        mouse=batch.mouse[:, frames],
        image_latents=None if image_latents is None else image_latents[:, :, latents],
    )


def other_episodes(ids: tuple[str, ...]) -> list[int] | None:
    """For each clip ("episode:start") the index of one of another episode; None if all are of one episode.

    Each is used about equally often: exactly once if the episodes have the same number of clips.
    """
    episodes = [clip.rpartition(":")[0] for clip in ids]
    order = sorted(range(len(ids)), key=lambda i: episodes[i])
    partner = [0] * len(ids)
    for rank, i in enumerate(order):  # sorted by episode, so that the others are those behind it, then around
        others = [j for j in [*order[rank:], *order[:rank]] if episodes[j] != episodes[i]]
        if not others:
            return None
        same = [j for j in order if episodes[j] == episodes[i]]
        partner[i] = others[same.index(i) % len(others)]
    return partner


def action_variants(batch: Batch) -> dict[str, Batch]:
    """The clips with the `right` actions, `shuffled` ones of other episodes' clips (if there are any), and `none`."""
    variants = {"right": batch}
    partner = other_episodes(batch.ids)
    if partner is not None:
        variants["shuffled"] = replace(batch, keyboard=batch.keyboard[partner], mouse=batch.mouse[partner])
    still = replace(batch, keyboard=torch.zeros_like(batch.keyboard), mouse=torch.zeros_like(batch.mouse))
    return variants | {"none": still}


def action_loss_table(losses: dict[str, dict[str, Tensor]], flow: FlowMatch) -> dict[str, dict[str, float]]:
    """Figures from losses[variant][sigma bin] (b): the mean per variant, per bin, and how much worse than `right`.

    `loss` weighs the bins as training draws them. `minus_right` is the mean paired difference over clips and
    `standard_error` its standard error (clips taken as independent).
    """
    share = {name: len(levels) / flow.config.train_steps for name, levels in sigma_bins(flow)}
    table, right = {}, losses["right"]
    for variant, bins in losses.items():
        tables = {"loss": bins}
        if variant != "right":
            tables["minus_right"] = {name: values - right[name] for name, values in bins.items()}
        figures = {}
        for what, by_bin in tables.items():
            per_clip = torch.stack([share[name] * values for name, values in by_bin.items()]).sum(dim=0)
            figures[what] = per_clip.mean().item()
            figures |= {f"{what}/{name}": values.mean().item() for name, values in by_bin.items()}
            if what == "minus_right" and len(per_clip) > 1:
                figures["standard_error"] = (per_clip.std() / math.sqrt(len(per_clip))).item()
        table[variant] = figures
    return table
