"""Images: from a source to a prepared folder, and from there to augmented batches on the device."""

from oat_dist.data.extra import open_extra
from oat_dist.data.loader import Batch, TrainLoader, evaluation_batches
from oat_dist.data.prepared import SPLITS, PreparedData, open_prepared
from oat_dist.data.writing import prepare

__all__ = [
    "SPLITS",
    "Batch",
    "PreparedData",
    "TrainLoader",
    "evaluation_batches",
    "open_extra",
    "open_prepared",
    "prepare",
]
