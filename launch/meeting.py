"""The nodes of a run, met at the port at which the run itself would meet, before anything is launched."""

import json
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import DistNetworkError, Store, TCPStore

from configs import build_from, to_dict
from configs.errors import one_line
from configs.foreign import parse_object, reading
from launch.machine import MachineConfig
from launch.rendezvous import serve_store

T = TypeVar("T")

POLL_S = 0.05
LEAVING_S = 10.0  # that the first node waits for the others to leave


@dataclass(frozen=True)
class Answer:
    """To a question of yes or no."""

    yes: bool


class Meeting:
    """What nodes tell each other, as dataclasses, through a store on the first node."""

    def __init__(self, store: TCPStore, node: int, nodes: int) -> None:
        self.store, self.node, self.nodes = store, node, nodes

    def tell(self, name: str, value: Any) -> None:
        """`value` is what this node says under `name`."""
        self.store.set(f"{name}/{self.node}", json.dumps(to_dict(value)))

    def hear(self, name: str, cls: type[T], nodes: Iterable[int], limit_s: float) -> dict[int, T]:
        """What each of `nodes` says under `name`, without those that have said nothing within `limit_s`. Raises
        ConnectionError in one line for what is no `cls`."""
        keys = {node: f"{name}/{node}" for node in nodes}
        wait_for(self.store, list(keys.values()), limit_s)
        return {node: said(self.store, key, cls) for node, key in keys.items() if self.store.check([key])}

    def decide(self, name: str, value: T) -> T:
        """What the first node says for all."""
        self.store.set(name, json.dumps(to_dict(value)))
        return value

    def learn(self, name: str, cls: type[T], limit_s: float) -> T:
        """What the first node has decided. Raises RuntimeError if it has not within `limit_s`, ConnectionError in one
        line for what is no `cls`."""
        if not wait_for(self.store, [name], limit_s):
            raise RuntimeError(f"node 0 has not said {name!r} within {limit_s:g} s")
        return said(self.store, name, cls)

    def leave(self, present: Iterable[int]) -> None:
        """Ends the meeting; the first node goes last, since the store and the port are its own."""
        self.tell("left", Answer(True))
        if self.node == 0:
            self.hear("left", Answer, present, LEAVING_S)
        del self.store


def said(store: Store, key: str, cls: type[T]) -> T:
    """What a peer has put into `store` under `key`. Raises ConnectionError in one line for what is no `cls`."""
    text, where = store.get(key), f"what another node says as {key!r}"  # torch's store holds up to 8 MB
    try:
        with reading(where, "start the same doctor on all nodes"):
            return build_from(cls, parse_object(text, where), where)
    except ValueError as error:
        raise ConnectionError(one_line(error)) from error


def wait_for(store: Store, keys: list[str], limit_s: float) -> bool:
    """Whether all of `keys` are in the store within `limit_s`; asks again and again, since waiting warns."""
    deadline = time.monotonic() + limit_s
    while not store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def meet(machine: MachineConfig, limit_s: float) -> Meeting:
    """This node's side of the meeting. Raises ConnectionError in one line with the remedy: the first node's port is
    taken, or it cannot be reached within `limit_s`."""
    first, timeout = machine.node_rank == 0, timedelta(seconds=limit_s)
    if not first:
        _reach(machine.host, machine.port, limit_s)
    try:
        if first:
            store = serve_store(machine.host, machine.port, machine.nodes, timeout)
        else:
            store = TCPStore(machine.host, machine.port, is_master=False, wait_for_workers=False, timeout=timeout)
    except DistNetworkError as error:
        raise ConnectionError(f"{machine.host}:{machine.port} answers, but not as a doctor: {error}") from error
    except OSError as error:
        raise ConnectionError(
            f"port {machine.port} of this node cannot be listened on ({error}); end "
            "what holds it (`ss -ltnp` shows it), or give machine.port another number on all nodes"
        ) from error
    return Meeting(store, machine.node_rank, machine.nodes)


def _reach(host: str, port: int, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((host, port), timeout=max(left, 0.1)).close()
            return
        except OSError as error:
            if left < 1:
                raise ConnectionError(
                    f"{host}:{port} of node 0 was not reached within {limit_s:g} s ({error}); start the doctor there "
                    "too, open the port in the firewall, or set machine.host to a name or address that all nodes know"
                ) from error
        time.sleep(1)
