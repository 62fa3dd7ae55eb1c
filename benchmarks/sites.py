"""The normalisation sites of a network: found by running it once on shapes alone, and as plain modules to compare with.

Letters: N images, A of them with lambda > 0, C channels, L distinct lambdas.
"""

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oat_dist.models.network import ConditionalNetwork


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a normalisation site is asked to do; sites that are equal cost the same."""

    channels: int
    """C."""
    height: int
    """Rows of pixels."""
    width: int
    """Columns of pixels."""
    has_film: bool
    """Whether lambda scales and shifts its output."""
    has_residual: bool
    """Whether a residual is added."""
    relu: bool
    """Whether the activation is ReLU."""

    @property
    def values_per_image(self) -> int:
        """C * H * W."""
        return self.channels * self.height * self.width


def sites_of(network: ConditionalNetwork, image_shape: tuple[int, int, int]) -> Counter[Site]:
    """How many sites of each kind one forward pass of an image runs through.

    Args:
        network: Any network on the meta device.
        image_shape: (C, H, W) of its images.
    """
    found: Counter[Site] = Counter()

    def note(site: nn.Module, args: tuple, kwargs: dict) -> None:
        # `FiLMDualBN2d.forward(x, cond, residual=None, activate=True)`.
        residual = kwargs.get("residual", args[2] if len(args) > 2 else None)
        relu = kwargs.get("activate", args[3] if len(args) > 3 else True)
        _, channels, height, width = args[0].shape
        found[
            Site(
                channels=channels, height=height, width=width, has_film=site.film is not None,
                has_residual=residual is not None, relu=relu,
            )
        ] += 1  # fmt: skip

    hooks = [site.register_forward_pre_hook(note, with_kwargs=True) for site in network.sites]
    try:
        frozen = network.freeze(network.condition(torch.zeros(1)))
        network.attack_logits(torch.empty(1, *image_shape, device="meta"), frozen)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def bytes_to_move(site: Site, operator: str, way: str, images: int, element_size: int) -> int:
    """Bytes that an operator cannot avoid to read and write at a site, big tensors alone (docs/design.md).

    film_dual_bn: forward two reads of x, one of the residual, one write; backward two reads of dy, x and (for ReLU) y,
    one write of dx and, where the activation makes it differ from dy, one of the residual's gradient. modulate: one
    read of x and the residual, one write; backward dy and y, dx and the residual's gradient.

    Args:
        site: The site.
        operator: "film_dual_bn" or "modulate".
        way: "forward", "backward" or "both".
        images: Rows of x.
        element_size: Bytes of a value.
    """
    if way == "both":
        parts = (bytes_to_move(site, operator, part, images, element_size) for part in ("forward", "backward"))
        return sum(parts)
    is_training = operator == "film_dual_bn"
    if way == "forward":
        passes = (2 if is_training else 1) + site.has_residual + 1
    else:
        reads = 2 * (2 + site.relu) if is_training else 1 + site.relu
        passes = reads + 1 + (site.has_residual and site.relu)
    return passes * images * site.values_per_image * element_size


class PlainSite(nn.Module):
    """A site out of PyTorch's modules: BatchNorm2d per group on slices, joined, FiLM rows, residual, ReLU.

    Scale and shift are taken in the dtype of the images, as autocast would give them.
    """

    def __init__(self, site: Site, *, boundaries: tuple[int, ...], groups: tuple[int, ...]) -> None:
        """Make the norms.

        Args:
            site: What to do.
            boundaries: Where one statistics segment of the batch ends and the next begins.
            groups: Norm group of each segment, one more than boundaries.
        """
        super().__init__()
        self.boundaries, self.groups, self.relu = boundaries, groups, site.relu
        self.norms = nn.ModuleList(nn.BatchNorm2d(site.channels) for _ in range(max(groups) + 1))

    def forward(
        self, x: Tensor, scale_LC: Tensor | None, shift_LC: Tensor | None, row: Tensor, residual: Tensor | None
    ) -> Tensor:
        """[N, C, H, W] images, FiLM of the distinct lambdas, the row of each image among these, residual."""
        parts = [self.norms[g](part) for g, part in zip(self.groups, x.tensor_split(self.boundaries), strict=True)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        if scale_LC is not None:
            scale_NC, shift_NC = scale_LC.to(x.dtype)[row], shift_LC.to(x.dtype)[row]
            out = out * scale_NC[:, :, None, None] + shift_NC[:, :, None, None]
        if residual is not None:
            out = out + residual
        return F.relu(out) if self.relu else out
