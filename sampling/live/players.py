"""The players of one world: who is in, who waits in line, whose block is made next."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketDisconnected

from configs.errors import UserError, one_line
from model.world import WorldModel, WorldModelConfig
from sampling.live.config import PlayConfig
from sampling.live.metrics import Metrics
from sampling.live.protocol import Command, describe_denoising, parse_command, parse_controls
from sampling.live.session import MOST_GUIDANCE, MOST_STEPS, Beginning, Session

T = TypeVar("T")
MOST_WAITING = 100  # pages in line
SEND_S = 10.0  # a page that does not take a message for so long is gone
HEARD_S = 2.0  # a page that said nothing for so long is gone, since pages speak twice a second
BROKEN = (1002, 1003, 1007, 1009)  # a page sent what is no message, or one that is too large
BAD, FULL, MOVED, IDLE = 1008, 1013, 4001, 4002  # why a connection is closed


class EndedError(Exception):
    """A session or a connection is over, for a reason of ours: a code and a word."""


class Connection:
    """One page."""

    def __init__(self, socket: WebSocket) -> None:
        self.socket, self.heard = socket, time.monotonic()
        self.session: Session | None = None
        self.woken = asyncio.Event()  # something was said or has changed

    async def say(self, kind: str, **facts: Any) -> None:
        async with asyncio.timeout(SEND_S):
            await self.socket.send_json({"kind": kind, **facts})

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(SEND_S):
            await self.socket.send_bytes(data)


class Players:
    """All sessions over one world. Blocks are made in one thread, in the order in which they were asked for; nobody
    has two in that line, so everybody has the same share."""

    def __init__(self, config: PlayConfig, trained: WorldModelConfig, starts: list[np.ndarray]) -> None:
        self.config, self.game, self.starts = config, trained.game, starts
        self.metrics = Metrics(trained.game.fps)
        self.world: WorldModel | None = None  # until it is loaded
        self.sessions: dict[str, Session] = {}  # by key
        self.pages: dict[str, Connection] = {}  # by the key of the session that they play
        self.line: list[Connection] = []
        self._count = 0
        self._thread = ThreadPoolExecutor(1, "world")

    async def load(self, checkpoint: str) -> None:
        """Loads the world and makes its first blocks, so that nobody waits for what is slow only once."""
        world = await self._in_thread(lambda: self.config.load(checkpoint))
        warming = Session(0, world, Beginning(self.starts[0], 0), self.config)
        for _ in range(2):
            await self._in_thread(warming.make_block)
        self.world = world
        self._wake_line()

    async def serve(self, socket: WebSocket) -> None:
        """One page, from its connection to its end."""
        connection, keep, code, why = Connection(socket), False, 1000, ""
        await socket.accept()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._listen(connection))
                tasks.create_task(self._play(connection))
        except* (WebSocketDisconnect, WebSocketDisconnected, TimeoutError):
            keep = True
        except* UserError as errors:
            code, why, keep = BAD, one_line(errors.exceptions[0]), False
        except* EndedError as errors:
            (code, why), keep = errors.exceptions[0].args, False
        finally:
            self._leave(connection, keep)
        with suppress(WebSocketDisconnect, WebSocketDisconnected, RuntimeError):  # it may be closed already
            await socket.close(code, why[:100])

    async def _listen(self, connection: Connection) -> None:
        """Takes what the page says. UserError for what cannot be parsed: it ends this session alone."""
        while True:
            message = await connection.socket.receive()
            if message["type"] == "websocket.disconnect":
                if message.get("code") in BROKEN:
                    raise EndedError(BAD, "no WebSocket message of this kind")
                raise WebSocketDisconnect
            connection.heard, session = time.monotonic(), connection.session
            if (data := message.get("bytes")) is not None:
                controls = parse_controls(data, len(self.game.action_space.keys))
                self.metrics.note_latency(controls.latency_ms / 1000)
                if session:
                    session.hear(controls)
            else:
                command = parse_command(message.get("text") or "")
                if session:
                    try:
                        self._obey(session, command)
                    except UserError as error:
                        await connection.say("error", text=one_line(error))
            connection.woken.set()

    def _obey(self, session: Session, command: Command) -> None:
        session.touched = time.monotonic()
        if command.do == "settings":
            session.change(command)
            return
        picture, seed = session.asked
        if command.start is not None:
            pictures = dict(enumerate(self.starts)) | ({} if session.own_picture is None else {-1: session.own_picture})
            if command.start not in pictures:
                raise UserError(f"there is no start picture {command.start}")
            picture = pictures[command.start]
        session.asked = Beginning(picture, seed if command.seed is None else command.seed)

    async def _play(self, connection: Connection) -> None:
        """Makes and sends a block whenever the page needs one."""
        session = await self._admit(connection)
        await connection.say("welcome", **self._facts(session))
        while connection.session is session:
            if session.due:
                block = await self._in_thread(session.make_block)
                settling = self._in_thread(session.settle)
                if block.number == 0:
                    await connection.say("world", seed=block.seed)
                for message in block.messages:
                    await connection.send(message)
                self.metrics.count(len(block.messages), block.seconds + await settling)
            else:
                connection.woken.clear()
                try:  # not with wait_for: that of Python 3.11 can lose that the page is gone
                    async with asyncio.timeout(session.touched + self.config.idle_s - time.monotonic()):
                        await connection.woken.wait()
                except TimeoutError:
                    raise EndedError(IDLE, "nothing was touched for a while") from None
        raise EndedError(MOVED, "this world is played on another page")

    async def _admit(self, connection: Connection) -> Session:
        """The page's own session if it is still there, else a new one once it is this page's turn."""
        key = connection.socket.query_params.get("key", "")
        page = self.pages.get(key)
        if key in self.sessions and (page is None or time.monotonic() - page.heard > HEARD_S):
            if page:
                page.session = None
                page.woken.set()
            session = self.sessions[key]
            await self._in_thread(session.release)
        else:
            session = await self._wait_in_line(connection)
        self.pages[session.key], connection.session = connection, session
        session.touched = time.monotonic()
        return session

    async def _wait_in_line(self, connection: Connection) -> Session:
        if len(self.line) >= MOST_WAITING:
            raise EndedError(FULL, "too many are waiting")
        self.line.append(connection)
        told = None
        while True:
            place = self.line.index(connection) + 1 - (self.config.sessions - len(self.sessions))
            if self.world and place <= 0:
                self.line.remove(connection)
                self._count += 1
                session = Session(self._count, self.world, Beginning(self.starts[0], self.config.seed), self.config)
                self.sessions[session.key] = session
                return session
            state = ("busy", place) if self.world else ("warming", 0)
            if state != told:
                told = state
                await connection.say(state[0], place=state[1])
            else:
                connection.woken.clear()
                await connection.woken.wait()

    def _leave(self, connection: Connection, keep: bool) -> None:
        """The page is gone; its session stays for a while if it may come back."""
        if connection in self.line:
            self.line.remove(connection)
        session = connection.session
        if session and self.pages.get(session.key) is connection:
            del self.pages[session.key]
            session.left_s = time.monotonic()
            if keep:
                asyncio.get_running_loop().call_later(self.config.keep_s, self._forget, session, session.left_s)
            else:
                self._forget(session, session.left_s)
        self._wake_line()

    def _forget(self, session: Session, left_s: float) -> None:
        """Makes room, unless a page came back since the one that left at `left_s`."""
        if session.key not in self.pages and session.left_s == left_s:
            self.sessions.pop(session.key, None)
            self._wake_line()

    def _wake_line(self) -> None:
        for connection in self.line:
            connection.woken.set()

    def _facts(self, session: Session) -> dict[str, Any]:
        """What the page needs to know."""
        space = self.game.action_space
        return {
            "key": session.key,
            "session": session.number,
            "block": session.block,
            "seed": session.asked.seed,
            "fps": self.game.fps,
            "size": [self.game.width, self.game.height],
            "game": self.game.name,
            "keys": list(space.keys),
            "caps": list(space.caps or space.keys),
            "mouse": space.mouse,
            "mouse_limit_deg": self.config.mouse_limit_deg,
            "starts": len(self.starts),
            "own": session.own_picture is not None,
            "lands": bool(self.config.record),
            "most": {"steps": max(MOST_STEPS, self.config.steps), "guidance": MOST_GUIDANCE},
            **describe_denoising(session.denoising),
        }

    def _in_thread(self, function: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._thread, function)
