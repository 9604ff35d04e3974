"""What was played is an episode: every reader takes it, and played again it gives the same frames, bit for bit."""

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_server import Client, serving
from PIL import Image
from tiny_world import GAME, change, generate, random_video, write_causal, write_checkpoint

from configs.cli import run
from configs.errors import UserError
from data_pipeline.pictures import read_picture
from data_pipeline.readers import read_game_frames
from data_pipeline.readers.worldloom import find_episodes, read_actions, read_episode
from data_pipeline.video import to_uint8, to_video
from model.world import load_world, read_world_config
from sampling.__main__ import VERBS
from sampling.live.config import PlayConfig, read_starts
from sampling.live.recording import MOST_FRAMES, Recording, to_jpeg
from sampling.play import play

SEED = 11


@pytest.fixture(scope="module", params=["one latent", "three latents", "chunked"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "run"
    written = write_checkpoint(folder) if request.param == "chunked" else write_causal(folder)
    if request.param == "one latent":
        change(written / "world.yaml", model__causal={"block": 1, "window": 4})
    return written


def picture() -> np.ndarray:
    return to_uint8(random_video(1))[0, 0].numpy()


def replayed(checkpoint: Path, folder: Path) -> str:
    """The digest of the frames that the episode in `folder` gives when it is played again as `generate` does."""
    about = json.loads((folder / "episode.json").read_text())
    (denoising,) = about["denoising"]
    config = PlayConfig(checkpoint=str(checkpoint), steps=denoising["steps"], guidance=denoising["guidance"])
    world, start = (
        load_world(checkpoint, precision=about["precision"]),
        torch.from_numpy(read_picture(folder / "prompt.png")),
    )
    actions = read_actions(folder / "actions.csv", GAME.action_space)
    rows = torch.from_numpy(actions.keyboard)[None], torch.from_numpy(actions.mouse)[None]
    pieces = play(world, to_video(start[None, None])[:, :, 0], rows, [about["seed"]], config.denoising)
    return hashlib.sha256(torch.cat(list(pieces), dim=1).numpy().tobytes()).hexdigest()


def test_an_episode_played_again_gives_the_same_frames_bit_for_bit(checkpoint: Path, tmp_path: Path) -> None:
    config = PlayConfig(checkpoint=str(checkpoint), steps=2, guidance=1.5, seed=SEED)
    with serving(config, read_world_config(checkpoint), [picture()]) as server, Client(server) as client:
        key = client.begin()["key"]
        held: list[dict[str, Any]] = [
            {"keys": 1}, {"keys": 5, "mouse": (0.7, 1 / 3)}, {"turn": (0.37, -1)}, {"mouse": (2.0, 9.99999)}, {},
        ]  # fmt: skip
        for block, controls in enumerate(held, start=2):
            client.hold(block, **controls)
            client.frames()
        status, data = server.ask(f"/episode?key={key}", b"")
        assert status == 200
        zipfile.ZipFile(io.BytesIO(data)).extractall(tmp_path)
        client.leave()
    (folder,) = find_episodes(tmp_path).values()
    about = json.loads((folder / "episode.json").read_text())
    assert about["seed"] == SEED and replayed(checkpoint, folder) == about["frames_sha256"]
    actions = (folder / "actions.csv").read_text()
    (folder / "actions.csv").write_text(actions.replace(",1,", ",0,"))
    assert replayed(checkpoint, folder) != about["frames_sha256"]  # it is the keys that make them


def test_readers_and_generate_take_the_episode(checkpoint: Path, tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "start.png")
    words = ["script=forward+turn_left:7,idle:5", "frames=21", "steps=2", f"seed={SEED}", f"record={tmp_path / 'out'}"]
    assert run("sampling", VERBS, ["play", str(checkpoint), f"prompt={tmp_path / 'start.png'}", *words]) == 0
    (folder,) = find_episodes(tmp_path / "out").values()
    episode = read_episode(folder, GAME)
    assert len(episode.actions) == len(list(read_game_frames(episode, GAME))) == 21
    assert episode.actions.keyboard[:8, 0].tolist() == [1] * 7 + [0]
    assert episode.actions.mouse[0, 1] == -1 and not episode.actions.mouse[7].any()
    assert replayed(checkpoint, folder) == json.loads((folder / "episode.json").read_text())["frames_sha256"]
    given = [f"actions={folder / 'actions.csv'}", f"prompt={folder / 'prompt.png'}", "frames=21", "steps=2"]
    assert generate(checkpoint, tmp_path, *given) == 0


def test_a_script_needs_a_folder_and_a_world_a_picture(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sampling", VERBS, ["play", str(checkpoint), "script=random"]) == 2
    assert "record=<folder>" in capsys.readouterr().err
    assert run("sampling", VERBS, ["play", str(checkpoint)]) == 2
    assert "give prompt=<picture>" in capsys.readouterr().err


def test_a_world_is_started_from_the_pictures_that_lie_in_its_folder_or_beside_it(tmp_path: Path) -> None:
    checkpoint = write_causal(tmp_path / "run")
    trained, config = read_world_config(checkpoint), PlayConfig(checkpoint=str(checkpoint))
    with pytest.raises(UserError, match="starts"):
        read_starts(str(checkpoint), trained, config)
    for folder, colour in ((tmp_path / "run" / "starts", "red"), (checkpoint / "starts", "blue")):
        folder.mkdir()
        Image.new("RGB", (480, 320), colour).save(folder / "1.png")
        (start,) = read_starts(str(checkpoint), trained, config)
        assert start.shape == (32, 48, 3) and start[0, 0, 2 * (colour == "blue")] == 255


def test_a_world_without_them_is_started_from_what_its_training_held_out(encoded: str, tmp_path: Path) -> None:
    checkpoint = write_causal(tmp_path / "run")
    (checkpoint / "config.yaml").write_text(f"validation: {{manifest: {encoded}/heldout/manifest.json}}\n")
    trained, config = read_world_config(checkpoint), PlayConfig(checkpoint=str(checkpoint))
    starts = read_starts(str(checkpoint), trained, config)
    assert len(starts) == 2 and starts[0].shape == (32, 48, 3) and not np.array_equal(starts[0], starts[1])


def test_a_recording_ends_at_its_limit_and_stays_whole(tmp_path: Path) -> None:
    frames, keyboard, mouse = np.zeros((10, 32, 48, 3), np.uint8), np.zeros((10, 4)), np.zeros((10, 2))
    recording, jpegs = Recording(GAME, frames[0], 0, "fp32"), [to_jpeg(frames[0])] * 10
    for _ in range(MOST_FRAMES // 10 + 5):
        recording.add(frames, jpegs, keyboard, mouse)
    assert len(recording) == len(recording.keyboard) == MOST_FRAMES
