"""Members of .tar.gz archives, read from the stream: nothing is unpacked onto the disk and nothing is unpickled.

Only regular files of expected names are read. An archive with a link, a device, an absolute name or a name that climbs
out of its folder is refused whole: no official archive has one. Sizes are limited before they are read.
"""

import contextlib
import gzip
import pathlib
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

from oat_dist.errors import UserError


def read_members(path: pathlib.Path, limits: Mapping[str, int], *, max_total_bytes: int) -> dict[str, bytes]:
    """Read chosen members of an archive, and all of the archive, so that its own checksum is verified.

    Args:
        path: A .tar.gz file.
        limits: Name of every member to read -> most bytes it may have.
        max_total_bytes: Most bytes the archive may unpack to.

    Returns:
        Name -> content.

    Raises:
        UserError: It cannot be read, is damaged or truncated, lacks a member, or holds what no honest archive does.
    """
    members: dict[str, bytes] = {}
    with _readable(path), gzip.open(path) as unpacked:
        stream = _Limited(unpacked, path, max_total_bytes)
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                _check(member, path)
                if member.name in limits:
                    members[member.name] = _read(archive, member, members, limits[member.name], path)
        stream.finish()
    missing = [name for name in limits if name not in members]
    if missing:
        raise _lacks(path, missing[0])
    return members


@contextlib.contextmanager
def open_member(
    path: pathlib.Path, name: str, *, limit: int, max_total_bytes: int
) -> Iterator[tuple[int, Callable[[int], bytes]]]:
    """One member of an archive, piece by piece, so that it need not fit into memory.

    When the block ends well, the rest of the archive is read too, so that its own checksum is verified.

    Args:
        path: A .tar.gz file.
        name: The member.
        limit: Most bytes it may have.
        max_total_bytes: Most bytes the archive may unpack to.

    Yields:
        Its size, and a function that reads as many of its next bytes.

    Raises:
        UserError: As `read_members`.
    """
    with contextlib.ExitStack() as stack:
        with _readable(path):
            stream = _Limited(stack.enter_context(gzip.open(path)), path, max_total_bytes)
            archive = stack.enter_context(tarfile.open(fileobj=stream, mode="r|"))
            member = _find(archive, name, path)
        _check_wanted(member, False, limit, path)
        content = archive.extractfile(member)

        def read(num_bytes: int) -> bytes:
            with _readable(path):
                body = content.read(num_bytes)
            if len(body) != num_bytes:
                raise UserError(f"{path}: truncated within {name!r}; fetch it again")
            return body

        yield member.size, read
        with _readable(path):
            for other in archive:
                _check(other, path)
                if other.name == name and other is not member:
                    _check_wanted(other, True, limit, path)
            stream.finish()


def text_lines(body: bytes, where: str, num: int) -> tuple[str, ...]:
    """The names in a text member, one per line.

    Args:
        body: Its content.
        where: Archive and member, for the message.
        num: How many names there must be, all different.

    Raises:
        UserError: It has others.
    """
    names = tuple(body.decode("ascii", "replace").split())
    if len(names) != num or len(set(names)) != num:
        raise UserError(f"{where}: must hold {num} different names, has {len(set(names))}")
    return names


class _Limited:
    """A stream that ends in an error when it gives more bytes than allowed."""

    def __init__(self, stream: BinaryIO, path: pathlib.Path, max_bytes: int) -> None:
        self._stream, self._path, self._max = stream, path, max_bytes
        self._given = 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._given += len(data)
        if self._given > self._max:
            raise UserError(f"{self._path}: unpacks to more than the {self._max} bytes that this data set can have")
        return data

    def finish(self) -> None:
        """Read the rest: gzip compares its checksum at the end of its stream."""
        while self.read(1 << 20):
            pass


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    """What goes wrong while an archive is read, in one line."""
    try:
        yield
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path}: not readable as a whole .tar.gz archive ({reason}); fetch it again") from None


def _find(archive: tarfile.TarFile, name: str, path: pathlib.Path) -> tarfile.TarInfo:
    """The first member of a name."""
    for member in archive:
        _check(member, path)
        if member.name == name:
            return member
    raise _lacks(path, name)


def _lacks(path: pathlib.Path, name: str) -> UserError:
    return UserError(f"{path}: has no member {name}; is it the archive of another data set?")


def _check(member: tarfile.TarInfo, path: pathlib.Path) -> None:
    name = pathlib.PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{path}: refused, its member {member.name!r} points out of the archive")
    if not (member.isfile() or member.isdir()):
        raise UserError(f"{path}: refused, its member {member.name!r} is a link or device, not a file")


def _read(
    archive: tarfile.TarFile, member: tarfile.TarInfo, earlier: Mapping[str, bytes], limit: int, path: pathlib.Path
) -> bytes:
    _check_wanted(member, member.name in earlier, limit, path)
    body = archive.extractfile(member).read()
    if len(body) != member.size:
        raise UserError(f"{path}: truncated within {member.name!r}; fetch it again")
    return body


def _check_wanted(member: tarfile.TarInfo, is_second: bool, limit: int, path: pathlib.Path) -> None:
    if is_second or not member.isfile():
        raise UserError(f"{path}: refused, {member.name!r} is in it twice or is a folder")
    if member.size > limit:
        raise UserError(f"{path}: its member {member.name!r} has {member.size} bytes, at most {limit} are right")
