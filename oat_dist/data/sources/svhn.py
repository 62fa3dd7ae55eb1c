"""SVHN, cropped digits, from its two official MATLAB files.

X is [32, 32, 3, N] uint8, y is [N, 1] with 10 for the digit 0. The 531,131 "extra" images are not used.
http://ufldl.stanford.edu/housenumbers/
"""

import pathlib

import numpy as np
import scipy.io

from oat_dist.data.checksum import file_sha256
from oat_dist.data.download import Remote, obtain
from oat_dist.data.sources.source import MAX_HELD_OUT, Source, SourceOptions, check_labels, split_rows
from oat_dist.errors import UserError

SVHN_TRAIN = Remote(
    url="http://ufldl.stanford.edu/housenumbers/train_32x32.mat", checksum="md5:e26dedcc434d2e4c54c9b2d4a06d8373"
)
SVHN_TEST = Remote(
    url="http://ufldl.stanford.edu/housenumbers/test_32x32.mat", checksum="md5:eb5a983be6a315427106f1b164d9cef3"
)
CITATION = "Netzer et al., Reading Digits in Natural Images with Unsupervised Feature Learning, NIPS workshop 2011"


def read_svhn(options: SourceOptions) -> Source:
    """73,257 training images (5,000 of them for validation) and 26,032 test images in 10 classes.

    Raises:
        UserError: A file cannot be fetched, or is damaged.
    """
    folder = options.archive
    if folder is not None and not folder.is_dir():
        raise UserError(f"--source {folder}: not a folder; for svhn it holds {SVHN_TRAIN.name} and {SVHN_TEST.name}")
    paths = [
        obtain(remote, folder and folder / remote.name, options.cache, source="FOLDER with both .mat files")
        for remote in (SVHN_TRAIN, SVHN_TEST)
    ]
    train, test = (_read_mat(path) for path in paths)
    labels_N = np.concatenate((train[1], test[1]))
    counts = {"train": len(train[1]), "test": len(test[1])}
    return Source(
        images_NHWC=np.concatenate((train[0], test[0])),
        labels_N=labels_N,
        classes=tuple("0123456789"),
        splits=split_rows(labels_N, counts, options, where=str(paths[0]), default_val=MAX_HELD_OUT),
        citation=CITATION,
        # A translated or mirrored house number may be another one; the published recipe has no augmentation.
        shift_pixels=0,
        flip=False,
        sha256={path.name: file_sha256(path) for path in paths},
    )


def _read_mat(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, H, W, C] uint8 and labels [N] int64."""
    try:
        content = scipy.io.loadmat(path, variable_names=["X", "y"])
    # The parser meets bytes of any kind and lets through whatever they cause: zlib, struct, index, memory errors.
    except Exception as error:
        raise UserError(f"{path}: damaged or not a MATLAB file: {_one_line(error)}; fetch it again") from None
    x, y = content.get("X"), content.get("y")
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 4 or x.shape[:3] != (32, 32, 3):
        raise UserError(f"{path}: X must be uint8 [32, 32, 3, N], got {_describe(x)}")
    if not isinstance(y, np.ndarray) or y.dtype.kind not in "iu" or y.size != x.shape[3] or not y.size:
        raise UserError(f"{path}: y must be {x.shape[3]} integers, one per image, got {_describe(y)}")
    labels_N = y.reshape(-1).astype(np.int64)
    labels_N[labels_N == 10] = 0
    check_labels(labels_N, 10, f"{path}: y")
    return x.transpose(3, 0, 1, 2), labels_N


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else "nothing"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
