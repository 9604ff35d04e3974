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

PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
INSTALL = "apt-get install --no-install-recommends radosgw ceph-mon ceph-osd ceph-common"
ACCESS_KEY, SECRET_KEY = "worldloom-tests", "worldloom-tests-secret"
START_S = 60
PR_SET_PDEATHSIG = 1  # of Linux

# One daemon of each kind, no keys between them, no copies: as small as it gets, and nobody else's.
CONFIG = """[global]
fsid = {fsid}
mon initial members = a
mon host = v1:127.0.0.1:{mon_port}
public addr = 127.0.0.1
public network = 127.0.0.0/8
ms bind ipv6 = false
ms bind msgr2 = false
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd crush update on start = false
mon allow pool size one = true
mon data avail warn = 2
mon data avail crit = 1
paxos propose interval = 0.02
paxos min wait = 0.005
osd objectstore = bluestore
bluestore block size = 8589934592
osd memory target = 1073741824
run dir = {folder}/run
log file = {folder}/log/$name.log
keyring = {folder}/keyring
[mon.a]
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

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _start_store(self) -> None:
        keyring, monmap = self.folder / "keyring", self.folder / "monmap"
        everything = [word for kind in ("mon", "osd", "mgr") for word in ("--cap", kind, "allow *")]
        for i, name in enumerate(("mon.", "client.admin", "client.rgw.a")):
            new = [] if i else ["--create-keyring"]
            self._call("ceph-authtool", keyring, *new, "--gen-key", "-n", name, *everything)
        host = f"[v1:127.0.0.1:{self.mon_port}]"
        self._call("monmaptool", "--create", "--clobber", "--addv", "a", host, "--fsid", self.fsid, monmap)
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)
        self._start("ceph-mon", "-i", "a")
        osd = str(uuid.uuid4())
        self._run("ceph", "osd", "new", osd)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._run("ceph", "osd", "crush", "add", "osd.0", "1.0", "root=default")
        self._start("ceph-osd", "-i", "0")

    def start_gateway(self) -> None:
        """The S3 side of it; what is stored is there again after `kill_gateway`."""
        self.gateway = self._start("radosgw", "-n", "client.rgw.a")
        deadline = time.monotonic() + START_S
        while not self._answers():
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

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    @property
    def _config(self) -> list[str]:
        return ["-c", str(self.folder / "ceph.conf")]

    def _start(self, program: str, *words: str) -> subprocess.Popen[bytes]:
        """A daemon that ends with the thread that starts it, however that ends."""
        with open(self.folder / "log" / f"{program}.out", "ab") as out:
            command = [program, *self._config, *words, "-f"]
            process = subprocess.Popen(command, stdout=out, stderr=out, preexec_fn=_die_with_parent)
        self.processes.append(process)
        return process

    def _run(self, program: str, *words: object) -> None:
        self._call(program, *self._config, *words)

    def _call(self, program: str, *words: object) -> None:
        done = subprocess.run([program, *map(str, words)], capture_output=True, text=True, timeout=START_S)
        if done.returncode:
            raise OSError(f"{program} ended with status {done.returncode}: {done.stderr.strip()[-500:]}")


class Moto:
    """The emulator, in this process: it takes every credential, and forgets everything with the process."""

    def __init__(self) -> None:
        self.port = free_port()
        self.start_gateway()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start_gateway(self) -> None:
        from moto.server import ThreadedMotoServer

        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.server.start()

    def kill_gateway(self) -> None:
        self.server.stop()

    def stop(self) -> None:
        self.kill_gateway()


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
