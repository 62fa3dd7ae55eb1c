"""The handwritten digits that come with scikit-learn."""

import numpy as np

from oat_dist.data.sources.source import Source


def read_digits() -> Source:
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
        shift_pixels=1,
        flip=False,
    )
