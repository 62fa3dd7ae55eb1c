"""FiLM generator: from a code of lambda to a per-channel scale and shift.

Wang et al., "Once-for-All Adversarial Training" (NeurIPS 2020), section 3.2: Linear - LeakyReLU - Linear, then
LeakyReLU on the output in the authors' code. FiLM itself: Perez et al., "FiLM: Visual Reasoning with a General
Conditioning Layer" (AAAI 2018), equation 1.

A network runs all its generators of one width as two batched products (`generate`): a GPU would wait for the launch of
each small one.

Letters: L distinct lambdas, E encoding width, C channels, F generators of one width, K knots.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        self.start = start
        self.hidden = nn.Linear(width, 2 * channels)
        self.output = nn.Linear(2 * channels, 2 * channels)
        if start == "identity":
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def forward(self, code_LE: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift of every channel for every code."""
        return _scale_and_shift(self.output(F.leaky_relu(self.hidden(code_LE))), self.start)


def generate(
    generators: Sequence[FiLMGenerator], code_LE: Tensor, mix_LK: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Scale and shift of many generators, those of equal width in one batched product.

    Weights are stacked here and stay where they are in their modules, so gradients reach them and names do not change.

    Args:
        generators: Of any widths; all take codes of the same width and start alike.
        code_LE: Codes.
        mix_LK: Weights that mix the outputs of K codes into those of L lambdas, or None for the outputs themselves.

    Returns:
        (scale_LC, shift_LC) of each generator, in order.
    """
    same_width: dict[int, list[int]] = {}
    for index, generator in enumerate(generators):
        same_width.setdefault(generator.output.out_features, []).append(index)
    films = {}
    for members in same_width.values():
        layers = [(generators[i].hidden, generators[i].output) for i in members]
        hidden, output = zip(*layers, strict=True)
        out_FLC = _linear(F.leaky_relu(_linear(code_LE.expand(len(members), -1, -1), hidden)), output)
        scale_FLC, shift_FLC = _scale_and_shift(out_FLC, generators[members[0]].start)
        if mix_LK is not None:
            scale_FLC, shift_FLC = mix_LK @ scale_FLC, mix_LK @ shift_FLC
        films |= zip(members, zip(scale_FLC.unbind(), shift_FLC.unbind(), strict=True), strict=True)
    return [films[index] for index in range(len(generators))]


def _linear(x_FLE: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    """Every layer on its own input."""
    weight_FCE = torch.stack([layer.weight for layer in layers])
    bias_FC = torch.stack([layer.bias for layer in layers])
    return torch.baddbmm(bias_FC[:, None], x_FLE, weight_FCE.mT)


def _scale_and_shift(out: Tensor, start: str) -> tuple[Tensor, Tensor]:
    """The two halves of the last dimension of a generator's last layer, after what its start asks for."""
    if start == "paper":
        return F.leaky_relu(out).chunk(2, -1)
    scale, shift = out.chunk(2, -1)
    return 1 + scale, shift
