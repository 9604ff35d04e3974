"""`accelerate launch`, but the port at which processes meet is open only to those that need it.

Whoever reaches that port can read and write what the processes tell each other: torch's store knows no password, and
by itself torch listens on every interface.
"""

import os
import socket
import sys
from argparse import Namespace
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path

import psutil
from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from configs.errors import one_line

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 29500  # Accelerate's


def own_address(host: str) -> str:
    """The address of this machine that others know as `host`; empty if that means another machine's address, only
    loopback (as in Debian's /etc/hosts), or several."""
    try:
        resolved = {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return ""
    local = {entry.address for interface in psutil.net_if_addrs().values() for entry in interface}
    addresses = {address for address in resolved if not ip_address(address).is_loopback}
    return addresses.pop() if len(addresses) == 1 and addresses <= local else ""


def listen(address: str, port: int) -> socket.socket:
    """A socket that listens at `address`, or on all interfaces if that is empty. Raises OSError if it cannot."""
    everywhere = not address and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if everywhere or ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=512, dualstack_ipv6=everywhere)


def serve_store(host: str, port: int, nodes: int, timeout: timedelta) -> TCPStore:
    """The first node's store, which the others reach at `host`; for one node it listens on loopback alone.

    torch's own launcher, in this process and given the same port, shares its server (`multi_tenant`). Raises OSError if
    the port cannot be listened on.
    """
    address = LOOPBACK if nodes == 1 else own_address(host)
    listener = listen(address, port)
    where = (address or host, listener.getsockname()[1], nodes, True, timeout)
    return TCPStore(*where, wait_for_workers=False, multi_tenant=True, master_listen_fd=listener.detach())


def accelerate(args: list[str]) -> None:
    """`accelerate launch` with these arguments; the rendezvous of one machine is closed to all others."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    options = launch_command_parser().parse_args(args)
    try:
        store = _open_rendezvous(options)
        launch_command(options)
    except ChildFailedError as error:  # its message is printed already; torch would add its own traceback
        rank, failed = error.get_first_failure()
        how = failed.signal_name() if failed.exitcode < 0 else f"status {failed.exitcode}"
        sys.exit(f"launch accelerate: rank {rank} ended with {how}")
    except (OSError, SignalException) as error:  # status 1, as of Accelerate: a run may be tried again
        sys.exit(f"launch accelerate: {one_line(error)}")
    del store  # it serves until the processes have ended


def _open_rendezvous(options: Namespace) -> TCPStore | None:
    """The store of the first node, at a free port if it is the only one; `options` then say where it is, in torch's
    terms instead of Accelerate's.

    Accelerate tests whether its own port is free and listens everywhere if it is not: it gets another port.
    """
    from accelerate.commands.config import default_config_file, load_config_from_file

    has_file = options.config_file or Path(default_config_file).exists()
    file = vars(load_config_from_file(options.config_file)) if has_file else {}
    settings = {name: value for source in (file, vars(options)) for name, value in source.items() if value is not None}
    nodes, rank = int(settings.get("num_machines", 1)), int(settings.get("machine_rank", 0))
    host, port = settings.get("main_process_ip", LOOPBACK), int(settings.get("main_process_port", DEFAULT_PORT))
    if nodes == 1:
        rank, host, port = 0, LOOPBACK, 0
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
    store = serve_store(host, port, nodes, timedelta(minutes=10)) if rank == 0 else None
    options.rdzv_endpoint = f"{host}:{store.port if store else port}"
    options.main_process_port, options.same_network = 0, True
    return store
