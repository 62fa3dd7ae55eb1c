"""The published arrangement of a conditional network, written with PyTorch's own modules, as an oracle for ours.

One nn.BatchNorm2d per norm group, a batch split by lambda and put together again, the FiLM network run on all rows of
the batch at every layer, and three separate calls: clean forward, adversarial forward, backward (Wang et al.,
NeurIPS 2020, and its published code).
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oat_dist.models.network import ConditionalNetwork
from oat_dist.models.norm import FiLMDualBN2d


class PublishedSite(nn.Module):
    """BatchNorm2d per group, FiLM on every row, residual, ReLU."""

    def __init__(self, site: FiLMDualBN2d) -> None:
        """Copy parameters and statistics of one of our sites."""
        super().__init__()
        self.norms = nn.ModuleList()
        for g in range(len(site.weight)):
            norm = nn.BatchNorm2d(site.weight.shape[1], dtype=site.weight.dtype)
            norm.weight.data.copy_(site.weight[g].detach())
            norm.bias.data.copy_(site.bias[g].detach())
            norm.running_mean.copy_(site.running_mean[g])
            norm.running_var.copy_(site.running_var[g])
            self.norms.append(norm)
        self.film = copy.deepcopy(site.film)

    def forward(
        self, x: Tensor, told: tuple[Tensor, Tensor], residual: Tensor | None = None, relu: bool = True
    ) -> Tensor:
        """Normalise under (codes of all rows, which rows have lambda = 0)."""
        code_NE, is_zero_N = told
        if len(self.norms) == 1:
            out = self.norms[0](x)
        else:
            out = torch.empty_like(x)
            for norm, members in zip(self.norms, (is_zero_N, ~is_zero_N), strict=True):
                if members.any():
                    out[members] = norm(x[members])
        if self.film is not None:
            scale_NC, shift_NC = self.film(code_NE)
            out = scale_NC[:, :, None, None] * out + shift_NC[:, :, None, None]
        if residual is not None:
            out = out + residual
        return F.relu(out) if relu else out


def published(network: ConditionalNetwork) -> nn.Module:
    """The same network with every normalisation site replaced; topology and convolutions are kept."""
    twin = copy.deepcopy(network)
    for name, module in list(twin.named_modules()):
        if isinstance(module, FiLMDualBN2d):
            twin.set_submodule(name, PublishedSite(module))
    return twin


def three_call_step(twin: nn.Module, code_NE: Tensor, x: Tensor, x_adv: Tensor, label: Tensor, lam: Tensor) -> Tensor:
    """Clean forward, adversarial forward of the images with lambda > 0, one backward of the mean; per-image losses."""
    is_zero = lam == 0
    clean = F.cross_entropy(twin(x, (code_NE, is_zero)), label, reduction="none")
    loss = (1 - lam) * clean
    if (~is_zero).any():
        adversarial = twin(x_adv, (code_NE[~is_zero], is_zero[~is_zero]))
        robust = F.cross_entropy(adversarial, label[~is_zero], reduction="none")
        loss = loss.index_add(0, (~is_zero).nonzero().flatten(), lam[~is_zero] * robust)
    loss.mean().backward()
    return loss.detach()
