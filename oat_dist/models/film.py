"""FiLM generators: from a code of lambda to a per-channel scale and shift.

FiLM itself: Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer" (AAAI 2018), equation 1. The
generators, one per site, all of one kind:

    FiLMGenerator   film=mlp      Linear - LeakyReLU - Linear (Wang et al., "Once-for-All Adversarial Training", NeurIPS
                                  2020, section 3.2), then LeakyReLU on the output in the authors' code
    FiLMHead        film=shared   Linear on what one `trunk` for all sites makes of the code: few parameters, since
                                  scale and shift of a site are a product of rank R over lambda
    FiLMTable       film=table    scale and shift of every knot themselves

A network runs all its generators of one shape as batched products (`generate`): a GPU would wait for the launch of each
small one. At a narrower width the leading units make the leading channels, as in the authors' code of OATS.

Letters: L distinct lambdas, E encoding width, C channels, F generators of one shape, K knots, R rank.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oat_dist.models.slimming import unfilled


class FiLMGenerator(nn.Module):
    """Two-layer perceptron from [L, E] codes to scale and shift, [L, C] each."""

    def __init__(self, width: int, channels: int, start: str) -> None:
        """Make the layers.

        Args:
            width: E.
            channels: C.
            start: `identity` (scale 1 + output, shift output, last layer zero) or `paper` (LeakyReLU of the output).
        """
        super().__init__()
        self.start, self.channels = start, channels
        self.hidden = nn.Linear(width, 2 * channels)
        self.output = nn.Linear(2 * channels, 2 * channels)
        if start == "identity":
            _zero(self.output)

    def forward(self, code_LE: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift of every channel for every code."""
        return scale_and_shift(self.output(F.leaky_relu(self.hidden(code_LE))), self.start)

    def parts(self, channels: int) -> tuple[Tensor, ...]:
        """Weights and biases of the leading units, which make the leading channels."""
        units = 2 * channels
        weight, bias = _leading(self.output.weight, channels), _leading(self.output.bias, channels)
        if channels < self.channels:
            return self.hidden.weight[:units], self.hidden.bias[:units], weight[:, :units], bias
        return self.hidden.weight, self.hidden.bias, weight, bias

    @staticmethod
    def together(code_LE: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """[F, L, 2C] outputs of many generators from their stacked parts."""
        hidden_weight, hidden_bias, weight, bias = parts
        hidden = _linear(code_LE.expand(len(weight), -1, -1), hidden_weight, hidden_bias)
        return _linear(F.leaky_relu(hidden), weight, bias)

    def cut(self, channels: int) -> "FiLMGenerator":
        """A generator of the leading channels alone."""
        width = self.hidden.in_features
        return _filled(lambda: FiLMGenerator(width, channels, self.start), self.parts(channels))


class FiLMHead(nn.Module):
    """Linear layer from [L, R] outputs of the shared trunk to scale and shift, [L, C] each."""

    def __init__(self, rank: int, channels: int, start: str) -> None:
        """Make the layer.

        Args:
            rank: R.
            channels: C.
            start: As for `FiLMGenerator`; `identity`.
        """
        super().__init__()
        self.start, self.channels = start, channels
        self.output = nn.Linear(rank, 2 * channels)
        _zero(self.output)

    def parts(self, channels: int) -> tuple[Tensor, ...]:
        """Weight and bias of the leading channels."""
        return _leading(self.output.weight, channels), _leading(self.output.bias, channels)

    @staticmethod
    def together(code_LR: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """[F, L, 2C] outputs of many heads from their stacked parts."""
        return _linear(code_LR.expand(len(parts[0]), -1, -1), *parts)

    def cut(self, channels: int) -> "FiLMHead":
        """A head of the leading channels alone."""
        rank = self.output.in_features
        return _filled(lambda: FiLMHead(rank, channels, self.start), self.parts(channels))


class FiLMTable(nn.Module):
    """Scale and shift, [K, C] each, of every knot."""

    def __init__(self, num_knots: int, channels: int, start: str) -> None:
        """Start as the identity.

        Args:
            num_knots: K.
            channels: C.
            start: As for `FiLMGenerator`; `identity`.
        """
        super().__init__()
        self.start, self.channels = start, channels
        self.table = nn.Parameter(torch.zeros(2 * channels, num_knots))

    def parts(self, channels: int) -> tuple[Tensor, ...]:
        """The table of the leading channels."""
        return (_leading(self.table, channels),)

    @staticmethod
    def together(code_KE: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """[F, K, 2C] of many tables from their stacked parts; the codes are not used."""
        return parts[0].mT

    def cut(self, channels: int) -> "FiLMTable":
        """A table of the leading channels alone."""
        num_knots = self.table.shape[1]
        return _filled(lambda: FiLMTable(num_knots, channels, self.start), self.parts(channels))


Generator = FiLMGenerator | FiLMHead | FiLMTable


def trunk(width: int, rank: int) -> nn.Module:
    """What all heads of film=shared have in common: [L, E] codes to [L, R].

    Args:
        width: E.
        rank: R.
    """
    return nn.Sequential(nn.Linear(width, rank), nn.LeakyReLU())


def generate(
    generators: Sequence[Generator],
    code_LE: Tensor,
    mix_LK: Tensor | None = None,
    *,
    channels: Sequence[int] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Scale and shift of many generators, those of equal shape in one batched product.

    Weights are stacked here and stay where they are in their modules, so gradients reach them and names do not change.

    Args:
        generators: All of one kind, of any numbers of channels; they take codes of the same width and start alike.
        code_LE: Codes; of a trunk its output.
        mix_LK: Weights that mix the outputs of K codes into those of L lambdas, or None for the outputs themselves.
        channels: Leading channels that are made of each generator; default: all.

    Returns:
        (scale_LC, shift_LC) of each generator, in order.
    """
    wanted = [generator.channels for generator in generators] if channels is None else channels
    same_shape: dict[int, list[int]] = {}
    for index, count in enumerate(wanted):
        same_shape.setdefault(count, []).append(index)
    films = {}
    for count, members in same_shape.items():
        stacked = [torch.stack(part) for part in zip(*(generators[i].parts(count) for i in members), strict=True)]
        first = generators[members[0]]
        scale_FLC, shift_FLC = scale_and_shift(first.together(code_LE, stacked), first.start)
        if mix_LK is not None:
            scale_FLC, shift_FLC = mix_LK @ scale_FLC, mix_LK @ shift_FLC
        films |= zip(members, zip(scale_FLC.unbind(), shift_FLC.unbind(), strict=True), strict=True)
    return [films[index] for index in range(len(generators))]


def _linear(x_FLE: Tensor, weight_FCE: Tensor, bias_FC: Tensor) -> Tensor:
    """Every layer on its own input."""
    return torch.baddbmm(bias_FC[:, None], x_FLE, weight_FCE.mT)


def _leading(scale_then_shift: Tensor, channels: int) -> Tensor:
    """Rows of the leading channels, of scales and of shifts."""
    rows = scale_then_shift.unflatten(0, (2, -1))
    return scale_then_shift if channels == rows.shape[1] else rows[:, :channels].flatten(0, 1)


def scale_and_shift(out: Tensor, start: str) -> tuple[Tensor, Tensor]:
    """The two halves of the last dimension of a generator's last layer, after what its start asks for."""
    if start == "paper":
        return F.leaky_relu(out).chunk(2, -1)
    scale, shift = out.chunk(2, -1)
    return 1 + scale, shift


def _zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


@torch.no_grad()
def _filled(make: Callable[[], Generator], parts: Sequence[Tensor]) -> Generator:
    """A new generator with copies of parts, in the order of its parameters."""
    cut = unfilled(make, parts[0])
    for parameter, part in zip(cut.parameters(), parts, strict=True):
        parameter.copy_(part)
    return cut
