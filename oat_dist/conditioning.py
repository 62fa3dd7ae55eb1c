"""Lambda: how it is drawn in training, and the code by which a network is told about it.

Distributions have a point mass at 0 that is dealt exactly (see `LambdaSampler`); encodings follow Wang et al.,
"Once-for-All Adversarial Training" (NeurIPS 2020), section 3.2. Lambdas live on the host in float64, because 0.1 must
stay 0.1.

Letters: N images, K knots (lambdas that own a code), L distinct lambdas, E encoding width.
"""

import math

import scipy.special
import torch
from torch import Tensor, nn

from oat_dist.config import ConditioningConfig
from oat_dist.random import draw_keys, normal, permutation, uniform


def positive_lambdas(cfg: ConditioningConfig, u_N: Tensor) -> Tensor:
    """Inverse distribution function of lambda given lambda > 0.

    Args:
        cfg: The distribution.
        u_N: [N] uniform in [0, 1).

    Returns:
        [N] float64 lambdas in (0, 1].
    """
    u_N = u_N.double()
    if cfg.distribution == "uniform":
        return cfg.high - (cfg.high - cfg.low) * u_N
    if cfg.distribution == "beta":
        lam_N = torch.from_numpy(scipy.special.betaincinv(cfg.alpha, cfg.beta, 1 - u_N.numpy()))
        return lam_N.clamp(min=torch.finfo(torch.float32).tiny)
    lambdas = torch.tensor(cfg.lambdas, dtype=torch.float64)
    weights = torch.tensor(cfg.weights or (1.0,) * len(lambdas), dtype=torch.float64)
    lambdas, weights = lambdas[lambdas > 0], weights[lambdas > 0]
    ends = weights.cumsum(0) / weights.sum()
    return lambdas[torch.searchsorted(ends, u_N, right=True).clamp(max=len(lambdas) - 1)]


class LambdaSampler:
    """Lambda of every image of a training batch.

    With per-image sampling, the first ceil(mass at 0 * global batch) positions of every global batch have lambda = 0
    and the others a positive draw keyed by their image, so shares are exact and do not depend on ranks. Positions are a
    random order of the images, hence so is the choice of zeros. With per-batch sampling the same holds for the batches
    of an epoch.
    """

    def __init__(self, cfg: ConditioningConfig, *, seed: int, batch_size: int, steps_per_epoch: int) -> None:
        """Prepare the exact shares.

        Args:
            cfg: Distribution and kind of sampling.
            seed: Seed of the run.
            batch_size: Images per optimiser step, over all ranks.
            steps_per_epoch: Optimiser steps per epoch.
        """
        self.cfg, self.seed, self.steps_per_epoch = cfg, seed, steps_per_epoch
        total = batch_size if cfg.sampling == "image" else steps_per_epoch
        # Rounded first: 0.1 * 30 is 3.0000000000000004 and must give 3 zeros, not 4.
        self.num_zero = math.ceil(round(cfg.mass_at_zero * total, 9))

    def draw(self, epoch: int, step: int, position_N: Tensor, index_N: Tensor) -> Tensor:
        """Lambdas of the images at some positions of a global batch.

        Args:
            epoch: Epoch, from 0.
            step: Step within the epoch, from 0.
            position_N: [N] int64 positions within the global batch.
            index_N: [N] int64 dataset indices of the images.

        Returns:
            [N] float64 on the host.
        """
        if self.cfg.sampling == "batch":
            order = permutation(self.steps_per_epoch, self.seed, "batches with lambda 0", epoch)
            position_N, index_N = torch.full_like(position_N, int(order[step])), torch.full_like(index_N, step)
        is_zero_N = position_N < self.num_zero
        if bool(is_zero_N.all()):
            return torch.zeros(len(position_N), dtype=torch.float64)
        key_N = draw_keys(self.seed, f"lambda per {self.cfg.sampling}", epoch, index_N)
        return torch.where(is_zero_N, 0.0, positive_lambdas(self.cfg, uniform(key_N)))


class LambdaEncoder(nn.Module):
    """Codes of lambda, the input of the FiLM generators. All tables are buffers, so a checkpoint carries them.

    `onehot`, `dct` and `orthogonal` give every knot a code: a unit vector, a row of the orthonormal DCT-II matrix, a
    row of a random orthogonal matrix. A lambda between two knots has no code: the FiLM outputs of the two are
    interpolated (see `plan`). `none` is lambda itself; `fourier` is [cos, sin](2 pi f lambda) for frequencies from 1/4
    to 8 (Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions", NeurIPS 2020, section 2).
    """

    def __init__(self, cfg: ConditioningConfig, *, seed: int) -> None:
        """Make the tables.

        Args:
            cfg: Kind and width of the encoding, and its knots.
            seed: Seed of the random orthogonal matrix.
        """
        super().__init__()
        self.encoding = cfg.encoding
        self.knots = cfg.code_lambdas
        self.width = {"none": 1, "onehot": len(self.knots or ())}.get(cfg.encoding, cfg.encoding_width)
        if self.knots is not None:
            self.register_buffer("codes_KE", _code_table(cfg.encoding, len(self.knots), self.width, seed))
            self.register_buffer("knots_K", torch.tensor(self.knots, dtype=torch.float64))
        elif cfg.encoding == "fourier":
            self.register_buffer("frequencies_F", torch.logspace(-2, 3, self.width // 2, base=2.0))

    def rows(self, lam_N: Tensor) -> tuple[Tensor, Tensor]:
        """Distinct lambdas and the row of each image among them.

        The knots stand for themselves when every lambda is one, so that shapes stay the same from batch to batch.

        Args:
            lam_N: [N] float64 on the host.

        Returns:
            lam_L float64 and row_N int64, on the host.
        """
        if self.knots is not None:
            knots_K = torch.tensor(self.knots, dtype=torch.float64)
            row_N = torch.searchsorted(knots_K, lam_N).clamp(max=len(knots_K) - 1)
            if bool((knots_K[row_N] == lam_N).all()):
                return knots_K, row_N
        return torch.unique(lam_N, return_inverse=True)

    def plan(self, lam_L: Tensor) -> Tensor | None:
        """Interpolation weights over the knots, or None when every lambda has its own code.

        Between two positive knots the weights are linear; below the smallest positive knot and above the largest they
        stay at that knot. lambda = 0 is the knot 0 and nothing else, since it has its own batch norm.

        Args:
            lam_L: [L] float64 on the host.

        Returns:
            [L, K] float64 on the host, rows summing to 1, or None.
        """
        if self.knots is None or tuple(lam_L.tolist()) == self.knots:
            return None
        knots_K = torch.tensor(self.knots, dtype=torch.float64)
        first = int(knots_K[0] == 0 and len(knots_K) > 1)
        at_L = lam_L.clamp(float(knots_K[first]), float(knots_K[-1]))
        high_L = torch.searchsorted(knots_K, at_L).clamp(min=first)
        low_L = (high_L - 1).clamp(min=first)
        span_L = (knots_K[high_L] - knots_K[low_L]).clamp(min=torch.finfo(torch.float64).tiny)
        weight_L = torch.where(high_L == low_L, 1.0, (at_L - knots_K[low_L]) / span_L)
        mix_LK = torch.zeros(len(lam_L), len(knots_K), dtype=torch.float64)
        mix_LK.scatter_add_(1, low_L[:, None], 1 - weight_L[:, None])
        mix_LK.scatter_add_(1, high_L[:, None], weight_L[:, None])
        if knots_K[0] == 0:
            mix_LK[lam_L == 0] = torch.eye(len(knots_K), dtype=torch.float64)[0]
        return mix_LK

    def forward(self, lam_L: Tensor) -> Tensor:
        """Codes: of the knots [K, E] where the encoding has knots, else of the given lambdas [L, E].

        Args:
            lam_L: [L] on the device of the tables.
        """
        if self.knots is not None:
            return self.codes_KE
        if self.encoding == "none":
            return lam_L[:, None]
        angle_LF = 2 * torch.pi * lam_L[:, None] * self.frequencies_F
        return torch.cat((angle_LF.cos(), angle_LF.sin()), 1) * math.sqrt(2 / self.width)


def _code_table(encoding: str, num_codes: int, width: int, seed: int) -> Tensor:
    """[K, E] orthonormal rows."""
    if encoding == "onehot":
        return torch.eye(num_codes, width)
    if encoding == "dct":
        k, e = torch.arange(num_codes, dtype=torch.float64), torch.arange(width, dtype=torch.float64)
        table = torch.cos(torch.pi * k[:, None] * (2 * e + 1) / (2 * width)) * math.sqrt(2 / width)
        table[0] /= math.sqrt(2)
        return table.float()
    square = normal(draw_keys(seed, "orthogonal codes", torch.arange(width)), (width,)).double()
    q, r = torch.linalg.qr(square)
    return (q * r.diagonal().sign())[:num_codes].float().contiguous()
