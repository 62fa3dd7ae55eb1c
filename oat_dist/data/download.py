"""Official archives: fetched once into a cache folder by pooch, or taken from where the user has them.

A download goes into a hidden .part file, which a later call resumes where the server allows it; it gets its name only
when its checksum is the official one.
"""

import contextlib
import logging
import os
import pathlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pooch
import requests

from oat_dist.errors import UserError
from oat_dist.progress import byte_bar

_ATTEMPTS = 2
_TIMEOUT_S = (10, 60)
"""To connect, and between two pieces."""
_CHUNK_BYTES = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A file on an official server."""

    url: str
    """Where it is."""
    checksum: str
    """What it must be, as pooch writes it: algorithm:digits."""

    @property
    def name(self) -> str:
        """File name."""
        return self.url.rpartition("/")[2]


def obtain(
    remote: Remote, archive: pathlib.Path | None, cache: pathlib.Path, *, source: str = "ARCHIVE"
) -> pathlib.Path:
    """The user's own copy of an official file, or the one in the cache, fetched if need be.

    Args:
        remote: The official file.
        archive: The user's copy, or None. One that differs from the official file is used, and a note printed.
        cache: Folder of downloads.
        source: What `--source` takes in place of this download, for the message of a failed one.

    Raises:
        UserError: There is no such copy, or the download failed.
    """
    if archive is None:
        return fetch(remote, cache, source=source)
    if not archive.is_file():
        raise UserError(f"--source {archive}: there is no such file; expected a copy of {remote.url}")
    algorithm, _, digits = remote.checksum.partition(":")
    try:
        found = pooch.file_hash(str(archive), alg=algorithm)
    except OSError as error:
        raise UserError(f"--source {archive}: cannot be read: {error.strerror}") from None
    if found != digits:
        print(f"note: {archive} is not the official {remote.name} ({algorithm} {found})", file=sys.stderr)
    return archive


def fetch(remote: Remote, cache: pathlib.Path, *, source: str = "ARCHIVE") -> pathlib.Path:
    """Download a file unless the cache has it, checked by its checksum either way.

    Args:
        remote: The official file.
        cache: Folder of downloads; made if need be.
        source: What `--source` takes instead, for the message.

    Returns:
        The file in the cache.

    Raises:
        UserError: Two attempts failed, or the cache cannot be written.
    """
    path = cache / remote.name
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with _quiet_pooch():
                pooch.retrieve(
                    remote.url,
                    known_hash=remote.checksum,
                    fname=remote.name,
                    path=cache,
                    downloader=_resuming_download,
                )
            return path
        except requests.RequestException as error:
            reason = f"download failed: {' '.join(str(error).split())}"
        except ValueError:
            reason = f"what came has the wrong checksum (expected {remote.checksum})"
        except OSError as error:
            # What is there of it would only keep a full disk full.
            with contextlib.suppress(OSError):
                _part(path).unlink()
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
        if attempt < _ATTEMPTS:
            print(f"note: {remote.url}: {reason}; trying again", file=sys.stderr)
    raise UserError(f"{remote.url} -> {path}: {reason}; run again, or give your own copy with --source {source}")


def _part(path: pathlib.Path) -> pathlib.Path:
    """Where a file is while it comes."""
    return path.with_name(f".{path.name}.part")


def _resuming_download(url: str, output_file: str, _pooch: object) -> None:
    """A pooch downloader that goes on where a killed one stopped.

    Raises:
        requests.RequestException: Network or server failed; what came stays in the .part file.
        OSError: The file cannot be written.
    """
    output = pathlib.Path(output_file)
    part = _part(output.with_name(url.rpartition("/")[2]))
    # pooch makes this file empty and would leave it behind when killed.
    output.unlink(missing_ok=True)
    have = part.stat().st_size if part.exists() else 0
    # "identity": else a server may call the .gz an encoding, and what arrives is unpacked.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, stream=True, timeout=_TIMEOUT_S, headers=headers) as response:
        # 416: there are no bytes beyond the part, so it is complete, or wrong, as its checksum will tell.
        if response.status_code != requests.codes.requested_range_not_satisfiable:
            response.raise_for_status()
            start = have if response.headers.get("Content-Range", "").startswith(f"bytes {have}-") else 0
            total = start + int(response.headers.get("Content-Length", 0))
            with part.open("ab" if start else "wb") as stream, byte_bar(url, total, start) as advance:
                for chunk in response.iter_content(_CHUNK_BYTES):
                    stream.write(chunk)
                    advance(len(chunk))
    os.replace(part, output)


@contextlib.contextmanager
def _quiet_pooch() -> Iterator[None]:
    """No log lines of pooch's: this module says what matters."""
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
