"""What the page and the server say to each other: frames and controls as bytes, everything rare as short JSON.

Binary messages begin with their kind; all numbers are little-endian. page.js has the same layouts.
"""

import math
import struct
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from configs import build
from configs.errors import UserError
from configs.untrusted import parse_object
from sampling.denoising import Denoising

FRAME, CONTROLS = 1, 2  # kinds of binary messages
# kind, index in its block, frames of the block, 0; session, block, frame, counter; the page's time stamp of the
# controls that it answers, in ms; ms of denoising, decoding, encoding. Then a JPEG.
FRAME_HEADER = struct.Struct("<HHHHIIIIdfff")
# kind, 0; counter, wanted block, keys as bits; ms; mouse pitch and yaw; turn pitch and yaw; latency.
CONTROLS_LAYOUT = struct.Struct("<HHIIIdddfff")
MOST_KEYS = 32  # one bit each
MOST_TEXT = 4096  # bytes of a JSON message
FARTHEST_DEG = 1e9  # that a mouse can have turned


class Controls(NamedTuple):
    """What a player does: a state, so the newest message says all, and a lost one loses nothing."""

    counter: int = 0  # of the page's messages
    wanted: int = 0  # the block that the page will need next
    keys: int = 0  # bit i: key i of the action space is held
    stamp_ms: float = 0.0  # the page's clock, which comes back with the frames
    mouse_deg: tuple[float, float] = (0.0, 0.0)  # (pitch, yaw) that the mouse has turned since the connection
    turn: tuple[float, float] = (0.0, 0.0)  # (pitch, yaw) from -1 to 1: a held arrow, a stick
    latency_ms: float = math.nan  # from an input to its frame on the screen, as the page measured it last


@dataclass(frozen=True)
class Command:
    """A JSON message of the page."""

    do: Literal["reset", "settings"]
    seed: int | None = None  # reset: of the new world; the old seed without it
    start: int | None = None  # reset: number of the start picture, -1 the player's own; the last one without it
    steps: int | None = None  # settings
    guidance: float | None = None  # settings


def parse_controls(data: bytes, keys: int) -> Controls:
    """The state in a message about an action space of `keys`. UserError for anything else."""
    if len(data) != CONTROLS_LAYOUT.size or data[:2] != CONTROLS.to_bytes(2, "little"):
        raise UserError(f"no controls: they are {CONTROLS_LAYOUT.size} bytes and begin with {CONTROLS}")
    _, _, counter, wanted, held, stamp, *degrees, pitch, yaw, latency = CONTROLS_LAYOUT.unpack(data)
    if held >> keys or not math.isfinite(stamp):
        raise UserError(f"controls hold keys {held:b} of {keys}, or no time")
    if not all(abs(value) <= FARTHEST_DEG for value in degrees) or not all(abs(value) <= 1 for value in (pitch, yaw)):
        raise UserError("controls turn farther than a mouse can")
    return Controls(counter, wanted, held, stamp, (degrees[0], degrees[1]), (pitch, yaw), latency)


def parse_command(text: str) -> Command:
    """The command in a JSON message. UserError for anything else."""
    if len(text) > MOST_TEXT:
        raise UserError(f"a command has {MOST_TEXT} bytes at most")
    command = build(Command, parse_object(text, "a command"))
    if command.seed is not None and not 0 <= command.seed < 1 << 53:  # a whole number in JavaScript, too
        raise UserError(f"seed={command.seed} must lie between 0 and 2^53")
    return command


def describe_denoising(denoising: Denoising) -> dict[str, Any]:
    """What decides about the frames besides seed, start picture and actions."""
    return {"steps": denoising.steps, "few_steps": list(denoising.few_steps), "guidance": denoising.guidance}
