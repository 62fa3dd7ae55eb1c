"""Layers of a deployed network: what those of training compute at test time, in standard operators alone.

A deployed network is a copy of the conditional one whose layers are exchanged for these, so that the forward of
`models/` is written once. They are called as the layers they replace.

Letters: N images, C channels, K classes.
"""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from oat_dist.errors import UserError
from oat_dist.models.condition import Frozen
from oat_dist.models.conditionalise import ConditionalisedNetwork
from oat_dist.models.layers import SlimmableConv2d
from oat_dist.models.network import ConditionalNetwork
from oat_dist.models.norm import ACTIVATIONS, FiLMDualBN2d
from oat_dist.models.slimming import WHOLE


class PlainConv2d(nn.Conv2d):
    """A convolution that takes no notice of the condition."""

    def forward(self, x: Tensor, cond: object) -> Tensor:
        """[N, in, H, W] -> [N, out, H / stride, W / stride]."""
        return super().forward(x)


class PlainLinear(nn.Linear):
    """A classifier that takes no notice of the condition."""

    def forward(self, features: Tensor, cond: object) -> Tensor:
        """[N, F] -> logits [N, K]."""
        return super().forward(features)


class Site(nn.Module):
    """Where a norm was: residual and activation, which are all that is left of one that went into its convolution.

    Attributes:
        activation: That of the norm, set by `plain_copy`.
    """

    activation = "relu"

    def forward(self, x: Tensor, cond: object, residual: Tensor | None = None, activate: bool = True) -> Tensor:
        """[N, C, H, W], of the same shape."""
        x = self.scaled(x, cond)
        x = x if residual is None else x + residual
        return ACTIVATIONS[self.activation](x) if activate else x

    def scaled(self, x: Tensor, cond: object) -> Tensor:
        """What is left of the norm."""
        return x


class Affine(Site):
    """A norm at one lambda: a scale and a shift per channel."""

    def __init__(self, scale_C: Tensor, shift_C: Tensor) -> None:
        """Keep both as [C, 1, 1] parameters that are not trained."""
        super().__init__()
        self.scale = nn.Parameter(scale_C[:, None, None].clone(), requires_grad=False)
        self.shift = nn.Parameter(shift_C[:, None, None].clone(), requires_grad=False)

    def scaled(self, x: Tensor, cond: object) -> Tensor:
        """See `Site`."""
        return x * self.scale + self.shift


class AffinePerImage(Site):
    """A norm whose scale and shift, [N, C] each, come with the condition, at its own position there."""

    def __init__(self, index: int) -> None:
        """Keep the position."""
        super().__init__()
        self.index = index

    def scaled(self, x: Tensor, cond: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
        """See `Site`."""
        scale_NC, shift_NC = cond[self.index]
        return x * scale_NC[:, :, None, None] + shift_NC[:, :, None, None]


def require_deployable(network: ConditionalNetwork, lam: float | None, key: str = "lam") -> None:
    """Check that a network is one deterministic function at a lambda.

    Args:
        network: The network.
        lam: Lambda, or None for all.
        key: What to call it in a message.

    Raises:
        UserError: A lambda outside [0, 1], weight noise, or a network of `conditionalise`.
    """
    if lam is not None and not 0 <= lam <= 1:
        raise UserError(f"{key}={lam}: lambda must lie in [0, 1]")
    if network.is_stochastic:
        raise UserError(
            "conditioning.kind=float: answers by a mean over draws of weight noise, which no constants can stand for; "
            "serve the run itself (`oat_dist.load`), or export a network of conditioning.kind=film"
        )
    if isinstance(network, ConditionalisedNetwork):
        name = type(network.module).__name__
        raise UserError(f"module {name}: networks of `conditionalise` are not exported; use those of model.name")


def plain_copy(network: ConditionalNetwork, frozen: Frozen, site: Callable[[FiLMDualBN2d], Site]) -> ConditionalNetwork:
    """A copy of a network whose layers are plain.

    Args:
        network: The network, which stays as it is.
        frozen: It as constants.
        site: Makes the plain site in place of a norm.

    Returns:
        A network in evaluation mode, which has no generators any more: call its `_logits` on normalised images.
    """
    # Generators can be most of a network; they are not needed, so they are not copied.
    shared = {id(part): None for part in (network.encoder, network.film_trunk) if part is not None}
    shared |= {id(module.film): None for module in network.sites if module.film is not None}
    body = copy.deepcopy(network, shared)
    body.encoder = body.film_trunk = None
    body.sites, body.layers, body.slimming = (), {}, WHOLE
    for norm in network.sites:
        plain = site(norm)
        plain.activation = norm.activation
        body.set_submodule(norm.name, plain)
    for name, layer in network.layers.items():
        paths = {own: f"{name}.{own}" for own in ("weight", "bias")}
        tensors = {own: frozen.weights[path] for own, path in paths.items() if path in frozen.weights}
        body.set_submodule(name, _plain_layer(layer, tensors))
    return body.eval().requires_grad_(False)


def normalised(body: ConditionalNetwork, x: Tensor) -> Tensor:
    """Images as the first layer gets them. The mean stays out of its bias: the padding is that of normalised images."""
    if body.pixel_mean is None:
        return x
    return (x - body.pixel_mean[:, None, None]) / body.pixel_std[:, None, None]


@torch.no_grad()
def _plain_layer(layer: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    weight = tensors["weight"]
    with torch.device("meta"):
        if isinstance(layer, SlimmableConv2d):
            options = {"stride": layer.stride, "padding": layer.padding, "bias": "bias" in tensors}
            plain = PlainConv2d(weight.shape[1], weight.shape[0], layer.kernel_size, **options)
        else:
            plain = PlainLinear(weight.shape[1], weight.shape[0])
    for name, tensor in tensors.items():
        setattr(plain, name, nn.Parameter(tensor.clone(), requires_grad=False))
    return plain
