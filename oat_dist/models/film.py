"""FiLM generator: from a code of lambda to a per-channel scale and shift.

Wang et al., "Once-for-All Adversarial Training" (NeurIPS 2020), section 3.2: Linear - LeakyReLU - Linear, then
LeakyReLU on the output in the authors' code. FiLM itself: Perez et al., "FiLM: Visual Reasoning with a General
Conditioning Layer" (AAAI 2018), equation 1.

Letters: L distinct lambdas, E encoding width, C channels.
"""

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
        out = self.output(F.leaky_relu(self.hidden(code_LE)))
        if self.start == "paper":
            out = F.leaky_relu(out)
        scale_LC, shift_LC = out.chunk(2, 1)
        return (1 + scale_LC, shift_LC) if self.start == "identity" else (scale_LC, shift_LC)
