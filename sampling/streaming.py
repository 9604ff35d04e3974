"""The causal method: block after block, each answering its actions and reading what the caches hold of the past."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from data_pipeline.video import to_uint8
from model.inputs import condition, model_inputs
from model.noise import seeded_noise
from model.vision import image_conditions
from model.world import WorldModel
from sampling.denoising import Denoising, Rows, Velocity, denoise_in_few_steps, guide, integrate


class Stream:
    """A rollout of a causal model from pictures, without an end: its caches, its decoder's state, its last actions.

    Memory does not grow with time. A sample depends on its own seed alone, not on its neighbours in the batch.
    """

    def __init__(
        self,
        world: WorldModel,
        image: Tensor,
        seeds: Sequence[int],
        denoising: Denoising,
    ) -> None:
        """`image` (b 3 h w) in [-1, 1] is frame 0."""
        causal, spatial = world.dit.config.causal, world.codec.config.spatial
        height, width, unit = *image.shape[2:], spatial * world.dit.config.patch_size[1]
        if height % unit or width % unit:
            raise UserError(f"a picture of {height}x{width} px: both must be multiples of {unit} (codec x patch)")
        if len(seeds) != len(image):
            raise UserError(f"{len(seeds)} seeds for {len(image)} pictures: give one each")
        self.cache = world.dit.make_cache(len(image), height // spatial, width // spatial, world.look(image))
        assert causal is not None  # make_cache refuses a model that is not causal
        self.world, self.seeds, self.denoising, self.causal = world, tuple(seeds), denoising, causal
        self.blocks = 0  # made or taken in so far
        self._decoder_state: Any = None
        self._history: tuple[Tensor, Tensor] | None = None  # the newest rows of keyboard and mouse
        self._conditions = _conditions(world, image, causal.unknown, causal.block)
        with torch.inference_mode():
            # A model told of its prompt by grey conditioning makes even the first latent itself, as upstream does.
            own = causal.unknown == "grey"
            self._known: Tensor | None = None if own else world.codec.encode(image[:, :, None]).float()

    @property
    def frames_due(self) -> int:
        """Frames of the next block, which wants as many action rows: 9 at the start, then 12, for blocks of three."""
        temporal = self.world.codec.config.temporal
        return temporal * self.causal.block - (temporal - 1 if self.blocks == 0 else 0)

    @torch.inference_mode()
    def step(self, keyboard: Tensor, mouse: Tensor) -> Tensor:
        """The next block, frames (b n h w 3) uint8, that answers keyboard (b n k) and mouse (b n 2), n `frames_due`.

        Row i was held during frame i's interval, so a block's last row leads to the frame after it.
        """
        rows = self._rows(keyboard, mouse)
        cond, flow = next(self._conditions), self.world.flow

        def answer(rows: Rows) -> Velocity:
            given = self._inputs(rows, cond)
            return lambda x, timestep: self.world.dit(x, timestep, **given, cache=self.cache)

        velocity = guide(answer, rows, keyboard.shape[1], self.denoising.guidance)
        if self.denoising.few_steps:
            latents = denoise_in_few_steps(velocity, flow, self._noise, self.denoising.few_steps, self._known)
        else:
            latents = integrate(velocity, flow, self._noise(0), self.denoising.steps, self._known)
        return self._finish(latents, cond, rows)

    @torch.inference_mode()
    def take(self, latents: Tensor, keyboard: Tensor, mouse: Tensor) -> Tensor:
        """A block that is known, normalised latents (b c f h w), in place of a made one; its frames as decoded."""
        rows = self._rows(keyboard, mouse)
        return self._finish(latents.float(), next(self._conditions), rows)

    def _finish(self, latents: Tensor, cond: Tensor, rows: Rows) -> Tensor:
        """One more pass over the finished block, which fills the caches, and its frames."""
        flow, level = self.world.flow, self.denoising.context_noise
        level = self.causal.context_noise if level is None else level
        sigma = torch.full((len(latents),), level, device=latents.device)
        x = flow.add_noise(latents, self._noise(-1), sigma) if level else latents
        given = self._inputs(rows, cond)
        self.world.dit(x, flow.config.train_steps * sigma, **given, cache=self.cache, keep=True)
        past = max(0, rows[0].shape[1] - self._window)
        self._history = rows[0][:, past:], rows[1][:, past:]
        self.blocks, self._known = self.blocks + 1, None
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.world.dtype == torch.bfloat16):
            video, self._decoder_state = self.world.codec.decode_stream(latents, self._decoder_state)
        return to_uint8(video.clamp(-1, 1))

    def _noise(self, level: int) -> Tensor:
        """Noise (b c f h w) that depends on each seed, the block and the level (-1: of the context)."""
        (_, rows, columns), (_, p, q) = self.cache.grid, self.world.dit.config.patch_size
        shape = (self.world.dit.config.out_dim, self.causal.block, rows * p, columns * q)
        return seeded_noise(shape, self.seeds, self.blocks, level + 1).to(self.world.device)

    def _rows(self, keyboard: Tensor, mouse: Tensor) -> Rows:
        """The rows of the next block behind those of the past that its windows may show."""
        check_actions(self.world, keyboard, mouse, len(self.seeds), self.frames_due)
        given = keyboard.to(self.world.device), mouse.to(self.world.device)
        before = self._history
        return (
            given
            if before is None
            else (torch.cat([before[0], given[0]], dim=1), torch.cat([before[1], given[1]], dim=1))
        )

    @property
    def _window(self) -> int:
        """Rows that a latent frame sees."""
        action = self.world.dit.config.action
        return 0 if action is None else action.window

    def _inputs(self, rows: Rows, cond: Tensor) -> dict[str, Tensor | None]:
        """What the model is given for the next block, with actions as of `_rows`."""
        # A later block's first latent ends with the last of its own frames.
        offset = rows[0].shape[1] - self.frames_due + (self.world.codec.config.temporal - 1 if self.blocks else 0)
        return model_inputs(self.world.dit, rows, "continuous", cond, offset=offset)


def check_actions(world: WorldModel, keyboard: Tensor, mouse: Tensor, b: int, n: int) -> None:
    """Raises ValueError in one line if these are not n finite rows for b samples of the world's game."""
    space = world.game.action_space
    widths = {"keyboard": len(space.keys), "mouse": 2 if space.mouse else 0}
    for name, rows in (("keyboard", keyboard), ("mouse", mouse)):
        if tuple(rows.shape) != (b, n, widths[name]):
            raise UserError(
                f"{name} actions of shape {tuple(rows.shape)}: the next {n} frames of {b} samples want "
                f"{(b, n, widths[name])}, for {space.describe()}"
            )
        if not rows.isfinite().all():
            raise UserError(f"{name} actions hold NaN or infinite numbers; give what was pressed and moved")


def rollout_blocks(
    world: WorldModel,
    prompt: Tensor,
    actions: tuple[Tensor, Tensor],
    seeds: Sequence[int],
    denoising: Denoising,
) -> Iterator[Tensor]:
    """Block after block of (b n h w 3) uint8 frames, n = 9 and then 12 for blocks of three, each as soon as it is made.

    `prompt` is a picture (b 3 h w) in [-1, 1] or a clip (b 3 n h w) of whole blocks, which come first, as decoded.
    `actions`: keyboard (b n k) and mouse (b n 2), one row per frame of the whole video, the prompt's among them.
    Raises ValueError before anything is computed if frames and blocks do not fit.
    """
    clip = prompt if prompt.ndim == 5 else None
    stream = Stream(world, prompt if clip is None else clip[:, :, 0], seeds, denoising)
    keyboard, mouse = actions
    block, temporal = stream.causal.block, world.codec.config.temporal
    count_blocks(keyboard.shape[1], block, temporal, "actions")
    known = count_blocks(clip.shape[2], block, temporal, "prompt") if clip is not None else 0
    if clip is not None and clip.shape[2] > keyboard.shape[1]:
        raise UserError(f"{keyboard.shape[1]} frames with a prompt of {clip.shape[2]}: ask for more than the prompt")
    return _play(stream, clip, known, (keyboard, mouse))


def _play(stream: Stream, clip: Tensor | None, known: int, actions: tuple[Tensor, Tensor]) -> Iterator[Tensor]:
    keyboard, mouse = actions
    start, block = 0, stream.causal.block
    with torch.inference_mode():
        latents = None if clip is None else stream.world.codec.encode(clip)
    while start < keyboard.shape[1]:
        rows, taken = slice(start, start + stream.frames_due), slice(block * stream.blocks, block * (stream.blocks + 1))
        start = rows.stop
        if latents is not None and stream.blocks < known:
            yield stream.take(latents[:, :, taken], keyboard[:, rows], mouse[:, rows])
        else:
            yield stream.step(keyboard[:, rows], mouse[:, rows])


def whole_blocks(frames: int, block: int, temporal: int) -> int:
    """Frames of the shortest video of whole blocks of `block` latents that has at least `frames`."""
    latents = -(-(frames - 1) // temporal) + 1
    return temporal * (block * max(1, -(-latents // block)) - 1) + 1


def count_blocks(frames: int, block: int, temporal: int, what: str) -> int:
    """Blocks of `block` latents in a video of `frames`; raises ValueError naming the next number that divides."""
    fitting = whole_blocks(frames, block, temporal)
    blocks = (1 + (fitting - 1) // temporal) // block
    if frames != fitting:
        raise UserError(
            f"{what}: {frames} frames are no whole number of blocks of {block} latents ({fitting} are {blocks}); "
            f"the first block has {temporal * (block - 1) + 1} frames, every later one {temporal * block}"
        )
    return blocks


def _conditions(world: WorldModel, image: Tensor, unknown: str, block: int) -> Iterator[Tensor]:
    """The conditioning (b 4+c f h w) of each block: the picture in the first, then nothing known."""
    if unknown == "zeros":
        known = world.codec.encode(image[:, :, None]).float()
        latents = torch.cat([known, torch.zeros_like(known).expand(-1, -1, block - 1, -1, -1)], dim=2)
        yield condition(latents, 1)
        nothing = condition(torch.zeros_like(latents), 0)
    else:
        # The encoder remembers finitely many frames: once grey gives what it gave before, it always will.
        nothing = None
        for cond in image_conditions(world.codec, image, block):
            if nothing is not None and torch.equal(cond, nothing):
                break
            nothing = cond
            yield cond
    assert nothing is not None
    while True:
        yield nothing
