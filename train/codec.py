"""Fits the demo's codec: the encoder in closed form, then the decoder by regression on pixels."""

import math
import time
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from configs import save_config, storage, within
from configs.errors import UserError
from configs.files import require_other_files
from configs.game import GameConfig
from data_pipeline.readers import Reader, Recording, find_recordings, read_game_frames, split_episodes
from data_pipeline.video import to_uint8, to_video
from model.codec import CONFIG_FILE, Codec
from model.layout import CHUNK_FRAMES
from model.patch_codec import WEIGHTS_FILE, PatchCodec, PatchCodecConfig, to_patches
from model.weights import save_weights
from sampling.appearance import psnr
from train.config import MOST_CLIPS, MOST_SEED, MOST_STEPS

RECORDING_FRAMES = 900  # of each recording, from its start, since they are held in memory
PCA_PATCHES = 200_000  # rows of the covariance; 768 x 768 is determined by far fewer


@dataclass(frozen=True)
class CodecTrainConfig:
    """The settings of `python -m train codec`."""

    game: GameConfig
    source: str  # folder of recordings
    out: str  # the codec's folder
    codec: PatchCodecConfig = field(default_factory=PatchCodecConfig)
    reader: Reader = "worldloom"  # format of the recordings
    heldout_every: int = within(2, 1_000_000, 10)  # every n-th episode is never trained on
    episodes: int = within(1, 1_000_000, 120)  # recordings held in memory
    heldout_episodes: int = within(1, 1_000_000, 12)  # recordings that PSNR is measured on
    steps: int = within(1, MOST_STEPS, 1500)
    batch: int = within(1, MOST_CLIPS, 4)  # clips of 9 frames
    learning_rate: float = within(0, 10, 2e-3)
    warmup_steps: int = within(1, MOST_STEPS, 50)
    precision: Literal["fp32", "bf16"] = "fp32"  # of the products while fitting
    seed: int = within(0, MOST_SEED, 0)


def train_codec(config: CodecTrainConfig) -> None:
    """Fit the demo's codec to recordings: PCA encoder, learned decoder; prints PSNR on held-out episodes."""
    files = [storage.join(config.out, name) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    require_other_files([config.out, *files], {"source": config.source})
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(config.seed)
    fitting, heldout = split_episodes(find_recordings(config.reader, config.source), config.heldout_every)
    clips = cut_clips(config, fitting[: config.episodes])
    heldout_clips = cut_clips(config, heldout[: config.heldout_episodes])
    with storage.writing_folder(config.out, last=WEIGHTS_FILE) as folder:  # a fault of out= is said before the work
        torch.manual_seed(config.seed)  # the layers' own initialisation takes no generator
        codec = PatchCodec(config.codec)
        kept = codec.fit_pca(_sample_patches(clips, generator))
        linear_db = mean_psnr(codec, heldout_clips)
        print(f"PCA keeps {kept:.1%} of the variance, {linear_db:.2f} dB on {len(heldout_clips)} held-out clips")
        fit_decoder(codec, clips, config, generator)
        weights = {name: tensor.bfloat16() for name, tensor in codec.state_dict().items()}  # half the size
        codec.load_state_dict(weights)  # what is measured is what is saved
        db = mean_psnr(codec, heldout_clips)
        save_config(config.codec, folder / CONFIG_FILE)
        metadata = {"heldout_psnr_db": f"{db:.3f}", "pca_psnr_db": f"{linear_db:.3f}"}
        save_weights(weights, folder / WEIGHTS_FILE, metadata)
    print(f"codec: {db:.2f} dB on held-out episodes (PCA alone {linear_db:.2f}), {time.perf_counter() - started:.0f} s")


def cut_clips(config: CodecTrainConfig, recordings: list[Recording]) -> Tensor:
    """Clips of 9 frames (m 9 h w 3) uint8, cut one after the other from the episodes of `recordings`."""
    clips = []
    for recording in tqdm(recordings, desc="read recordings", unit="recording"):
        left = RECORDING_FRAMES
        for episode in recording.read(config.game):
            whole = min(left, len(episode.actions)) // CHUNK_FRAMES * CHUNK_FRAMES
            if whole:
                frames = np.stack(list(islice(read_game_frames(episode, config.game), whole)))
                clips.append(rearrange(torch.from_numpy(frames), "(m n) h w c -> m n h w c", n=CHUNK_FRAMES))
            left -= whole
    if not clips:
        raise UserError(f"{config.source} has too few episodes for heldout_every={config.heldout_every}")
    return torch.cat(clips)


def fit_decoder(codec: Codec, clips: Tensor, config: CodecTrainConfig, generator: torch.Generator) -> None:
    """Regresses the decoder on pixels, in place; the encoder stays as it is."""
    weights = [p for p in codec.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    progress = tqdm(range(config.steps), desc="codec", unit="step")
    codec.train()
    for step in progress:
        warmup = min(1.0, (step + 1) / config.warmup_steps)
        decay = 0.5 * (1 + math.cos(math.pi * step / config.steps))
        optimizer.param_groups[0]["lr"] = config.learning_rate * warmup * decay
        video = to_video(clips[torch.randint(len(clips), (config.batch,), generator=generator)])
        with torch.no_grad():
            latents = codec.encode(video)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            decoded, _ = codec.decode_stream(latents, None)
        loss = (decoded.float() - video).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 20 == 0:
            progress.set_postfix_str(f"{10 * math.log10(4 / loss.item()):.2f} dB")
    codec.eval()


@torch.inference_mode()
def mean_psnr(codec: Codec, clips: Tensor) -> float:
    """Mean PSNR in dB over the frames of `clips` (m 9 h w 3) uint8 after encoding and decoding."""
    decoded = ((part, to_uint8(codec.decode(codec.encode(to_video(part))))) for part in clips.split(8))
    return float(np.concatenate([psnr(made.numpy(), part.numpy()) for part, made in decoded]).mean())


def _sample_patches(clips: Tensor, generator: torch.Generator) -> Tensor:
    """At most PCA_PATCHES rows (m 768) of `clips`, first frames repeated as `encode` does it."""
    per_clip = 3 * (clips.shape[2] // 8) * (clips.shape[3] // 8)
    chosen = torch.randperm(len(clips), generator=generator)[: max(1, PCA_PATCHES // per_clip)]
    video = to_video(clips[chosen])
    whole = torch.cat([video[:, :, :1].repeat_interleave(4, dim=2), video[:, :, 1:]], dim=2)
    return to_patches(whole).flatten(0, 3)
