"""A run without data: its own model, engine, objective and average, on tensors that hold nothing but are counted."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from configs.errors import UserError
from data_pipeline.shards import load_manifest
from data_pipeline.types import Batch
from model.action_dit import ActionDiTConfig
from model.cost import IMAGE_TOKENS
from model.flow import FlowMatch
from model.layout import Layout, latent_ends
from model.memory import peak_gib
from model.patch_codec import SPATIAL, TEMPORAL
from train.build import build_engine
from train.config import TrainConfig
from train.ema import Ema
from train.engine import Engine
from train.engines import start_accelerator
from train.ledger import EXCHANGED, Ledger
from train.metrics import flops_of_pass, tokens_of_pass
from train.objectives import check_objective, make_objective
from train.objectives.objective import rng_for_step
from train.pretence import launched_here, pretended_ranks
from train.state import collect_state

TINY = ActionDiTConfig(dim=32, ffn_dim=32, num_heads=2, num_layers=1, freq_dim=32, vision="none")
BACKWARD, OTHER, TEMPORARIES = "backward", "other", "temporaries"


@dataclass(frozen=True)
class ClipSize:
    """What is in a clip."""

    layout: Layout
    latents: int
    rows: int  # of a latent
    columns: int
    image_latents: bool = False  # the clip carries its conditioning


@dataclass(frozen=True)
class Rehearsed:
    """What one rank of a run holds, and what it computes per step."""

    held: dict[str, int]  # bytes by purpose, at the moment when most is held
    peaks: dict[str, int]  # bytes at most while building, training, saving
    parameters: int  # of the whole model
    tokens: int  # of video
    flops: int  # what checkpointing computes again is not counted


def clip_size(config: TrainConfig, height: int | None, width: int | None, latents: int | None) -> ClipSize:
    """The clips of the run's manifest, but `latents` latents of `height` x `width` px where those are given; without a
    manifest all three must be. Raises ValueError or OSError in one line."""
    objective = make_objective(config.objective)
    causal = config.model.causal
    layout, unknown = objective.layout, causal.unknown if causal else "zeros"
    if height is None or width is None or latents is None:
        manifest = load_manifest(config.sources[0].path)
        height, width = height or manifest.game.height, width or manifest.game.width
        latents, layout, unknown = latents or manifest.clip_latents, manifest.layout, manifest.unknown
    if min(height, width, latents) < 1 or height % SPATIAL or width % SPATIAL:
        raise UserError(
            f"height={height} and width={width} must be multiples of {SPATIAL} px, latents={latents} 1 or more"
        )
    check_objective(objective, config.model, layout, latents)
    return ClipSize(layout, latents, height // SPATIAL, width // SPATIAL, unknown == "grey")


def rehearse(config: TrainConfig, clip: ClipSize, ranks: int, lazy: bool) -> Rehearsed:
    """Rank 0 of `ranks`: the engine is built, makes two steps and collects a checkpoint, on tensors without data.

    `lazy`: memory counts when it is written to, as on a CPU, not when it is allocated. To be called once, in a process
    of its own: it joins a process group in which nothing is exchanged, and changes its own environment.
    """
    config = rehearsable(config)
    with pretended_ranks(config, ranks), FakeTensorMode(allow_non_fake_inputs=True):
        accelerator = start_accelerator(config)
        state: Any = accelerator.state
        state.device = torch.device("cpu")  # not cpu:0, which is another one to tensors without data
        with Ledger(lazy) as ledger:
            engine = build_engine(accelerator, config, None)
            # DDP's buckets: it cannot be asked itself, since it looks at the numbers.
            spread = config.engine.name == "ddp" and ranks > 1
            buckets = [torch.zeros_like(p) for p in engine.module.parameters()] if spread else []
            ledger.name(buckets, EXCHANGED)
            run = Rehearsal(config, clip, engine, Ema(engine, config.ema_decay), ledger)
            run.name_states()
            ledger.name_living(OTHER, "engine's buffers")
            peaks = {"building": ledger.restart()}
            for step in range(2):  # the optimizer's states come with the first: the second is as all that follow
                sequences = run.step(step)
            peaks["training"] = ledger.restart()
            kept = run.checkpoint_part()
            if config.checkpoint.background:
                run.step(2)
            peaks["saving"] = ledger.restart()
            del kept, buckets
            parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    tokens = sum(tokens_of_pass(config.model, shape) for shape in sequences)
    flops = sum(flops_of_pass(config.model, shape) for shape in sequences)
    held = Counter[str]()
    for tag, size in max(peaks.values(), key=lambda peak: peak.total).held.items():
        held[TEMPORARIES if tag in (BACKWARD, OTHER) else tag] += size
    return Rehearsed(dict(held), {moment: peak.total for moment, peak in peaks.items()}, parameters, tokens, flops)


def base_process(config: TrainConfig) -> int:
    """Bytes that a process of a run takes besides the model and what belongs to it: measured, by training a model of a
    few thousand weights on the CPU. To be called once, in a fresh process."""
    import train.loop  # noqa: F401  what a run loads

    config = rehearsable(replace(config, model=TINY, objective={"name": "base"}, batch=1))
    with launched_here(config, 1):
        engine = build_engine(start_accelerator(config), config, None)
        run = Rehearsal(config, ClipSize("chunked", 3, 2, 2), engine, Ema(engine, 0.0), Ledger(lazy=True))
        run.step(0)
        run.checkpoint_part()
        return int(peak_gib("cpu") * 2**30)


def rehearsable(config: TrainConfig) -> TrainConfig:
    """`config` with what takes as much memory but needs no accelerator."""
    attention = "dense" if config.model.attention == "dense" else "sdpa"
    # Which of FSDP2's parts are on the CPU changes nothing but where they are.
    offload = "nothing" if config.engine.name == "fsdp2" else config.engine.offload
    engine = replace(config.engine, compile="no", offload=offload)
    return replace(config, model=replace(config.model, attention=attention), engine=engine)


@dataclass(frozen=True)
class Rehearsal:
    """The parts of a run that hold memory."""

    config: TrainConfig
    clip: ClipSize
    engine: Engine
    ema: Ema
    ledger: Ledger

    def __post_init__(self) -> None:
        self.engine.adam.register_step_pre_hook(lambda *_: self._name_gradients())

    def step(self, step: int) -> list[torch.Size]:
        """One optimizer step; the shapes of the latents that went through the model."""
        config, engine, ledger, sequences = self.config, self.engine, self.ledger, []
        objective, flow = make_objective(config.objective).longest(), FlowMatch(config.flow)
        for _ in range(config.accumulation):
            ledger.tag = "activations"
            batch, draws = random_batch(config, self.clip), rng_for_step(config.seed, step, 0, config.batch)
            with engine.accumulate():
                loss, part = objective.loss(engine.model, flow, batch, 0.0, draws)
                ledger.name((p for p in engine.module.parameters() if hasattr(p, "ds_tensor")), EXCHANGED)
                sequences.append(part.sequence)
                ledger.tag = BACKWARD
                engine.backward(loss)
        ledger.tag = OTHER
        self.ema.update(step)
        self.name_states()
        return sequences

    def checkpoint_part(self) -> dict[str, Tensor]:
        """This rank's part of a checkpoint, copied if it is written while training goes on."""
        if not self.engine.writes_state:
            return {}
        buffers = dict(self.engine.buffers())
        tensors, _ = collect_state(self.engine.shards(), self.engine.adam, self.ema.averages, buffers)
        if self.config.checkpoint.background:
            self.ledger.tag = "checkpoint"
            tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        return tensors

    def name_states(self) -> None:
        """Tells the ledger what is what. Where an engine keeps one set of weights, it is the last name that counts."""
        ledger, module, adam = self.ledger, self.engine.module, self.engine.adam
        states = (value for state in adam.state.values() for value in state.values())
        ledger.name((value for value in states if isinstance(value, Tensor)), "optimizer's states")
        ledger.name(self.ema.averages.values(), "average")
        ledger.name((part.owner for part in self.engine.shards()), "float32 weights")
        ledger.name((getattr(p, "ds_tensor", p) for p in module.parameters()), "weights")
        ledger.name(module.buffers(), "weights")

    def _name_gradients(self) -> None:
        owned = (p for group in self.engine.adam.param_groups for p in group["params"])
        self.ledger.name((p.grad for p in owned if p.grad is not None), "gradients")
        self.ledger.name_living(BACKWARD, "gradients")


def random_batch(config: TrainConfig, clip: ClipSize) -> Batch:
    """A batch of clips as the stream gives it."""
    b, model, action = config.batch, config.model, config.model.action
    frames = latent_ends(clip.layout, clip.latents, TEMPORAL)[-1] + 1
    latents = torch.zeros(b, model.out_dim, clip.latents, clip.rows, clip.columns, dtype=torch.bfloat16)
    keys = action.keys if action and action.enable_keyboard else 0
    axes = action.mouse_dim_in if action and action.enable_mouse else 0
    tokens = IMAGE_TOKENS.get(model.vision)
    return Batch(
        latents=latents,
        keyboard=torch.zeros(b, frames, keys),
        mouse=torch.zeros(b, frames, axes),
        ids=tuple(f"clip:{i}" for i in range(b)),
        visual=torch.zeros(b, tokens, model.img_dim, dtype=torch.bfloat16) if tokens else None,
        image_latents=torch.zeros_like(latents) if clip.image_latents else None,
    )
