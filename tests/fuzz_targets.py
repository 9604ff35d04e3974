"""What is read that others wrote: for each kind some good files, and what a program does with them."""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, get_args

import foreign_games
import numpy as np
import torch
from fuzz_mutations import NUMBERS, TEXTS
from PIL import Image
from tiny_recordings import write_recording
from tiny_shards import read_clips
from tiny_world import GAME, SPACE, random_dit, write_checkpoint, write_codec

from configs import load_config, to_dict
from configs.cli import call
from data_pipeline.encode import encode
from data_pipeline.inspect import InspectConfig, inspect
from data_pipeline.plan import EncodeConfig
from data_pipeline.readers import Reader
from data_pipeline.record import RecordConfig
from data_pipeline.verify import verify_set
from launch.pipeline import PipelineConfig
from launch.run import read_launch
from model.__main__ import VERBS
from model.weights import save_weights
from sampling.__main__ import VERBS as SAMPLING
from sampling.evaluate import EvaluateConfig
from sampling.generate import GenerateConfig, read_prompt
from sampling.scripts import Scripted, read_script
from train.checkpoint import FORMAT, Position, read_position, state_of
from train.codec import CodecTrainConfig
from train.config import TrainConfig
from train.state import STARTS, STEP

CONFIGS = Path(__file__).parent.parent / "configs"
RUN = [f"{CONFIGS}/models/smoke.yaml", f"{CONFIGS}/train/demo_base.yaml", "manifest=x", "codec=x", "out=x"]
ARGS: list[tuple[type, list[str]]] = [  # what is right before one of them is changed
    (EncodeConfig, [f"{CONFIGS}/games/doom.yaml", "source=x", "codec=x", "out=x"]),
    (RecordConfig, [f"{CONFIGS}/games/doom.yaml", "out=x", "episodes=1"]),
    (EvaluateConfig, ["checkpoint=x", "recordings=x", "manifest=x", "out=x"]),
    (GenerateConfig, ["checkpoint=x", "prompt=x", "actions=idle", "out=x"]),
    (CodecTrainConfig, [f"{CONFIGS}/games/doom.yaml", f"{CONFIGS}/train/demo_codec.yaml", "source=x", "out=x"]),
    (TrainConfig, RUN),
    (PipelineConfig, [f"{CONFIGS}/pipelines/smoke.yaml"]),
]


@dataclass(frozen=True)
class Target:
    """`deed` gets the folder of good files, one of them changed."""

    name: str
    prepare: Callable[[Path], Any]
    deed: Callable[[Path, Random], int | None]
    changes: Callable[[Path], bool] = lambda path: True  # the files that are changed
    fine: tuple[int, ...] = (0,)  # statuses of success
    goes_on: bool = False  # it works in the folder that it is given


def _recordings(reader: Reader) -> Target:
    def prepare(folder: Path) -> None:
        shutil.copytree(foreign_games.write_all(folder.with_name(f"{reader}.all"))[reader], folder)

    def read(folder: Path, rng: Random) -> None:
        game = foreign_games.load_game(reader, Path(tempfile.gettempdir()))
        for episode in foreign_games.read_all(reader, folder, game):
            for frame in episode.frames():
                assert frame.shape[2] == 3

    return Target(reader, prepare, read)


def _shards(folder: Path) -> None:
    for i in range(2):
        write_recording(folder / "recordings" / f"episode_{i:05d}", GAME, seed=i)
    write_codec(folder / "codec")
    encode(_encoding(folder))


def _encoding(folder: Path) -> EncodeConfig:
    recordings, codec, latents = (str(folder / name) for name in ("recordings", "codec", "latents"))
    return EncodeConfig(GAME, recordings, codec, latents, shard_clips=2, heldout_every=2)


def _look(folder: Path, rng: Random) -> int:
    manifest = str(folder / "latents" / "train" / "manifest.json")
    how = rng.randrange(3)
    if how == 0:
        return int(bool(verify_set(manifest)))
    if how == 1:
        inspect(InspectConfig(manifest, "made/page.html"))
    else:
        read_clips(manifest)
    return 0


def _sample(folder: Path, rng: Random) -> None:
    paths = [f"checkpoint={folder}/step_0000100", f"prompt={folder}/prompt.png", "out=made/a.mp4"]
    settings = ["actions=idle", "frames=1", "steps=1", "device=cpu", f"weights={rng.choice(['ema', 'model'])}"]
    call(SAMPLING["generate"], [*paths, *settings])


def _checkpoint(folder: Path) -> None:
    write_checkpoint(folder)
    _picture(folder / "prompt.png")


def _picture(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(path)


def _pictures(folder: Path) -> None:
    folder.mkdir()
    for suffix in ("png", "jpg", "webp", "gif", "tiff", "bmp"):
        _picture(folder / f"a.{suffix}")
    write_recording(folder / "film", GAME)
    shutil.move(folder / "film" / "video.mp4", folder / "a.mp4")
    shutil.rmtree(folder / "film")


def _see(folder: Path, rng: Random) -> None:
    for path in sorted(folder.iterdir()):
        read_prompt(str(path), 0, GAME)


def _scripts(folder: Path) -> None:
    write_recording(folder / "one", GAME)
    shutil.move(folder / "one" / "actions.csv", folder / "a.csv")
    shutil.rmtree(folder / "one")
    (folder / "a.json").write_text(json.dumps(["forward:12", "turn_left+back:3", "idle"]))


def _play(folder: Path, rng: Random) -> None:
    holds = ["idle", "forward", "turn_left+back"]
    script = f"{rng.choice(holds)}:{rng.choice([*NUMBERS, '3'])},{rng.choice([*holds, *TEXTS])}"
    read_script(rng.choice([f"{folder}/a.csv", f"{folder}/a.json", script]), SPACE, Scripted(27))


def _weights(folder: Path) -> None:
    folder.mkdir()
    state = random_dit().state_dict()
    save_weights(state, folder / "a.safetensors")
    torch.save({"generator_ema": {f"module.{name}": tensor for name, tensor in state.items()}}, folder / "a.pt")
    (folder / "sharded").mkdir()
    save_weights(state, folder / "sharded" / "one.safetensors")
    index = {"weight_map": dict.fromkeys(state, "one.safetensors")}
    (folder / "sharded" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    write_codec(folder.parent / "codec_of_weights")
    model = {"model": to_dict(random_dit().config), "game": to_dict(GAME)}
    (folder.parent / "weights.yaml").write_text(json.dumps(model))


def _import(folder: Path, rng: Random) -> None:
    good = Path.cwd().parent / "good"
    given = folder / rng.choice(["a.safetensors", "a.pt", "sharded"])
    call(VERBS["import"], [str(given), str(good / "weights.yaml"), f"codec={good}/codec_of_weights", "out=made/world"])


def _run(folder: Path) -> None:
    write_checkpoint(folder)
    step = folder / "step_0000100"
    (step / "trainer").mkdir()
    (step / "trainer" / "position.json").write_text(json.dumps(asdict(Position(100, 1, 4, 1, 0, "0" * 16))))
    told = {STARTS: json.dumps({"a": 0}), STEP: "100"}
    save_weights({"weight/a": torch.zeros(3)}, step / "trainer" / "rank_00000.safetensors", told)
    _seal(step)


def _resume(folder: Path, rng: Random) -> None:
    step = folder / "step_0000100"
    if rng.random() < 0.7:
        _seal(step)
    read_position(step)
    state_of(step).read("weight", "a", 0, 3)


def _seal(step: Path) -> None:
    """Sizes as they are: the change is then to be found where the file is read."""
    sizes = {str(path.relative_to(step)): path.stat().st_size for path in step.rglob("*") if path.is_file()}
    (step / "COMPLETE").unlink(missing_ok=True)
    (step / "COMPLETE").write_text(json.dumps({"format": FORMAT, "bytes": sizes}))


def _settings(folder: Path, rng: Random) -> None:
    cls, args = rng.choice(ARGS)
    name = rng.choice([field.name for field in fields(cls)])
    if rng.random() < 0.3:
        name = f"{name}.{rng.choice([*TEXTS[:2], 'name', 'keys', 'every', 'fps'])}"
    changed = f"{name}={_value(rng)}"
    if rng.random() < 0.3:
        Path("tmp.yaml").write_text(changed.replace("=", ": ", 1))
        changed = "tmp.yaml"
    try:
        load_config(cls, [*args, changed])
    finally:
        Path("tmp.yaml").unlink(missing_ok=True)


def _value(rng: Random) -> str:
    return rng.choice([*TEXTS, *NUMBERS, "1", "2", "true", "[a, b]", "{a: b}", "[" * 5000])


def _launch(folder: Path, rng: Random) -> None:
    names = ["name", "env.A", "slurm.logs", "slurm.partition", "port", "nodes", "processes", "kubernetes.image", "env"]
    machine = rng.choice(sorted((CONFIGS / "machines").glob("*.yaml")))
    given = read_launch([str(machine), *RUN, f"machine.{rng.choice(names)}={_value(rng)}", f"out={_value(rng)}"])
    if given.machine.kind != "local":
        given.machine.start(given.job, None, True)


TARGETS = [
    *map(_recordings, get_args(Reader)),
    Target("shards", _shards, _look, lambda path: "latents" in path.parts, (0, 1)),
    Target("encode", _shards, lambda folder, rng: (encode(_encoding(folder)), None)[1], goes_on=True),
    Target("generate", _checkpoint, _sample),
    Target("pictures", _pictures, _see),
    Target("scripts", _scripts, _play),
    Target("weights", _weights, _import),
    Target("position", _run, _resume, lambda path: path.parent.name in ("trainer", "step_0000100"), goes_on=True),
    Target("settings", partial(Path.mkdir), _settings),
    Target("launch", partial(Path.mkdir), _launch),
]
