"""Whether every node can open a connection to every other, at any port: gloo and NCCL choose theirs freely."""

import socket
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

CONNECT_S = 5.0
AT_ONCE = 16  # connections that are tried at the same time


@dataclass(frozen=True)
class Hello:
    """How a node introduces itself."""

    host: str  # its name
    address: str  # where its processes let others find them
    port: int  # where its `Door` is


class Door:
    """A port of this node at `address`, chosen by the system, that says `name` to whoever comes."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name.encode()
        self.socket = socket.create_server((address, 0), backlog=512)
        self.port: int = self.socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):  # of the closed socket
            while True:
                guest, _ = self.socket.accept()
                with guest, suppress(OSError):
                    guest.sendall(self.name)

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)  # closing alone would leave it open while the thread waits there
        self.socket.close()


def door_name(node: int) -> str:
    return f"worldloom node {node}"


def knock(others: Mapping[int, Hello]) -> dict[str, str]:
    """Why a node was not reached, by its number as text; empty if all of `others` were."""

    def try_one(item: tuple[int, Hello]) -> tuple[str, str]:
        node, hello = item
        try:
            with socket.create_connection((hello.address, hello.port), timeout=CONNECT_S) as guest:
                said = guest.recv(100).decode(errors="replace")
        except OSError as error:
            return str(node), str(error)
        return str(node), "" if said == door_name(node) else f"something else answers there: {said[:40]!r}"

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return {node: why for node, why in pool.map(try_one, others.items()) if why}
