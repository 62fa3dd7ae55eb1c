"""The published arrangement of a training step, written plainly: what ours is measured against and proved equal to.

As in the authors' code (Wang et al., NeurIPS 2020): images with lambda = 0 come first; a normalisation site cuts the
batch there, gives each part to its own `nn.BatchNorm2d` and joins them again; the FiLM network runs on all rows of the
batch at every layer; scale, shift, residual and ReLU are operations of their own, the residual and the wide networks'
ReLU in place; and a step is three calls: clean forward, adversarial forward, backward, with the attack between the
first two, in evaluation mode and without gradients to parameters. The convolutions' memory order is NCHW.

Letters: N images, A of them (the last) with lambda > 0, C channels, E encoding width, K classes.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oat_dist.attacks import evaluation_mode
from oat_dist.models.network import ConditionalNetwork
from oat_dist.models.norm import FiLMDualBN2d
from oat_dist.models.preact_resnet import PreActResNet


class Told(NamedTuple):
    """What every layer is told; ours look at the width and the noise."""

    code_NE: Tensor
    """Codes of all rows."""
    num_zero: int
    """How many of the first rows have lambda = 0."""
    width: float = 1.0
    """All channels take part."""
    noise: None = None
    """Weights have none."""


Forward = Callable[[Tensor, Tensor, int], Tensor]
"""(images [N, C, H, W], codes [N, E], number of images with lambda = 0) -> logits [N, K]."""


class PublishedSite(nn.Module):
    """BatchNorm2d per group, FiLM on every row, residual, ReLU."""

    def __init__(self, site: FiLMDualBN2d, *, relu_in_place: bool) -> None:
        """Copy parameters and statistics of one of our sites."""
        super().__init__()
        self.relu_in_place = relu_in_place
        self.norms = nn.ModuleList()
        for g in range(len(site.weight)):
            norm = nn.BatchNorm2d(site.weight.shape[1], eps=site.eps, momentum=site.momentum, dtype=site.weight.dtype)
            norm.weight.data.copy_(site.weight[g].detach())
            norm.bias.data.copy_(site.bias[g].detach())
            norm.running_mean.copy_(site.running_mean[g])
            norm.running_var.copy_(site.running_var[g])
            self.norms.append(norm)
        self.film = copy.deepcopy(site.film)

    def forward(self, x: Tensor, told: Told, residual: Tensor | None = None, activate: bool = True) -> Tensor:
        """Normalise under the codes of all rows and the number of the first rows with lambda = 0."""
        code_NE, num_zero = told.code_NE, told.num_zero
        if len(self.norms) == 1 or num_zero == len(x):
            out = self.norms[0](x)
        elif num_zero == 0:
            out = self.norms[1](x)
        else:
            out = torch.cat((self.norms[0](x[:num_zero]), self.norms[1](x[num_zero:])))
        if self.film is not None:
            scale_NC, shift_NC = self.film(code_NE)
            out = out * scale_NC[:, :, None, None] + shift_NC[:, :, None, None]
        if residual is not None:
            out += residual
        return F.relu(out, inplace=self.relu_in_place) if activate else out


def published(network: ConditionalNetwork) -> ConditionalNetwork:
    """The same network with every normalisation site replaced, in NCHW; topology and convolutions are kept.

    Its `forward` is not to be called; `published_forward` is.
    """
    twin = copy.deepcopy(network)
    relu_in_place = isinstance(network, PreActResNet)
    for name, module in list(twin.named_modules()):
        if isinstance(module, FiLMDualBN2d):
            twin.set_submodule(name, PublishedSite(module, relu_in_place=relu_in_place))
    return twin.to(memory_format=torch.contiguous_format)


def published_forward(twin: ConditionalNetwork) -> Forward:
    """The forward pass of a network that `published` gave, without what our network does to its input."""
    return lambda x, code_NE, num_zero: twin._logits(x, Told(code_NE, num_zero))


@contextlib.contextmanager
def as_attacked(twin: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients to parameters until the block ends."""
    wanted = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        with evaluation_mode(twin):
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def published_losses(
    forward: Forward,
    code_NE: Tensor,
    x: Tensor,
    label: Tensor,
    lam: Tensor,
    num_zero: int,
    attack: Callable[[], Tensor],
) -> Tensor:
    """Per-image losses: clean forward of all, attack, adversarial forward of the images with lambda > 0.

    Args:
        forward: The network.
        code_NE: Code of each image's lambda.
        x: [N, C, H, W] images, those with lambda = 0 first.
        label: [N] classes.
        lam: [N] lambdas, on the device, in the dtype of the losses.
        num_zero: Images with lambda = 0.
        attack: Gives the [A, C, H, W] adversarial images; called after the clean forward, if A > 0.

    Returns:
        [N] losses with a graph.
    """
    clean = F.cross_entropy(forward(x, code_NE, num_zero), label, reduction="none")
    robust = clean.new_zeros(num_zero)
    if num_zero < len(x):
        x_adv = attack()
        logits = forward(x_adv, code_NE[num_zero:], 0)
        robust = torch.cat((robust, F.cross_entropy(logits, label[num_zero:], reduction="none")))
    return (1 - lam) * clean + lam * robust


def three_call_step(
    twin: ConditionalNetwork, code_NE: Tensor, x: Tensor, x_adv: Tensor, label: Tensor, lam: Tensor
) -> Tensor:
    """Clean forward, adversarial forward with given images, one backward of the mean; per-image losses."""
    num_zero = int((lam == 0).sum())
    loss = published_losses(published_forward(twin), code_NE, x, label, lam, num_zero, lambda: x_adv)
    loss.mean().backward()
    return loss.detach()


def published_attack(
    logits_fn: Callable[[Tensor], Tensor], x: Tensor, label: Tensor, *, eps: float, steps: int, step_size: float
) -> Tensor:
    """PGD in the Linf ball from a uniform random start.

    Differs from the authors' code in one thing, in its favour: clamping instead of assignment through boolean masks,
    for which a GPU would have to be waited.

    Args:
        logits_fn: Images [A, C, H, W] to logits [A, K].
        x: [A, C, H, W] images in [0, 1].
        label: [A] classes.
        eps: Radius of the ball, pixel units of [0, 1].
        steps: Gradient steps.
        step_size: Length of a step in pixel units.

    Returns:
        [A, C, H, W], detached.
    """
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    x_adv = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_(True)
        loss = F.cross_entropy(logits_fn(x_adv), label, reduction="sum")
        (grad,) = torch.autograd.grad(loss, x_adv)
        x_adv = torch.clamp(x_adv.detach() + step_size * grad.sign(), low, high)
    return x_adv
