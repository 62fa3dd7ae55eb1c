"""A trained network as others' programs know networks, and its result as RobustBench keeps results.

RobustBench (Croce et al., "RobustBench: a standardized adversarial robustness benchmark", NeurIPS 2021, datasets and
benchmarks) takes an `nn.Module` from images in [0, 1] to logits, and keeps one JSON file per network in
model_info/<dataset>/<threat model>/, with accuracies in percent as strings.
"""

import json
import pathlib

from torch import Tensor, nn

from oat_dist.evaluation.specs import EXTERNAL
from oat_dist.models.network import ConditionalNetwork
from oat_dist.runs import load_run, make_folder
from oat_dist.weights import whole_file

THREAT_MODELS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
_ARCHITECTURES = {"resnet": "ResNet-", "preactresnet": "PreActResNet-", "wrn": "WideResNet-"}


class FixedLambda(nn.Module):
    """A conditional network at one lambda: deterministic, always as in evaluation, gradients to the images alone."""

    def __init__(self, network: ConditionalNetwork, lam: float, *, width: float = 1.0) -> None:
        """Freeze the network.

        Args:
            network: The network, which must not change any more; weight noise is drawn here, once and for all.
            lam: Lambda in [0, 1].
            width: Share of the channels, one of the network's widths.

        Raises:
            UserError: A lambda outside [0, 1], or a width that the network does not have.
        """
        super().__init__()
        self.network = network.requires_grad_(False)
        ((self._frozen, self._row),) = network.frozen_at((lam,), width=width)
        # Buffers, so that `.to(device)` takes them along.
        for at, tensor in enumerate(self._frozen.tensors()):
            self.register_buffer(f"frozen_{at}", tensor, persistent=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, K] of images [N, C, H, W] in [0, 1]."""
        tensors = [self.get_buffer(f"frozen_{at}") for at in range(len(self._frozen.tensors()))]
        frozen = self._frozen.with_tensors(tensors)
        return self.network.attack_logits(x, frozen.for_row(self._row, len(x)))


def robustbench_model(run: str | pathlib.Path, lam: float, *, width: float = 1.0) -> FixedLambda:
    """A trained network at one lambda as a plain module: for RobustBench's `benchmark`, AutoAttack, foolbox.

    Args:
        run: Folder of a finished run.
        lam: Lambda in [0, 1].
        width: Share of the channels, one of the network's widths.

    Returns:
        [0, 1] images to logits, on the CPU, in evaluation mode.

    Raises:
        UserError: The run is incomplete, lambda is outside [0, 1], or the network does not have this width.
    """
    return FixedLambda(load_run(run)[1], lam, width=width)


def write_model_infos(report: dict, stem: pathlib.Path) -> list[pathlib.Path]:
    """Write one file per lambda in RobustBench's field names, if AutoAttack was run as a whole; returns the paths.

    Args:
        report: In the form of frontier.json.
        stem: Path of the report without suffix; the files go to robustbench/<dataset>/<threat model>/ beside it.
    """
    names = [part["name"] for part in report["attack"].get("attacks", [])]
    if names[: len(EXTERNAL)] != list(EXTERNAL):
        return []
    threat_model = THREAT_MODELS[report["attack"]["norm"]]
    folder = make_folder(stem.parent / "robustbench" / report["dataset"] / threat_model)
    paths = []
    for point in report["points"]:
        of_width = f"_width{point['width']:g}" if "width" in point else ""
        path = folder / f"{stem.name}{of_width}_lam{point['lam']:g}.json"
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(model_info(report, point), indent=2) + "\n")
        paths.append(path)
    return paths


def model_info(report: dict, point: dict) -> dict:
    """One point of a report in RobustBench's field names; what only its authors can say is null.

    Args:
        report: In the form of frontier.json, AutoAttack's four attacks first.
        point: One of its points.
    """
    attack = report["attack"]
    after = list(point["ra_after"].values())
    info = {
        "link": None,
        "name": None,
        "authors": None,
        "additional_data": None,
        "number_forward_passes": report.get("noise_draws", 1),
        "dataset": report["dataset"],
        "venue": None,
        "architecture": architecture(report["model"]),
        "eps": f"{attack['eps'] * 255:g}/255" if attack["norm"] == "linf" else f"{attack['eps']:g}",
        "clean_acc": _percent(point["sa"]),
        "reported": None,
        "autoattack_acc": _percent(after[len(EXTERNAL) - 1]),
        "footnote": f"lambda = {point['lam']:g}" + (f", width = {point['width']:g}" if "width" in point else ""),
        "unreliable": any(check["flagged"] for check in report["checks"]),
    }
    if len(after) > len(EXTERNAL):
        info["external"] = _percent(after[-1])
    return info | {"threat_model": THREAT_MODELS[attack["norm"]], "n_examples": report["num_examples"]}


def architecture(model: str) -> str:
    """A name of ours as RobustBench writes it, e.g. WideResNet-10-2."""
    letters = model.rstrip("0123456789_")
    return _ARCHITECTURES[letters] + model[len(letters) :].replace("_", "-")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}"
