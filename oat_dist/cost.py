"""What a run will cost, before it starts: parameters, multiply-adds, forward units. Touches neither images nor a GPU.

A forward unit is one forward pass of one image. The backward pass to the images alone (an attack step) counts one
more; the backward pass of training, to images and parameters, counts two: each is a convolution as large as the
forward one. With PGD of k steps and attacked share a = 1 - P(lambda = 0), an image of a training batch costs

    a * k * (1 + 1)     the attack of its partner
    (1 + a) * (1 + 2)   training forward and backward of itself and its partner

With loss.clean_at_one=false the share of lambda = 1 does not go through the latter itself: (1 + a - P(lambda = 1)) * 3.
With attack.early_steps, k is the mean over the epochs; with loss.self_distillation, an attacked image costs 1 more.
Objectives with more to do say so (`oat_dist.losses.Objective`): passes before the first step of the attack, further
views in the training forward (3 each), and gradients to images within the loss: one more backward pass of the whole
training forward and, to be differentiated, two more, so 6 instead of 3.

With optim.awp_gamma the training forward and backward, and the teacher's forward, come twice, less the warm-up's share.

With several widths a step does all this for each of them (of the sandwich rule: for those it chooses, on average), and
a narrower one counts by its share of the FLOPs of the whole network.

FLOPs are 2 per multiply-add of convolutions and the classifier. Norms, activations and the FiLM generators, which run
once per step on the distinct lambdas, are left out, as are the evaluation at the end and the checks of attack.guard.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from oat_dist.config import ConditioningConfig, Config, ModelConfig, of_one_width
from oat_dist.data import open_prepared
from oat_dist.export import cut_out
from oat_dist.losses import attack_plan, robust_term
from oat_dist.models import build_model
from oat_dist.models.network import ConditionalNetwork
from oat_dist.models.slimming import widths_per_step


@dataclass(frozen=True, kw_only=True)
class DataShape:
    """What the cost needs to know of a data set."""

    image_shape: tuple[int, int, int]
    """(H, W, C)."""
    num_classes: int
    """Classes."""
    num_train_images: int
    """Images of the training split."""


# The training splits are those of `launch/prepare_data.py`: validation is already taken off.
_KNOWN = {
    "cifar10": DataShape(image_shape=(32, 32, 3), num_classes=10, num_train_images=45_000),
    "cifar100": DataShape(image_shape=(32, 32, 3), num_classes=100, num_train_images=45_000),
    "svhn": DataShape(image_shape=(32, 32, 3), num_classes=10, num_train_images=68_257),
    "stl10": DataShape(image_shape=(96, 96, 3), num_classes=10, num_train_images=4_500),
    "digits": DataShape(image_shape=(8, 8, 1), num_classes=10, num_train_images=1_437),
}


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """Cost of one run."""

    parameters: int
    """Trained numbers of the network."""
    plain_parameters: int
    """Those of the same network without conditioning (film=none, norm=single)."""
    forward_flops: int
    """FLOPs of one forward pass of one image, 2 per multiply-add."""
    units_per_image: float
    """Forward units for one image of a training batch."""
    images: int
    """Images of all batches of the run, those of `data.extra` with them."""
    widths: Sequence[Mapping[str, float]]
    """`width_costs` of the network."""

    @property
    def units(self) -> float:
        """Forward units of the run."""
        return self.units_per_image * self.images

    @property
    def flops(self) -> float:
        """FLOPs of the run."""
        return self.units * self.forward_flops


def training_cost(
    config: Config, *, in_channels: int, image_size: tuple[int, int], num_classes: int, num_train_images: int
) -> TrainingCost:
    """Count the cost of a run.

    Args:
        config: Configuration of the run.
        in_channels: Channels of the images.
        image_size: (H, W) of the images.
        num_classes: Classes.
        num_train_images: Images of the training split of `data.dataset`; an epoch leaves out the incomplete batch.

    Returns:
        The cost; shares of lambda are the configured ones, a batch rounds its number of zeros up.
    """
    plain = _plain(config)
    networks = [build_model(c, in_channels=in_channels, num_classes=num_classes) for c in (config, plain)]
    attacked = 1 - config.conditioning.mass_at_zero
    clean = 1 if config.loss.clean_at_one else 1 - config.conditioning.mass_at_one
    objective = robust_term(config)
    early = config.num_early_epochs / config.optim.epochs
    steps = early * attack_plan(config, epoch=0).steps + (1 - early) * attack_plan(config).steps
    attack_units = 2 * steps + sum(objective.attack.preparation)
    # Once to find where the weights go, once there.
    passes = 2 - config.optim.awp_warmup_share if config.optim.awp_gamma else 1
    teacher_units = passes if config.loss.self_distillation else 0
    training_units = passes * (6 if objective.has_input_gradient else 3) * (clean + attacked * objective.views)
    batches = config.optim.epochs * config.steps_per_epoch(num_train_images)
    widths = width_costs(networks[0], (in_channels, *image_size))
    return TrainingCost(
        parameters=_num_parameters(networks[0]),
        plain_parameters=_num_parameters(networks[1]),
        forward_flops=widths[0]["forward_flops"],
        units_per_image=(attacked * (attack_units + teacher_units) + training_units) * _of_widths(config.model, widths),
        images=batches * config.optim.batch_size,
        widths=widths,
    )


def forward_flops(network: ConditionalNetwork, image_shape: tuple[int, int, int], width: float = 1.0) -> int:
    """FLOPs of one forward pass of one image, counted on shapes alone.

    Args:
        network: Any conditional network; it stays as it is.
        image_shape: (C, H, W).
        width: One of its widths.
    """
    shadow = copy.deepcopy(network).to("meta")
    frozen = shadow.freeze(shadow.condition(torch.zeros(1), width=width))
    with FlopCounterMode(display=False) as counter:
        shadow.attack_logits(torch.empty(1, *image_shape, device="meta"), frozen)
    return counter.get_total_flops()


def width_costs(network: ConditionalNetwork, image_shape: tuple[int, int, int]) -> list[dict]:
    """{"width", "parameters", "forward_flops"} of the network that each width makes, cut out; the largest first.

    Args:
        network: Any conditional network; it stays as it is.
        image_shape: (C, H, W).
    """
    shadow = copy.deepcopy(network).to("meta")
    return [
        {
            "width": width,
            "parameters": _num_parameters(cut_out(shadow, width)),
            "forward_flops": forward_flops(shadow, image_shape, width),
        }
        for width in reversed(network.slimming.widths)
    ]


def _plain(config: Config) -> Config:
    """The network without conditioning, of one width."""
    conditioning = ConditioningConfig(lambdas=(0.0,), film="none", norm="single")
    evaluation = dataclasses.replace(config.evaluation, noise_draws=None)
    return dataclasses.replace(of_one_width(config), conditioning=conditioning, evaluation=evaluation)


def _of_widths(cfg: ModelConfig, costs: Sequence[Mapping[str, float]]) -> float:
    """FLOPs of one forward pass of every width of a step, in those of the whole network."""
    first, *middle = (cost["forward_flops"] / costs[0]["forward_flops"] for cost in costs)
    last = middle.pop() if middle else 0.0
    chosen = (widths_per_step(cfg) - 2) / len(middle) if middle else 0.0
    return first + chosen * sum(middle) + last


def print_cost(config: Config) -> None:
    """Print what a run of this configuration costs.

    Raises:
        UserError: A data set that is neither known by name nor prepared.
    """
    shape = _data_shape(config)
    height, width, channels = shape.image_shape
    cost = training_cost(
        config,
        in_channels=channels,
        image_size=(height, width),
        num_classes=shape.num_classes,
        num_train_images=shape.num_train_images,
    )
    table = Table(title=f"{config.name}: {config.model.name} on {config.data.dataset}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in {
        "image (height x width x channels)": f"{height} x {width} x {channels}",
        "parameters": f"{cost.parameters:,}",
        "parameters without conditioning": f"{cost.plain_parameters:,}",
        "GFLOPs per forward pass of an image": f"{cost.forward_flops / 1e9:.3f}",
        **{
            f"parameters, GFLOPs of width {of['width']:g}": f"{of['parameters']:,}, {of['forward_flops'] / 1e9:.3f}"
            for of in cost.widths[1:]
        },
        "forward units per training image": f"{cost.units_per_image:.2f}",
        "training images x epochs": f"{cost.images:,}",
        "forward units of the run": f"{cost.units:.3e}",
        "FLOPs of the run": f"{cost.flops:.3e}",
    }.items():
        table.add_row(name, value)
    Console().print(table)


def _data_shape(config: Config) -> DataShape:
    if config.data.dataset in _KNOWN:
        return _KNOWN[config.data.dataset]
    data = open_prepared(config.data.root, config.data.dataset)
    return DataShape(image_shape=data.image_shape, num_classes=len(data.classes), num_train_images=data.counts["train"])


def _num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
