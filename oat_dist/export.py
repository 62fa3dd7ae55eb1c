"""One width of a slimmable network as an ordinary network, and as a folder that is read like a run.

    narrow = cut_out(network, 0.5)                      a network of its own, with the same logits
    folder = export_run("runs/<run>", 0.5)              config.yaml and model.safetensors
    config, narrow = oat_dist.load_run(folder)

The configuration of the folder says the channels in numbers (`model.channels`), so the network is built as any other.
"""

import copy
import dataclasses
import pathlib
import shutil

import torch

from oat_dist.config import Config, of_one_width
from oat_dist.config_io import write_config
from oat_dist.errors import UserError
from oat_dist.models import model_channels
from oat_dist.models.layers import SlimmableConv2d, SlimmableLinear
from oat_dist.models.network import ConditionalNetwork
from oat_dist.models.norm import FiLMDualBN2d
from oat_dist.models.slimming import WHOLE, channels_at
from oat_dist.runs import load_run
from oat_dist.weights import read_tensors, write_tensors


def cut_out(network: ConditionalNetwork, width: float) -> ConditionalNetwork:
    """A network that has the channels of one width and nothing else.

    Args:
        network: The slimmable network; it stays as it is.
        width: One of its widths.

    Returns:
        A network with the same logits at the same lambdas, on the device, in the dtype and in the mode of `network`.

    Raises:
        UserError: The network was not trained at this width.
    """
    network.slimming.require(width)
    narrow = copy.deepcopy(network)
    for name, module in list(narrow.named_modules()):
        if isinstance(module, SlimmableConv2d | SlimmableLinear | FiLMDualBN2d) and ".narrow." not in name:
            narrow.set_submodule(name, module.cut(width))
    narrow.slimming = WHOLE
    narrow._number_sites()
    return narrow.to(memory_format=torch.channels_last)


def cut_config(config: Config, width: float) -> Config:
    """The configuration that builds what `cut_out` gives.

    Args:
        config: Of the slimmable network.
        width: One of its widths.
    """
    channels = tuple(channels_at(count, width) for count in model_channels(config.model))
    if width == 1:
        # Written as the user wrote it, or a network trained alone would not be found again by its fingerprint.
        channels = config.model.channels
    config = of_one_width(config)
    model = dataclasses.replace(config.model, channels=channels, init_from=None)
    return dataclasses.replace(config, name=f"{config.name}-width-{width:g}", model=model)


def export_run(
    run: str | pathlib.Path, width: float, folder: str | pathlib.Path | None = None, *, key: str = "width"
) -> pathlib.Path:
    """Write one width of a finished run as a folder of its own.

    Args:
        run: Folder of the run.
        width: One of its widths.
        folder: Where to; default: width_<width> in the folder of the run.
        key: What to call the width in a message.

    Returns:
        The folder, with config.yaml and model.safetensors; it appears whole or not at all.

    Raises:
        UserError: The run is not finished, was not trained at this width, or the folder exists or cannot be written.
    """
    config, network = load_run(run)
    network.slimming.require(width, key)
    folder = pathlib.Path(run, f"width_{width:g}") if folder is None else pathlib.Path(folder)
    if folder.exists():
        raise UserError(f"{folder}: exists already; name another folder, or remove it")
    about = read_tensors(pathlib.Path(run, "model.safetensors"))[1]
    temporary = folder.with_name(f".{folder.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_config(cut_config(config, width), temporary / "config.yaml")
        write_tensors(cut_out(network, width).state_dict(), temporary / "model.safetensors", about)
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
