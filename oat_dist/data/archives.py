"""Members of .tar.gz archives, read from the stream: nothing is unpacked onto the disk and nothing is unpickled.

Only regular files of expected names are read. An archive with a link, a device, an absolute name or a name that climbs
out of its folder is refused whole: no official archive has one. Sizes are limited before they are read.
"""

import gzip
import pathlib
import tarfile
import zlib
from collections.abc import Mapping
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
    try:
        with gzip.open(path) as unpacked:
            stream = _Limited(unpacked, path, max_total_bytes)
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    _check(member, path)
                    if member.name in limits:
                        members[member.name] = _read(archive, member, members, limits[member.name], path)
            # gzip compares its checksum at the end of its stream.
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path}: not readable as a whole .tar.gz archive ({reason}); fetch it again") from None
    missing = [name for name in limits if name not in members]
    if missing:
        raise UserError(f"{path}: has no member {missing[0]}; is it the archive of another data set?")
    return members


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


def _check(member: tarfile.TarInfo, path: pathlib.Path) -> None:
    name = pathlib.PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{path}: refused, its member {member.name!r} points out of the archive")
    if not (member.isfile() or member.isdir()):
        raise UserError(f"{path}: refused, its member {member.name!r} is a link or device, not a file")


def _read(
    archive: tarfile.TarFile, member: tarfile.TarInfo, earlier: Mapping[str, bytes], limit: int, path: pathlib.Path
) -> bytes:
    if member.name in earlier or not member.isfile():
        raise UserError(f"{path}: refused, {member.name!r} is in it twice or is a folder")
    if member.size > limit:
        raise UserError(f"{path}: its member {member.name!r} has {member.size} bytes, at most {limit} are right")
    body = archive.extractfile(member).read()
    if len(body) != member.size:
        raise UserError(f"{path}: truncated within {member.name!r}; fetch it again")
    return body
