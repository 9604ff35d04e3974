"""A play server in a thread, and a plain client."""

import asyncio
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.error import HTTPError

import cv2
import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from model.world import WorldModelConfig
from sampling.live.config import PlayConfig
from sampling.live.players import Players
from sampling.live.protocol import CONTROLS, CONTROLS_LAYOUT, FRAME_HEADER
from sampling.live.server import listen, make_server, run


@dataclass
class Server:
    """A running server."""

    url: str
    players: Players

    def ask(self, path: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """Status and body of a GET, or of a POST of `data`."""
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers)) as answer:
                return answer.status, answer.read()
        except HTTPError as error:
            return error.code, error.read()

    def until(self, is_so: Any) -> None:
        """Waits until `is_so(players)`; half a minute at most."""
        end = time.monotonic() + 30
        while not is_so(self.players):
            assert time.monotonic() < end, "it never came"
            time.sleep(0.01)


@contextmanager
def serving(
    config: PlayConfig, trained: WorldModelConfig, starts: list[np.ndarray], token: str = ""
) -> Iterator[Server]:
    """A server of `config`, ready to be played."""
    listener, started = listen("127.0.0.1", 0), threading.Event()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)  # of its connections: a page that stalls is felt
    running: dict[str, Any] = {}

    async def main() -> None:
        running["players"] = Players(config, trained, starts)
        running["server"] = make_server(running["players"], token)
        started.set()
        await run(running["server"], running["players"], config.checkpoint, listener)

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    started.wait()
    server = Server(f"http://127.0.0.1:{listener.getsockname()[1]}", running["players"])
    try:
        server.until(lambda players: players.world)
        yield server
    finally:
        running["server"].should_exit = True
        thread.join()


class Frame(NamedTuple):
    """A frame as the page gets it."""

    index: int
    count: int
    session: int
    block: int
    frame: int
    counter: int
    stamp_ms: float
    times_ms: tuple[float, ...]
    picture: np.ndarray  # (h w 3)


class Client:
    """A page without a screen."""

    def __init__(self, server: Server, key: str = "", **options: Any) -> None:
        address = server.url.replace("http", "ws") + f"/play?key={key}"
        self.socket: ClientConnection = connect(address, compression=None, **options)
        self.counter, self.key = 0, key

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def hear(self, kind: str) -> dict[str, Any]:
        """The next message, which is of this kind."""
        message = self.socket.recv(timeout=30)
        assert isinstance(message, str), "a frame"
        facts = json.loads(message)
        assert facts["kind"] == kind, facts
        return facts

    def hold(
        self, wanted: int, keys: int = 0, turn: tuple[float, float] = (0, 0), mouse: tuple[float, float] = (0, 0)
    ) -> None:
        """Says what is held, and which block is wanted."""
        self.counter += 1
        words = (self.counter, wanted, keys, 1000.0 * self.counter, *mouse, *turn, 30.0)
        self.socket.send(CONTROLS_LAYOUT.pack(CONTROLS, 0, *words))

    def do(self, **command: Any) -> None:
        self.socket.send(json.dumps(command))

    def leave(self) -> None:
        """Ends the session, by a message that cannot be parsed: it is not kept then."""
        self.socket.send("")
        with suppress(ConnectionClosed):
            while True:
                self.socket.recv(timeout=30)

    def frames(self) -> list[Frame]:
        """The frames of the next block."""
        frames: list[Frame] = []
        while not frames or len(frames) < frames[0].count:
            data = self.socket.recv(timeout=30)
            assert isinstance(data, bytes), data
            _, index, count, _, session, block, frame, counter, stamp, *times = FRAME_HEADER.unpack_from(data)
            jpeg = np.frombuffer(data[FRAME_HEADER.size :], np.uint8)
            picture = cv2.imdecode(jpeg, cv2.IMREAD_COLOR_RGB)
            assert picture is not None
            frames.append(Frame(index, count, session, block, frame, counter, stamp, tuple(times), picture))
        return frames

    def play(self, blocks: int, first: int = 2, **held: Any) -> list[Frame]:
        """The frames of `blocks` blocks from `first` on, with the same controls held."""
        frames = []
        for block in range(first, first + blocks):
            self.hold(block, **held)
            frames += self.frames()
        return frames

    def begin(self) -> dict[str, Any]:
        """What the server says first, once two blocks have come; nothing is held, as the first frame's row stands."""
        welcome = self.hear("welcome")
        self.hear("world")
        self.frames()
        self.play(1, first=1)
        return welcome
