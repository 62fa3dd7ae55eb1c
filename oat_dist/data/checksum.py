"""Checksums of files."""

import hashlib
import pathlib


def file_sha256(path: pathlib.Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
