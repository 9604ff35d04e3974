"""HDF5 files that would read other files or need all memory: one line instead."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from foreign_games import load_game, read_all, refusal
from foreign_recordings import draw_play, write_csgo

SHAPE = (150, 280, 3)


def external(file: h5py.File, name: str, secret: Path) -> None:
    kind = "u1" if name.endswith("x") else "f8"
    shape = SHAPE if name.endswith("x") else (51,)
    file.create_dataset(name, shape, kind, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])


def external_link(file: h5py.File, name: str, secret: Path) -> None:
    file[name] = h5py.ExternalLink(str(secret), name)


def soft_link(file: h5py.File, name: str, secret: Path) -> None:
    file["outside"] = h5py.ExternalLink(str(secret), "/")
    file[name] = h5py.SoftLink(f"/outside/{name}")


def virtual(file: h5py.File, name: str, secret: Path) -> None:
    shape, kind = (SHAPE, "u1") if name.endswith("x") else ((51,), "f8")
    layout = h5py.VirtualLayout(shape, kind)
    layout[:] = h5py.VirtualSource(str(secret), name, shape, kind)
    file.create_virtual_dataset(name, layout)


@pytest.mark.parametrize("name", ["frame_0_x", "frame_2_x", "frame_1_y", "frame_1_helperarr"])
@pytest.mark.parametrize("disguise", [external, external_link, soft_link, virtual])
def test_hdf5_cannot_name_data_of_another_file(disguise: Callable[..., None], name: str, tmp_path: Path) -> None:
    write_csgo(tmp_path / "secret" / "secret.hdf5", draw_play(3, 13))
    write_csgo(tmp_path / "csgo" / "one.hdf5", draw_play(3, 13))
    with h5py.File(tmp_path / "csgo" / "one.hdf5", "a") as file:
        del file[name]
        disguise(file, name, tmp_path / "secret" / "secret.hdf5")
    said = refusal("csgo", tmp_path / "csgo")
    assert f"one.hdf5 {name} names data of another file" in said and said.endswith("it was not read")


@pytest.mark.parametrize(
    ("shape", "more"),
    [
        ((100_000, 100_000, 3), {"chunks": (64, 64, 3)}),
        ((64, 64, 3), {"chunks": (30_000, 30_000, 3), "maxshape": (None, None, 3), "compression": "gzip"}),
        ((0, 0, 3), {}),
        ((0, 280, 3), {}),
    ],
)
@pytest.mark.parametrize("number", [0, 2])
def test_a_picture_of_no_size_or_of_all_memory_is_one_line(shape, more, number, tmp_path):
    write_csgo(tmp_path / "csgo" / "one.hdf5", draw_play(3, 13))
    with h5py.File(tmp_path / "csgo" / "one.hdf5", "a") as file:
        del file[f"frame_{number}_x"]
        file.create_dataset(f"frame_{number}_x", shape, "u1", **more)
    assert f"frame_{number}_x" in refusal("csgo", tmp_path / "csgo")


def test_flipped_bits_of_hdf5_are_one_line_or_other_pixels(tmp_path: Path) -> None:
    write_csgo(tmp_path / "good.hdf5", draw_play(3, 13))
    good, rng = (tmp_path / "good.hdf5").read_bytes(), np.random.default_rng(0)
    (tmp_path / "csgo").mkdir()
    game, refused = load_game("csgo", tmp_path), 0
    with h5py.File(tmp_path / "good.hdf5") as file:  # bits of pixels are no damage that anybody could see
        pixels = [(at := file[f"frame_{i}_x"].id.get_offset(), at + 150 * 280 * 3) for i in range(3)]
    structure = [i for i in range(len(good)) if not any(first <= i < end for first, end in pixels)]
    for _ in range(60):
        spoilt = bytearray(good)
        for place in rng.choice(structure, 20):
            spoilt[place] ^= 1 << rng.integers(8)
        (tmp_path / "csgo" / "one.hdf5").write_bytes(spoilt)
        try:
            for episode in read_all("csgo", tmp_path / "csgo", game):
                list(episode.frames())
        except ValueError as error:
            assert "one.hdf5" in str(error)
            refused += 1
    assert refused > 20
