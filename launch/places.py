"""Folders and buckets that all nodes should share: what one writes, all others must read."""

import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from configs import storage
from configs.errors import UserError, one_line
from launch.meeting import Answer, Meeting
from launch.timed import Doing

PATIENCE_S = 5.0  # network file systems show a new file of another machine only after a while
POLL_S = 0.2


@dataclass(frozen=True)
class Place:
    """A folder or bucket as one node sees it."""

    url: str
    error: str = ""  # why this node cannot write there
    unread: tuple[int, ...] = ()  # nodes that wrote a file which this one cannot read


@dataclass(frozen=True)
class Trial:
    """Files of one examination, told from those of any other by `token`."""

    token: str
    nodes: tuple[int, ...]  # those that take part
    limit_s: float

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w{1,32}", self.token):  # it names a folder, and another node says it
            raise UserError(f"the examination {self.token!r} is none of a doctor's")

    def file(self, url: str, node: int) -> str:
        return storage.join(url, f".doctor_{self.token}/node_{node:05d}")

    def of(self, url: str, meeting: Meeting, doing: Doing) -> Place:
        """`url` as this node sees it; all nodes must call, for the same places in the same order."""
        doing.name = f"writing to {url}"
        error = self._write(url, meeting.node)
        meeting.tell(f"wrote {url}", Answer(not error))
        doing.name = f"waiting for what the other nodes write to {url}"
        wrote = meeting.hear(f"wrote {url}", Answer, self.nodes, self.limit_s)
        doing.name = f"reading what the other nodes wrote to {url}"
        deadline = time.monotonic() + PATIENCE_S
        unread = {node for node, written in wrote.items() if written.yes}
        while unread := {node for node in unread if not self._reads(url, node)}:
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        return Place(url, error, tuple(sorted(unread)))

    def _write(self, url: str, node: int) -> str:
        """Why this node's file cannot be written; empty if it is."""
        if not storage.is_s3(url) and not Path(url).is_dir():
            return "there is no such folder"
        try:
            storage.write_text(self.file(url, node), self.token)
        except (OSError, ValueError) as error:
            return one_line(error)
        return ""

    def _reads(self, url: str, node: int) -> bool:
        with suppress(OSError):
            return storage.read_bytes(self.file(url, node)) == self.token.encode()
        return False

    def clear(self, url: str, node: int) -> None:
        """Takes this node's file away again."""
        with suppress(OSError):  # where it could not be written there is none
            storage.remove(self.file(url, node))
            if not storage.is_s3(url):
                Path(self.file(url, node)).parent.rmdir()  # fails until the last node's file is gone
