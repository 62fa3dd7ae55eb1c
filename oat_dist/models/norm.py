"""The normalisation site of every network: dual batch norm, FiLM, residual and ReLU in one operator.

Another activation than ReLU is an operation of its own after it.

With conditioning.norm=shared_statistics the groups have scales and shifts of their own but one set of statistics. Batch
statistics are then taken over all images of a training forward, clean and adversarial, and they are what the running
ones follow: a network must be trained with the statistics that it is tested with, and the running statistics of
segments normalised apart would be a mixture that no image ever met in training.

Letters: N images, C channels, G norm groups, T sets of statistics (G, or 1 if shared), L distinct lambdas, X channels
of several sites side by side.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import film_dual_bn, modulate
from oat_dist.models.condition import Condition, Frozen
from oat_dist.models.film import Generator
from oat_dist.models.slimming import unfilled, width_name

_TENSORS = ("weight", "bias", "running_mean", "running_var")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu}
"""Name -> function, as `model.activation` has them."""


class GroupedNorm(nn.Module):
    """Scale, shift and running statistics of each norm group, for one width; a `FiLMDualBN2d` uses them."""

    def __init__(self, channels: int, num_groups: int, num_statistics: int | None = None) -> None:
        """Start as the identity normalisation: weight 1, bias 0, mean 0, variance 1.

        Args:
            channels: C.
            num_groups: G; 2 is dual batch norm.
            num_statistics: T; default: G.
        """
        super().__init__()
        num_statistics = num_statistics or num_groups
        self.weight = nn.Parameter(torch.ones(num_groups, channels))
        self.bias = nn.Parameter(torch.zeros(num_groups, channels))
        self.register_buffer("running_mean", torch.zeros(num_statistics, channels))
        self.register_buffer("running_var", torch.ones(num_statistics, channels))

    @property
    def shares_statistics(self) -> bool:
        """Whether the groups have one set of statistics."""
        return len(self.running_mean) < len(self.weight)


class FiLMDualBN2d(GroupedNorm):
    """y = act( FiLM( DualBN(x) ) + residual ); see `kernels.film_dual_bn`.

    Attributes:
        index: Position of the site in its network, set by the network.
        name: Its name there, for messages.
        film: Generator of scale and shift, or None.
        narrow: Norms of the widths below 1, by `width_name`.
        activation: One of `ACTIVATIONS`; set by who builds the network.
    """

    def __init__(
        self,
        channels: int,
        num_groups: int,
        film: Generator | None,
        *,
        num_statistics: int | None = None,
        narrow: Mapping[float, int] | None = None,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        """Start as the identity normalisation.

        Args:
            channels: C.
            num_groups: G; 2 is dual batch norm.
            film: Generator for this site, or None.
            num_statistics: T; default: G.
            narrow: Channels at the widths below 1.
            momentum: Weight of a batch's statistics in the running ones.
            eps: Added to the variance.
        """
        super().__init__(channels, num_groups, num_statistics)
        self.index, self.name, self.activation = -1, "norm", "relu"
        self.momentum, self.eps = momentum, eps
        self.film = film
        norms = {width_name(w): GroupedNorm(count, num_groups, num_statistics) for w, count in (narrow or {}).items()}
        self.narrow = nn.ModuleDict(norms) if norms else {}

    def at(self, width: float) -> GroupedNorm:
        """The norm of a width."""
        return self if width == 1 else self.narrow[width_name(width)]

    def forward(
        self, x: Tensor, cond: Condition | Frozen, residual: Tensor | None = None, activate: bool = True
    ) -> Tensor:
        """Normalise [N, C, H, W] under a condition; in training mode the running statistics move."""
        is_fused = self.activation == "relu"
        y = self._normalised(x, cond, residual, relu=activate and is_fused)
        return ACTIVATIONS[self.activation](y) if activate and not is_fused else y

    def _normalised(self, x: Tensor, cond: Condition | Frozen, residual: Tensor | None, *, relu: bool) -> Tensor:
        if isinstance(cond, Frozen):
            scale_LC, shift_LC = cond.affines[self.index]
            return modulate(x, scale_LC, shift_LC, cond.row_N, residual=residual, relu=relu, site=self.name)
        norm = self.at(cond.width)
        weight, bias, film = norm.weight, norm.bias, cond.films[self.index]
        if norm.shares_statistics:
            film, weight, bias = _as_film(norm, cond, film), torch.ones_like(weight[:1]), torch.zeros_like(bias[:1])
        scale_LC, shift_LC = film or (None, None)
        return film_dual_bn(
            x, weight, bias, norm.running_mean, norm.running_var,
            segment=cond.segment_N, group_of_segment=cond.group_of_segment,
            film_scale=scale_LC, film_shift=shift_LC, film_row=None if scale_LC is None else cond.row_N,
            residual=residual, relu=relu, training=self.training, momentum=self.momentum, eps=self.eps, sync=cond.sync,
            site=self.name,
        )  # fmt: skip

    @torch.no_grad()
    def cut(self, width: float) -> "FiLMDualBN2d":
        """A site of one width alone."""
        norm = self.at(width)
        num_groups, channels = norm.weight.shape
        groups = {"num_groups": num_groups, "num_statistics": len(norm.running_mean)}
        site = unfilled(
            lambda: FiLMDualBN2d(channels, film=None, momentum=self.momentum, eps=self.eps, **groups), norm.weight
        )
        for name in _TENSORS:
            getattr(site, name).copy_(getattr(norm, name))
        site.film = None if self.film is None else self.film.cut(channels)
        site.activation = self.activation
        return site.train(self.training)


def _as_film(norm: GroupedNorm, cond: Condition, film: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Scale and shift of each distinct lambda's group, and FiLM after them, as one (scale_LC, shift_LC)."""
    weight_LC, bias_LC = norm.weight.index_select(0, cond.group_L), norm.bias.index_select(0, cond.group_L)
    if film is None:
        return weight_LC, bias_LC
    scale_LC, shift_LC = film
    return scale_LC * weight_LC, scale_LC * bias_LC + shift_LC


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
        norms = [site.at(cond.width) for site in members]
        weight_GX, bias_GX, mean_TX, var_TX = (
            torch.cat([getattr(norm, name) for norm in norms], 1) for name in _TENSORS
        )
        a_GX = weight_GX * torch.rsqrt(var_TX + eps)
        b_GX = bias_GX - mean_TX * a_GX
        scale_LX, shift_LX = a_GX.index_select(0, cond.group_L), b_GX.index_select(0, cond.group_L)
        if films:
            film_scale_LX, film_shift_LX = (torch.cat(halves, 1) for halves in zip(*films, strict=True))
            with_film = slice(film_scale_LX.shape[1])
            scale_LX[:, with_film] *= film_scale_LX
            shift_LX[:, with_film].mul_(film_scale_LX).add_(film_shift_LX)
        channels = [norm.weight.shape[1] for norm in norms]
        pairs = zip(_columns(scale_LX, channels), _columns(shift_LX, channels), strict=True)
        folded |= zip((site.index for site in members), pairs, strict=True)
    return tuple(folded[site.index] for site in sites)


def _columns(values_LX: Tensor, channels: Sequence[int]) -> list[Tensor]:
    """Contiguous [L, C] copies of the columns of each site, in one operation."""
    parts = [values_LX.new_empty(len(values_LX), count) for count in channels]
    torch.split_with_sizes_copy(values_LX, channels, dim=1, out=parts)
    return parts
