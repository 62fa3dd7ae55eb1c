"""The normalisation site of every network: dual batch norm, FiLM, residual and ReLU in one operator.

Letters: N images, C channels, G norm groups, L distinct lambdas, X channels of several sites side by side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels import film_dual_bn, modulate
from oat_dist.models.condition import Condition, Frozen
from oat_dist.models.film import FiLMGenerator


class FiLMDualBN2d(nn.Module):
    """y = act( FiLM( DualBN(x) ) + residual ); see `kernels.film_dual_bn`.

    Attributes:
        index: Position of the site in its network, set by the network.
        name: Its name there, for messages.
        film: Generator of scale and shift, or None.
    """

    def __init__(
        self, channels: int, num_groups: int, film: FiLMGenerator | None, *, momentum: float = 0.1, eps: float = 1e-5
    ) -> None:
        """Start as the identity normalisation: weight 1, bias 0, mean 0, variance 1.

        Args:
            channels: C.
            num_groups: G; 2 is dual batch norm.
            film: Generator for this site, or None.
            momentum: Weight of a batch's statistics in the running ones.
            eps: Added to the variance.
        """
        super().__init__()
        self.index, self.name = -1, "norm"
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(num_groups, channels))
        self.bias = nn.Parameter(torch.zeros(num_groups, channels))
        self.register_buffer("running_mean", torch.zeros(num_groups, channels))
        self.register_buffer("running_var", torch.ones(num_groups, channels))
        self.film = film

    def forward(self, x: Tensor, cond: Condition | Frozen, residual: Tensor | None = None, relu: bool = True) -> Tensor:
        """Normalise [N, C, H, W] under a condition; in training mode the running statistics move."""
        if isinstance(cond, Frozen):
            scale_LC, shift_LC = cond.affines[self.index]
            return modulate(x, scale_LC, shift_LC, cond.row_N, residual=residual, relu=relu, site=self.name)
        scale_LC, shift_LC = cond.films[self.index] or (None, None)
        return film_dual_bn(
            x, self.weight, self.bias, self.running_mean, self.running_var,
            segment=cond.segment_N, group_of_segment=cond.group_of_segment,
            film_scale=scale_LC, film_shift=shift_LC, film_row=None if scale_LC is None else cond.row_N,
            residual=residual, relu=relu, training=self.training, momentum=self.momentum, eps=self.eps, sync=cond.sync,
            site=self.name,
        )  # fmt: skip


@torch.no_grad()
def fold(sites: Sequence[FiLMDualBN2d], cond: Condition) -> tuple[tuple[Tensor, Tensor], ...]:
    """Running statistics, affine parameters and FiLM of every site as one (scale_LC, shift_LC).

    All sites are worked out side by side in a few operations, which on a GPU cost their launch alone.

    Args:
        sites: The sites of a network.
        cond: Condition with the FiLM outputs of each.

    Returns:
        (scale_LC, shift_LC) of each site, contiguous and without a graph.
    """
    folded: dict[int, tuple[Tensor, Tensor]] = {}
    for eps in dict.fromkeys(site.eps for site in sites):
        # FiLM sites first, so that they are a slice.
        members = sorted((site for site in sites if site.eps == eps), key=lambda site: cond.films[site.index] is None)
        films = [cond.films[site.index] for site in members if cond.films[site.index] is not None]
        weight_GX, bias_GX, mean_GX, var_GX = (
            torch.cat([getattr(site, name) for site in members], 1)
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        a_GX = weight_GX * torch.rsqrt(var_GX + eps)
        b_GX = bias_GX - mean_GX * a_GX
        scale_LX, shift_LX = a_GX.index_select(0, cond.group_L), b_GX.index_select(0, cond.group_L)
        if films:
            film_scale_LX, film_shift_LX = (torch.cat(halves, 1) for halves in zip(*films, strict=True))
            with_film = slice(film_scale_LX.shape[1])
            scale_LX[:, with_film] *= film_scale_LX
            shift_LX[:, with_film].mul_(film_scale_LX).add_(film_shift_LX)
        widths = [site.weight.shape[1] for site in members]
        pairs = zip(_columns(scale_LX, widths), _columns(shift_LX, widths), strict=True)
        folded |= zip((site.index for site in members), pairs, strict=True)
    return tuple(folded[site.index] for site in sites)


def _columns(values_LX: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Contiguous [L, C] copies of the columns of each site, in one operation."""
    parts = [values_LX.new_empty(len(values_LX), width) for width in widths]
    torch.split_with_sizes_copy(values_LX, widths, dim=1, out=parts)
    return parts
