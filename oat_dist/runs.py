"""A run is a folder; this file makes it, says where everything in it is, and reads a finished one back.

<output_dir>/<time>_<name>_<fingerprint>/
config.yaml  deepspeed.json  provenance.json  metrics.jsonl  timings.jsonl  tensorboard/
model.safetensors  frontier.json  frontier.png  frontier.svg  eval/*.json  report.html
checkpoints/ (see checkpoint.py)  guard.json (after a collapse, see guard.py)
"""

import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
from importlib import metadata

import torch

from oat_dist.config import Config, fingerprint
from oat_dist.config_io import read_config, write_config
from oat_dist.data import PreparedData
from oat_dist.errors import UserError
from oat_dist.models import build_model
from oat_dist.models.network import ConditionalNetwork
from oat_dist.weights import load_exactly, read_tensors, whole_file, write_tensors

_PACKAGES = ("torch", "triton", "deepspeed", "ffcv", "numpy", "safetensors")
_FORMAT = "oat-dist/1"


def create_run(
    config: Config, data: PreparedData, deepspeed: dict, ranks: int, *, extra: PreparedData | None = None
) -> pathlib.Path:
    """Make the folder of a new run and write down what it is made from.

    Args:
        config: Its configuration.
        data: Its data set.
        deepspeed: The derived DeepSpeed configuration.
        ranks: Number of ranks.
        extra: The data set of `data.extra`.

    Returns:
        The folder, which did not exist before.

    Raises:
        UserError: It cannot be written.
    """
    now = datetime.datetime.now()
    stem = f"{now:%Y%m%d-%H%M%S}_{config.name}_{fingerprint(config)}"
    try:
        run = _new_folder(pathlib.Path(config.output_dir), stem)
        write_config(config, run / "config.yaml")
        (run / "deepspeed.json").write_text(json.dumps(deepspeed, indent=1))
        about_data = {"data": _about(data)} | ({"extra_data": _about(extra)} if extra else {})
        provenance = {**_circumstances(ranks), **about_data, "resumed": []}
        (run / "provenance.json").write_text(json.dumps(provenance, indent=1))
    except OSError as error:
        raise UserError(f"output_dir={config.output_dir!r}: cannot write a run: {error.strerror or error}") from None
    return run


def note_resume(run: pathlib.Path, step: int, ranks: int) -> None:
    """Add to provenance.json under which circumstances a run goes on.

    Args:
        run: Folder of the run.
        step: Optimiser steps done.
        ranks: Number of ranks now.
    """
    path = run / "provenance.json"
    provenance = json.loads(path.read_text())
    provenance["resumed"].append({"step": step, **_circumstances(ranks)})
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(provenance, indent=1))


def save_model(network: ConditionalNetwork, data: PreparedData, path: pathlib.Path) -> None:
    """Write a network as safetensors; image shape and classes go into the header, so that it can be rebuilt.

    Args:
        network: Network to save.
        data: Data set it was trained on.
        path: Target; written under a temporary name and renamed.
    """
    about = {
        "format": _FORMAT,
        "in_channels": data.image_shape[2],
        "image_shape": data.image_shape,
        "classes": data.classes,
        "dataset": data.name,
    }
    write_tensors(network.state_dict(), path, about)


def load_run(run: str | pathlib.Path) -> tuple[Config, ConditionalNetwork]:
    """Read the configuration and the trained network of a run.

    Args:
        run: Folder of a finished run.

    Returns:
        The configuration, and the network on the CPU in evaluation mode.

    Raises:
        UserError: The folder, or a file in it, is missing or does not fit.
    """
    run = pathlib.Path(run)
    if not (run / "config.yaml").is_file():
        raise UserError(f"--run {run}: not a run (no config.yaml); name a folder that training made")
    path = run / "model.safetensors"
    if not path.is_file():
        raise UserError(f"--run {run}: has no model.safetensors; its training did not finish")
    config = read_config(run / "config.yaml")
    tensors, about = read_tensors(path)
    if about.get("format") != _FORMAT:
        raise UserError(f"{path}: format {about.get('format')!r}, expected {_FORMAT!r}")
    network = build_model(config, in_channels=about["in_channels"], num_classes=len(about["classes"]))
    load_exactly(network, tensors, path)
    return config, network.eval()


def require_same_images(run: str | pathlib.Path, data: PreparedData) -> None:
    """Check that a data set has the images and classes that a run was trained on.

    Args:
        run: Folder of a finished run.
        data: The data set.

    Raises:
        UserError: Another image size (where the run says its own), other channels, or another number of classes.
    """
    _, about = read_tensors(pathlib.Path(run) / "model.safetensors")
    where = f"--run {run}: its network cannot be measured on {data.folder}"
    if len(about["classes"]) != len(data.classes):
        raise UserError(f"{where}: {len(data.classes)} classes there, {len(about['classes'])} in the network")
    trained = tuple(about.get("image_shape", (*data.image_shape[:2], about["in_channels"])))
    if trained != tuple(data.image_shape):
        ours, theirs = ("x".join(map(str, shape)) for shape in (trained, data.image_shape))
        raise UserError(f"{where}: images of {theirs} there, the network was trained on {ours}")


def make_folder(folder: pathlib.Path) -> pathlib.Path:
    """Make a folder and its parents where they are missing.

    Raises:
        UserError: It cannot be made, or nothing can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror or error}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: cannot be written; give write permission, or use a copy of the folder")
    return folder


def free_stem(folder: pathlib.Path, stem: str) -> pathlib.Path:
    """A path in `folder` (made if need be) of which no STEM.json exists: `stem`, else `stem-2`, `stem-3`, ...

    Raises:
        UserError: As `make_folder`.
    """
    make_folder(folder)
    attempt = 1
    while (path := folder / (stem if attempt == 1 else f"{stem}-{attempt}")).with_name(f"{path.name}.json").exists():
        attempt += 1
    return path


def _new_folder(parent: pathlib.Path, stem: str) -> pathlib.Path:
    parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, 1000):
        folder = parent / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise FileExistsError(f"1000 runs named {stem}")


def _about(data: PreparedData) -> dict:
    """What identifies the images of a data set."""
    return {
        "name": data.name,
        "counts": dict(data.counts),
        "sha256": dict(data.sha256),
        "source_sha256": dict(data.source_sha256),
    }


def _circumstances(ranks: int) -> dict:
    """When, how and where this process runs."""
    return {
        "command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "ranks": ranks,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "gpu": _gpu()},
    }


def _commit() -> str | None:
    """Commit of the source tree this package runs from, with `-dirty` for uncommitted changes."""
    try:
        here = pathlib.Path(__file__).parent
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Model name of the CPU, where Linux tells it."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
