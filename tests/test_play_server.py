"""The play server to a plain client: what it sends, how it shares, what it refuses, whom it lets in."""

import asyncio
import io
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import AsyncMock

import numpy as np
import pytest
from exact_world import GAME, STARTS, TRAINED, ExactConfig, bar
from live_server import Client, Server, serving
from PIL import Image
from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.uri import parse_uri

from sampling.live.players import Players
from sampling.live.protocol import CONTROLS_LAYOUT

CONFIG = ExactConfig(checkpoint="exact", steps=1, sessions=3)
FORWARD, RIGHT_DEG = 1, 3.0


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(CONFIG, TRAINED, STARTS) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    server.until(lambda players: not players.sessions)
    with Client(server) as client:
        client.key = client.begin()["key"]
        yield client
        client.leave()


def put(code: int) -> str:
    """What a closed connection says."""
    return f"received {code}"


def test_the_first_frame_comes_at_once_and_each_block_when_it_is_wanted(server: Server) -> None:
    with Client(server) as client:
        facts = client.hear("welcome")
        assert facts["fps"] == 17.5 and facts["size"] == [160, 96] and facts["caps"] == ["W", "S", "A", "D"]
        assert client.hear("world")["seed"] == 0
        (first,) = client.frames()
        assert (first.block, first.frame, first.picture.shape) == (0, 0, (96, 160, 3))
        assert bar(first.picture)[0] == pytest.approx(80, abs=1)
        with pytest.raises(TimeoutError):
            client.socket.recv(timeout=0.3)  # nothing is made that nobody wants
        client.hold(1)
        client.hold(1, keys=FORWARD)
        frames = client.frames()
        assert [frame.frame for frame in frames] == [1, 2, 3, 4] and {frame.block for frame in frames} == {1}
        assert all(0 <= ms < 5000 for frame in frames for ms in frame.times_ms)
        client.leave()


def test_frames_answer_the_newest_controls_and_say_which(client: Client) -> None:
    for keys in (0, FORWARD, 0):
        client.hold(0, keys=keys)
    client.hold(2, turn=(0, 1))
    frames = client.frames()
    assert {(frame.counter, frame.stamp_ms) for frame in frames} == {(5, 5000.0)}
    middles = [bar(frame.picture)[0] for frame in frames]
    assert middles == pytest.approx([80 - RIGHT_DEG * i for i in range(1, 5)], abs=1)  # from the very first frame on


def test_the_mouse_turns_by_what_it_moved_and_no_faster_than_the_limit(client: Client) -> None:
    client.hold(2, mouse=(0, 8.0))
    assert bar(client.frames()[-1].picture)[0] == pytest.approx(72, abs=1)
    client.hold(3, mouse=(0, 8.0))
    assert bar(client.frames()[-1].picture)[0] == pytest.approx(72, abs=1)  # it has not moved since
    client.hold(4, mouse=(0, 1008.0))
    assert bar(client.frames()[-1].picture)[0] == pytest.approx(72 - 4 * CONFIG.mouse_limit_deg, abs=1)


def test_a_reset_starts_again_with_the_picture_and_the_seed_that_are_asked_for(client: Client) -> None:
    client.play(2, keys=FORWARD)
    client.do(do="reset", start=1, seed=7)
    assert client.hear("world")["seed"] == 7
    (first,) = client.frames()
    assert (first.block, first.frame) == (0, 0)
    red, _, blue = first.picture[10, 10]
    assert blue > 140 and red < 60
    client.do(do="reset")
    assert client.hear("world")["seed"] == 7
    client.frames()
    client.do(do="reset", start=9)
    assert "no start picture 9" in client.hear("error")["text"]
    client.do(do="settings", steps=10_000)
    assert "steps=10000" in client.hear("error")["text"]


def test_two_players_have_worlds_of_their_own_and_take_turns(server: Server, client: Client) -> None:
    with Client(server) as other:
        assert other.begin()["session"] != 0
        mine, theirs = [], []
        for block in range(2, 7):
            client.hold(block, turn=(0, 1))
            other.hold(block, keys=FORWARD)
            mine, theirs = client.frames(), other.frames()
        assert bar(mine[-1].picture)[0] == pytest.approx(80 - 20 * RIGHT_DEG, abs=1)
        assert bar(theirs[-1].picture)[0] == pytest.approx(80, abs=1)
        assert bar(theirs[-1].picture)[1] > bar(mine[-1].picture)[1] + 15
        other.leave()


def test_a_page_that_reads_nothing_stops_nobody(
    server: Server, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sampling.live.players.SEND_S", 1.0)
    with socket.socket() as narrow:
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        narrow.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        page = ClientProtocol(parse_uri(server.url.replace("http", "ws") + "/play"))
        page.send_request(page.connect())
        narrow.sendall(b"".join(page.data_to_send()))
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += narrow.recv(1)
        page.receive_data(answer)
        server.until(lambda players: len(players.pages) == 2)
        (key,) = server.players.pages.keys() - {client.key}
        blocks, end = 0, time.monotonic() + 30
        while key in server.players.pages:
            assert time.monotonic() < end, "it was never jammed"
            page.send_text(b'{"do": "reset"}')
            narrow.sendall(b"".join(page.data_to_send()))
            blocks += 1
            assert len(client.play(1, first=1 + blocks)) == 4
    del server.players.sessions[key]  # which is kept, in case the page comes back
    assert blocks > 20


GARBAGE = {
    "short": b"\2\0abc",
    "another kind": CONTROLS_LAYOUT.pack(9, 0, 1, 1, 0, 0.0, 0, 0, 0, 0, 0),
    "keys that are not there": CONTROLS_LAYOUT.pack(2, 0, 1, 1, 1 << 20, 0.0, 0, 0, 0, 0, 0),
    "no time": CONTROLS_LAYOUT.pack(2, 0, 1, 1, 0, float("nan"), 0, 0, 0, 0, 0),
    "a turn without end": CONTROLS_LAYOUT.pack(2, 0, 1, 1, 0, 0.0, float("inf"), 0, 0, 0, 0),
    "a stick that is bent": CONTROLS_LAYOUT.pack(2, 0, 1, 1, 0, 0.0, 0, 0, 2.0, 0, 0),
    "no JSON": "{",
    "deep JSON": "[" * 4000,
    "an unknown command": '{"do": "dance"}',
    "an unknown setting": '{"do": "reset", "path": "/etc"}',
    "a seed without end": '{"do": "reset", "seed": 1e400}',
    "a negative seed": '{"do": "reset", "seed": -1}',
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_ends_the_session_that_sent_it_alone(server: Server, client: Client, what: str) -> None:
    with Client(server) as other:
        key = other.begin()["key"]
        other.socket.send(GARBAGE[what])
        with pytest.raises(ConnectionClosed, match=put(1008)) as closed:
            other.socket.recv(timeout=30)
        assert closed.value.rcvd and "/" not in closed.value.rcvd.reason.replace("/etc", "")
    server.until(lambda players: key not in players.sessions)
    assert len(client.play(1)) == 4


def test_garbage_close_behind_a_message_ends_its_session() -> None:
    """Both are taken in one turn of the loop, so the player who waits is woken and cancelled at once."""

    async def main() -> None:
        heard: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        page = AsyncMock(receive=heard.get, query_params={})
        players = Players(CONFIG, TRAINED, STARTS)
        await players.load("exact")
        serving = asyncio.create_task(players.serve(page))
        while not page.send_bytes.await_count or page.send_json.await_count < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)  # it waits now
        heard.put_nowait({"type": "websocket.receive", "text": '{"do": "settings", "steps": 1}'})
        heard.put_nowait({"type": "websocket.receive", "text": "{"})
        await asyncio.wait({serving}, timeout=10)
        assert serving.done() and not players.sessions

    asyncio.run(main())


def test_a_huge_message_ends_its_session(server: Server, client: Client) -> None:
    with Client(server) as other:
        key = other.begin()["key"]
        with pytest.raises(ConnectionClosed, match=r"1009|1006|no close frame"):
            other.socket.send(b"\2" * 10_000_000)
            other.socket.recv(timeout=30)
    server.until(lambda players: key not in players.sessions)
    assert len(client.play(1)) == 4


def test_a_page_that_comes_back_finds_its_world(server: Server) -> None:
    with Client(server) as client:
        key = client.begin()["key"]
        client.play(3, turn=(0, 1))
    with Client(server, key) as again:
        welcome = again.hear("welcome")
        assert (welcome["key"], welcome["block"]) == (key, 5)
        frames = again.play(1, first=5)
        assert frames[0].frame == 17 and bar(frames[-1].picture)[0] == pytest.approx(80 - 12 * RIGHT_DEG, abs=1)
        with Client(server, key) as twin:  # a second tab with the same key
            assert twin.begin()["key"] != key
            twin.leave()
        again.leave()


def test_a_world_is_not_kept_for_longer_than_said() -> None:
    with serving(replace(CONFIG, keep_s=0.2), TRAINED, STARTS) as server:
        with Client(server) as client:
            key = client.begin()["key"]
        server.until(lambda players: not players.sessions)
        with Client(server, key) as client:
            assert client.begin()["key"] != key


def test_the_next_player_is_told_their_place_and_comes_in_when_somebody_leaves() -> None:
    with serving(replace(CONFIG, sessions=1), TRAINED, STARTS) as server, Client(server) as first:
        first.begin()
        with Client(server) as second, Client(server) as third:
            assert (second.hear("busy")["place"], third.hear("busy")["place"]) == (1, 2)
            status, text = server.ask("/metrics")
            assert status == 200 and b"worldloom_play_sessions 1\n" in text and b"worldloom_play_waiting 2\n" in text
            first.leave()
            second.begin()
            assert third.hear("busy")["place"] == 1


def test_a_player_who_touches_nothing_makes_room() -> None:
    with serving(replace(CONFIG, idle_s=0.5), TRAINED, STARTS) as server, Client(server) as client:
        client.begin()
        with pytest.raises(ConnectionClosed, match=put(4002)):
            for block in range(2, 1000):  # a page that goes on asking by itself
                client.hold(block)
                client.frames()
        assert not server.players.sessions


def test_pages_of_others_and_calls_by_other_names_are_refused(server: Server) -> None:
    port = server.url.rsplit(":", 1)[1]
    assert server.ask("/")[0] == 200 and server.ask("/", Host=f"localhost:{port}")[0] == 200
    assert server.ask("/", Host=f"evil.example:{port}")[0] == 403  # whose name points here
    assert server.ask("/", Origin="http://evil.example")[0] == 403
    with pytest.raises(InvalidStatus, match="403"):
        Client(server, origin="http://evil.example")
    with Client(server, origin=server.url) as client:
        client.begin()
        client.leave()


def test_where_others_reach_the_server_the_url_holds_a_token() -> None:
    with serving(CONFIG, TRAINED, STARTS, token="secret") as server:
        assert server.ask("/")[0] == 403 and server.ask("/?token=wrong")[0] == 403
        assert server.ask("/?token=secret", Host="elsewhere:80")[0] == 200
        assert server.ask("/healthz") == (200, b"ok\n") and server.ask("/readyz") == (200, b"ready\n")
        assert server.ask("/starts/0.png")[0] == 403 and server.ask("/metrics")[0] == 403
        with pytest.raises(InvalidStatus, match="403"):
            Client(server)
        with Client(server, "&token=secret") as client:
            client.begin()


def picture(width: int, height: int, orientation: int = 1) -> bytes:
    """A JPEG whose left half is green, turned as `orientation` says."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = 0, 200, 0
    exif, data = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(data, "JPEG", exif=exif)
    return data.getvalue()


def test_a_picture_of_one_s_own_is_turned_as_its_exif_says_and_fitted(server: Server) -> None:
    with Client(server) as client:
        key = client.begin()["key"]
        status, png = server.ask(f"/picture?key={key}", picture(320, 192, orientation=3))  # upside down
        seen = np.array(Image.open(io.BytesIO(png)))
        assert status == 200 and seen.shape == (96, 160, 3) and seen[50, 120, 1] > 150 and seen[50, 30, 1] < 50
        client.do(do="reset", start=-1)
        client.hear("world")
        assert client.frames()[0].picture[5, 5, 1] == pytest.approx(100, abs=8)  # the codec knows the mean colour
        client.leave()


def test_pictures_that_are_too_large_or_none_are_refused(server: Server, client: Client) -> None:
    bomb = io.BytesIO()
    Image.new("1", (6000, 6000)).save(bomb, "PNG")
    for data, expected, word in (
        (b"\0" * 9_000_000, 413, b"8 MB"), (bomb.getvalue(), 400, b"25,000,000"), (b"GIF89a", 400, b"known format"),
    ):  # fmt: skip
        status, text = server.ask(f"/picture?key={client.key}", data)
        assert status == expected and word in text
    assert server.ask("/picture?key=nobody", picture(32, 32))[0] == 404
    assert len(client.play(1)) == 4


def test_an_answer_never_holds_a_path_of_the_server(tmp_path: Any) -> None:
    (tmp_path / "file").write_text("in the way")
    config = replace(CONFIG, record=str(tmp_path / "file" / "episodes"))
    with serving(config, TRAINED, STARTS) as server, Client(server) as client:
        key = client.begin()["key"]
        status, text = server.ask(f"/episode?key={key}", b"")
        assert status == 507 and b"/" not in text
        for path in ("/starts/7.png", "/../../etc/passwd", "/page.py", "/starts/-1.png"):
            assert server.ask(path)[0] == 404


def test_metrics_tell_block_times_rates_and_latency(server: Server, client: Client) -> None:
    client.play(3)
    text = server.ask("/metrics")[1].decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["worldloom_play_blocks_total"]) >= 3
    assert float(values["worldloom_play_real_time_factor"]) > 0
    assert float(values['worldloom_play_latency_seconds{quantile="0.5"}']) == pytest.approx(0.03)
    assert float(values['worldloom_play_block_seconds{quantile="0.95"}']) > 0
    assert GAME.fps * float(values["worldloom_play_real_time_factor"]) == pytest.approx(
        float(values["worldloom_play_fps"]), rel=1e-3
    )
