"""What the server has done, in the text format of Prometheus."""

import math
from collections import deque

KEPT = 512  # newest values that quantiles are of
PREFIX = "worldloom_play"


class Metrics:
    """Counts since the server started, and quantiles of the newest blocks."""

    def __init__(self, fps: float) -> None:
        self.fps, self.blocks, self.frames, self.seconds = fps, 0, 0, 0.0
        self._recent = {"block_seconds": deque[float](maxlen=KEPT), "latency_seconds": deque[float](maxlen=KEPT)}

    def count(self, frames: int, seconds: float) -> None:
        """A block that took `seconds`."""
        self.blocks, self.frames, self.seconds = self.blocks + 1, self.frames + frames, self.seconds + seconds
        self._recent["block_seconds"].append(seconds)

    def note_latency(self, seconds: float) -> None:
        """From an input to its frame on a player's screen."""
        if math.isfinite(seconds) and seconds > 0:
            self._recent["latency_seconds"].append(seconds)

    def text(self, sessions: int, waiting: int) -> str:
        """All of them; what is not known yet is left out."""
        gauges = {"sessions": sessions, "waiting": waiting}
        if self.seconds:
            gauges |= {"fps": self.frames / self.seconds, "real_time_factor": self.frames / self.seconds / self.fps}
        counters = {"blocks_total": self.blocks, "frames_total": self.frames, "busy_seconds_total": self.seconds}
        lines = [f"# TYPE {PREFIX}_{name} gauge\n{PREFIX}_{name} {value:g}" for name, value in gauges.items()]
        lines += [f"# TYPE {PREFIX}_{name} counter\n{PREFIX}_{name} {value:g}" for name, value in counters.items()]
        for name, values in self._recent.items():
            if ordered := sorted(values):
                lines.append(f"# TYPE {PREFIX}_{name} summary")
                for q in (0.5, 0.95):
                    value = ordered[math.ceil(q * len(ordered)) - 1]
                    lines.append(f'{PREFIX}_{name}{{quantile="{q}"}} {value:g}')
        return "\n".join(lines) + "\n"
