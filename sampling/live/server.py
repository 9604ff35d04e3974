"""The server: a page, its pictures and episodes over HTTP, and a WebSocket per player."""

import asyncio
import io
import os
import secrets
import socket
import sys
import tempfile
import time
import webbrowser
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from configs import storage
from configs.errors import UserError, one_line
from data_pipeline.pictures import decode_picture
from data_pipeline.video import fit_frame
from model.world import WorldModelConfig
from sampling.live.config import PlayConfig
from sampling.live.guard import HEADERS, Guard, is_loopback
from sampling.live.players import Players
from sampling.live.protocol import MOST_TEXT
from sampling.live.recording import Recording
from sampling.live.session import Session

MOST_BYTES = 8 << 20  # of a picture that a player brings
MOST_PX = 25_000_000  # of it, decoded
FILES = {"/": ("page.html", "text/html"), "/page.js": ("page.js", "text/javascript")}


def serve(config: PlayConfig, checkpoint: str, trained: WorldModelConfig, starts: list[np.ndarray]) -> None:
    """Serves the world until Ctrl-C, after one line that says where."""
    listener = listen(config.host, config.port)
    token = "" if is_loopback(config.host) else secrets.token_urlsafe(16)
    host = socket.gethostname() if config.host in ("0.0.0.0", "::") else config.host
    host, port = f"[{host}]" if ":" in host else host, listener.getsockname()[1]
    url = f"http://{host}:{port}/" + (f"?token={token}" if token else "")
    print(f"{checkpoint} is played at {url} (Ctrl-C ends it)", flush=True)
    if config.browser and (sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
        with suppress(webbrowser.Error):
            webbrowser.open(url)
    players = Players(config, trained, starts)
    asyncio.run(run(make_server(players, token), players, checkpoint, listener))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; UserError if it cannot."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"host={host} port={port}: {error.strerror or error}; give another port= (0: any)") from error


def make_server(players: Players, token: str) -> uvicorn.Server:
    """The server, not yet running."""
    settings = uvicorn.Config(
        make_app(players, token), ws=WebSocketsSansIOProtocol, ws_max_size=MOST_TEXT, ws_per_message_deflate=False,
        log_level="warning", access_log=False, server_header=False, proxy_headers=False, timeout_graceful_shutdown=1,
    )  # fmt: skip
    return uvicorn.Server(settings)


async def run(server: uvicorn.Server, players: Players, checkpoint: str, listener: socket.socket) -> None:
    """Loads the world and serves it until the server is told to exit, or the world cannot be loaded: that raises."""
    loading = asyncio.create_task(players.load(checkpoint))
    # A world that cannot be loaded ends the server, with the error.
    loading.add_done_callback(lambda done: setattr(server, "should_exit", done.cancelled() or bool(done.exception())))
    await server.serve(sockets=[listener])
    if loading.done():
        loading.result()


def make_app(players: Players, token: str) -> Guard:
    """Everything that is served about `players`, to those who may ask."""
    routes = Routes(players)
    table = [
        *(Route(path, _file(*file)) for path, file in FILES.items()),
        Route("/healthz", lambda _: PlainTextResponse("ok\n")),
        Route("/readyz", routes.ready),
        Route("/metrics", routes.metrics),
        Route("/starts/{number:int}.png", routes.start),
        Route("/picture", routes.picture, methods=["POST"]),
        Route("/episode", routes.episode, methods=["POST"]),
        WebSocketRoute("/play", players.serve),
    ]
    return Guard(Starlette(routes=table), token)


def _file(name: str, media_type: str) -> Callable[[Request], Response]:
    content = Path(__file__).with_name(name).read_bytes()
    return lambda _: Response(content, media_type=media_type, headers=HEADERS)


class Routes:
    """What is asked for over HTTP."""

    def __init__(self, players: Players) -> None:
        self.players = players
        self._heavy = asyncio.Lock()  # pictures are decoded and episodes written one after the other

    async def ready(self, _: Request) -> Response:
        ready = self.players.world is not None
        return PlainTextResponse("ready\n" if ready else "warming up\n", 200 if ready else 503)

    async def metrics(self, _: Request) -> Response:
        text = self.players.metrics.text(len(self.players.sessions), len(self.players.line))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def start(self, request: Request) -> Response:
        """A start picture."""
        number = request.path_params["number"]
        if not 0 <= number < len(self.players.starts):
            raise HTTPException(404)
        return _png(self.players.starts[number])

    async def picture(self, request: Request) -> Response:
        """Takes the player's own start picture; with the answer comes how the world sees it."""
        session, data = self._session(request), bytearray()
        async for part in request.stream():
            data += part
            if len(data) > MOST_BYTES:
                return PlainTextResponse(f"a picture has {MOST_BYTES >> 20} MB at most", 413)
        game = self.players.game
        async with self._heavy:
            try:
                picture = await asyncio.to_thread(decode_picture, bytes(data), "that was sent", MOST_PX)
            except UserError as error:
                return PlainTextResponse(one_line(error), 400)
            session.own_picture = await asyncio.to_thread(fit_frame, picture, game.height, game.width)
        return _png(session.own_picture)

    async def episode(self, request: Request) -> Response:
        """Writes what the session has played into the folder `record`; without one the answer is a zip of it."""
        session, folder = self._session(request), self.players.config.record
        recording = session.recording
        if recording is None or not len(recording):
            return PlainTextResponse("nothing has been played yet", 409)
        name = f"play_{time.strftime('%Y%m%d_%H%M%S')}_{session.number}"
        async with self._heavy:
            try:
                if folder:
                    await asyncio.to_thread(recording.write, storage.join(folder, name))
                    return JSONResponse({"name": name, "frames": len(recording)})
                data = await asyncio.to_thread(_zipped, recording, name)
            except OSError as error:  # the page is not told where
                print(f"an episode could not be written: {one_line(error)}", file=sys.stderr)
                return PlainTextResponse("the episode could not be written", 507)
        headers = {**HEADERS, "content-disposition": f'attachment; filename="{name}.zip"'}
        return Response(data, media_type="application/zip", headers=headers)

    def _session(self, request: Request) -> Session:
        session = self.players.sessions.get(request.query_params.get("key", ""))
        if session is None:
            raise HTTPException(404, "no such session")
        return session


def _png(picture: np.ndarray) -> Response:
    """A picture (h w 3) uint8."""
    return Response(cv2.imencode(".png", picture[..., ::-1])[1].tobytes(), media_type="image/png", headers=HEADERS)


def _zipped(recording: Recording, name: str) -> bytes:
    """The episode as a zip with the folder `name` in it."""
    data = io.BytesIO()
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(data, "w") as archive:
        recording.write(Path(scratch) / name)
        for path in sorted(Path(scratch, name).iterdir()):
            archive.write(path, f"{name}/{path.name}")
    return data.getvalue()
