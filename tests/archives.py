"""Tiny data sets in the byte layout of the official archives, with the pixels and labels they hold."""

import gzip
import io
import pathlib
import tarfile
from collections.abc import Mapping

import numpy as np
import scipy.io


def write_tar(path: pathlib.Path, members: Mapping[str, bytes | tarfile.TarInfo]) -> pathlib.Path:
    """Write a .tar.gz; a TarInfo stands for a member without content, such as a link."""
    with tarfile.open(path, "w:gz") as archive:
        for name, body in members.items():
            info = body if isinstance(body, tarfile.TarInfo) else tarfile.TarInfo(name)
            content = b"" if isinstance(body, tarfile.TarInfo) else body
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def pixels(num: int, size: int = 32, channels: int = 3) -> np.ndarray:
    """[N, H, W, C] random bytes, always the same."""
    return np.random.default_rng(num).integers(0, 256, (num, size, size, channels), dtype=np.uint8)


def cifar10_members(num: int = 20) -> tuple[dict[str, bytes], np.ndarray, np.ndarray]:
    """Five training batches and a test batch of `num` images each; the images in order; their labels."""
    x, y = pixels(6 * num), np.tile(np.arange(10, dtype=np.uint8), 6 * num // 10)
    records = np.concatenate((y[:, None], x.transpose(0, 3, 1, 2).reshape(len(x), -1)), axis=1)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    parts = records.reshape(6, num, -1)
    members = {f"cifar-10-batches-bin/{n}": p.tobytes() for n, p in zip(names, parts, strict=True)}
    return {"cifar-10-batches-bin/readme.html": b"hello", **members}, x, y


def cifar100_members() -> tuple[dict[str, bytes], np.ndarray, np.ndarray]:
    """200 training and 100 test images; coarse labels differ from the fine ones."""
    x, y = pixels(300), np.tile(np.arange(100, dtype=np.uint8), 3)
    records = np.concatenate((y[:, None] // 5, y[:, None], x.transpose(0, 3, 1, 2).reshape(300, -1)), axis=1)
    names = "".join(f"name_{i:02}\n" for i in range(100)).encode()
    folder = "cifar-100-binary"
    members = {f"{folder}/train.bin": records[:200].tobytes(), f"{folder}/test.bin": records[200:].tobytes()}
    return {**members, f"{folder}/fine_label_names.txt": names}, x, y


def stl10_members() -> tuple[dict[str, bytes], np.ndarray, np.ndarray]:
    """40 training, 10 test and 3 unlabelled images; stored column by column, labels from 1."""
    x, y = pixels(50, 96), np.tile(np.arange(10), 5)
    stored = x.transpose(0, 3, 2, 1)
    files = {
        "test_X": stored[40:], "test_y": y[40:] + 1, "train_X": stored[:40], "train_y": y[:40] + 1,
        "unlabeled_X": stored[:3],
    }  # fmt: skip
    return {f"stl10_binary/{n}.bin": a.astype(np.uint8).tobytes() for n, a in files.items()}, x, y


def write_svhn(folder: pathlib.Path) -> tuple[pathlib.Path, np.ndarray, np.ndarray]:
    """A folder with both files: 40 training and 10 test images; digit 0 is stored as 10."""
    folder.mkdir(exist_ok=True)
    x, y = pixels(50), np.tile(np.arange(10), 5)
    stored = np.where(y == 0, 10, y).astype(np.uint8)[:, None]
    for name, rows in (("train", slice(40)), ("test", slice(40, None))):
        content = {"X": x[rows].transpose(1, 2, 3, 0), "y": stored[rows]}
        scipy.io.savemat(folder / f"{name}_32x32.mat", content, do_compression=True)
    return folder, x, y


def gzip_bomb(path: pathlib.Path, num_bytes: int) -> pathlib.Path:
    """A small .tar.gz with one member of zeros."""
    info = tarfile.TarInfo("zeros.bin")
    info.size = num_bytes
    with gzip.open(path, "wb") as stream:
        stream.write(info.tobuf() + bytes(num_bytes + 1024))
    return path
