"""Networks whose answers are known or wrong on purpose, and small image sets for them."""

import dataclasses
import itertools

import torch

from oat_dist.config import ConditioningConfig, Config
from oat_dist.data import Batch
from oat_dist.models import build_model
from oat_dist.models.network import ConditionalNetwork

SIDE = 6


class Linear(ConditionalNetwork):
    """Logits linear in the pixels, for any lambda; the one norm site is at its start and does next to nothing."""

    def __init__(self, num_classes: int, seed: int = 0):
        super().__init__(ConditioningConfig(film="none", norm="single"), seed=0)
        self.norm = self._norm(1)
        self.classifier = self._linear(SIDE * SIDE, num_classes)
        gen = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.classifier.weight.copy_(torch.randn(num_classes, SIDE * SIDE, generator=gen))
            self.classifier.bias.copy_(-self.classifier.weight.sum(1) / 2)  # balanced around grey
        self._number_sites()

    def _features(self, x, cond):
        return self.norm(x, cond, activate=False).flatten(1)


def exact_robust(network: Linear, batch: Batch, eps: float) -> torch.Tensor:
    """[N] bool in closed form: no point of ball and pixel range has a wrong logit at least as large as the label's.

    Each wrong class is best reached at the corner that its difference of weights points to.
    """
    scale = (1 + network.norm.eps) ** -0.5
    weight, bias = network.classifier.weight.detach().double() * scale, network.classifier.bias.detach().double()
    x = batch.image_NCHW.flatten(1).double()
    robust = torch.ones(len(x), dtype=torch.bool)
    for wrong in range(len(weight)):
        difference = weight[wrong] - weight[batch.label_N]
        corner = (x + eps * difference.sign()).clamp(0, 1)
        reached = (corner * difference).sum(1) + bias[wrong] - bias[batch.label_N]
        robust &= (reached < 0) | (batch.label_N == wrong)
    return robust


def linear_images(network: Linear, num_images: int, seed: int = 1) -> Batch:
    """Random images with the label the network gives, every tenth with another."""
    gen = torch.Generator().manual_seed(seed)
    image = torch.rand(num_images, 1, SIDE, SIDE, generator=gen)
    label = network.predict(image, 0.5).argmax(1)
    label[::10] = (label[::10] + 1) % network.classifier.out_features
    index = torch.arange(num_images)
    return Batch(image_NCHW=image, label_N=label, index_N=index, position_N=index)


def perturbed_network(num_classes: int = 10) -> ConditionalNetwork:
    """A small network, not trained, that answers differently at different lambdas."""
    network = build_model(Config(), in_channels=1, num_classes=num_classes)
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=gen))
        for parameter in network.classifier.parameters():
            parameter.mul_(0.01)  # else its softmax is all or nothing
    return network


def answered(network: ConditionalNetwork, batches: list[Batch], lam: float) -> list[Batch]:
    """The same images with the labels that a network gives at a lambda, so that it has something to lose."""
    return [dataclasses.replace(batch, label_N=network.predict(batch.image_NCHW, lam).argmax(1)) for batch in batches]


def masked(network: ConditionalNetwork) -> ConditionalNetwork:
    """Gradient masking: logits are rounded, so that their gradient is zero, and the answers stay."""
    honest = network.attack_logits
    network.attack_logits = lambda x, frozen: (honest(x, frozen) * 1e4).round() / 1e4
    return network


def noisy(network: ConditionalNetwork) -> ConditionalNetwork:
    """A stochastic defence: the weights of the classifier carry fresh noise in every forward pass."""
    honest, queries = network.attack_logits, itertools.count()

    def with_noise(x, frozen):
        gen = torch.Generator().manual_seed(next(queries))
        weight = frozen.weights["classifier.weight"]
        noise = 0.1 * weight.std() * torch.randn(weight.shape, generator=gen)
        return honest(x, dataclasses.replace(frozen, weights={**frozen.weights, "classifier.weight": weight + noise}))

    network.attack_logits = with_noise
    return network
