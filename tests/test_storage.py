"""Storage: the same calls on a local folder and on a server that speaks S3."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
import pytest
from moto.server import ThreadedMotoServer

from data_pipeline import storage
from data_pipeline.encode import encode_recordings
from data_pipeline.shards import verify_set
from data_pipeline.stream import Stream


def point_boto3_at(monkeypatch, port):
    for name, value in {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    storage._client_of_process.cache_clear()


@pytest.fixture
def s3(monkeypatch, tmp_path):
    """The url of a folder on an S3 server, in a bucket of its own: moto keeps them as long as the process lives."""
    bucket = f"worlds-{hashlib.sha256(bytes(tmp_path)).hexdigest()[:12]}"
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    point_boto3_at(monkeypatch, server.get_host_and_port()[1])
    boto3.client("s3").create_bucket(Bucket=bucket)
    yield f"s3://{bucket}/some folder"
    server.stop()
    storage._client_of_process.cache_clear()


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path):
    return str(tmp_path / "some folder") if request.param == "local" else request.getfixturevalue("s3")


def test_what_is_written_is_read_whole_and_in_ranges(folder):
    url = storage.join(folder, "a ü.txt")
    assert not storage.exists(url) and storage.list_files(folder) == []
    storage.write_text(url, "0123456789")
    storage.write_text(storage.join(folder, "deeper/b.txt"), "")
    assert storage.exists(url) and storage.size(url) == 10
    assert storage.read_bytes(url) == b"0123456789" and storage.read_range(url, 3, 4) == b"3456"
    assert storage.read_bytes(storage.join(folder, "deeper/b.txt")) == b""
    assert storage.list_files(folder) == [url]
    assert storage.parent(url) == folder


def test_a_range_beyond_the_end_and_a_missing_file_are_named(folder):
    url = storage.join(folder, "a.txt")
    storage.write_text(url, "0123456789")
    with pytest.raises(ValueError, match=r"a.txt is truncated"):
        storage.read_range(url, 8, 4)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        storage.read_bytes(storage.join(folder, "nowhere"))


def test_a_write_that_fails_leaves_nothing(folder):
    url = storage.join(folder, "a.txt")
    with pytest.raises(ValueError, match="broke off"), storage.writing(url) as part:
        part.write_text("half")
        raise ValueError("broke off")
    assert storage.list_files(folder) == []


def test_a_bucket_that_is_not_there_and_a_url_without_a_key_are_one_line(s3):
    with pytest.raises(FileNotFoundError, match="s3://nowhere/a"):
        storage.read_bytes("s3://nowhere/a")
    with pytest.raises(OSError, match="s3://nowhere/a"):
        storage.write_text("s3://nowhere/a", "text")
    with pytest.raises(ValueError, match="s3://bucket/key"):
        storage.read_bytes("s3://nowhere")


def test_shards_can_be_written_to_and_read_from_s3(s3, encode_config, encoded):
    """Everything as on disk, and the manifest byte for byte."""
    encode_recordings(type(encode_config)(**{**vars(encode_config), "out": s3}))
    url, local = f"{s3}/train/manifest.json", f"{encoded}/train/manifest.json"
    assert storage.read_bytes(url) == storage.read_bytes(local)
    assert verify_set(url) == []
    found, wanted = (Stream(one, 2, seed=0).batch_at(3) for one in (url, local))
    assert found.ids == wanted.ids and found.latents.equal(wanted.latents)


class BreaksOff(BaseHTTPRequestHandler):
    """Serves 10 bytes, but hangs up after 4 until it has been asked `failures` times."""

    data, asked, failures = b"0123456789", 0, 1
    ranges: tuple[str, ...] = ()

    def do_GET(self):
        cls = type(self)
        cls.asked += 1
        cls.ranges = (*cls.ranges, self.headers.get("Range", ""))
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        rest = self.data[start:]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[:4] if cls.asked <= cls.failures else rest)

    def log_message(self, format, *args):
        pass


def test_a_body_that_breaks_off_is_continued_where_it_stopped(monkeypatch):
    handler = type("Handler", (BreaksOff,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_boto3_at(monkeypatch, server.server_port)
    assert storage.read_bytes("s3://worlds/a") == b"0123456789"
    assert handler.ranges == ("", "bytes=4-")
    handler.failures = 1000
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    with pytest.raises(OSError, match="s3://worlds/a"):
        storage.read_bytes("s3://worlds/a")
    server.shutdown()
    storage._client_of_process.cache_clear()
