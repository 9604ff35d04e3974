"""The codecs there are, and codecs as files: a folder with a config.yaml and weights, or a third party's own layout.

A new codec is its own file and a line in CODECS.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs import build_from, load_file, save_config, storage
from configs.errors import MissingFileError, UserError
from configs.overrides import merge_args, read_settings
from configs.untrusted import require_inside
from model.patch_codec import PatchCodec
from model.video_codec import Codec
from model.wan_codec import WanCodec

CODECS: dict[str, type[Codec]] = {"patch": PatchCodec, "wan": WanCodec}
CONFIG_FILE = "config.yaml"  # in a folder of ours

Located = tuple[type[Codec], Any, Path]  # the kind of a codec, its config and the folder of its weights


def locate_codec(url: str | Path, overrides: Sequence[str] = ()) -> Located:
    """What kind of codec lies at `url`, without reading its weights; `overrides` (key=value) change its settings.

    `url` is a folder of ours, Wan's official file, or a folder in the diffusers layout. Raises UserError or FileError.
    """
    path = storage.local(url, lambda name: "/" not in name)
    file = path / CONFIG_FILE
    if file.is_file():
        name = read_settings(file).get("name", "patch")
        if name not in CODECS:
            raise UserError(f"{file}: name={str(name)[:80]} is no codec; there are: {', '.join(CODECS)}")
        config = load_file(CODECS[name].Config, file, overrides)
        for weights in CODECS[name].weight_files(config).values():
            require_inside(weights, file)  # as text: links to where the weights lie are the user's own
        return CODECS[name], config, path
    for kind in CODECS.values():
        if described := kind.third_party_settings(path):
            config = build_from(kind.Config, described[0] | merge_args(overrides), described[1])
            return kind, config, path if path.is_dir() else path.parent
    raise MissingFileError(f"no codec in {url}; fit one with python -m train codec, or give Wan2.1_VAE.pth")


def load_codec(url: str | Path, *overrides: str) -> Codec:
    """The codec at `url` (see `locate_codec`), in eval mode on the CPU."""
    kind, config, folder = locate_codec(url, overrides)
    return kind.load(config, folder).eval()


def copy_codec(url: str | Path, folder: Path) -> None:
    """Writes the codec at `url`, whatever its layout, into `folder` as one with a config.yaml, which comes last."""
    kind, config, source = locate_codec(url)
    files = {setting: source / name for setting, name in kind.weight_files(config).items()}
    for i, file in enumerate(files.values()):
        if i == 0 or file.is_file():
            with storage.writing(folder / file.name) as part:
                shutil.copyfile(file, part)
    names = {setting: file.name for setting, file in files.items() if setting}
    save_config(replace(config, **names), folder / CONFIG_FILE)


def codec_hash(url: str | Path) -> str:
    """Twelve hex digits over the codec's weights file: latents of one codec mean nothing to another."""
    kind, config, folder = locate_codec(url)
    weights = folder / next(iter(kind.weight_files(config).values()))
    if not weights.is_file():
        raise MissingFileError(f"no codec in {url} ({weights.name} is missing)")
    return storage.sha256(weights)[:12]
