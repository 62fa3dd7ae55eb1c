"""Labelling images by a trained network and writing them as a data set that `data.extra` can name.

The first step of robust self-training: Carmon et al., "Unlabeled Data Improves Adversarial Robustness" (NeurIPS 2019),
Algorithm 1. The network is in evaluation mode, with running statistics; a label is the class of the largest logit, its
confidence the softmax probability of that class.

Letters: N images, H, W, C.
"""

import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from oat_dist.data import PreparedData, open_prepared
from oat_dist.data.checksum import file_sha256
from oat_dist.data.sources import SourceOptions
from oat_dist.data.sources.unlabelled import Unlabelled, Wanted, open_unlabelled
from oat_dist.data.splits import check_space, write_split
from oat_dist.data.writing import check_name, describe, hidden_folder, move
from oat_dist.distributed import default_device
from oat_dist.errors import UserError, require
from oat_dist.models.network import ConditionalNetwork
from oat_dist.progress import progress_bar
from oat_dist.runs import load_run
from oat_dist.weights import read_tensors

_BATCH_SIZE = 512


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """Which images are labelled, by what, and which of them are kept."""

    run: pathlib.Path
    """Folder of a finished run; its network labels."""
    request: str
    """The images, one of `oat_dist.data.sources.unlabelled.NAMES` with a path in place of PATH or FILE."""
    name: str
    """Name of the new data set."""
    lam: float = 0.0
    """Lambda of the predictions, in [0, 1]."""
    min_confidence: float = 0.0
    """Least probability of the predicted class for an image to be kept, in [0, 1]."""
    limit: int | None = None
    """Most images to label, the first ones; None: all."""
    options: SourceOptions
    """What is asked of the source."""
    data_root: str | None = None
    """Folder of the data set that the run was trained on; None: `data.root` of the run."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_name(self.name)
        require(0 <= self.lam <= 1, "--lam", self.lam, "must lie in [0, 1]")
        require(0 <= self.min_confidence <= 1, "--min-confidence", self.min_confidence, "must lie in [0, 1]")
        require(self.limit is None or self.limit >= 1, "--limit", self.limit, "must be at least 1")

    @property
    def arguments(self) -> list[str]:
        """The command line of launch/pseudo_label.py, without --out, that asks for the same."""
        named = {"--run": self.run, "--images": self.request, "--name": self.name}
        named |= {"--lam": self.lam or None, "--min-confidence": self.min_confidence or None, "--limit": self.limit}
        named |= {"--size": self.options.size, "--source": self.options.archive, "--data-root": self.data_root}
        return [str(part) for pair in named.items() if pair[1] is not None for part in pair]


def pseudo_label(labelling: Labelling, root: str) -> tuple[PreparedData, dict]:
    """Label images and write them as a data set with a training split alone; it is there whole or not at all.

    Args:
        labelling: What is asked.
        root: Folder of data sets; it must have none of this name.

    Returns:
        The data set, and who labelled it how: `labelled_by` of its dataset.json.

    Raises:
        UserError: The run or the images cannot be read or do not go together, no image is confident enough, there is
            such a data set already, or it cannot be written.
    """
    folder = pathlib.Path(root) / labelling.name
    expected = f"{folder} is there already; remove it, or choose another name"
    require(not folder.exists(), "--name", labelling.name, expected)
    config, network = load_run(labelling.run)
    data = open_prepared(labelling.data_root or config.data.root, config.data.dataset)
    _require_same_kind(labelling.run, data)
    wanted = Wanted(image_shape=data.image_shape, chunk_size=_BATCH_SIZE, limit=labelling.limit)
    try:
        with hidden_folder(folder) as hidden:
            with open_unlabelled(labelling.request, wanted, labelling.options) as images:
                check_space(images.count, data.image_shape, hidden, copies=1)
                pixels = hidden / "pixels"
                label_N, index_N, confidence_N = _label_all(images, network, labelling, pixels)
            image_NHWC = np.memmap(pixels, np.uint8, "r", shape=(len(label_N), *data.image_shape))
            labelled_by = {
                "run": str(labelling.run),
                "dataset": data.name,
                "model_sha256": file_sha256(labelling.run / "model.safetensors"),
                "lam": labelling.lam,
                "min_confidence": labelling.min_confidence,
                "num_images": images.count,
                "mean_confidence": float(confidence_N.mean()),
                "counts_per_class": _counts(label_N, data.classes),
            }
            about = describe(
                image_NHWC,
                name=labelling.name,
                classes=data.classes,
                counts={"train": len(label_N)},
                augmentation=(data.shift_pixels, data.flip),
                citation=f"{images.citation}; labelled by a network",
                source_sha256=images.sha256(),
                sha256=write_split(hidden, "train", image_NHWC, label_N, index_N),
                arguments=labelling.arguments,
            )
            about |= {"script": "pseudo_label.py", "labelled_by": labelled_by}
            pixels.unlink()
            (hidden / "dataset.json").write_text(json.dumps(about, indent=1))
            move(hidden, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the data set: {error.strerror or error}") from None
    return open_prepared(root, labelling.name, key="data.extra"), labelled_by


@torch.no_grad()
def predicted_labels(network: ConditionalNetwork, images_NHWC: np.ndarray, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Labels and confidences of images.

    Args:
        network: The network.
        images_NHWC: uint8.
        lam: Lambda of the predictions.

    Returns:
        [N] int64 classes and [N] float64 probabilities of them.
    """
    device = next(network.parameters()).device
    x = torch.tensor(images_NHWC).to(device).permute(0, 3, 1, 2).to(torch.float32) / 255
    confidence_N, label_N = network.predict(x, lam).double().softmax(1).max(1)
    return label_N.cpu().numpy(), confidence_N.cpu().numpy()


def _label_all(
    images: Unlabelled, network: ConditionalNetwork, labelling: Labelling, pixels: pathlib.Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label, place in the source and confidence of the images that are kept; their bytes are written to a file."""
    network, first = network.to(default_device()), 0
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    num_chunks = -(-images.count // _BATCH_SIZE)
    with pixels.open("wb") as stream, progress_bar("labelling", num_chunks, is_main=True) as advance:
        for chunk in images.chunks:
            label_N, confidence_N = predicted_labels(network, chunk, labelling.lam)
            (rows,) = np.nonzero(confidence_N >= labelling.min_confidence)
            stream.write(chunk[rows].tobytes())
            kept.append((label_N[rows], first + rows, confidence_N[rows]))
            first += len(chunk)
            advance()
    label_N, index_N, confidence_N = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    expected = f"no image of {labelling.request} is labelled with that confidence; lower it"
    require(len(label_N) > 0, "--min-confidence", labelling.min_confidence, expected)
    return label_N, index_N, confidence_N


def _require_same_kind(run: pathlib.Path, data: PreparedData) -> None:
    """The data set that is there under the name of the run's is of the kind that its network was trained on."""
    about = read_tensors(run / "model.safetensors")[1]
    if (tuple(about["classes"]), about["in_channels"]) != (data.classes, data.image_shape[2]):
        raise UserError(f"--run {run}: {data.folder} has other classes or channels than the run was trained with")


def _counts(label_N: np.ndarray, classes: Sequence[str]) -> dict[str, int]:
    return dict(zip(classes, np.bincount(label_N, minlength=len(classes)).tolist(), strict=True))
