"""What every source gives, and how training images are held out for validation and test.

Letters: N images, H, W, C channels.
"""

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from oat_dist.errors import UserError, require
from oat_dist.random import permutation

MAX_HELD_OUT = 5000
"""Most images that are held out for validation by default: the published number for CIFAR-10 and SVHN."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What a user may ask of a source; not every source takes every option."""

    archive: pathlib.Path | None = None
    """Local copy of the official archive, instead of a download."""
    cache: pathlib.Path = pathlib.Path("data/archives")
    """Folder of downloaded archives."""
    num_val: int | None = None
    """Training images to hold out for validation; None: the source's own number."""
    num_test: int | None = None
    """Last training images to move to the test split; None: none."""
    size: int | None = None
    """Height and width to crop and resize images to, in pixels; None: they have one size already."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for option, value in (("--val", self.num_val), ("--test", self.num_test), ("--size", self.size)):
            require(value is None or value >= 1, option, value, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set in memory, before it is written."""

    images_NHWC: np.ndarray
    """uint8, C last."""
    labels_N: np.ndarray
    """int64 in [0, number of classes)."""
    classes: tuple[str, ...]
    """Names of the classes."""
    splits: Mapping[str, np.ndarray]
    """Indices of the images of train, val and test, increasing, without overlap."""
    citation: str
    """Where the data comes from."""
    shift_pixels: int = 4
    """Default augmentation: random translation by up to this many pixels (padding by it and a random crop)."""
    flip: bool = True
    """Default augmentation: random left-right flip."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Source file -> checksum."""


def crop_shift(images_NHWC: np.ndarray) -> int:
    """Pixels of translation for images of which nothing else is known: an eighth of the shorter side, 4 of 32."""
    return min(images_NHWC.shape[1:3]) // 8


def split_rows(
    labels_N: np.ndarray,
    counts: Mapping[str, int],
    options: SourceOptions,
    *,
    where: str,
    default_val: int | None = None,
    by_class: bool = False,
) -> dict[str, np.ndarray]:
    """Divide images that lie in the order train, val, test into these splits.

    Args:
        labels_N: [N] labels of all images.
        counts: Images of each given part; val and test may be missing or 0.
        options: `num_test` moves the last images of train to test; `num_val` says how many of the rest are held out.
        where: The source, for error messages.
        default_val: Images held out when `num_val` is None; default a tenth of train, at most `MAX_HELD_OUT`.
        by_class: The training images lie class by class, so their last ones are taken from every class in proportion.

    Returns:
        Rows of each split, increasing. Held-out rows are drawn per class in proportion, the same at every call.

    Raises:
        UserError: A split would be empty, a class would lose its training images, or there are two validation parts.
    """
    num_train, num_val = counts["train"], counts.get("val", 0)
    train = np.arange(num_train)
    val = np.arange(num_train, num_train + num_val)
    test = np.arange(num_train + num_val, len(labels_N))
    if options.num_test is not None:
        moved = _last_rows(labels_N[train], options.num_test, by_class)
        train, test = np.setdiff1d(train, moved), np.concatenate((moved, test))
    if not len(test):
        raise UserError(f"{where}: has no test images; add them, or move N training images there with --test N")
    if num_val:
        require(options.num_val is None, "--val", options.num_val, f"{where} has validation images of its own")
    else:
        num = options.num_val or default_val or min(MAX_HELD_OUT, max(1, len(train) // 10))
        order = permutation(len(train), 0, "validation").numpy()
        val = train[_take_by_class(labels_N[train], num, order, "--val")]
        train = np.setdiff1d(train, val)
    return {"train": train, "val": val, "test": test}


def check_labels(labels_N: np.ndarray, num_classes: int, where: str) -> None:
    """Require labels in [0, num_classes).

    Raises:
        UserError: One is not; `where` begins the message.
    """
    wrong = labels_N[(labels_N < 0) | (labels_N >= num_classes)]
    if len(wrong):
        raise UserError(f"{where}: label {wrong[0]} is out of range, {num_classes} classes have 0 to {num_classes - 1}")


def _last_rows(labels_N: np.ndarray, num: int, by_class: bool) -> np.ndarray:
    if by_class:
        return _take_by_class(labels_N, num, np.arange(len(labels_N))[::-1], "--test")
    require(num < len(labels_N), "--test", num, f"must be less than the {len(labels_N)} training images")
    return np.arange(len(labels_N) - num, len(labels_N))


def _take_by_class(labels_N: np.ndarray, num: int, order_N: np.ndarray, option: str) -> np.ndarray:
    """`num` rows in proportion to the classes (largest remainders): of each class the first ones in the given order."""
    total = len(labels_N)
    require(num < total, option, num, f"must be less than the {total} training images")
    kinds, sizes = np.unique(labels_N, return_counts=True)
    quota, remainder = np.divmod(num * sizes, total)
    quota[np.argsort(-remainder, kind="stable")[: num - quota.sum()]] += 1
    emptied = kinds[quota == sizes]
    if len(emptied):
        raise UserError(f"{option}={num}: would leave class {emptied[0]} without training images; take fewer")
    ordered = labels_N[order_N]
    return np.sort(np.concatenate([order_N[ordered == k][:n] for k, n in zip(kinds, quota, strict=True)]))
