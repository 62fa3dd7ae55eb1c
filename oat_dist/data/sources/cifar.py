"""CIFAR-10 and CIFAR-100 from their official binary archives.

A record is the label (CIFAR-100: coarse label, fine label) and 3 x 32 x 32 bytes, channel by channel, row by row. The
first 50,000 records are for training. https://www.cs.toronto.edu/~kriz/cifar.html
"""

import numpy as np

from oat_dist.data.archives import read_members, text_lines
from oat_dist.data.checksum import file_sha256
from oat_dist.data.download import Remote, obtain
from oat_dist.data.sources.source import MAX_HELD_OUT, Source, SourceOptions, check_labels, split_rows
from oat_dist.errors import UserError

CIFAR10 = Remote(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", checksum="md5:c32a1d4ab5d03f1284b67883e8d87530"
)
CIFAR100 = Remote(
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", checksum="md5:03b5dce01913d631647c71ecec9e9cb8"
)
CITATION = "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, University of Toronto, 2009"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_SHAPE_CHW = (3, 32, 32)
# The whole data set unpacked has 184.8 million bytes.
_MAX_BYTES = 200_000_000


def read_cifar10(options: SourceOptions) -> Source:
    """50,000 training images (5,000 of them for validation) and 10,000 test images in 10 classes.

    Raises:
        UserError: The archive cannot be fetched, or is damaged.
    """
    folder = "cifar-10-batches-bin"
    train = [f"{folder}/data_batch_{number}.bin" for number in range(1, 6)]
    return _read(CIFAR10, options, train, f"{folder}/test_batch.bin", labels=1)


def read_cifar100(options: SourceOptions) -> Source:
    """50,000 training images (5,000 of them for validation) and 10,000 test images in 100 (fine) classes.

    Raises:
        UserError: The archive cannot be fetched, or is damaged.
    """
    folder = "cifar-100-binary"
    names = f"{folder}/fine_label_names.txt"
    return _read(CIFAR100, options, [f"{folder}/train.bin"], f"{folder}/test.bin", labels=2, names=names)


def _read(
    remote: Remote, options: SourceOptions, train: list[str], test: str, *, labels: int, names: str | None = None
) -> Source:
    """Read an archive whose records begin with `labels` labels, the last of which counts."""
    path = obtain(remote, options.archive, options.cache)
    wanted = [*train, test, *([names] if names else [])]
    members = read_members(path, dict.fromkeys(wanted, _MAX_BYTES), max_total_bytes=_MAX_BYTES)
    classes = text_lines(members[names], f"{path}: {names}", 100) if names else CIFAR10_CLASSES
    parts = [_records(members[name], labels, f"{path}: {name}", len(classes)) for name in (*train, test)]
    labels_N = np.concatenate([part[1] for part in parts])
    counts = {"train": sum(len(part[1]) for part in parts[:-1]), "test": len(parts[-1][1])}
    return Source(
        images_NHWC=np.concatenate([part[0] for part in parts]),
        labels_N=labels_N,
        classes=classes,
        splits=split_rows(labels_N, counts, options, where=str(path), default_val=MAX_HELD_OUT),
        citation=CITATION,
        sha256={path.name: file_sha256(path)},
    )


def _records(body: bytes, labels: int, where: str, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, H, W, C] uint8 and labels [N] int64."""
    record_bytes = labels + int(np.prod(_SHAPE_CHW))
    if not body or len(body) % record_bytes:
        raise UserError(f"{where}: has {len(body)} bytes, must be a multiple of the {record_bytes} of a record")
    records = np.frombuffer(body, np.uint8).reshape(-1, record_bytes)
    labels_N = records[:, labels - 1].astype(np.int64)
    check_labels(labels_N, num_classes, where)
    return records[:, labels:].reshape(-1, *_SHAPE_CHW).transpose(0, 2, 3, 1), labels_N
