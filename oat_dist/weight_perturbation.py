"""Adversarial weight perturbation: a step's gradient is taken where the loss of its batch rises most.

Wu, Xia and Wang, "Adversarial Weight Perturbation Helps Robust Generalization" (NeurIPS 2020, equations 6 to 9 with one
step): on given adversarial images every layer's weights w move to w + gamma * ||w|| * g / ||g||, g being the gradient
of the loss with respect to them; the gradient there moves the weights w. The loss is that of the whole global batch, so
the perturbation depends neither on the number of ranks nor on accumulation. Nothing waits for the device.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from oat_dist.distributed import World
from oat_dist.models.network import ConditionalNetwork
from oat_dist.optim import layer_weights, running_statistics


class WeightPerturbation:
    """The weights of a network's convolutions and of its classifier, moved away and back; those of FiLM stay."""

    def __init__(self, network: ConditionalNetwork, gamma: float, world: World) -> None:
        """Perturb nothing yet.

        Args:
            network: The network that is trained, on its device.
            gamma: Length of the perturbation of a layer, as a share of the norm of its weights.
            world: The ranks, whose gradients are summed.
        """
        self.weights, self.gamma, self.world = layer_weights(network), gamma, world
        self._statistics = running_statistics(network)
        self._gradients: list[Tensor] = []
        self._own: list[Tensor] = []

    @contextlib.contextmanager
    def ascent(self) -> Iterator[None]:
        """After the block, in which every micro-batch is handed to `add`, the weights are perturbed.

        What the forward passes of the block did to running statistics is undone. Every rank must enter.
        """
        before = [statistic.clone() for statistic in self._statistics]
        self._gradients = []
        yield
        if before:
            torch._foreach_copy_(self._statistics, before)
        self._move()

    def add(self, loss_N: Tensor) -> None:
        """Add the gradient of a micro-batch.

        Args:
            loss_N: [N] losses of this rank's images, with a graph, which is used up.
        """
        gradients = torch.autograd.grad(loss_N.sum(), self.weights)
        if self._gradients:
            torch._foreach_add_(self._gradients, gradients)
        else:
            self._gradients = list(gradients)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the weights the values that they had, to the last bit; without a perturbation nothing happens."""
        if self._own:
            torch._foreach_copy_(self.weights, self._own)
        self._own = []

    @torch.no_grad()
    def _move(self) -> None:
        flat = self.world.sum(torch.cat([gradient.reshape(-1) for gradient in self._gradients]))
        parts = flat.split([weight.numel() for weight in self.weights])
        gradients = [part.view_as(weight) for part, weight in zip(parts, self.weights, strict=True)]
        self._own = [weight.detach().clone() for weight in self.weights]
        for weight, gradient in zip(self.weights, gradients, strict=True):
            # A layer without gradient stays; one whose gradient is not finite spoils the step, which is then found out.
            length = gradient.norm().clamp_min(torch.finfo(gradient.dtype).tiny)
            weight += gradient * (self.gamma * weight.norm() / length)
        self._gradients = []
