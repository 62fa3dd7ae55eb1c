"""What every conditional network can do: take a condition, freeze itself, answer an attack.

    cond   = network.condition(lam_N)                  encode, run all FiLM generators once
    frozen = network.freeze(cond)                      fold statistics, detach everything
    logits = network.attack_logits(x, frozen)          evaluation-mode forward, no graph over parameters
    logits = network(torch.cat((x, x_adv)), cond.joint())     the one training forward

A subclass builds its layers from `_conv`, `_norm` and `nn.Linear`, then calls `_number_sites`, and defines
`_features(x, cond)`, which gets the images after pixel normalisation, and `classifier`, which takes what it returns.

Images are made channels last in memory, as the operators of `kernels` want them; so are the convolution weights of
`build_model` and those of a frozen network. Files hold plain tensors; loading keeps the layout that is there.

Letters: N images, C channels, L distinct lambdas, K classes in logits_NK.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from oat_dist.attacks import evaluation_mode
from oat_dist.conditioning import LambdaEncoder
from oat_dist.config import ConditioningConfig
from oat_dist.errors import UserError
from oat_dist.models.condition import Condition, Frozen
from oat_dist.models.film import FiLMGenerator, generate
from oat_dist.models.norm import FiLMDualBN2d, fold


class ConditionalNetwork(nn.Module):
    """Base class; images are [N, C, H, W] in [0, 1]."""

    def __init__(self, cfg: ConditioningConfig, *, seed: int) -> None:
        """Keep the conditioning; layers are the subclass's.

        Args:
            cfg: Encoding, FiLM and norm.
            seed: Seed of the encoding tables.
        """
        super().__init__()
        self.cfg = cfg
        self.encoder = LambdaEncoder(cfg, seed=seed) if cfg.film != "none" else None
        self.sync_statistics = False
        self.sites: tuple[FiLMDualBN2d, ...] = ()
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
        if with_features:
            features = self._features(x, cond)
            outputs = (self.classifier(features), features)
        else:
            outputs = (self._logits(x, cond),)
        outputs += () if within is None else within(outputs[0])
        return outputs if len(outputs) > 1 else outputs[0]

    def _logits(self, x: Tensor, cond: Condition | Frozen) -> Tensor:
        """Logits [N, K] of normalised images."""
        return self.classifier(self._features(x, cond))

    def _features(self, x: Tensor, cond: Condition | Frozen) -> Tensor:
        """Penultimate features [N, F] of normalised images; the subclass's."""
        raise NotImplementedError

    def _conv(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
        return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)

    def _norm(self, channels: int, film: bool = True) -> FiLMDualBN2d:
        has_film = film and self.encoder is not None
        generator = FiLMGenerator(self.encoder.width, channels, self.cfg.film_start) if has_film else None
        return FiLMDualBN2d(channels, 2 if self.cfg.norm == "dual" else 1, generator)

    def _number_sites(self) -> None:
        named = {name: m for name, m in self.named_modules() if isinstance(m, FiLMDualBN2d)}
        self.sites = tuple(named.values())
        for index, (name, site) in enumerate(named.items()):
            site.index, site.name = index, name

    def condition(self, lam_N: Tensor) -> Condition:
        """Everything the forward passes of a batch need to know of its lambdas.

        Args:
            lam_N: [N] lambdas in [0, 1]. On the host in training, so that nothing waits for the device.

        Raises:
            UserError: A lambda outside [0, 1].
        """
        lam_N = lam_N.detach().to("cpu", torch.float64).contiguous()
        if not bool(((lam_N >= 0) & (lam_N <= 1)).all()):
            raise UserError(f"lam={lam_N[~((lam_N >= 0) & (lam_N <= 1))][0].item()}: lambda must lie in [0, 1]")
        lam_L, row_N = self.encoder.rows(lam_N) if self.encoder else torch.unique(lam_N, return_inverse=True)
        is_zero_N = lam_N == 0
        num_zero, is_dual = int(is_zero_N.sum()), self.cfg.norm == "dual"
        device = self.sites[0].weight.device
        return Condition(
            row_N=row_N.to(device, non_blocking=True),
            segment_N=(~is_zero_N & is_dual).to(device, torch.int32, non_blocking=True),
            group_of_segment=(0, 1, 1) if is_dual else (0, 0),
            group_L=((lam_L > 0) & is_dual).to(device, torch.int64, non_blocking=True),
            num_zero=num_zero,
            zeros_first=bool(is_zero_N[:num_zero].all()),
            films=self._films(lam_L),
            sync=self.sync_statistics,
        )

    def _films(self, lam_L: Tensor) -> tuple[tuple[Tensor, Tensor] | None, ...]:
        """Scale and shift of every site for the distinct lambdas, interpolated between knots where needed."""
        if self.encoder is None:
            return (None,) * len(self.sites)
        like = self.sites[0].weight
        mix_LK = self.encoder.plan(lam_L)
        if mix_LK is not None:
            mix_LK = mix_LK.to(like.device, like.dtype, non_blocking=True)
        generators = [site.film for site in self.sites if site.film is not None]
        # Few rows, and every site multiplies by them: not worth a rounding to bfloat16.
        with _full_precision(like.device.type):
            code = self.encoder(lam_L.to(like.device, like.dtype, non_blocking=True))
            films = iter(generate(generators, code, mix_LK))
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
        """
        inside = {id(p) for site in self.sites for p in site.parameters()}
        weights = {name: _laid_out(p, dtype) for name, p in self.named_parameters() if id(p) not in inside}
        return Frozen(row_N=cond.row_N, affines=fold(self.sites, cond), weights=weights)

    def attack_logits(self, x: Tensor, frozen: Frozen) -> Tensor:
        """Logits [N, K] with running statistics and without dropout in any mode; gradients flow to `x` alone."""
        with evaluation_mode(self) if self.training else contextlib.nullcontext():
            return torch.func.functional_call(self, dict(frozen.weights), (x, frozen))

    @torch.no_grad()
    def predict(self, x: Tensor, lam: float | Tensor) -> Tensor:
        """Logits [N, K] of images in [0, 1] at one lambda or one per image, with running statistics."""
        lam_N = torch.as_tensor(lam, dtype=torch.float64).expand(len(x))
        return self.attack_logits(x, self.freeze(self.condition(lam_N)))


def _laid_out(parameter: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A detached parameter in a dtype, channels last where it has four dimensions; no copy if it is so already."""
    layout = torch.channels_last if parameter.dim() == 4 else torch.contiguous_format
    return parameter.detach().to(dtype=dtype or parameter.dtype, memory_format=layout)


def _full_precision(device_type: str) -> contextlib.AbstractContextManager:
    """No autocast, on devices that have it (shapes on the meta device do not)."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
