"""What a player gets: frames per second, time from an input to its frame, memory, with one player and with two."""

import asyncio
import json
import statistics
import threading
import time
from dataclasses import dataclass, field

import psutil
from websockets.sync.client import connect

from configs.errors import UserError
from model.world import read_world_config
from sampling.live.config import PlayConfig, read_starts
from sampling.live.players import Players
from sampling.live.protocol import CONTROLS, CONTROLS_LAYOUT, FRAME_HEADER
from sampling.live.server import listen, make_server, run


@dataclass
class Played:
    """What one player saw."""

    latencies_s: list[float] = field(default_factory=list)  # from a change of the keys to the frame that answers it
    arrivals_s: list[float] = field(default_factory=list)  # of frames


def bench_play(config: PlayConfig) -> None:
    """How fast a world is played, with one player and with two: <checkpoint> steps=4 frames=600 (of each)"""
    checkpoint = config.find([], prompt=config.prompt or None)
    trained, listener = read_world_config(checkpoint), listen("127.0.0.1", 0)
    starts, url = read_starts(checkpoint, trained, config), f"ws://127.0.0.1:{listener.getsockname()[1]}/play"
    held: list[Players] = []

    async def serve() -> None:
        held.append(Players(config, trained, starts))
        await run(make_server(held[0], ""), held[0], checkpoint, listener)

    started = time.perf_counter()
    threading.Thread(target=asyncio.run, args=(serve(),), daemon=True).start()
    while not held or held[0].world is None:
        if time.perf_counter() - started > 300:
            raise UserError(f"{checkpoint} was not loaded in 300 s")
        time.sleep(0.02)
    print(f"loaded and warm in {time.perf_counter() - started:.1f} s; the game has {trained.game.fps:g} frames/s")
    for players in (1, 2):
        seen, before = [Played() for _ in range(players)], psutil.Process().memory_info().rss
        args = [(url, trained.game.fps, config.frames, played) for played in seen]
        threads = [threading.Thread(target=play_paced, args=each) for each in args]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        grown = psutil.Process().memory_info().rss - before
        for i, played in enumerate(seen):
            print(f"{players} playing, player {i + 1}: {describe(played)}")
        print(f"{players} playing: memory {before / 2**20:.0f} MiB before, {grown / 2**20:+.1f} MiB after")


def describe(played: Played) -> str:
    """Rate, and latency from the first answered change on."""
    span_s = played.arrivals_s[-1] - played.arrivals_s[0]
    ordered = sorted(played.latencies_s)
    p95 = ordered[int(0.95 * (len(ordered) - 1))]
    rate = (len(played.arrivals_s) - 1) / span_s
    return f"{rate:.1f} frames/s, input to frame {1000 * statistics.median(ordered):.0f} ms, p95 {1000 * p95:.0f} ms"


def play_paced(url: str, fps: float, frames: int, played: Played) -> None:
    """Plays as the page does: frames are shown at `fps`, the next block is asked for as late as possible, and a key
    changes at moments that have nothing to do with the blocks."""
    with connect(url, compression=None) as socket:
        counter, keys, wanted, trip_s, shown = 0, 0, 1, 0.15, time.perf_counter()
        changes: list[tuple[int, float]] = []
        next_change = shown + 0.37
        pending, asked = 0, None  # frames that are not shown yet
        while len(played.arrivals_s) < frames:
            now = time.perf_counter()
            while pending and now >= shown + 1 / fps:
                shown, pending = max(shown + 1 / fps, now - 1 / fps), pending - 1
            if now >= next_change:
                keys, next_change = keys ^ 1, now + 0.37
                counter += 1
                changes.append((counter, now))
                socket.send(controls(counter, wanted if asked else max(0, wanted - 1), keys, now))
            if asked is None and wanted > 0 and pending / fps + (shown + 1 / fps - now) <= trip_s + 0.03:
                counter, asked = counter + 1, now
                socket.send(controls(counter, wanted, keys, now))
            try:
                data = socket.recv(timeout=0.004)
            except TimeoutError:
                continue
            if isinstance(data, str):
                if json.loads(data)["kind"] == "busy":
                    raise UserError("sessions= is less than the players of the bench: give sessions=2")
                continue
            now = time.perf_counter()
            _, index, _, _, _, block, _, answered, *_ = FRAME_HEADER.unpack_from(data)
            played.arrivals_s.append(now)
            pending += 1
            if index == 0 and asked is not None and block == wanted:
                trip_s, asked, wanted = 0.8 * trip_s + 0.2 * (now - asked), None, wanted + 1
            show_at = max(now, shown + pending / fps)
            while changes and changes[0][0] <= answered:
                played.latencies_s.append(show_at - changes.pop(0)[1])


def controls(counter: int, wanted: int, keys: int, now_s: float) -> bytes:
    return CONTROLS_LAYOUT.pack(CONTROLS, 0, counter, wanted, keys, 1000 * now_s, 0, 0, 0, 0, float("nan"))
