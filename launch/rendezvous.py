"""The port at which processes find each other: it listens where they need it, not on every interface.

Whoever reaches it can read and write what the processes tell each other: torch's store knows no password.
"""

import os
import socket
import sys
from datetime import timedelta
from ipaddress import ip_address

import psutil
from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousInfo, static_tcp_rendezvous

from configs.errors import one_line

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 29500  # Accelerate's


def own_address(host: str) -> str:
    """The address of this machine at which others find it by the name `host`; empty if that means none of its own
    here (but loopback's, as Debian has it in /etc/hosts), or several."""
    try:
        meant = {str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return ""
    own = {one.address for interface in psutil.net_if_addrs().values() for one in interface}
    meant = {one for one in meant if not ip_address(one).is_loopback}
    return meant.pop() if len(meant) == 1 and meant <= own else ""


def listen(address: str, port: int) -> socket.socket:
    """A socket that listens at `address`, or on all interfaces if that is empty. Raises OSError if it cannot."""
    everywhere = not address and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if everywhere or ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=512, dualstack_ipv6=everywhere)


def serve_store(
    host: str, port: int, nodes: int, timeout: timedelta, wait_for_workers: bool = False, multi_tenant: bool = False
) -> TCPStore:
    """The first node's store of `nodes`, which the others reach at `host`: one node listens on loopback alone.

    Raises OSError if it cannot listen at `port`.
    """
    address = LOOPBACK if nodes == 1 else own_address(host)
    # Given a port, torch listens on all interfaces; a socket it takes as it is.
    door = listen(address, port)
    there = (address or host, door.getsockname()[1], nodes, True, timeout, wait_for_workers)
    return TCPStore(*there, multi_tenant=multi_tenant, master_listen_fd=door.detach())


class Rendezvous(static_tcp_rendezvous.StaticTCPRendezvous):
    """torch's own, which every launcher uses, with a store of ours on the first node."""

    def next_rendezvous(self) -> RendezvousInfo:
        """Raises OSError if the first node cannot listen at its port."""
        if self.rank == 0 and not self._store:
            self._store = serve_store(
                self.master_addr, self.master_port, self.world_size, self.timeout, True, multi_tenant=True
            )
        return super().next_rendezvous()


def accelerate(words: list[str]) -> None:
    """`accelerate launch` of these words; one machine's rendezvous is closed to all others."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import is_port_in_use

    given = launch_command_parser().parse_args(words)  # numbers that a file gives are None here
    if given.num_machines == 1 or given.num_machines == given.machine_rank is None:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
        port = DEFAULT_PORT if given.main_process_port is None else given.main_process_port
        if port and is_port_in_use(port):  # Accelerate would turn to another rendezvous, which listens everywhere
            given.main_process_port = 0
    static_tcp_rendezvous.StaticTCPRendezvous = Rendezvous
    try:
        launch_command(given)
    except ChildFailedError as error:  # which has said what is wrong; torch would add its own traceback
        rank, failed = error.get_first_failure()
        how = failed.signal_name() if failed.exitcode < 0 else f"status {failed.exitcode}"
        sys.exit(f"launch accelerate: rank {rank} ended with {how}")
    except (OSError, SignalException) as error:  # as Accelerate ends: with 1, tried again, unlike a person's fault
        sys.exit(f"launch accelerate: {one_line(error)}")
