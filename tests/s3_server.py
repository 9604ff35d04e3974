"""A real S3 server on loopback: Ceph's monitor, one storage daemon and its S3 gateway, in a folder of their own.

Where Ceph is not installed, moto, an emulator from PyPI, stands in. By hand: `python tests/s3_server.py` starts either,
makes the bucket `demo`, says what to export, and ends it at Ctrl-C.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

from configs.s3 import client

PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin")
INSTALL = "apt-get install --no-install-recommends radosgw ceph-mon ceph-osd ceph-common"
ACCESS_KEY, SECRET_KEY = "worldloom-tests", "worldloom-tests-secret"
START_S = 60
PR_SET_PDEATHSIG = 1  # of Linux

# One daemon of each kind, no copies: as small as it gets. Without keys between them a first command may be sent before
# its client knows the cluster, and is refused as one for another cluster (one start in four on a busy machine).
CONFIG = """[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{mon_port}
public network = 127.0.0.0/8
ms bind msgr2 = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data avail crit = 1
paxos propose interval = 0.02
paxos min wait = 0.005
osd objectstore = bluestore
bluestore block size = 8589934592
run dir = {folder}/run
log file = {folder}/log/$name.log
keyring = {folder}/keyring
[mon.a]
public addr = v1:127.0.0.1:{mon_port}
mon data = {folder}/mon
[osd.0]
osd data = {folder}/osd
[client.rgw.a]
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port}
"""


def missing_programs() -> list[str]:
    """Which of Ceph's programs are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Ceph:
    """The three daemons, from construction to `stop`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fsid, self.port, self.mon_port = folder, uuid.uuid4(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.processes: list[subprocess.Popen[bytes]] = []
        for name in ("mon", "osd", "rgw", "run", "log"):
            (folder / name).mkdir(parents=True)
        (folder / "ceph.conf").write_text(CONFIG.format(**vars(self)))
        try:
            self._start_store()
            user = ["user", "create", "--uid=tests", "--display-name=tests"]
            self._run("radosgw-admin", *user, f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}")
            self.start_gateway()
        except BaseException:
            self.stop()
            raise

    def _start_store(self) -> None:
        keyring = f"{self.folder}/keyring"
        everything = [word for kind in ("mon", "osd", "mgr") for word in ("--cap", kind, "allow *")]
        for i, name in enumerate(("mon.", "osd.0", "client.admin", "client.rgw.a")):
            new = [] if i else ["--create-keyring"]
            self._run("ceph-authtool", keyring, *new, "--gen-key", "-n", name, *everything)
        self._run("ceph-mon", "-i", "a", "--mkfs", "--keyring", keyring)
        self._start("ceph-mon", "-i", "a")
        osd = str(uuid.uuid4())
        self._run("ceph", "osd", "new", osd)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._start("ceph-osd", "-i", "0")

    def start_gateway(self) -> None:
        """The S3 side of it; what is stored is there again after `kill_gateway`."""
        self.gateway = self._start("radosgw", "-n", "client.rgw.a")
        deadline = time.monotonic() + START_S
        with socket.socket() as probe:
            while probe.connect_ex(("127.0.0.1", self.port)):
                if self.gateway.poll() is not None or time.monotonic() > deadline:
                    raise OSError(f"radosgw does not start; see {self.folder / 'log'}")
                time.sleep(0.05)

    def kill_gateway(self) -> None:
        """As a machine that loses its power."""
        self.gateway.kill()
        self.gateway.wait()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, program: str, *args: str) -> subprocess.Popen[bytes]:
        """A daemon that ends with the thread that starts it, however that ends."""
        command = [program, "-c", f"{self.folder}/ceph.conf", *args, "-f"]
        with open(self.folder / "log" / f"{program}.out", "ab") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, preexec_fn=_die_with_parent)
        self.processes.append(process)
        return process

    def _run(self, program: str, *args: str) -> None:
        command = [program, "-c", f"{self.folder}/ceph.conf", *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_S)
        if done.returncode:
            raise OSError(f"{program} ended with status {done.returncode}: {done.stderr.strip()[-500:]}")


class Moto:
    """The emulator, in this process: it takes every credential, and forgets everything with the process."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start_gateway()

    def start_gateway(self) -> None:
        from moto.server import ThreadedMotoServer

        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.server.start()

    def kill_gateway(self) -> None:
        self.server.stop()

    stop = kill_gateway


def environment(url: str) -> dict[str, str]:
    """What points boto3 at the server."""
    return {
        "S3_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def main() -> None:
    missing = missing_programs()
    server = Moto() if missing else Ceph(Path(tempfile.mkdtemp(prefix="ceph-")))
    try:
        if missing:
            print(f"# an emulator, which forgets everything when it ends; for Ceph, as root: {INSTALL}")
        exported = environment(server.url)
        os.environ.update(exported)
        client().create_bucket(Bucket="demo")
        print(*(f"export {name}={value}" for name, value in exported.items()), sep="\n", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        server.stop()


if __name__ == "__main__":
    main()
