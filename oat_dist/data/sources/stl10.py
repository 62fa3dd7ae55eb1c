"""STL-10 from its official binary archive.

Images are 3 x 96 x 96 bytes, channel by channel and *column* by column; labels are 1 to 10, one byte each, in a file of
their own. The 100,000 unlabelled images are passed over here; `unlabelled.py` reads them. https://cs.stanford.edu/~acoates/stl10/
"""

import numpy as np

from oat_dist.data.archives import read_members
from oat_dist.data.checksum import file_sha256
from oat_dist.data.download import Remote, obtain
from oat_dist.data.sources.source import Source, SourceOptions, check_labels, split_rows
from oat_dist.errors import UserError

STL10 = Remote(
    url="http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz", checksum="md5:91f7769df0f17e558f3565bffb0c7dfb"
)
CITATION = "Coates, Lee and Ng, An Analysis of Single-Layer Networks in Unsupervised Feature Learning, AISTATS 2011"
CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")

IMAGE_BYTES = 3 * 96 * 96
"""Bytes of an image."""
MAX_BYTES = 115_000 * IMAGE_BYTES
"""Most bytes that the archive may unpack to: it has 113,000 images."""

# There are 8,000 test images.
_MAX_MEMBER_BYTES = 8_000 * IMAGE_BYTES
# A tenth of the 5,000 training images; the test set selects nothing.
_NUM_VAL = 500


def read_stl10(options: SourceOptions) -> Source:
    """5,000 training images (500 of them for validation) and 8,000 test images of 96x96 pixels in 10 classes.

    Raises:
        UserError: The archive cannot be fetched, or is damaged.
    """
    path = obtain(STL10, options.archive, options.cache)
    names = [f"stl10_binary/{part}_{kind}.bin" for part in ("train", "test") for kind in "Xy"]
    members = read_members(path, dict.fromkeys(names, _MAX_MEMBER_BYTES), max_total_bytes=MAX_BYTES)
    train, test = (_part(members, x, y, path) for x, y in (names[:2], names[2:]))
    labels_N = np.concatenate((train[1], test[1]))
    counts = {"train": len(train[1]), "test": len(test[1])}
    return Source(
        images_NHWC=np.concatenate((train[0], test[0])),
        labels_N=labels_N,
        classes=CLASSES,
        splits=split_rows(labels_N, counts, options, where=str(path), default_val=_NUM_VAL),
        citation=CITATION,
        sha256={path.name: file_sha256(path)},
    )


def _part(members: dict[str, bytes], x: str, y: str, path: object) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, H, W, C] uint8 and labels [N] int64 of one part."""
    images, labels_N = members[x], np.frombuffer(members[y], np.uint8).astype(np.int64) - 1
    if not images or len(images) != len(labels_N) * IMAGE_BYTES:
        expected = f"{IMAGE_BYTES} for each of the {len(labels_N)} labels in {y}"
        raise UserError(f"{path}: {x}: has {len(images)} bytes, must have {expected}")
    check_labels(labels_N, len(CLASSES), f"{path}: {y} (less 1)")
    return images_of(images), labels_N


def images_of(body: bytes) -> np.ndarray:
    """Images [N, H, W, C] uint8 from their stored bytes."""
    images_NCWH = np.frombuffer(body, np.uint8).reshape(-1, 3, 96, 96)
    return images_NCWH.transpose(0, 3, 2, 1)
