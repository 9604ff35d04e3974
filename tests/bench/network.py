"""How fast a model is here: its passes and its codec in one process, with FLOPs that are counted."""

import json
import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from configs import to_dict, within
from configs.errors import UserError
from configs.files import require_no_folder, require_other_files
from configs.storage import write_text
from model.action_dit import ActionDiT, CompileMode
from model.codec import Codec, load_codec
from model.config import ActionDiTConfig
from model.cost import META, Run, count_flops, counted_dit, random_inputs, run_clip
from model.flow import FlowMatchConfig
from model.kv_cache import KVCache
from model.limits import MANY, WIDE, require_device
from model.patch_codec import SPATIAL, TEMPORAL, PatchCodec, PatchCodecConfig
from model.tiny_decoder import TinyDecoder
from model.wan_codec import WanCodec, WanCodecConfig, make_vae

RESET_PEAK = Path("/proc/self/clear_refs")  # Linux: writing 5 starts a new peak of resident memory
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CODEC_DTYPES = DTYPES | {"fp16": torch.float16}


@dataclass(frozen=True)
class BenchConfig:
    """`python -m model bench configs/models/X.yaml`; the attention backend is `model.attention`."""

    model: ActionDiTConfig
    flow: FlowMatchConfig = field(default_factory=FlowMatchConfig)  # in every model file; no pass depends on it
    codec: str | None = None  # to be measured too: a path, or patch, wan or wan-tiny for one with random weights
    codec_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = "cpu"
    dtype: Literal["fp32", "bf16"] = "fp32"  # of weights and arithmetic
    compile: CompileMode = "no"
    batch: int = within(1, MANY, 1)
    blocks: int = within(1, MANY, 1)  # of `block_latents` latents, in the clip
    block_latents: int = within(1, MANY, 3)
    steps: int = within(1, MANY, 3)  # denoising passes per block of a stream
    height: int = within(16, WIDE, 352)  # px
    width: int = within(16, WIDE, 640)  # px
    warmup: int = within(0, MANY, 1)  # runs before those that count
    repeats: int = within(1, MANY, 5)
    # Of the device in this dtype, from its data sheet; without it no MFU.
    peak_tflops: float | None = within(1e-6, 1e6, None)
    out: str | None = None  # .json that gets everything, the environment included

    def __post_init__(self) -> None:
        if self.height % (2 * SPATIAL) or self.width % (2 * SPATIAL):
            raise UserError(f"{self.height}x{self.width} px must be multiples of {2 * SPATIAL} (codec x patch)")

    @property
    def latents(self) -> int:
        return self.blocks * self.block_latents

    @property
    def streams(self) -> bool:
        """Whether the model can keep a cache."""
        return self.model.causal is not None and self.model.causal.window is not None

    @property
    def frames(self) -> int:
        """Pixel frames of the clip."""
        return 1 + TEMPORAL * (self.latents - 1)


@dataclass(frozen=True)
class Measured:
    """One row: medians over the runs, and how far they spread."""

    what: str
    wall_s: float
    wall_s_min: float
    wall_s_max: float
    cpu_s: float  # of the whole process, all threads together
    peak_gib: float  # CPU: resident memory of the process; CUDA: allocated by torch
    model_tflop: float  # of one run; recomputed activations are not counted twice
    frames_per_s: float | None  # pixel frames encoded or made
    mfu: float | None  # model FLOPs per second over the stated peak


def bench(config: BenchConfig) -> None:
    """Measure passes and codec: configs/models/X.yaml device=cuda dtype=bf16 blocks=7 codec=wan peak_tflops=989"""
    require_device(config.device)
    if config.out:
        codec = config.codec if Path(config.codec or "").is_file() else None  # else a folder, or the name of a kind
        require_no_folder([config.out])
        require_other_files([config.out], {"codec": codec})
    rows = []
    print(header(config))
    for row in measure_all(config):
        rows.append(row)
        print(table_line(row), flush=True)
    if not config.streams:
        print("no cached pass: this model has no causal.window, so it cannot stream")
    if config.out:
        report = {"config": to_dict(config), "environment": environment(config.device), "rows": list(map(asdict, rows))}
        write_text(config.out, json.dumps(report, indent=1))


def measure_all(config: BenchConfig) -> Iterator[Measured]:
    """The rows, one after the other, of one model and one codec with random weights (or the codec at a path)."""
    dit, costs = make_dit(config), counted_dit(config.model)
    on_device, on_meta = (inputs_for(config, config.latents, model) for model in (dit, costs))
    for what, train in (("forward", False), ("forward + backward", True)):
        flops = count_flops(partial(run_clip, costs, on_meta, train))
        yield measured(what, partial(run_clip, dit, on_device, train), config, flops)
    dit, costs = dit.requires_grad_(False), costs.requires_grad_(False)
    codec = bench_codec(config) if config.codec else None
    if config.streams:
        flops = count_flops(cached_pass(config, costs))
        yield measured("cached pass", cached_pass(config, dit), config, flops)
    if codec:
        passes = codec_passes(config, deepcopy(codec).to(META))
        for what, (run, frames) in codec_passes(config, codec).items():
            yield measured(what, run, config, count_flops(passes[what][0]), frames)
    if codec and config.streams:
        what = f"stream, {config.steps} + 1 passes"
        run, frames = stream_block(config, dit, codec)
        yield measured(what, run, config, count_flops(stream_block(config, costs, deepcopy(codec).to(META))[0]), frames)


def make_dit(config: BenchConfig) -> ActionDiT:
    """The model with random weights on the bench's device."""
    device = torch.device(config.device)
    with device:
        dit = ActionDiT(config.model, torch.Generator(device).manual_seed(0))
    dit = dit.to(DTYPES[config.dtype]).eval()
    dit.compile_blocks(config.compile)
    return dit


def inputs_for(config: BenchConfig, f: int, dit: ActionDiT) -> dict[str, Tensor]:
    """Random inputs of a forward pass over `f` latents of the bench's size, where `dit` is."""
    h, w = config.height // SPATIAL, config.width // SPATIAL
    return random_inputs(config.model, config.batch, f, h, w, dit.head.head.weight.device)


@torch.no_grad()
def cached_pass(config: BenchConfig, dit: ActionDiT) -> Run:
    """One pass of one block against a cache that is full."""
    given, cache = full_cache(config, dit)
    return torch.no_grad()(lambda: dit(**given, cache=cache))


@torch.no_grad()
def stream_block(config: BenchConfig, dit: ActionDiT, codec: Codec) -> tuple[Run, int]:
    """All that one block of a stream costs: its denoising passes, the one that fills the cache, the decoder."""
    given, cache = full_cache(config, dit)
    shape, state = given["x"], None
    for _ in range(2):  # the first block of a stream gives fewer frames
        _, state = codec.decode_stream(shape, state)

    @torch.no_grad()
    def run() -> None:
        x = given["x"]
        for _ in range(config.steps):
            x = x - dit(**given | {"x": x}, cache=cache) / config.steps
        dit(**given | {"x": x}, cache=cache, update_cache=True)
        codec.decode_stream(x, state)

    return run, TEMPORAL * shape.shape[2] * config.batch


def full_cache(config: BenchConfig, dit: ActionDiT) -> tuple[dict[str, Tensor], KVCache]:
    """Random inputs of one block, and a cache whose windows are full."""
    causal = config.model.causal
    assert causal is not None and causal.window is not None
    given = inputs_for(config, causal.block, dit)
    cache = dit.make_cache(config.batch, *given["x"].shape[3:], visual=given.pop("visual", None))
    while cache.position < causal.window:
        dit(**given, cache=cache, update_cache=True)
    return given, cache


def bench_codec(config: BenchConfig) -> Codec:
    """The codec at the path `config.codec`, or the one that it names with random weights."""
    assert config.codec
    if config.codec == "patch":
        codec: Codec = PatchCodec(PatchCodecConfig())
    elif config.codec in ("wan", "wan-tiny"):
        settings = WanCodecConfig(decoder="tiny" if config.codec == "wan-tiny" else "full")
        codec = WanCodec(settings, make_vae(settings), TinyDecoder() if settings.decoder == "tiny" else None)
    else:
        codec = load_codec(config.codec)
    if isinstance(codec, PatchCodec) and config.codec_dtype != "fp32":
        raise UserError(f"codec_dtype={config.codec_dtype}: the patch codec runs in fp32")
    return codec.eval().requires_grad_(False).to(config.device, CODEC_DTYPES[config.codec_dtype])


@torch.no_grad()
def codec_passes(config: BenchConfig, codec: Codec) -> dict[str, tuple[Run, int]]:
    """Encoding and decoding of a random clip of the bench's length, and decoding of a later block of a stream."""
    device = codec.latent_mean.device
    video = torch.rand(config.batch, 3, config.frames, config.height, config.width, device=device) * 2 - 1
    latents = codec.encode(video)
    block = latents[:, :, : config.block_latents]
    _, state = codec.decode_stream(block, None)
    following, whole = TEMPORAL * config.block_latents * config.batch, config.frames * config.batch
    runs: dict[str, tuple[Run, int]] = {
        f"encode {config.frames} frames": (lambda: codec.encode(video), whole),
        f"decode {config.frames} frames": (lambda: codec.decode(latents), whole),
        "decode the next block": (lambda: codec.decode_stream(block, state), following),
    }
    return {what: (torch.no_grad()(run), frames) for what, (run, frames) in runs.items()}


def measured(what: str, run: Run, config: BenchConfig, flops: int, frames: int | None = None) -> Measured:
    """Warm-up and `repeats` runs of `run`, which costs `flops` and gives `frames`; one row."""
    for _ in range(config.warmup):
        run()
    reset_peak(config.device)
    wall, cpu = [], []
    for _ in range(config.repeats):
        started = time.perf_counter(), time.process_time()
        run()
        if config.device.startswith("cuda"):
            torch.cuda.synchronize(config.device)
        wall.append(time.perf_counter() - started[0])
        cpu.append(time.process_time() - started[1])
    median, tflop = statistics.median(wall), flops / 1e12
    mfu = tflop / median / config.peak_tflops if config.peak_tflops else None
    times = (median, min(wall), max(wall), statistics.median(cpu))
    return Measured(what, *times, _peak_gib(config.device), tflop, frames / median if frames else None, mfu)


def reset_peak(device: str) -> None:
    """Starts a new peak of memory, after everything that runs has ended; where the system cannot, it goes on."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access(RESET_PEAK, os.W_OK):
        RESET_PEAK.write_text("5")


def environment(device: str) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.is_file() else "", re.MULTILINE)
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # of the last minute: other jobs make wall times longer
    }
    if device.startswith("cuda"):
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts


def header(config: BenchConfig) -> str:
    """What is measured on what, and the table's first line."""
    where = environment(config.device)
    clip = f"batch {config.batch}, {config.latents} latents of {config.height}x{config.width} px"
    how = f"{config.dtype}, attention {config.model.attention}, compile {config.compile}"
    machine = f"{where.get('gpu', where['processor'])}, {where['threads']} threads, torch {where['torch']}"
    peak = f"; MFU against {config.peak_tflops:g} TFLOP/s" if config.peak_tflops else ""
    columns = f"{'median':>9} {'least':>9} {'most':>9} {'CPU':>9} {'GFLOP':>9} {'frames/s':>9} {'MFU':>7} {'peak':>10}"
    return f"{clip}, {how}; {machine}, load {where['load_average']:.1f}{peak}\n{'':<24} {columns}"


def table_line(row: Measured) -> str:
    """One line of the table."""
    times = "".join(f" {seconds:>7.3f} s" for seconds in (row.wall_s, row.wall_s_min, row.wall_s_max, row.cpu_s))
    speed = "-" if row.frames_per_s is None else f"{row.frames_per_s:.1f}"
    mfu = "-" if row.mfu is None else f"{100 * row.mfu:.1f} %"
    return f"{row.what:<24}{times} {1e3 * row.model_tflop:>9.1f} {speed:>9} {mfu:>7} {row.peak_gib:>6.2f} GiB"


def _peak_gib(device: str) -> float:
    """The peak of memory in GiB. CPU: resident memory of the process; CUDA: allocated by torch."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
