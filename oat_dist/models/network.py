"""What every conditional network can do: take a condition, freeze itself, answer an attack.

    cond   = network.condition(lam_N)                  encode, run all FiLM generators once
    frozen = network.freeze(cond)                      fold statistics, detach everything
    logits = network.attack_logits(x, frozen)          evaluation-mode forward, no graph over parameters
    logits = network(torch.cat((x, x_adv)), cond.joint())     the one training forward

A subclass builds its layers from `_conv`, `_norm` and `_linear`, then calls `_number_sites`, and defines
`_features(x, cond)`, which gets the images after pixel normalisation, and `classifier`, which takes what it returns.

A network of several widths (`slimming.py`) is told the width with the lambdas, `condition(lam_N, width=0.5)`; its
layers then use their leading channels. A network with weight noise (`layers.py`) is told the key of the draw, and what
it answers is the mean over draws (`frozen_at`).

Images are made channels last in memory, as the operators of `kernels` want them; so are the convolution weights of
`build_model` and those of a frozen network. Files hold plain tensors; loading keeps the layout that is there.

Letters: N images, C channels, L distinct lambdas, K classes in logits_NK.
"""

import contextlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from oat_dist.attacks import evaluation_mode
from oat_dist.config import ConditioningConfig
from oat_dist.errors import UserError
from oat_dist.models.condition import Condition, Frozen, FrozenDraws
from oat_dist.models.factory import LayerFactory
from oat_dist.models.film import generate
from oat_dist.models.layers import SlimmableConv2d, SlimmableLinear
from oat_dist.models.norm import FiLMDualBN2d, fold
from oat_dist.models.slimming import WHOLE, Slimming, channels_at
from oat_dist.random import draw_keys, normal

_GROUPS = {"dual": (0, 1, 1), "single": (0, 0), "shared_statistics": (0,)}
"""Norm group of each statistics segment."""


class ConditionalNetwork(LayerFactory):
    """Base class; images are [N, C, H, W] in [0, 1]."""

    def __init__(self, cfg: ConditioningConfig, *, seed: int, slimming: Slimming = WHOLE) -> None:
        """Keep the conditioning; layers are the subclass's.

        Args:
            cfg: Encoding, FiLM and norm.
            seed: Seed of the encoding tables.
            slimming: Widths.
        """
        super().__init__(cfg, seed=seed, slimming=slimming)
        self.sync_statistics = False
        self.noise_draws = 1
        self.sites: tuple[FiLMDualBN2d, ...] = ()
        self.layers: dict[str, SlimmableConv2d | SlimmableLinear] = {}
        # None is left out of the state dict; `normalise_pixels` fills them.
        self.register_buffer("pixel_mean", None)
        self.register_buffer("pixel_std", None)

    def normalise_pixels(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise images inside the network from now on, so that attacks stay in [0, 1]; the state dict carries both.

        Args:
            mean: Mean of each channel in [0, 1].
            std: Standard deviation of each channel, > 0.

        Raises:
            UserError: Different lengths, or a deviation that is not positive and finite.
        """
        mean_C, std_C = torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)
        if mean_C.dim() != 1 or mean_C.shape != std_C.shape:
            raise UserError(f"pixel_mean={list(mean)}, pixel_std={list(std)}: expected one number per channel each")
        if not bool((mean_C.isfinite() & std_C.isfinite() & (std_C > 0)).all()):
            raise UserError(f"pixel_mean={list(mean)}, pixel_std={list(std)}: expected finite means, deviations > 0")
        self.pixel_mean, self.pixel_std = mean_C, std_C

    def forward(
        self,
        x: Tensor,
        cond: Condition | Frozen,
        *,
        with_features: bool = False,
        within: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Logits of images.

        Args:
            x: [N, C, H, W] images in [0, 1].
            cond: What the network is told about their lambdas.
            with_features: Give the penultimate features too.
            within: What is to be worked out from the logits before anything outside sees them: DeepSpeed takes the
                first backward pass through an output for that of the training loss, so gradients that are part of the
                loss have to be taken here.

        Returns:
            Logits [N, K], or a tuple of them, features [N, F] if asked for, and what `within` returned.
        """
        x = x.contiguous(memory_format=torch.channels_last)
        if self.pixel_mean is not None:
            x = (x - self.pixel_mean[:, None, None]) / self.pixel_std[:, None, None]
        if cond.noise is None or not cond.num_zero:
            outputs = self._outputs(x, cond, with_features)
        else:
            # Images with lambda = 0 see the weights themselves, the others noisy ones. Collectives want both forwards.
            parts = zip(x.split((cond.num_zero, len(x) - cond.num_zero)), cond.split(), strict=True)
            found = [self._outputs(images, part, with_features) for images, part in parts if len(images) or cond.sync]
            outputs = tuple(map(torch.cat, zip(*found, strict=True)))
        outputs += () if within is None else within(outputs[0])
        return outputs if len(outputs) > 1 else outputs[0]

    def _outputs(self, x: Tensor, cond: Condition | Frozen, with_features: bool) -> tuple[Tensor, ...]:
        """(logits,) or (logits, features) of normalised images."""
        if with_features:
            features = self._features(x, cond)
            return self.classifier(features, cond), features
        return (self._logits(x, cond),)

    def _logits(self, x: Tensor, cond: Condition | Frozen) -> Tensor:
        """Logits [N, K] of normalised images."""
        return self.classifier(self._features(x, cond), cond)

    def _features(self, x: Tensor, cond: Condition | Frozen) -> Tensor:
        """Penultimate features [N, F] of normalised images; the subclass's."""
        raise NotImplementedError

    def _number_sites(self) -> None:
        named = {name: m for name, m in self.named_modules() if isinstance(m, FiLMDualBN2d)}
        self.sites = tuple(named.values())
        for index, (name, site) in enumerate(named.items()):
            site.index, site.name = index, name
        # A head inside a classifier is the classifier's to choose.
        layers = {name: m for name, m in self.named_modules() if isinstance(m, SlimmableConv2d | SlimmableLinear)}
        self.layers = {name: layer for name, layer in layers.items() if ".narrow." not in name}
        for index, layer in enumerate(self.layers.values()):
            layer.index = index

    def condition(self, lam_N: Tensor, *, width: float = 1.0, noise_key: Tensor | None = None) -> Condition:
        """Everything the forward passes of a batch need to know of its lambdas.

        Args:
            lam_N: [N] lambdas in [0, 1]. On the host in training, so that nothing waits for the device.
            width: Share of the channels, one of the network's widths.
            noise_key: [1] key (`oat_dist.random`) of the weight noise, which a network without noise does not look at.

        Raises:
            UserError: A lambda outside [0, 1], or a width that the network does not have.
            ValueError: Weight noise for several lambdas > 0 at once, or without a key.
        """
        self.slimming.require(width)
        lam_N = lam_N.detach().to("cpu", torch.float64).contiguous()
        if not bool(((lam_N >= 0) & (lam_N <= 1)).all()):
            raise UserError(f"lam={lam_N[~((lam_N >= 0) & (lam_N <= 1))][0].item()}: lambda must lie in [0, 1]")
        lam_L, row_N = self.encoder.rows(lam_N) if self.encoder else torch.unique(lam_N, return_inverse=True)
        is_zero_N = lam_N == 0
        num_zero, is_dual, has_groups = int(is_zero_N.sum()), self.cfg.norm == "dual", self.cfg.norm != "single"
        device = self.sites[0].weight.device
        return Condition(
            row_N=row_N.to(device, non_blocking=True),
            segment_N=(~is_zero_N & is_dual).to(device, torch.int32, non_blocking=True),
            group_of_segment=_GROUPS[self.cfg.norm],
            group_L=((lam_L > 0) & has_groups).to(device, torch.int64, non_blocking=True),
            num_zero=num_zero,
            zeros_first=bool(is_zero_N[:num_zero].all()),
            films=self._films(lam_L, width),
            sync=self.sync_statistics,
            width=width,
            noise=self._noise(lam_L, width, noise_key) if self.is_stochastic else None,
        )

    @torch.no_grad()
    def _noise(self, lam_L: Tensor, width: float, key: Tensor | None) -> tuple[Tensor, ...] | None:
        """Noise of variance lambda^2 for the weights that each layer uses, or None where all lambdas are 0."""
        positive = lam_L[lam_L > 0].tolist()
        if not positive:
            return None
        if len(positive) > 1 or key is None:
            raise ValueError(f"lam={positive}, noise_key={key}: weight noise needs one lambda > 0 and a key")
        key = key.to(self.sites[0].weight.device, non_blocking=True)
        weights = [layer.weight_at(width) for layer in self.layers.values()]
        draws = (
            normal(draw_keys(0, "noise of a layer", key, at), tuple(weight.shape))[0]
            for at, weight in enumerate(weights)
        )
        # Laid out like the weights, whose sums with them then are too.
        pairs = zip(draws, weights, strict=True)
        return tuple(torch.empty_like(weight).copy_(positive[0] * draw) for draw, weight in pairs)

    def _films(self, lam_L: Tensor, width: float) -> tuple[tuple[Tensor, Tensor] | None, ...]:
        """Scale and shift of every site for the distinct lambdas, interpolated between knots where needed."""
        if self.encoder is None:
            return (None,) * len(self.sites)
        like = self.sites[0].weight
        mix_LK = self.encoder.plan(lam_L)
        if mix_LK is not None:
            mix_LK = mix_LK.to(like.device, like.dtype, non_blocking=True)
        generators = [site.film for site in self.sites if site.film is not None]
        channels = [channels_at(generator.channels, width) for generator in generators]
        # Few rows, and every site multiplies by them: not worth a rounding to bfloat16.
        with _full_precision(like.device.type):
            code = self.encoder(lam_L.to(like.device, like.dtype, non_blocking=True))
            code = code if self.film_trunk is None else self.film_trunk(code)
            films = iter(generate(generators, code, mix_LK, channels=channels))
        return tuple(None if site.film is None else next(films) for site in self.sites)

    @torch.no_grad()
    def freeze(self, cond: Condition, *, dtype: torch.dtype | None = None) -> Frozen:
        """The network under a condition as constants, at its current running statistics.

        Args:
            cond: Condition of the images.
            dtype: What weights outside the sites are cast to, once instead of in every forward under autocast, which
                keeps no casts of tensors without a gradient. The folded sites stay as exact as they are.

        Returns:
            The network; its convolution weights are channels last, whatever they became in an optimiser.

        Raises:
            ValueError: Weight noise, which images with lambda > 0 have alone, and images with lambda = 0 beside them.
        """
        if cond.noise is not None and cond.num_zero:
            raise ValueError("lam: freeze images with lambda = 0 and those with weight noise apart (`cond.split()`)")
        inside = {id(p) for module in (*self.sites, self.film_trunk) if module for p in module.parameters()}
        used = {
            f"{path}.{name}": tensor for path, layer in self.layers.items() for name, tensor in layer.used(cond).items()
        }
        weights = {
            name: _laid_out(used.get(name, p), dtype) for name, p in self.named_parameters() if id(p) not in inside
        }
        return Frozen(row_N=cond.row_N, affines=fold(self.sites, cond), weights=weights, width=cond.width)

    @torch.no_grad()
    def frozen_at(
        self, lambdas: Sequence[float], *, width: float = 1.0, seed: int = 0, dtype: torch.dtype | None = None
    ) -> list[tuple[Frozen | FrozenDraws, int]]:
        """The network as constants at each of some lambdas, for measurements.

        Args:
            lambdas: In [0, 1].
            width: Share of the channels.
            seed: Seed of the weight noise, of which there are `noise_draws` draws; the same for all lambdas and images.
            dtype: As for `freeze`.

        Returns:
            (network, row): `network.for_row(row, num_images)` is it for some images at that lambda.
        """
        if not self.is_stochastic:
            cond = self.condition(torch.tensor(list(lambdas), dtype=torch.float64), width=width)
            frozen = self.freeze(cond, dtype=dtype)
            return [(frozen, row) for row in frozen.row_N.tolist()]
        found = []
        for lam in lambdas:
            keys = [draw_keys(seed, "noise of a measurement", at) for at in range(self.noise_draws if lam else 1)]
            lam_1 = torch.tensor([lam], dtype=torch.float64)
            draws = (self.freeze(self.condition(lam_1, width=width, noise_key=key), dtype=dtype) for key in keys)
            found.append((FrozenDraws(draws=tuple(draws)), 0))
        return found

    def attack_logits(self, x: Tensor, frozen: Frozen | FrozenDraws) -> Tensor:
        """Logits [N, K] with running statistics and without dropout in any mode; gradients flow to `x` alone.

        Of several draws of weight noise: the logarithm of the mean of their probabilities.
        """
        if isinstance(frozen, FrozenDraws):
            logp_DNK = torch.stack([self.attack_logits(x, draw).log_softmax(1) for draw in frozen.draws])
            return logp_DNK.logsumexp(0) - math.log(len(frozen.draws))
        with evaluation_mode(self) if self.training else contextlib.nullcontext():
            return torch.func.functional_call(self, dict(frozen.weights), (x, frozen))

    @torch.no_grad()
    def predict(self, x: Tensor, lam: float | Tensor, *, width: float = 1.0) -> Tensor:
        """Logits [N, K] of images in [0, 1] at one lambda or one per image, with running statistics.

        Args:
            x: [N, C, H, W].
            lam: In [0, 1]; one, or [N].
            width: Share of the channels, one of the network's widths.

        Raises:
            UserError: A lambda outside [0, 1], or a width that the network does not have.
        """
        lam_N = torch.as_tensor(lam, dtype=torch.float64).expand(len(x))
        if not self.is_stochastic:
            return self.attack_logits(x, self.freeze(self.condition(lam_N, width=width)))
        lam_L, row_N = torch.unique(lam_N.cpu(), return_inverse=True)
        parts = [row_N.eq(row).nonzero().flatten().to(x.device) for row in range(len(lam_L))]
        networks = self.frozen_at(lam_L.tolist(), width=width)
        logits = [
            self.attack_logits(x[part], frozen.for_row(row, len(part)))
            for part, (frozen, row) in zip(parts, networks, strict=True)
        ]
        return torch.cat(logits)[torch.cat(parts).argsort()]


def _laid_out(parameter: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A detached parameter in a dtype, channels last where it has four dimensions; no copy if it is so already."""
    layout = torch.channels_last if parameter.dim() == 4 else torch.contiguous_format
    return parameter.detach().to(dtype=dtype or parameter.dtype, memory_format=layout)


def _full_precision(device_type: str) -> contextlib.AbstractContextManager:
    """No autocast, on devices that have it (shapes on the meta device do not)."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
