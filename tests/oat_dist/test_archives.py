"""Archives: only what is expected is read, and nothing dishonest, damaged or endless gets through."""

import tarfile

import pytest

from oat_dist.data.archives import read_members
from oat_dist.errors import UserError
from tests.archives import gzip_bomb, write_tar

GOOD = {"set/a.bin": b"a" * 5000, "set/b.bin": b"b" * 3000}
LIMITS = {"set/a.bin": 5000}


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def refuse(path, limits=LIMITS, total=1 << 20) -> str:
    with pytest.raises(UserError) as error:
        read_members(path, limits, max_total_bytes=total)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


def test_the_wanted_members_are_read_and_nothing_is_unpacked(tmp_path):
    path = write_tar(tmp_path / "a.tar.gz", GOOD)
    assert read_members(path, LIMITS, max_total_bytes=1 << 20) == {"set/a.bin": b"a" * 5000}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("extra", "message"),
    [({"../evil": b"x"}, "points out of the archive"),
     ({"/etc/evil": b"x"}, "points out of the archive"),
     ({"set/../../evil": b"x"}, "points out of the archive"),
     ({"link": special("link", tarfile.SYMTYPE, "/etc/passwd")}, "is a link or device"),
     ({"hard": special("hard", tarfile.LNKTYPE, "set/a.bin")}, "is a link or device"),
     ({"null": special("null", tarfile.CHRTYPE)}, "is a link or device"),
     ({"again": special("set/a.bin", tarfile.DIRTYPE)}, "is in it twice or is a folder")],
)  # fmt: skip
def test_an_archive_with_a_dishonest_member_is_refused_whole(tmp_path, extra, message):
    assert message in refuse(write_tar(tmp_path / "a.tar.gz", {**GOOD, **extra}))


def test_a_member_given_twice_is_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar.gz", {"set/a.bin": b"first", "other": special("set/a.bin", tarfile.REGTYPE)})
    assert "twice" in refuse(path)


def test_a_member_or_archive_beyond_its_size_is_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar.gz", GOOD)
    assert "has 5000 bytes, at most 4999 are right" in refuse(path, {"set/a.bin": 4999})
    assert "unpacks to more than the 4000 bytes" in refuse(path, total=4000)
    bomb = gzip_bomb(tmp_path / "bomb.tar.gz", 1 << 24)
    assert bomb.stat().st_size < 1 << 16
    assert "unpacks to more than" in refuse(bomb)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.9, -8, -1])
def test_an_archive_cut_anywhere_is_named(tmp_path, keep):
    path = write_tar(tmp_path / "a.tar.gz", {**GOOD, "set/c.bin": bytes(range(256)) * 50})
    body = path.read_bytes()
    path.write_bytes(body[: int(len(body) * keep) if 0 < keep < 1 else keep])
    assert "not readable as a whole .tar.gz archive" in refuse(path)


def test_a_byte_changed_anywhere_is_noticed(tmp_path):
    path = write_tar(tmp_path / "a.tar.gz", {"set/a.bin": bytes(range(250)) * 20})
    body = path.read_bytes()
    for at in range(40, len(body), 37):
        path.write_bytes(body[:at] + bytes([body[at] ^ 0x55]) + body[at + 1 :])
        refuse(path)


def test_an_archive_of_something_else_or_none_is_named(tmp_path):
    assert "has no member set/z.bin" in refuse(write_tar(tmp_path / "a.tar.gz", GOOD), {"set/z.bin": 1})
    plain = tmp_path / "plain.tar.gz"
    plain.write_text("this is a page of HTML")
    assert "not readable as a whole" in refuse(plain)
    assert "No such file" in refuse(tmp_path / "missing.tar.gz")
