"""Downloads: whole and right, or not there; resumed after a kill; one line that says what to do."""

import hashlib
import http.server
import pathlib
import resource
import subprocess
import sys
import threading
import time

import pytest

from oat_dist.data.download import Remote, fetch, obtain
from oat_dist.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
BODY = bytes(range(256)) * 4096


class Server(http.server.ThreadingHTTPServer):
    """Serves BODY in the ways that servers fail."""

    daemon_threads = True
    cut_at: int | None = None
    """Bytes after which a connection is closed, in the first `cuts` answers."""
    cuts = 0
    hold = False
    """After `cut_at` bytes, wait instead of closing."""
    wrong = False
    resumes = True

    def __init__(self) -> None:
        self.asked: list[str | None] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def remote(self) -> Remote:
        checksum = f"md5:{hashlib.md5(BODY).hexdigest()}"
        return Remote(url=f"http://127.0.0.1:{self.server_port}/set.tar.gz", checksum=checksum)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append(asked)
        if self.path != "/set.tar.gz":
            return self.send_error(404)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.resumes else 0
        if start >= len(BODY):
            return self.send_error(416)
        body = BODY[::-1] if server.wrong else BODY
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if server.cuts > 0:
            server.cuts -= 1
            self.wfile.write(body[start : start + server.cut_at])
            self.wfile.flush()
            while server.hold:
                time.sleep(0.02)
            return self.connection.close()
        return self.wfile.write(body[start:])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.hold = False
        server.shutdown()


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def refuse(remote, cache) -> str:
    with pytest.raises(UserError) as error:
        fetch(remote, cache)
    message = str(error.value)
    assert message.startswith(f"{remote.url} -> {cache / remote.name}: ") and "\n" not in message
    assert message.endswith("or give your own copy with --source ARCHIVE")
    return message


def test_a_file_is_fetched_once_and_then_taken_from_the_cache(server, tmp_path):
    for _ in range(2):
        assert fetch(server.remote, tmp_path / "cache").read_bytes() == BODY
    assert server.asked == [None]
    assert names(tmp_path / "cache") == ["set.tar.gz"]


def test_a_truncated_download_is_tried_again_where_it_stopped(server, tmp_path, capsys):
    server.cuts, server.cut_at = 1, 300_000
    assert fetch(server.remote, tmp_path).read_bytes() == BODY
    assert server.asked[0] is None and server.asked[1].startswith("bytes=")
    assert capsys.readouterr().err.startswith(f"note: {server.remote.url}: download failed: ")


@pytest.mark.parametrize("resumes", [True, False])
def test_a_download_that_stays_truncated_is_named_and_a_later_call_completes_it(server, tmp_path, resumes):
    server.cuts, server.cut_at, server.resumes = 2, 300_000, resumes
    assert "download failed" in refuse(server.remote, tmp_path)
    assert names(tmp_path) == [".set.tar.gz.part"]
    assert fetch(server.remote, tmp_path).read_bytes() == BODY
    assert names(tmp_path) == ["set.tar.gz"]


def test_a_wrong_checksum_leaves_nothing_and_is_named(server, tmp_path):
    server.wrong = True
    assert "wrong checksum" in refuse(server.remote, tmp_path)
    assert names(tmp_path) == [] and len(server.asked) == 2
    server.wrong = False
    assert fetch(server.remote, tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("part", [BODY[:1000], BODY, b"another version", BODY + b"more"])
def test_any_part_that_lies_there_ends_in_the_right_file(server, tmp_path, part):
    (tmp_path / ".set.tar.gz.part").write_bytes(part)
    assert fetch(server.remote, tmp_path).read_bytes() == BODY
    assert names(tmp_path) == ["set.tar.gz"]


def test_a_download_killed_half_way_is_resumed_by_the_next_call(server, tmp_path):
    server.cuts, server.cut_at, server.hold = 1, 600_000, True
    script = (
        "import pathlib, sys; from oat_dist.data.download import Remote, fetch;"
        "fetch(Remote(url=sys.argv[1], checksum=sys.argv[2]), pathlib.Path(sys.argv[3]))"
    )
    remote = server.remote
    process = subprocess.Popen([sys.executable, "-c", script, remote.url, remote.checksum, str(tmp_path)], cwd=ROOT)
    part = tmp_path / ".set.tar.gz.part"
    for _ in range(3000):
        # What is on the disk when the process dies: whole chunks, some of the bytes that were sent.
        if part.exists() and part.stat().st_size > 0:
            break
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert names(tmp_path) == [".set.tar.gz.part"] and 0 < part.stat().st_size < len(BODY)
    assert fetch(remote, tmp_path).read_bytes() == BODY
    assert server.asked[1] is not None, "the second call resumed"
    assert names(tmp_path) == ["set.tar.gz"]


def test_a_damaged_file_in_the_cache_is_fetched_again(server, tmp_path):
    (tmp_path / "set.tar.gz").write_bytes(BODY[:-1])
    assert fetch(server.remote, tmp_path).read_bytes() == BODY


def test_no_network_and_no_such_page_are_named(server, tmp_path):
    missing = Remote(url=server.remote.url.replace("/set.", "/gone/set."), checksum=server.remote.checksum)
    assert "404" in refuse(missing, tmp_path)
    nobody = Remote(url="http://127.0.0.1:1/set.tar.gz", checksum=server.remote.checksum)
    assert "download failed" in refuse(nobody, tmp_path)
    assert names(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/cache/set.tar.gz: cannot be written: "):
        fetch(server.remote, tmp_path / "file/cache")


def test_a_disk_that_fills_up_is_named_and_given_back(server, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(UserError, match=r"set.tar.gz: cannot be written: File too large"):
            fetch(server.remote, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path / "cache") == []


def test_a_copy_of_the_users_is_used_as_it_is_with_a_note_when_it_is_not_the_official_one(server, tmp_path, capsys):
    own = tmp_path / "own.tar.gz"
    own.write_bytes(BODY)
    assert obtain(server.remote, own, tmp_path / "cache") == own
    assert capsys.readouterr().err == ""
    own.write_bytes(b"mine")
    assert obtain(server.remote, own, tmp_path / "cache") == own
    assert capsys.readouterr().err.startswith(f"note: {own} is not the official set.tar.gz (md5 ")
    assert server.asked == [] and not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match=r"--source .*nothing: there is no such file; expected a copy of http://127"):
        obtain(server.remote, tmp_path / "nothing", tmp_path)
