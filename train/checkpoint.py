"""Checkpoints that are whole or not there: a new folder per step, and the COMPLETE file last."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from configs import save_config, to_dict
from configs.files import write_text
from model.weights import save_weights
from sampling.world_model import COMPLETE, WORLD_FILE, WorldModelConfig, complete_checkpoints, read_world_config
from train.config import TrainConfig
from train.ema import Ema
from train.engine import Engine

TRAINER = "trainer"  # what only resuming needs
POSITION = "position.json"


@dataclass(frozen=True)
class Position:
    """Where a run stands."""

    step: int  # optimizer steps done
    ranks: int
    batch: int
    accumulation: int


def step_folder(run: Path, step: int) -> Path:
    return run / f"step_{step:07d}"


def save_checkpoint(engine: Engine, ema: Ema, config: TrainConfig, world: WorldModelConfig, position: Position) -> Path:
    """Writes the checkpoint of `position` and deletes those beyond `keep_last`. All ranks must call."""
    accelerator = engine.accelerator
    folder = step_folder(Path(config.out), position.step)
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)  # of a save that was killed
        (folder / TRAINER).mkdir(parents=True)
    accelerator.wait_for_everyone()
    engine.save(folder / TRAINER)
    ema.save(folder / TRAINER / f"ema_{accelerator.process_index}.pt")
    weights = dict(engine.full_weights())
    with ema.swapped_in():
        averages = dict(engine.full_weights())
    if accelerator.is_main_process:
        save_weights(weights, folder / "model.safetensors", {"step": str(position.step)})
        save_weights(averages, folder / "ema.safetensors", {"step": str(position.step)})
        save_config(config, folder / "config.yaml")
        save_config(world, folder / WORLD_FILE)
        write_text(folder / TRAINER / POSITION, json.dumps(asdict(position)))
    accelerator.wait_for_everyone()  # every rank's shards are written before the marker is
    if accelerator.is_main_process:
        files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        write_text(folder / COMPLETE, json.dumps({"step": position.step, "bytes": files}, indent=1))
        for old in complete_checkpoints(Path(config.out))[: -config.checkpoint.keep_last]:
            (old / COMPLETE).unlink()  # first, so that a kill here leaves no half of a checkpoint that looks whole
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def find_resumable(run: Path, world: WorldModelConfig) -> Path | None:
    """The newest complete checkpoint of `run`, or None; raises if it is of another model, flow, game or codec."""
    found = complete_checkpoints(run)
    if not found:
        return None
    there, here = to_dict(read_world_config(found[-1])), to_dict(world)
    differing = [
        f"{part}: {there[part]} != {here[part]}" for part in here if part != "codec" and there[part] != here[part]
    ]
    if differing:
        raise ValueError(f"{found[-1]} is of another run ({'; '.join(differing)}); choose another out=")
    return found[-1]


def load_checkpoint(engine: Engine, ema: Ema, config: TrainConfig, folder: Path) -> Position:
    """Restores everything from `folder` and returns where it stands. All ranks must call."""
    saved = json.loads((folder / COMPLETE).read_text())
    for name, size in saved["bytes"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{path} is missing or truncated; delete {folder} to resume from the checkpoint before it")
    position = Position(**json.loads((folder / TRAINER / POSITION).read_text()))
    now = (engine.accelerator.num_processes, config.batch, config.accumulation)
    if (position.ranks, position.batch, position.accumulation) != now:
        raise ValueError(
            f"{folder} was written by {position.ranks} ranks x batch {position.batch} x accumulation "
            f"{position.accumulation}, this run has {now[0]} x {now[1]} x {now[2]}; use the same, or start a new run "
            f"with init={folder}"
        )
    engine.load(folder / TRAINER)
    ema.load(folder / TRAINER / f"ema_{engine.accelerator.process_index}.pt")
    return position
