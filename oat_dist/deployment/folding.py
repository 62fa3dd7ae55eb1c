"""A network at one lambda without any arithmetic of lambda: FiLM and norms become constants, most of them no layer.

A norm that follows a convolution goes into it, after FiLM (scale, shift) and with dual norm the group of lambda:

    y = s * (W x) + t = (s W) x + t,   s = film_scale * weight * rstd,   t = film_scale * (bias - mean * weight * rstd)
                                                                           + film_shift

ResNets lose every norm. In pre-activation networks the norm before a block's first convolution and the final one follow
a sum that others read too: they stay, as one scale and shift per channel.

Letters: C channels.
"""

import torch
from torch import Tensor, nn

from oat_dist.deployment.plain import Affine, PlainConv2d, Site, normalised, plain_copy, require_deployable
from oat_dist.models.network import ConditionalNetwork
from oat_dist.models.preact_resnet import PreActBlock
from oat_dist.models.resnet import BasicBlock, ResNet

_FOLLOWS = {
    ResNet: {"stem_norm": "stem"},
    BasicBlock: {"norm1": "conv1", "norm2": "conv2", "shortcut_norm": "shortcut"},
    PreActBlock: {"norm2": "conv1"},
}
"""Norm -> the convolution whose output nothing but this norm reads."""


class FoldedNetwork(nn.Module):
    """What `fold_network` returns."""

    def __init__(self, network: ConditionalNetwork, lam: float) -> None:
        """Fold; see `fold_network`."""
        super().__init__()
        frozen = network.freeze(network.condition(torch.tensor([lam], dtype=torch.float64)))
        row = int(frozen.row_N[0])
        affines = {norm.name: [half[row] for half in frozen.affines[norm.index]] for norm in network.sites}
        follows = _convolutions(network)
        self.network = plain_copy(
            network, frozen, lambda norm: Site() if norm.name in follows else Affine(*affines[norm.name])
        )
        for name, convolution in follows.items():
            _fold_into(self.network.get_submodule(convolution), *affines[name])
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, K] of images [N, C, H, W] in [0, 1]."""
        return self.network._logits(normalised(self.network, x), None)


@torch.no_grad()
def fold_network(network: ConditionalNetwork, lam: float, *, key: str = "lam") -> FoldedNetwork:
    """A network at one lambda, its norms folded.

    Args:
        network: The network, of one width (`oat_dist.export.cut_out`); it stays as it is.
        lam: In [0, 1].
        key: What to call it in a message.

    Returns:
        Images to logits, in evaluation mode, on the device and in the dtype of the network, with at most as many
        parameters as the same network without conditioning.

    Raises:
        UserError: See `require_deployable`.
    """
    require_deployable(network, lam, key)
    return FoldedNetwork(network, lam)


def _convolutions(network: nn.Module) -> dict[str, str]:
    """Name of each norm that folds -> name of its convolution."""
    pairs = {}
    for name, module in network.named_modules():
        for kind, follows in _FOLLOWS.items():
            if isinstance(module, kind):
                prefix = f"{name}." if name else ""
                there = ((norm, conv) for norm, conv in follows.items() if getattr(module, norm) is not None)
                pairs |= {prefix + norm: prefix + conv for norm, conv in there}
    return pairs


def _fold_into(convolution: PlainConv2d, scale_C: Tensor, shift_C: Tensor) -> None:
    """Scale and shift the output of a convolution by its weight and a bias; the product is rounded once."""
    weight = convolution.weight
    folded = (weight.double() * scale_C.double()[:, None, None, None]).to(weight.dtype)
    convolution.weight = nn.Parameter(folded, requires_grad=False)
    convolution.bias = nn.Parameter(shift_C.clone(), requires_grad=False)
