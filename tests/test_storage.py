"""Storage: the same calls on a local folder and on a server that speaks S3."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from full_disk import full_disk
from tiny_training import ROOT

from configs import cache, s3, storage
from configs.errors import UserError, is_users

MANY = 1005  # objects: a server lists a thousand at a time


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path):
    return str(tmp_path / "some folder") if request.param == "local" else request.getfixturevalue("bucket_folder")


def forget_copies() -> None:
    """As at the end of this process."""
    for lock in cache._kept_locks.values():
        lock.close()
    cache._kept_locks.clear()


@pytest.fixture
def own_cache(monkeypatch, tmp_path) -> Iterator[Path]:
    monkeypatch.setenv("WORLDLOOM_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    forget_copies()


def put(folder: str, *names: str) -> None:
    """Empty objects with any names, which storage itself would refuse."""
    bucket, prefix = s3.bucket_and_key(f"{folder}/")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: s3.client().put_object(Bucket=bucket, Key=prefix + name, Body=b""), names))


def files_in(folder: Path) -> set[str]:
    """Their suffixes, at any depth."""
    return {path.suffix for path in folder.rglob("*") if path.is_file()}


def test_what_is_written_is_read_whole_and_in_ranges(folder):
    url = storage.join(folder, "a ü+%.txt")
    assert not storage.exists(url) and storage.list_folder(folder) == []
    storage.write_text(url, "0123456789")
    storage.write_text(storage.join(folder, "deeper/b.txt"), "")
    assert storage.exists(url) and storage.path(url).stat().st_size == 10
    assert storage.read_bytes(url) == b"0123456789" and storage.read_range(url, 3, 4) == b"3456"
    for offset in (8, 10, 12):
        with pytest.raises(ValueError, match=r"a ü\+%.txt is truncated"):
            storage.read_range(url, offset, 4)
    assert storage.read_bytes(storage.join(folder, "deeper/b.txt")) == b""
    assert storage.list_folder(folder) == ["a ü+%.txt", "deeper/"] and storage.path(folder).is_dir()
    assert storage.list_tree(folder) == {"a ü+%.txt": 10, "deeper/b.txt": 0}
    assert storage.parent(url) == folder and storage.name_of(url) == "a ü+%.txt"
    assert storage.local(url).read_text() == "0123456789"
    assert (storage.local(folder) / "deeper" / "b.txt").is_file()
    storage.remove(url)
    storage.remove(url)
    storage.remove_folder(folder, "COMPLETE")
    storage.remove_folder(folder, "COMPLETE")
    assert storage.list_tree(folder) == {} and not storage.exists(url)
    with pytest.raises(FileNotFoundError, match=r"a ü\+%.txt"):
        storage.read_bytes(url)


def test_an_opened_file_reads_and_seeks_like_any_other(folder):
    url, data = storage.join(folder, "a.bin"), os.urandom(100_000)
    with storage.writing(url) as part:
        part.write_bytes(data)
    for buffer_bytes in (1, 4096, storage.BUFFER_BYTES):
        with storage.open(url, buffer_bytes) as file:
            assert file.read(10) == data[:10] and file.read(10) == data[10:20]
            file.seek(-7, os.SEEK_END)
            assert file.read() == data[-7:] and file.read() == b""
            file.seek(50_000)
            memory = bytearray(20_000)
            assert file.readinto(memory) == 20_000 and memory == data[50_000:70_000]
    assert storage.sha256(url) == hashlib.sha256(data).hexdigest()


def test_a_write_that_fails_leaves_nothing(folder):
    with pytest.raises(ValueError, match="broke off"), storage.writing(storage.join(folder, "a.txt")) as part:
        part.write_text("half")
        raise ValueError("broke off")
    assert storage.list_folder(folder) == []


def test_the_last_file_of_a_folder_comes_last(bucket_folder, proxy):
    for _ in range(2):  # over what is there already, too
        proxy.requests.clear()
        with storage.writing_folder(bucket_folder, last="COMPLETE") as folder:
            for name in ("COMPLETE", "a.txt", "z.txt"):
                (folder / name).write_text(name)
        changes = [request for request in proxy.requests if request.startswith(("PUT", "DELETE"))]
        assert [request.rpartition("/")[2] for request in changes] == ["COMPLETE", "a.txt", "z.txt", "COMPLETE"]
        assert changes[0].startswith("DELETE")


def test_of_many_who_create_a_file_one_is_first(folder):
    url = storage.join(folder, "claim")
    with ThreadPoolExecutor(4) as pool:
        firsts = list(pool.map(lambda i: storage.create(url, f"worker {i}".encode()), range(4)))
    assert firsts.count(True) == 1 and storage.list_folder(folder) == ["claim"]
    assert storage.read_bytes(url) == f"worker {firsts.index(True)}".encode()


def test_a_large_file_goes_in_parts_and_comes_back_the_same(bucket_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    url, data = storage.join(bucket_folder, "large.bin"), os.urandom((12 << 20) + 1)
    (tmp_path / "large.bin").write_bytes(data)
    s3.upload(tmp_path / "large.bin", url)
    assert s3.head(url).etag.strip('"').endswith("-3")
    assert storage.read_bytes(url) == data and storage.local(url).read_bytes() == data


def test_a_copy_follows_what_changes_in_the_bucket(bucket_folder):
    for text in ("old", "new"):
        storage.write_text(storage.join(bucket_folder, "deeper/a.txt"), text)
        assert (storage.local(bucket_folder) / "deeper" / "a.txt").read_text() == text


@pytest.mark.parametrize("limit", ["the setting", "the disk"])
def test_copies_stay_within_their_limit_but_those_in_use(limit, bucket_folder, own_cache, monkeypatch):
    def used() -> int:
        return sum(map(os.path.getsize, own_cache.glob("copies/*/*")))

    copies, usage = {}, shutil.disk_usage(own_cache.parent)
    if limit == "the setting":
        monkeypatch.setenv("WORLDLOOM_CACHE_GB", "0.000025")
    else:  # which holds a bit less than two more
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=25_000 - used()))
    for name in "abc":
        storage.write_text(storage.join(bucket_folder, name), name * 10_000)
        copies[name] = storage.local(storage.join(bucket_folder, name))
    assert all(copy.is_file() for copy in copies.values())  # this process may be reading them
    forget_copies()
    storage.write_text(storage.join(bucket_folder, "d"), "d" * 10_000)
    assert storage.local(storage.join(bucket_folder, "d")).is_file()
    assert [name for name, copy in copies.items() if copy.is_file()] == ["c"]


HOSTILE = [
    "../../../../victim", "..", ".", "./a", "a/../../b", "a//b", "/etc/passwd", "a\\b", "a\tb", "a\x7fb", "a.txt/below",
    "b/" + "a" * 256,
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bucket_cannot_write_outside_its_folder(name, bucket_folder, own_cache) -> None:
    storage.write_text(storage.join(bucket_folder, "a.txt"), "text")
    put(bucket_folder, name)
    with pytest.raises((ValueError, OSError), match=r"no file of a folder|a\.txt|aaa") as error:
        storage.local(bucket_folder)
    assert is_users(error.value) and files_in(own_cache.parent) <= {".lock", ".fetch"}
    assert storage.local(bucket_folder, lambda below: below == "a.txt").joinpath("a.txt").read_text() == "text"


@pytest.mark.parametrize(("key", "name"), [("..", ".."), (".", "."), ("/a", ""), ("../a", "..")])
def test_the_names_of_a_folder_in_a_bucket_stay_in_it(key, name, bucket_folder) -> None:
    put(bucket_folder, "deeper/../../b")
    assert [path.name for path in storage.path(bucket_folder).iterdir()] == ["deeper"]
    put(bucket_folder, key)
    with pytest.raises(ValueError, match=f"names '{name}'"):
        list(storage.path(bucket_folder).iterdir())


@pytest.mark.parametrize("url", ["s3://b/../../x", "s3://../x", "s3://b/./x", "s3://b//x", "s3://b/x\0", "s3://b/x/.."])
def test_a_url_leads_to_no_place_outside_of_the_cache(url, own_cache) -> None:
    for use in (cache.run_folder, storage.local, storage.path, lambda url: storage.writing(url).__enter__()):
        with pytest.raises(ValueError, match="no file of a folder"):
            use(url)


def test_of_two_writers_to_a_folder_in_a_bucket_none_leaves_a_mixture(bucket_folder) -> None:
    first, last = storage.join(bucket_folder, "a.mp4"), storage.join(bucket_folder, "b.png")

    def write(url: str) -> None:
        with storage.writing_folder(url, last="b.png") as folder:
            for name in ("a.mp4", "b.png"):
                (folder / name).write_text("mine")

    write(bucket_folder)
    mine = {"a.mp4": storage.version(first), "b.png": storage.version(last)}
    storage.require_sole_writer(bucket_folder, mine, "b.png")
    for url, left in (
        (last, ["a.mp4", "b.png"]),
        (first, ["a.mp4"]),
    ):  # its own last file is taken back, the other's not
        write(bucket_folder)
        mine = {"a.mp4": storage.version(first), "b.png": storage.version(last)}
        storage.write_text(url, "another's")
        with pytest.raises(OSError, match="another process"):
            storage.require_sole_writer(bucket_folder, mine, "b.png")
        assert storage.list_folder(bucket_folder) == left


def test_a_wrong_cache_is_one_line(bucket_folder, own_cache, monkeypatch) -> None:
    storage.write_text(storage.join(bucket_folder, "a.txt"), "text")
    for limit in ("inf", "nan", "much"):
        monkeypatch.setenv("WORLDLOOM_CACHE_GB", limit)
        with pytest.raises(UserError, match=f"WORLDLOOM_CACHE_GB={limit}"):
            storage.local(bucket_folder)
    monkeypatch.setenv("HOME", "~")  # what an unknown user of a container has: nothing that ~ stands for
    for folder in ("", "~/x"):
        monkeypatch.setenv("WORLDLOOM_CACHE", folder)
        with pytest.raises(OSError, match="WORLDLOOM_CACHE"):
            cache.root("copies")


def test_nobody_else_can_look_into_the_cache(bucket_folder, own_cache) -> None:
    (own_cache / "copies").mkdir(mode=0o755, parents=True)  # of an earlier version
    with storage.writing(storage.join(bucket_folder, "a.txt")) as part:
        part.write_text("secret")
    storage.local(bucket_folder)
    cache.run_folder("s3://worlds/run").mkdir(parents=True)
    modes = {path.name: path.stat().st_mode & 0o777 for path in own_cache.iterdir()}
    assert modes == dict.fromkeys(("copies", "runs", "tmp"), 0o700)


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda copy: copy.write_text("01234"), lambda copy: shutil.rmtree(copy.parent)]
)
def test_a_copy_that_was_damaged_is_fetched_again(damage, bucket_folder, own_cache) -> None:
    """By a process that uses it, and by another."""
    urls = {name: storage.join(bucket_folder, name) for name in ("deeper/a", "b")}
    for url in urls.values():
        storage.write_text(url, "0123456789")
    with storage.cached_file(urls["b"], 10, sha256 := storage.sha256(urls["b"])) as shard:
        pass
    folder = storage.local(bucket_folder)
    for _ in range(2):
        for copy in (folder / "deeper" / "a", shard):
            damage(copy)
        assert storage.local(bucket_folder) == folder
        assert {name: (folder / name).read_text() for name in urls} == dict.fromkeys(urls, "0123456789")
        with storage.cached_file(urls["b"], 10, sha256) as again:
            assert again == shard and again.read_text() == "0123456789"
        forget_copies()


def test_what_changes_while_it_is_copied_is_no_copy(bucket_folder, own_cache, monkeypatch) -> None:
    url, download = storage.join(bucket_folder, "a"), s3.download
    storage.write_text(url, "text")
    monkeypatch.setattr(s3, "download", lambda url, file: storage.write_text(url, "more") or download(url, file))
    with pytest.raises(UserError, match="/a is altered"):
        storage.local(bucket_folder)
    assert files_in(own_cache) == {".lock", ".fetch"}


def test_a_copy_that_does_not_fit_is_one_line(bucket_folder, own_cache) -> None:
    url = storage.join(bucket_folder, "large")
    storage.write_text(url, "0" * 20_000)
    with full_disk(15_000), pytest.raises(OSError, match=f"File too large: '{own_cache}/"):
        storage.local(url)
    assert files_in(own_cache) == {".lock", ".fetch"}


def test_objects_that_stand_for_folders_are_no_files(bucket_folder, own_cache) -> None:
    put(bucket_folder, "", "deeper/", "empty/")
    storage.write_text(storage.join(bucket_folder, "deeper/a.txt"), "text")
    assert storage.list_tree(bucket_folder) == {"deeper/a.txt": 4}
    assert storage.list_folder(bucket_folder) == ["deeper/", "empty/"]
    assert (storage.local(bucket_folder) / "deeper" / "a.txt").read_text() == "text"
    with pytest.raises(FileNotFoundError):
        storage.local(storage.join(bucket_folder, "empty"))
    storage.remove_folder(bucket_folder, "COMPLETE")
    bucket, prefix = s3.bucket_and_key(f"{bucket_folder}/")
    assert s3.client().list_objects_v2(Bucket=bucket, Prefix=prefix)["KeyCount"] == 0


def test_more_than_a_thousand_keys_are_listed(bucket_folder):
    names = [f"{i:05d} ü" for i in range(MANY)]
    put(bucket_folder, *names)
    assert storage.list_folder(bucket_folder) == names and len(storage.list_tree(bucket_folder)) == MANY


def test_processes_share_one_copy(bucket_folder, proxy):
    """Two that ask at the same moment, while a third that has it goes on living."""
    url = storage.join(bucket_folder, "shared.bin")
    storage.write_text(url, "x" * 1000)
    program = f"from configs import storage; print(storage.local({url!r}), flush=True); input()"
    command, pipe = [sys.executable, "-c", program], subprocess.PIPE
    readers = [subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    copies = {reader.stdout.readline().strip() for reader in readers if reader.stdout}
    assert copies == {str(storage.local(url))} and storage.local(url).read_text() == "x" * 1000
    assert len([request for request in proxy.requests if request.startswith("GET") and "shared.bin" in request]) == 1
    for reader in readers:
        reader.communicate("")
