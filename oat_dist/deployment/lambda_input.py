"""A network with lambda as an input, one per image, in standard operators: nothing in it depends on values of lambda.

With codes of knots (or without FiLM) every scale and shift is piecewise linear in lambda, as `LambdaEncoder.plan` says:
FiLM is interpolated between positive knots, and norm and FiLM together are linear in FiLM. So a table of R rows, at
lambda = 0 and at each positive knot, is all there is to keep. Other encodings keep their generators.

Lambdas outside [0, 1] answer as the nearer end; a graph cannot refuse them.

Letters: N images, C channels, F generators of one shape, P positive knots, S = P - 1 segments between,
R = 1 + P rows, X channels of all sites.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from oat_dist.deployment.plain import AffinePerImage, normalised, plain_copy, require_deployable
from oat_dist.models.film import scale_and_shift
from oat_dist.models.network import ConditionalNetwork
from oat_dist.models.norm import fold

Affines = tuple[tuple[Tensor, Tensor], ...]


class LambdaNetwork(nn.Module):
    """What `with_lambda` returns."""

    def __init__(self, network: ConditionalNetwork) -> None:
        """Copy; see `with_lambda`."""
        super().__init__()
        encoder = network.encoder
        has_table = encoder is None or encoder.knots is not None
        self.affines = _Table(network) if has_table else _Generated(network)
        frozen = network.freeze(network.condition(torch.zeros(1, dtype=torch.float64)))
        self.network = plain_copy(network, frozen, lambda norm: AffinePerImage(norm.index))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, lam_N: Tensor) -> Tensor:
        """Logits [N, K] of images [N, C, H, W] in [0, 1] at lambdas [N] in [0, 1], of the dtype of the images."""
        return self.network._logits(normalised(self.network, x), self.affines(lam_N.clamp(0, 1)))


@torch.no_grad()
def with_lambda(network: ConditionalNetwork, *, key: str = "lam") -> LambdaNetwork:
    """A network with lambda as an input.

    Args:
        network: The network, of one width (`oat_dist.export.cut_out`); it stays as it is.
        key: What to call lambda in a message.

    Returns:
        Images and lambdas to logits, in evaluation mode, on the device and in the dtype of the network.

    Raises:
        UserError: See `require_deployable`.
    """
    require_deployable(network, None, key)
    return LambdaNetwork(network)


class _Table(nn.Module):
    """Scale and shift of all sites at lambda = 0 and at every positive knot."""

    def __init__(self, network: ConditionalNetwork) -> None:
        super().__init__()
        knots = () if network.encoder is None else network.encoder.knots
        # Without a positive knot, all lambdas > 0 answer alike.
        positive = [knot for knot in knots if knot > 0] or [1.0]
        frozen = network.freeze(network.condition(torch.tensor([0.0, *positive], dtype=torch.float64)))
        self.channels = [scale.shape[1] for scale, _ in frozen.affines]
        halves = (torch.cat([pair[half] for pair in frozen.affines], 1) for half in (0, 1))
        self.register_buffer("table", torch.cat([half[frozen.row_N] for half in halves], 1))
        knots_P = torch.tensor(positive, dtype=torch.float64)
        self.register_buffer("low", knots_P[:-1].to(self.table))
        self.register_buffer("span", (knots_P[1:] - knots_P[:-1]).to(self.table))

    def forward(self, lam_N: Tensor) -> Affines:
        """Affines at [N] lambdas."""
        lam_N1 = lam_N[:, None]
        mix_NP = torch.ones_like(lam_N1)
        if len(self.low):
            # 0 below a segment between knots, 1 above it: differences are the weights of the knots.
            done_NS = ((lam_N1 - self.low) / self.span).clamp(0, 1)
            mix_NP = torch.cat((mix_NP, done_NS), 1) - torch.cat((done_NS, torch.zeros_like(lam_N1)), 1)
        return _by_site(torch.where(lam_N1 == 0, self.table[0], mix_NP @ self.table[1:]), self.channels)


class _Generated(nn.Module):
    """Generators on the code of every image's lambda, then the norm of its group."""

    def __init__(self, network: ConditionalNetwork) -> None:
        super().__init__()
        self.encoder, self.trunk = copy.deepcopy((network.encoder, network.film_trunk))
        cond = network.condition(torch.tensor([0.0, 1.0], dtype=torch.float64))
        # The norms alone: at lambda = 0, and above.
        norms = fold(network.sites, replace(cond, films=(None,) * len(network.sites)))
        self.channels = [scale.shape[1] for scale, _ in norms]
        self.register_buffer("norms", torch.cat([torch.cat([n[half] for n in norms], 1) for half in (0, 1)], 1))
        same_shape: dict[int, list[int]] = {}
        for site in network.sites:
            if site.film is not None:
                same_shape.setdefault(site.film.channels, []).append(site.index)
        self.members = list(same_shape.values())
        films = [network.sites[site].film for site in range(len(network.sites))]
        self.together, self.start = type(films[self.members[0][0]]).together, films[self.members[0][0]].start
        self.num_parts = 0
        for at, members in enumerate(self.members):
            parts = list(zip(*(films[site].parts(films[site].channels) for site in members), strict=True))
            self.num_parts = len(parts)
            for number, part in enumerate(parts):
                self.register_buffer(f"part_{at}_{number}", torch.stack(part).detach())

    def forward(self, lam_N: Tensor) -> Affines:
        """Affines at [N] lambdas."""
        norms_NX = torch.where(lam_N[:, None] > 0, self.norms[1], self.norms[0])
        affines = list(_by_site(norms_NX, self.channels))
        code = self.encoder(lam_N)
        code = code if self.trunk is None else self.trunk(code)
        for at, members in enumerate(self.members):
            parts = [self.get_buffer(f"part_{at}_{number}") for number in range(self.num_parts)]
            films = scale_and_shift(self.together(code, parts), self.start)
            for position, site in enumerate(members):
                film_scale_NC, film_shift_NC = films[0][position], films[1][position]
                scale_NC, shift_NC = affines[site]
                affines[site] = (film_scale_NC * scale_NC, film_scale_NC * shift_NC + film_shift_NC)
        return tuple(affines)


def _by_site(scale_and_shift_NX: Tensor, channels: Sequence[int]) -> Affines:
    """(scale_NC, shift_NC) of each site from all of them side by side, scales first."""
    parts = scale_and_shift_NX.split([*channels, *channels], 1)
    return tuple(zip(parts[: len(channels)], parts[len(channels) :], strict=True))
