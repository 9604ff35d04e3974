"""The page in a real browser: keys, mouse, pause, reset, a second tab, recording, and a server that goes and comes."""

import base64
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from data_pipeline.readers.worldloom import find_episodes
from sampling.live.server import listen
from sampling.motion import all_motions

HALL = Path(__file__).parent.parent / "sampling" / "worlds" / "hall"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no browser: apt-get install --no-install-recommends chromium")
PIXELS = """() => {
  const { width, height } = screen, row = screen.getContext('2d').getImageData(0, height >> 1, width, 1).data;
  const white = [...Array(width).keys()].filter((x) => row[4 * x + 1] > 190).map((x) => x * 160 / width);
  const [red, , blue] = [0, 1, 2].map((i) => row[i]);
  return [white.reduce((a, b) => a + b, 0) / white.length, white.length * 160 / width, red, blue];
}""".replace("screen", "document.getElementById('screen')")


class Served:
    """A server in a process of its own, which can be killed and started again on the same port."""

    def __init__(self, record: Path, *command: str) -> None:
        with listen("127.0.0.1", 0) as free:
            self.port = free.getsockname()[1]
        self.record, self.url = record, f"http://127.0.0.1:{self.port}/"
        self.command = command or (str(Path(__file__).with_name("exact_world.py")),)
        self.start()

    def start(self) -> None:
        words = [f"port={self.port}", "sessions=32", f"record={self.record}"]
        self.process = subprocess.Popen([sys.executable, *self.command, *words])
        soon(self._ready, 60)

    def _ready(self) -> bool:
        with suppress(OSError):
            return urllib.request.urlopen(f"{self.url}readyz").status == 200
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(10)


def soon(is_so: Callable[[], Any], seconds: float = 15) -> Any:
    """Waits until `is_so()`, which it returns."""
    end = time.monotonic() + seconds
    while not (value := is_so()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.03)
    return value


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("played")) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """A page of its own, playing; no error may happen on it."""
    context = browser.new_context(viewport={"width": 1000, "height": 700}, **options)
    page, faults = context.new_page(), list[str]()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(url)
    soon(lambda: "fps" in page.inner_text("#state"))
    yield page
    context.close()
    assert not faults


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    with opened(browser, served.url) as page:
        yield page


def bar(page: Page) -> list[float]:
    """Middle and width of the white bar, px of the game, and red and blue of the room."""
    return page.evaluate(PIXELS)


def test_keys_change_the_picture_the_right_way_within_a_second(page: Page) -> None:
    middle, width, *_ = bar(page)
    assert middle == pytest.approx(80, abs=2)
    took_s = []
    for _ in range(8):  # the best of them: other programs may need the machine just then
        width, started = bar(page)[1], time.monotonic()
        page.keyboard.down("KeyW")
        assert "held" in (page.get_attribute(".cap[title=forward]", "class") or "")  # lit at once
        soon(lambda width=width: bar(page)[1] > width + 2)
        took_s.append(time.monotonic() - started)
        page.keyboard.up("KeyW")
        if took_s[-1] < 1:
            break
        page.keyboard.press("Backspace")  # starts again
    assert min(took_s) < 1
    page.keyboard.down("ArrowRight")
    soon(lambda: bar(page)[0] < middle - 5)
    page.keyboard.up("ArrowRight")
    assert "ms" in soon(lambda: page.inner_text("#latency").replace("–", ""))


def picture(page: Page) -> np.ndarray:
    """What the page shows (h w 3) uint8."""
    shown = page.evaluate("document.getElementById('screen').toDataURL('image/png')").split(",")[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(shown))).convert("RGB"))


def soon_moving(page: Page, sideways: Callable[[np.ndarray], Any]) -> None:
    """Waits until `sideways` is true of how far the picture moved to the right between the last four looks at it."""
    seen: list[np.ndarray] = []

    def moves() -> bool:
        seen.append(picture(page))
        return len(seen) > 3 and bool(sideways(all_motions(np.stack(seen[-4:])[None])[0, :, 0]))

    soon(moves)


def test_the_shipped_world_turns_and_steps_the_right_way_within_a_second(browser: Browser, tmp_path: Path) -> None:
    with Served(tmp_path, "-m", "sampling", "play", str(HALL)) as served, opened(browser, served.url) as page:
        for key, sign in (("ArrowRight", -1), ("ArrowLeft", 1), ("KeyD", -1), ("KeyA", 1)):
            took_s: list[float] = []
            while not took_s or (min(took_s) >= 1 and len(took_s) < 8):  # others may need the machine just then
                page.keyboard.press("Backspace")
                soon_moving(page, lambda px: np.abs(px).max() < 0.5)
                started = time.monotonic()
                page.keyboard.down(key)
                soon_moving(page, lambda px, sign=sign: np.median(sign * px) > 1)
                took_s.append(time.monotonic() - started)
                page.keyboard.up(key)
            assert min(took_s) < 1, key


def test_a_tap_between_two_blocks_is_not_lost(page: Page) -> None:
    width = bar(page)[1]
    page.keyboard.press("KeyW")
    soon(lambda: bar(page)[1] > width + 1)


def test_the_locked_mouse_turns_and_keys_are_let_go_with_the_window(page: Page) -> None:
    page.click("#screen")
    soon(lambda: page.evaluate("document.pointerLockElement !== null"))
    page.mouse.move(500, 300)
    for x in range(500, 620, 10):
        page.mouse.move(x, 300)
    soon(lambda: bar(page)[0] < 76)  # to the right: the picture goes left
    page.keyboard.down("KeyA")
    page.evaluate("window.dispatchEvent(new Event('blur'))")
    assert "held" not in (page.get_attribute(".cap[title=left]", "class") or "")


def test_pause_stops_the_world_and_reset_and_the_gallery_start_it_again(page: Page) -> None:
    page.keyboard.down("ArrowRight")
    soon(lambda: bar(page)[0] < 60)
    page.keyboard.up("ArrowRight")
    page.click("#pause")
    assert page.inner_text("#veil strong") == "Paused"
    time.sleep(0.4)
    stopped = page.evaluate("playout.frame")
    time.sleep(0.5)
    assert page.evaluate("playout.frame") == stopped
    page.click("#reset")
    soon(lambda: bar(page)[0] == pytest.approx(80, abs=2))
    assert bar(page)[2] > 120 > bar(page)[3]
    page.click(".start[data-number='1']")
    soon(lambda: bar(page)[3] > 120 > bar(page)[2])
    page.click("#seed")
    soon(lambda: page.inner_text("#number") != "0")


def test_a_second_tab_has_its_own_world_and_a_reload_finds_the_first(
    page: Page, browser: Browser, served: Served
) -> None:
    page.keyboard.down("ArrowRight")
    soon(lambda: bar(page)[0] < 60)
    page.keyboard.up("ArrowRight")
    with opened(browser, served.url) as other:
        assert bar(other)[0] == pytest.approx(80, abs=2)
    page.reload()
    soon(lambda: "fps" in page.inner_text("#state"))
    assert bar(page)[0] < 62


def test_an_episode_lands_in_the_folder(page: Page, served: Served) -> None:
    page.click("#record")
    soon(lambda: "Saved" in page.inner_text("#toast"))
    soon(lambda: find_episodes(served.record))


def test_a_server_that_is_killed_is_shown_and_found_again(browser: Browser, tmp_path: Path) -> None:
    with Served(tmp_path / "played") as served, opened(browser, served.url) as page:
        served.stop(signal.SIGKILL)
        soon(lambda: page.inner_text("#veil strong") == "The server is gone")
        served.start()
        soon(lambda: "fps" in page.inner_text("#state"))


def test_fingers_hold_keys_and_drag_the_view(browser: Browser, served: Served) -> None:
    with opened(browser, served.url, has_touch=True) as page:
        width = bar(page)[1]
        page.dispatch_event(".cap[title=forward]", "pointerdown", {"pointerId": 1, "pointerType": "touch"})
        soon(lambda: bar(page)[1] > width + 2)
        page.dispatch_event(".cap[title=forward]", "pointerup", {"pointerId": 1, "pointerType": "touch"})
        for x in (300, 330, 360):
            page.dispatch_event("#screen", "pointermove", {"pointerId": 2, "pointerType": "touch", "clientX": x})
        soon(lambda: bar(page)[0] < 76)
