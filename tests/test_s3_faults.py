"""What a server, a network or a user can do wrong to storage: what is survived, and what is an error."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import s3_server
from fault_proxy import Fault
from tiny_training import ROOT

from configs import s3, storage
from configs.cli import run
from configs.errors import UserError
from data_pipeline.__main__ import VERBS


@pytest.fixture
def few_attempts(monkeypatch):
    monkeypatch.setattr(s3, "ATTEMPTS", 3)
    s3._client.cache_clear()
    yield
    s3._client.cache_clear()


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)


def write(url: str, data: bytes) -> None:
    with storage.writing(url) as part:
        part.write_bytes(data)


@pytest.mark.parametrize("kind", ["busy", "broken", "dropped", "lost", "too slow", "misread", "throttled"])
def test_requests_that_fail_for_a_while_are_repeated(bucket_folder, proxy, kind) -> None:
    url = storage.join(bucket_folder, "a.txt")
    for method in ("PUT", "HEAD", "GET"):
        proxy.add(Fault(kind, f"^{method} ", times=1))
    write(url, b"0123456789")
    assert storage.read_bytes(url) == b"0123456789" and storage.read_range(url, 3, 4) == b"3456"
    assert all(fault.met == 1 for fault in proxy.faults)


@pytest.mark.parametrize("kind", ["busy", "dropped", "misread"])
def test_requests_that_fail_for_good_are_one_line(bucket_folder, proxy, few_attempts, kind) -> None:
    url = storage.join(bucket_folder, "a.txt")
    fault = proxy.add(Fault(kind, "a.txt"))
    for action in (storage.read_bytes, partial(storage.write_text, text="text")):
        fault.met = 0
        with pytest.raises(OSError, match=r"a\.txt: ") as error:
            action(url)
        assert "\n" not in str(error.value) and s3_server.SECRET_KEY not in str(error.value)
        assert fault.met == s3.ATTEMPTS


def test_a_body_that_breaks_off_is_asked_for_again(bucket_folder, proxy, few_attempts) -> None:
    url, data = storage.join(bucket_folder, "a.bin"), os.urandom(1 << 20)
    write(url, data)
    fault = proxy.add(Fault("cut", "^GET ", times=2))
    assert storage.read_bytes(url) == data and fault.met == 2
    fault.met = 0
    assert storage.read_range(url, 1000, 500_000) == data[1000:501_000] and fault.met == 2
    fault.times = 10**9
    with pytest.raises(OSError, match=r"a\.bin: "):
        storage.read_bytes(url)


def test_bytes_that_change_on_their_way_are_noticed(bucket_folder, proxy, few_attempts, small_parts) -> None:
    for name, data in (("small", b"0123456789"), ("large", os.urandom(11 << 20))):
        url = storage.join(bucket_folder, name)
        write(url, data)
        fault = proxy.add(Fault("altered", f"^GET .*{name}", times=1))
        assert storage.read_bytes(url) == data and fault.met == 1
        fault.met = 0
        assert storage.local(url).read_bytes() == data and fault.met == 1
        fault.times = 10**9
        with pytest.raises(OSError, match=f"{name}.*(damaged|checksum)"):
            storage.read_bytes(url)
        storage.remove(url)
        write(url, data[::-1])
        with pytest.raises(UserError, match=f"{name} is damaged, or changes while it is read"):
            storage.local(url)
        fault.met = fault.times


def test_a_server_that_stops_speaking_is_asked_again(bucket_folder, proxy, monkeypatch, few_attempts) -> None:
    monkeypatch.setattr(s3, "SILENT_S", 0.5)
    url = storage.join(bucket_folder, "a.txt")
    storage.write_text(url, "text")
    slow = proxy.add(Fault("slow", "^GET ", times=1, seconds=0.2))
    silent = proxy.add(Fault("slow", "^GET ", times=1, seconds=3))
    assert storage.read_bytes(url) == b"text" and (slow.met, silent.met) == (1, 0)
    began = time.monotonic()
    assert storage.read_bytes(url) == b"text" and silent.met == 1
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("kind", ["lost", "not offered"])
def test_a_first_writer_is_one_whose_answer_was_lost_or_whose_server_has_no_conditional_writes(
    kind, bucket_folder, proxy
) -> None:
    url = storage.join(bucket_folder, "claim")
    fault = proxy.add(Fault(kind, "^PUT .*claim", times=1))
    assert storage.create(url, b"worker 1") and fault.met == 1
    assert not storage.create(url, b"worker 2") and storage.read_bytes(url) == b"worker 1"


def error_of(capsys, *args: str) -> str:
    """The one line with which `python -m data_pipeline` ends, with status 2."""
    assert run("data_pipeline", VERBS, args) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and s3_server.SECRET_KEY not in line, line
    return line


def test_wrong_or_no_credentials_are_one_clear_line(s3, bucket_folder, monkeypatch, capsys, tmp_path) -> None:
    manifest = f"{bucket_folder}/manifest.json"
    if isinstance(s3, s3_server.Ceph):  # moto takes every credential
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", wrong := "not-the-secret")
        line = error_of(capsys, "verify", manifest)
        assert f"{manifest}: the server refuses" in line and "AWS_SECRET_ACCESS_KEY" in line and wrong not in line
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    assert "S3_ENDPOINT_URL and the credentials: AWS_PROFILE" in error_of(capsys, "verify", manifest)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "(nobody)" in error_of(capsys, "verify", manifest)


def test_a_bucket_that_does_not_exist_is_one_clear_line(s3, capsys) -> None:
    assert "there is no bucket 'nowhere'" in error_of(capsys, "verify", "s3://nowhere/manifest.json")
    write_it = partial(storage.write_text, text="text")
    for action in (storage.read_bytes, storage.exists, storage.list_folder, storage.local, write_it):
        with pytest.raises(OSError, match="there is no bucket 'nowhere'"):
            action("s3://nowhere/a")


@pytest.mark.parametrize(
    "url", ["s3://", "s3:/bucket/key", "s3:///key", "s3://bucket", "s3://user:password@bucket/key"]
)
def test_a_wrong_url_is_one_clear_line_without_what_is_secret(url) -> None:
    with pytest.raises(ValueError, match="write s3://bucket/key") as error:
        storage.read_bytes(url)
    assert "password" not in str(error.value)


def test_a_server_that_is_not_there_is_one_line_without_what_is_secret(s3, monkeypatch, few_attempts) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://user:password@127.0.0.1:{s3_server.free_port()}")
    with pytest.raises(OSError, match="S3_ENDPOINT_URL") as error:
        storage.read_bytes("s3://worlds/a")
    assert "password" not in str(error.value)


def start_later(server: s3_server.Ceph | s3_server.Moto) -> None:
    """Half a second without a server."""
    time.sleep(0.5)
    server.start_gateway()


def test_an_upload_survives_a_server_that_is_killed_and_restarted(s3, bucket_folder, proxy, small_parts) -> None:
    url, data = storage.join(bucket_folder, "large.bin"), os.urandom(32 << 20)
    held = proxy.add(Fault("held", "^PUT .*partNumber=5", times=1))
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write, url, data)
        held.wait()
        s3.kill_gateway()
        held.released.set()  # the part is forwarded to a server that is not there any more
        start_later(s3)
        writing.result(timeout=120)
    assert storage.sha256(url) == hashlib.sha256(data).hexdigest()
    assert unfinished_uploads(bucket_folder) == []


def test_a_read_survives_a_server_that_is_killed_and_restarted(s3, bucket_folder, proxy) -> None:
    url, data = storage.join(bucket_folder, "large.bin"), os.urandom(48 << 20)
    write(url, data)
    cut = proxy.add(Fault("cut", "^GET .*large.bin", times=1))
    held = proxy.add(Fault("held", "^GET .*large.bin", times=1))  # what goes on where the body was cut
    with ThreadPoolExecutor(1) as pool, storage.open(url) as file:
        reading = pool.submit(storage.read_bytes, url)
        held.wait()
        s3.kill_gateway()
        held.released.set()
        start_later(s3)
        assert reading.result(timeout=120) == data and cut.met == 1
        assert file.read(10 << 20) == data[: 10 << 20]
        s3.kill_gateway()
        reading = pool.submit(file.read)
        start_later(s3)
        assert reading.result(timeout=120) == data[10 << 20 :]


def unfinished_uploads(folder: str) -> list[str]:
    bucket, prefix = s3.bucket_and_key(storage.join(folder, ""))
    answer = s3.client().list_multipart_uploads(Bucket=bucket, Prefix=prefix)
    return [upload["Key"] for upload in answer.get("Uploads", ())]


def test_an_upload_that_fails_takes_its_parts_back(bucket_folder, proxy, few_attempts, small_parts) -> None:
    url = storage.join(bucket_folder, "large.bin")
    proxy.add(Fault("broken", "^PUT .*partNumber=3"))
    with pytest.raises(OSError, match=r"large\.bin: .*InternalError"):
        write(url, bytes(16 << 20))
    assert unfinished_uploads(bucket_folder) == [] and not storage.exists(url)


def test_a_writer_that_is_killed_leaves_no_half_file(bucket_folder, proxy) -> None:
    url = storage.join(bucket_folder, "large.bin")
    storage.write_text(url, "as it was")
    held = proxy.add(Fault("held", "^PUT .*partNumber=3", times=1))
    program = (
        "import sys; from configs import s3, storage\n"
        "s3.PART_BYTES = 5 << 20\n"
        "with storage.writing(sys.argv[1]) as part: part.write_bytes(bytes(32 << 20))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, url], cwd=ROOT)
    held.wait()
    process.send_signal(signal.SIGKILL)
    process.wait()
    held.released.set()
    assert storage.read_bytes(url) == b"as it was"
    assert storage.list_tree(bucket_folder) == {"large.bin": len("as it was")}
