"""Where images come from: each source is a function that gives pixels, labels and a split."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


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


def digits() -> Source:
    """The 1,797 handwritten digits of 8x8 grey pixels that scikit-learn carries, split 80/10/10 within each class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    labels = bunch.target.astype(np.int64)
    train, rest = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    val, test = train_test_split(rest, test_size=0.5, stratify=labels[rest], random_state=0)
    return Source(
        # The pixels are counts from 0 to 16.
        images_NHWC=np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None],
        labels_N=labels,
        classes=tuple(str(name) for name in bunch.target_names),
        splits={"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)},
        citation="Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998; from scikit-learn",
    )


SOURCES: Mapping[str, Callable[[], Source]] = {"digits": digits}
