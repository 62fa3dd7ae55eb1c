"""Convolution and classifier of every network: at a width they use their leading channels, under noise noisy weights.

A narrower width uses weight[:out, :in] of the shared weight (Yu et al., "Slimmable Neural Networks", ICLR 2019, as in
OATS, Wang et al., NeurIPS 2020). With conditioning.kind=float the weight of an image with lambda > 0 is

    weight + lambda * alpha * noise,   noise ~ N(0, std(weight)^2),   alpha one learnt number per layer

(Kundu et al., "FLOAT", WACV 2023; noise and alpha as in He et al., "Parametric Noise Injection", CVPR 2019). `std` is
that of the weights in use and no gradient goes through it. The condition carries lambda * N(0, 1) draws.

A frozen network has its weights sliced and noisy already, and slicing again changes nothing.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oat_dist.models.condition import Condition, Frozen
from oat_dist.models.slimming import channels_at, unfilled, width_name

_MOST_PACKED = 16


class _Layer(nn.Module):
    """What both layers share."""

    weight: Tensor
    index = -1
    """Position among the layers of the network, set by it."""

    def _add_noise(self, noise_start: float | None) -> None:
        """Make alpha, or none."""
        alpha = None if noise_start is None else nn.Parameter(torch.full((1,), noise_start))
        self.register_parameter("alpha", alpha)

    def used(self, cond: Condition | Frozen) -> dict[str, Tensor]:
        """Name -> tensor of the parameters that take part under a condition, sliced and noisy."""
        raise NotImplementedError

    def weight_at(self, width: float) -> Tensor:
        """The part of the weight that a width uses."""
        raise NotImplementedError

    def cut(self, width: float) -> "_Layer":
        """A layer of one width alone."""
        raise NotImplementedError

    def _noisy(self, weight: Tensor, cond: Condition | Frozen, layer: "_Layer") -> Tensor:
        if cond.noise is None:
            return weight
        return weight + layer.alpha * (weight.detach().std(correction=0) * cond.noise[self.index])


class SlimmableConv2d(_Layer, nn.Conv2d):
    """A convolution without bias, padded to keep the size."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        *,
        from_images: bool = False,
        noise_start: float | None = None,
    ) -> None:
        """Make the layer.

        Args:
            in_channels: Input channels at width 1.
            out_channels: Output channels at width 1.
            kernel: Side of the kernel, odd.
            stride: Stride.
            from_images: Whether the input is images, which have all their channels at every width.
            noise_start: Start of alpha; None: no noise.
        """
        super().__init__(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
        self.from_images = from_images
        self._add_noise(noise_start)

    def forward(self, x: Tensor, cond: Condition | Frozen) -> Tensor:
        """[N, in, H, W] -> [N, out, H / stride, W / stride] of the channels of the condition's width."""
        weight = self.used(cond)["weight"]
        if x.device.type == "cpu" and self._meets_fault(weight):
            return F.conv2d(x[:, :, :: self.stride[0], :: self.stride[1]], weight)
        return self._conv_forward(x, weight, None)

    def _meets_fault(self, weight: Tensor) -> bool:
        """Whether oneDNN would write past its workspace in the backward of this convolution on a CPU.

        So it does (torch 2.13; oneDNN issue 6035) with strides, a kernel of 1x1 and fewer input channels than it packs
        together, 8 or 16. Without the pixels that a stride passes over, the convolution is the same and has no stride.
        """
        return self.kernel_size == (1, 1) and self.stride != (1, 1) and weight.shape[1] < _MOST_PACKED

    def used(self, cond: Condition | Frozen) -> dict[str, Tensor]:
        """See `_Layer`."""
        return {"weight": self._noisy(self.weight_at(cond.width), cond, self)}

    def weight_at(self, width: float) -> Tensor:
        """See `_Layer`."""
        if width == 1:
            return self.weight
        num_in = self.in_channels if self.from_images else channels_at(self.in_channels, width)
        return self.weight[: channels_at(self.out_channels, width), :num_in]

    def cut(self, width: float) -> "SlimmableConv2d":
        """See `_Layer`."""
        weight, kernel, stride = self.weight_at(width), self.kernel_size[0], self.stride[0]
        options = {"from_images": self.from_images, "noise_start": None if self.alpha is None else 0.0}
        make = lambda: SlimmableConv2d(weight.shape[1], weight.shape[0], kernel, stride, **options)  # noqa: E731
        return _filled(make, self, weight=weight)


class SlimmableLinear(_Layer, nn.Linear):
    """A classifier on the leading features; with heads, every narrower width has one of its own."""

    def __init__(
        self, in_features: int, out_features: int, *, narrow: Mapping[float, int] | None = None,
        noise_start: float | None = None,
    ) -> None:  # fmt: skip
        """Make the layer.

        Args:
            in_features: Features at width 1.
            out_features: Classes.
            narrow: Features of the widths that have a head of their own.
            noise_start: Start of alpha; None: no noise.
        """
        super().__init__(in_features, out_features)
        self._add_noise(noise_start)
        heads = {
            width_name(width): SlimmableLinear(features, out_features, noise_start=noise_start)
            for width, features in (narrow or {}).items()
        }
        self.narrow = nn.ModuleDict(heads) if heads else {}

    def forward(self, features: Tensor, cond: Condition | Frozen) -> Tensor:
        """[N, F] -> logits [N, K]."""
        return F.linear(features, *self.used(cond).values())

    def used(self, cond: Condition | Frozen) -> dict[str, Tensor]:
        """See `_Layer`."""
        name = width_name(cond.width)
        layer, prefix = (self.narrow[name], f"narrow.{name}.") if name in self.narrow else (self, "")
        weight = self._noisy(self.weight_at(cond.width), cond, layer)
        return {f"{prefix}weight": weight, f"{prefix}bias": layer.bias}

    def weight_at(self, width: float) -> Tensor:
        """See `_Layer`."""
        if width_name(width) in self.narrow:
            return self.narrow[width_name(width)].weight
        return self.weight if width == 1 else self.weight[:, : channels_at(self.in_features, width)]

    def cut(self, width: float) -> "SlimmableLinear":
        """See `_Layer`."""
        weight, name = self.weight_at(width), width_name(width)
        layer = self.narrow[name] if name in self.narrow else self  # noqa: SIM401 (a ModuleDict has no get)
        start = None if self.alpha is None else 0.0
        make = lambda: SlimmableLinear(weight.shape[1], weight.shape[0], noise_start=start)  # noqa: E731
        return _filled(make, layer, weight=weight, bias=layer.bias)


@torch.no_grad()
def _filled(make: Callable[[], _Layer], layer: _Layer, **tensors: Tensor) -> _Layer:
    """A new layer with copies of tensors, and alpha and mode of another."""
    cut = unfilled(make, layer.weight)
    if layer.alpha is not None:
        tensors["alpha"] = layer.alpha
    for name, tensor in tensors.items():
        getattr(cut, name).copy_(tensor)
    return cut.train(layer.training)
