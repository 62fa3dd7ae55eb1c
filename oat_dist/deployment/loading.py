"""Trained networks for a program that serves them: lambda with every call, one for all images or one for each.

    model = oat_dist.load("runs/<run>")                 or an exported .safetensors file
    logits_NK = model(images, 0.3)                      lam a number, or one per image

An image's logits do not depend on the other images of its batch nor on their lambdas. Nothing here unpickles: run
folders and .safetensors files are read, .pt2 archives are not, because `torch.export.load` unpickles parts of them.

Letters: N images, K classes.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from oat_dist.config_io import from_dict
from oat_dist.deployment.folding import FoldedNetwork, fold_network
from oat_dist.deployment.lambda_input import LambdaNetwork, with_lambda
from oat_dist.errors import UserError
from oat_dist.export import cut_out
from oat_dist.models import build_model
from oat_dist.models.network import ConditionalNetwork
from oat_dist.runs import load_run
from oat_dist.weights import load_exactly, read_about, read_tensors

FORMAT = "oat-dist-deployed/1"
_LAM_TOLERANCE = 1e-6
"""A folded network takes its lambda in float32 too."""


class LoadedModel(nn.Module):
    """What `load` returns; on the CPU, in evaluation mode, without gradients.

    Attributes:
        lam: The one lambda of a folded network, else None.
        classes: Names of the classes, in the order of the logits.
        image_shape: (height, width, channels) of the training images, or None where the file does not say.
    """

    def __init__(self, network: nn.Module, about: Mapping[str, Any]) -> None:
        """Wrap a network; see `load`."""
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.lam = about["lam"] if isinstance(network, FoldedNetwork) else None
        self.classes = tuple(about["classes"])
        self.image_shape = tuple(about["image_shape"]) if "image_shape" in about else None

    @torch.no_grad()
    def forward(self, x: Tensor, lam: float | Tensor | Sequence[float] | None = None) -> Tensor:
        """Logits [N, K] of images.

        Args:
            x: [N, C, H, W] in [0, 1], of the device and the dtype of the network.
            lam: In [0, 1]; one, or one per image. A folded network takes its own lambda or none.

        Raises:
            UserError: No lambda, one outside [0, 1], one that a folded network does not have, or not one per image.
        """
        lam_N = self._checked(lam, len(x))
        if isinstance(self.network, FoldedNetwork):
            return self.network(x)
        if isinstance(self.network, LambdaNetwork):
            return self.network(x, lam_N.to(x.device, x.dtype))
        return self.network.predict(x, lam_N)

    def _checked(self, lam: float | Tensor | Sequence[float] | None, num_images: int) -> Tensor:
        if lam is None:
            if self.lam is None:
                raise UserError(
                    "lam=None: this network takes lambda with every call, a number in [0, 1] or one per image"
                )
            lam = self.lam
        try:
            lam_N = torch.as_tensor(lam, dtype=torch.float64).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"lam={lam!r}: must be a number in [0, 1], or one per image") from None
        if lam_N.dim() and lam_N.shape != (num_images,):
            raise UserError(
                f"lam: shape {list(lam_N.shape)} for {num_images} images; give one number, or one per image"
            )
        wrong = lam_N[~((lam_N >= 0) & (lam_N <= 1))]
        if len(wrong.flatten()):
            raise UserError(f"lam={wrong.flatten()[0].item()}: lambda must lie in [0, 1]")
        if self.lam is not None and bool(((lam_N - self.lam).abs() > _LAM_TOLERANCE).any()):
            raise UserError(f"lam: this network was exported at {self.lam:g} alone; export with --lam input for others")
        return lam_N.expand(num_images)


def load(path: str | pathlib.Path, *, width: float = 1.0) -> LoadedModel:
    """Read a trained network to serve it.

    Args:
        path: Folder of a finished run, or a .safetensors file of `launch/export.py`.
        width: Share of the channels, one of the run's model.widths; an exported file has one width alone.

    Returns:
        The network, called as `model(x, lam)`.

    Raises:
        UserError: A missing, incomplete, damaged or foreign file, or a width that the network does not have.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        config, network = load_run(path)
        network.slimming.require(width)
        about = read_about(path / "model.safetensors")
        return LoadedModel(cut_out(network, width) if len(config.model.widths) > 1 else network, about)
    if not path.exists():
        raise UserError(f"{path}: does not exist; name the folder of a run, or an exported .safetensors file")
    if path.suffix != ".safetensors":
        why = "torch.export.load, which reads it, unpickles" if path.suffix == ".pt2" else "of another program"
        raise UserError(f"{path}: not read here ({why}); name the folder of a run, or an exported .safetensors file")
    if width != 1:
        raise UserError(f"width={width:g}: an exported file has one width; leave it out, or name the folder of the run")
    tensors, about = read_tensors(path)
    return LoadedModel(_rebuilt(path, tensors, about), about)


def about_export(network: ConditionalNetwork, config: Mapping[str, Any], lam: float | None, run: Mapping) -> dict:
    """What the header of an exported file says: enough to build the network again.

    Args:
        network: The network that was exported.
        config: Its configuration as plain dictionaries.
        lam: Lambda, or None for all.
        run: The header of the run's model.safetensors.
    """
    conditioning = config["conditioning"] if lam is None else {"film": "none", "norm": "single"}
    settings = {"model": {**config["model"], "init_from": None}, "conditioning": conditioning}
    settings["data"] = {"normalise": network.pixel_mean is not None}
    images = {key: run[key] for key in ("in_channels", "image_shape", "classes", "dataset") if key in run}
    return {
        "format": FORMAT,
        "architecture": config["model"]["name"],
        "lam": "input" if lam is None else lam,
        **images,
        "config": settings,
    }


def _rebuilt(path: pathlib.Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> nn.Module:
    if about.get("format") != FORMAT:
        hint = "; name the folder of its run" if path.name == "model.safetensors" else ""
        raise UserError(f"{path}: format {about.get('format')!r}, expected {FORMAT!r} of launch/export.py{hint}")
    try:
        config = from_dict(about["config"])
        network = build_model(config, in_channels=about["in_channels"], num_classes=len(about["classes"]))
        is_input = about["lam"] == "input"
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged header: {type(error).__name__} {error}") from None
    model = with_lambda(network) if is_input else fold_network(network, 0.0)
    model.to(next(iter(tensors.values())).dtype)
    load_exactly(model, tensors, path)
    return model
