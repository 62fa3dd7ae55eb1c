"""The normalisation site of every network: dual batch norm, FiLM, residual and ReLU in one operator.

Letters: N images, C channels, G norm groups, L distinct lambdas.
"""

import torch
from torch import Tensor, nn

from kernels import film_dual_bn, modulate
from oat_dist.models.condition import Condition, Frozen
from oat_dist.models.film import FiLMGenerator


class FiLMDualBN2d(nn.Module):
    """y = act( FiLM( DualBN(x) ) + residual ); see `kernels.film_dual_bn`.

    Attributes:
        index: Position of the site in its network, set by the network.
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
        self.index = -1
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
            return modulate(x, scale_LC, shift_LC, cond.row_N, residual=residual, relu=relu)
        scale_LC, shift_LC = cond.films[self.index] or (None, None)
        return film_dual_bn(
            x, self.weight, self.bias, self.running_mean, self.running_var,
            segment=cond.segment_N, group_of_segment=cond.group_of_segment,
            film_scale=scale_LC, film_shift=shift_LC, film_row=None if scale_LC is None else cond.row_N,
            residual=residual, relu=relu, training=self.training, momentum=self.momentum, eps=self.eps, sync=cond.sync,
        )  # fmt: skip

    @torch.no_grad()
    def fold(self, cond: Condition) -> tuple[Tensor, Tensor]:
        """Running statistics, affine parameters and FiLM as one (scale_LC, shift_LC)."""
        a_GC = self.weight * torch.rsqrt(self.running_var + self.eps)
        b_GC = self.bias - self.running_mean * a_GC
        scale_LC, shift_LC = a_GC.index_select(0, cond.group_L), b_GC.index_select(0, cond.group_L)
        if cond.films[self.index] is not None:
            film_scale_LC, film_shift_LC = (t.detach() for t in cond.films[self.index])
            scale_LC, shift_LC = film_scale_LC * scale_LC, film_scale_LC * shift_LC + film_shift_LC
        return scale_LC, shift_LC
