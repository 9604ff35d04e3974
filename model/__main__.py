"""`python -m model <verb>`: what a model is, whether it equals the reference, how fast it is, official files."""

import json
import re
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from configs import build, load_config, merge_words, save_config
from configs.cli import first_is, run
from configs.files import require_other_files, write_text, yaml_files
from data_pipeline import storage
from model.action_dit import ActionDiT
from model.bench import bench
from model.codec import codec_hash
from model.config import ModelConfig
from model.fixtures import Row, read_fixtures, run_fixture
from model.official import (
    WEIGHTS_NAME,
    ExportConfig,
    check_variant,
    diffusers_json,
    exported,
    official_json,
    ranges,
    read_official,
    unused_scales,
)
from model.parity import CASES
from model.weights import open_weights, save_weights


def info(words: list[str]) -> None:
    """Parameters per part, and the names and shapes of all tensors, of a model: FILE.yaml key=value ..."""
    config = load_config(ModelConfig, words)
    with torch.device("meta"):
        state = ActionDiT(config.model).state_dict()
    for name, where, shape in tensor_table(state):
        print(f"{name:<58} {where:<8} {shape}")
    print()
    for part, count in count_by_part(state).items():
        print(f"{part:<58} {count:>16,}")
    print(f"{'total':<58} {sum(tensor.numel() for tensor in state.values()):>16,} in {len(state)} tensors")


def tensor_table(state: dict[str, Tensor]) -> list[tuple[str, str, str]]:
    """Rows (name with {i} for the block, blocks, shape), equal blocks together."""
    blocks: dict[tuple[str, str], list[int]] = {}
    for name, tensor in state.items():
        numbered = re.match(r"blocks\.(\d+)\.", name)
        general = re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name)
        shape = "x".join(map(str, tensor.shape))
        blocks.setdefault((general, shape), []).extend([int(numbered[1])] if numbered else [])
    return [(name, ranges(indices), shape) for (name, shape), indices in blocks.items()]


def count_by_part(state: dict[str, Tensor]) -> dict[str, int]:
    """Numbers stored per part of the model; those of all blocks added up."""
    counts: Counter[str] = Counter()
    for name, tensor in state.items():
        words = name.split(".")
        part = words[0] if words[0] != "blocks" else f"blocks.{words[2]}"
        counts[part] += tensor.numel()
    return dict(counts)


def parity(words: list[str]) -> int:
    """Compares the model with the fixtures in a folder and says how far each output is from the reference's: DIR"""
    if len(words) != 1 or not Path(words[0]).is_dir():
        raise ValueError(f"give one folder of fixtures, not {' '.join(words) or 'nothing'!r}")
    # The one import against the order of the packages: presets and live actions belong to sampling, and one command
    # judges everything.
    from sampling.parity import CASES as SAMPLING_CASES

    torch.backends.cuda.matmul.allow_tf32 = False
    rows = [row for fixture in read_fixtures(Path(words[0])) for row in run_fixture(fixture, CASES | SAMPLING_CASES)]
    judged = [row for row in rows if row.verdict != "not supported"]
    if not judged:
        raise ValueError(f"no fixture in {words[0]} is of a kind that can be judged yet")
    width = max(len(row.output) for row in judged)
    print(f"{'case':<24} {'output':<{width}} {'error':>10} {'tolerance':>10}  verdict")
    for row in judged:
        print(f"{row.case:<24} {row.output:<{width}} {row.error:>10.2e} {row.tolerance:>10.2e}  {row.verdict}")
    _summarise(rows)
    return 1 if any(row.verdict == "FAIL" for row in rows) else 0


def _summarise(rows: list[Row]) -> None:
    print()
    for case in dict.fromkeys(row.case for row in rows):
        outputs = [row.output for row in rows if row.case == case and row.verdict == "not supported"]
        if outputs:
            print(f"not supported yet: {case}: {', '.join(outputs)}")
    verdicts = Counter(row.verdict for row in rows)
    print("; ".join(f"{count} {verdict}" for verdict, count in verdicts.items()))


def import_official(words: list[str]) -> None:
    """Make a checkpoint of official weights: FILE_OR_FOLDER model.yaml game.yaml codec=... out=..."""
    # A checkpoint is sampling's; this verb and `export` are where the model's own files meet it.
    from sampling.world_model import COMPLETE, WORLD_FILE, WorldModelConfig, writing_world

    values = merge_words(words)
    if values.get("file") is None:
        raise ValueError("the first word is the official file, or the folder that holds it")
    missing = [name for name in ("model", "game", "codec", "out") if values.get(name) is None]
    if missing:
        raise ValueError(f"no {', '.join(missing)}: say configs/models/X.yaml configs/games/Y.yaml codec=... out=...")
    if not all(isinstance(values[name], str) for name in ("file", "codec", "out")):
        raise ValueError(f"file, codec and out are paths, not {values['file']}, {values['codec']} and {values['out']}")
    out, file = values.pop("out"), values.pop("file").rstrip("/")
    given, codec = storage.local(file), storage.local(values["codec"])
    written = ("model.safetensors", "ema.safetensors", "config.yaml", WORLD_FILE, COMPLETE)
    read = {"codec": storage.files_at(values["codec"]), "config": yaml_files(words)}
    read["official weights"] = storage.files_at(file)
    require_other_files([storage.join(out, name) for name in written], read)
    told = {"layout": "continuous", "flow": {}, **values, "codec_hash": codec_hash(codec)}
    world = build(WorldModelConfig, told)
    action, keys = world.model.action, world.game.action_space.keys
    if action and action.enable_keyboard and action.keyboard_dim_in != len(keys):
        raise ValueError(f"the model has {action.keyboard_dim_in} keys, {world.game.name} has {', '.join(keys)}")
    weights, origin = read_official(given, world.model)
    origin = replace(origin, source=file + origin.source.removeprefix(str(given)))
    with writing_world(out, world, values["codec"]) as folder:
        save_weights(weights, folder / "model.safetensors", asdict(origin))
        save_config(origin, folder / "config.yaml")
    stored = sum(spec.nbytes for spec in weights.specs.values())
    print(f"{out}: {len(weights)} tensors, {stored / 2**30:.2f} GiB, {origin.layout} names, from {origin.source}")


def export(words: list[str]) -> None:
    """Write a checkpoint's weights as others read them: CHECKPOINT format=official|diffusers out=folder"""
    from sampling.world_model import find_checkpoint, find_codec, read_world_config, writing_world

    config = load_config(ExportConfig, words)
    checkpoint = find_checkpoint(config.checkpoint)
    world, file = read_world_config(checkpoint), storage.join(checkpoint, f"{config.weights}.safetensors")
    model, codec, lacking = world.model, None, ""
    try:
        codec = find_codec(checkpoint, world, config.codec)
    except ValueError as error:  # others need none: their format can still be written
        if config.codec:
            raise
        lacking = f"note: without a codec, so that others can read it, but nobody can play it here: {error}"
    weights = open_weights(storage.local(file))
    check_variant(model, weights.specs, {}, file)
    given = exported(weights, config)
    described = diffusers_json(model) if config.format == "diffusers" else official_json(model)
    with writing_world(config.out, world, codec) as folder:
        save_weights(given, folder / WEIGHTS_NAME)
        write_text(folder / "config.json", json.dumps(described, indent=1))
    print(f"{storage.join(config.out, WEIGHTS_NAME)}: {len(given)} tensors, the first {next(iter(given))}")
    if lacking:
        print(lacking)
    if config.format == "diffusers" and (scales := unused_scales(weights)):
        print(
            f"note: {scales} RMS scales of the action modules are not 1; the FastVideo port applies them, this code not"
        )


VERBS = {"info": info, "parity": parity, "bench": bench, "import": first_is("file", import_official),
         "export": first_is("checkpoint", export)}  # fmt: skip

if __name__ == "__main__":
    sys.exit(run("model", VERBS))
