"""A world model of a few thousand random weights on disk, in the form in which training leaves one."""

from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from configs import save_config
from configs.cli import run
from configs.game import ActionSpace, GameConfig
from model.action_dit import ActionDiT
from model.actions import ActionConfig
from model.codec import CONFIG_FILE, codec_hash, load_codec
from model.config import ActionDiTConfig
from model.flow import FlowMatch, FlowMatchConfig
from model.masks import CausalConfig
from model.patch_codec import WEIGHTS_FILE, PatchCodec, PatchCodecConfig, to_patches
from model.weights import load_into, save_weights
from model.world import COMPLETE, WORLD_FILE, WorldModel, WorldModelConfig
from sampling.__main__ import VERBS

SPACE = ActionSpace("tiny", ("forward", "back", "left", "right"), ("W", "S", "A", "D"), mouse_unit_deg=3.0)
GAME = GameConfig("tiny", SPACE, fps=17.5, height=32, width=48)
DIT = ActionDiTConfig(
    dim=32, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=32, vision="none",
    action=ActionConfig(
        blocks=(0, 1), heads_num=2, hidden_size=8, keyboard_hidden_dim=16, mouse_hidden_dim=16, rope_dim_list=(8, 0, 0)
    ),
)  # fmt: skip


def random_dit(seed: int = 0) -> ActionDiT:
    """A DiT whose every output depends on its inputs: the layers that start at zero are drawn, too."""
    generator = torch.Generator().manual_seed(seed)
    dit = ActionDiT(DIT, generator)
    for name, parameter in dit.named_parameters():
        if name.startswith("head.head.weight") or name.endswith(("proj_mouse.weight", "proj_keyboard.weight")):
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return dit


def random_world(codec: Path, causal: CausalConfig | None = None) -> WorldModel:
    """The world of `random_dit`, or of a causal model with its weights, and the codec in the folder `codec`."""
    dit = ActionDiT(replace(DIT, causal=causal))
    load_into(dit, random_dit().state_dict())
    flow, loaded = FlowMatch(FlowMatchConfig()), load_codec(codec).requires_grad_(False)
    return WorldModel(dit.eval().requires_grad_(False), flow, loaded, GAME)


def random_video(frames: int, seed: int = 0) -> torch.Tensor:
    """(1 3 n h w) in [-1, 1]: coloured noise in blocks of 4 px, so that the codec has something to keep."""
    coarse = torch.rand(1, 3, frames, GAME.height // 4, GAME.width // 4, generator=torch.Generator().manual_seed(seed))
    return (2 * coarse - 1).repeat_interleave(4, dim=3).repeat_interleave(4, dim=4)


def fitted_codec(memory_blocks: int = 2) -> PatchCodec:
    """A codec with a fitted encoder and an untrained decoder."""
    torch.manual_seed(0)  # the layers' own initialisation takes no generator
    codec = PatchCodec(PatchCodecConfig(width=8, fine_width=8, memory_blocks=memory_blocks, fine_blocks=1))
    codec.fit_pca(to_patches(random_video(256)).flatten(0, 3))
    return codec.eval()


def write_codec(folder: Path) -> None:
    codec = fitted_codec(memory_blocks=1)
    save_config(codec.config, folder / CONFIG_FILE)
    save_weights(codec.state_dict(), folder / WEIGHTS_FILE)


def write_checkpoint(run: Path, step: int = 100, game: GameConfig = GAME) -> Path:
    """A complete checkpoint in `run`, its codec beside it; returns the step's folder."""
    if not (run / "codec").exists():
        write_codec(run / "codec")
    folder = run / f"step_{step:07d}"
    folder.mkdir(parents=True)
    world = WorldModelConfig(DIT, FlowMatchConfig(), game, "chunked", str(run / "codec"), codec_hash(run / "codec"))
    save_config(world, folder / WORLD_FILE)
    for weights in ("ema", "model"):
        save_weights(random_dit().state_dict(), folder / f"{weights}.safetensors")
    (folder / COMPLETE).write_text("{}")
    return folder


def write_causal(run: Path) -> Path:
    """The same of a causal model in blocks of 3 latents, for continuous clips."""
    folder = write_checkpoint(run)
    change(folder / WORLD_FILE, layout="continuous", model__causal={"block": 3, "window": 6})
    return folder


def change(path: Path, **settings: object) -> None:
    """Other values for keys of a YAML file; `a__b` is b in a."""
    loaded = OmegaConf.load(path)
    for name, value in settings.items():
        OmegaConf.update(loaded, name.replace("__", "."), value)
    OmegaConf.save(loaded, path)


def generate(checkpoint: Path, out: Path, *args: str) -> int:
    Image.new("RGB", (GAME.width, GAME.height), "teal").save(out / "prompt.png")
    fixed = [f"prompt={out / 'prompt.png'}", "actions=idle", "frames=9", "steps=1", f"out={out / 'film.mp4'}"]
    return run("sampling", VERBS, ["generate", str(checkpoint), *fixed, *args])
