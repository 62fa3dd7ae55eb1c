"""A finished run: every file that the page needs, read and checked before anything is computed.

Letters: M images, H, W, C.
"""

import dataclasses
import json
import pathlib
from dataclasses import dataclass

import torch
from torch import Tensor

from oat_dist.config import Config
from oat_dist.data import PreparedData, open_prepared
from oat_dist.data.reader import open_reader
from oat_dist.dedicated import read_frontier
from oat_dist.errors import UserError
from oat_dist.models.network import ConditionalNetwork
from oat_dist.runs import load_run, require_same_images

_FILES = ("config.yaml", "provenance.json", "metrics.jsonl", "model.safetensors", "frontier.json")
_REPORT_KEYS = {"model", "dataset", "split", "num_examples", "attack", "points"}
_SAME = ("dataset", "split", "num_examples", "attack")


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run with its measurements."""

    folder: pathlib.Path
    """As it was named."""
    config: Config
    """Its configuration."""
    network: ConditionalNetwork
    """Its network, on the CPU in evaluation mode."""
    data: PreparedData
    """The data set it was trained on."""
    provenance: dict
    """provenance.json."""
    metrics: list[dict]
    """Lines of metrics.jsonl."""
    reports: dict[pathlib.Path, dict]
    """frontier.json, then what launch/evaluate.py measured."""
    frontiers: list[dict]
    """The dedicated networks beside the run that it can be held against: at most one file of launch/frontier.py."""

    @property
    def frontier(self) -> dict:
        """frontier.json."""
        return self.reports[self.folder / "frontier.json"]

    @property
    def curve(self) -> list[tuple[dict, pathlib.Path]]:
        """Points by lambda, each with the report it is from: frontier.json, and others of the same measurement."""
        found = {}
        for path, report in self.reports.items():
            if all(report[key] == self.frontier[key] for key in _SAME):
                for point in report["points"]:
                    found.setdefault(point["lam"], (point, path))
        return [found[lam] for lam in sorted(found)]


@dataclass(frozen=True, kw_only=True)
class Images:
    """The images that a run was measured on, on the host."""

    image: Tensor
    """[M, H, W, C] uint8."""
    label: Tensor
    """[M] int64."""
    index: Tensor
    """[M] int64, place in the source."""


def open_finished(folder: pathlib.Path, *, data_root: str | None = None) -> FinishedRun:
    """Read a run.

    Args:
        folder: Folder of the run.
        data_root: Folder of data sets; default: that of the run.

    Raises:
        UserError: It is no run, not finished, damaged, or its data set is not there or another.
    """
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if "config.yaml" in missing:
        raise UserError(f"{folder}: not a run (no config.yaml); name a folder that training made")
    if missing:
        raise UserError(f"{folder}: incomplete, has no {missing[0]}; its training did not finish")
    reports = {path: _report(path) for path in (folder / "frontier.json", *sorted(folder.glob("eval/*.json")))}
    provenance, metrics = _json(folder / "provenance.json"), _lines(folder / "metrics.jsonl")
    config, network = load_run(folder)
    data = open_prepared(data_root or config.data.root, config.data.dataset)
    require_same_images(folder, data)
    name = f"{reports[folder / 'frontier.json']['split']}.safetensors"
    if provenance.get("data", {}).get("sha256", {}).get(name) != data.sha256.get(name):
        raise UserError(f"{folder}: its {name} is not the one in {data.folder}; name the folder of its data sets")
    return FinishedRun(
        folder=folder,
        config=config,
        network=network,
        data=data,
        provenance=provenance,
        metrics=metrics,
        reports=reports,
        frontiers=_frontiers(folder, config, data, reports[folder / "frontier.json"]["split"]),
    )


def read_images(run: FinishedRun) -> Images:
    """All images of the split that frontier.json is about.

    Raises:
        UserError: Their file is missing or damaged.
    """
    cfg = dataclasses.replace(run.config.data, loader="memory")
    reader = open_reader(run.data, run.frontier["split"], cfg, torch.device("cpu"))
    return Images(image=reader.image, label=reader.label, index=reader.index)


def _json(path: pathlib.Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise UserError(f"{path}: damaged, not JSON") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: damaged, expected an object")
    return found


def _lines(path: pathlib.Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError:
        raise UserError(f"{path}: damaged, a line is not JSON") from None


def _report(path: pathlib.Path) -> dict:
    report = _json(path)
    if not report.keys() >= _REPORT_KEYS or not report["points"]:
        raise UserError(f"{path}: damaged, expected points and {', '.join(sorted(_REPORT_KEYS - {'points'}))}")
    return report


def _frontiers(folder: pathlib.Path, config: Config, data: PreparedData, split: str) -> list[dict]:
    """The first file of dedicated networks, in the folder of the run, with its recipe, data, split and attack."""
    own = folder.parent / f"{config.name}_frontier/{split}.json"
    for path in (own, *sorted(folder.parent.glob(f"*_frontier/{split}.json"))):
        try:
            return [{**read_frontier(path, config, data, split=split), "path": str(path)}]
        except UserError:
            continue
    return []
