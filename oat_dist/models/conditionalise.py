"""Conditional networks out of any module with BatchNorm2d layers.

    network = conditionalise(torchvision.models.vgg11_bn(num_classes=10), ConditioningConfig(), seed=0)
    logits = network.predict(images, lam=0.3)

Every BatchNorm2d becomes a FiLM dual norm (Wang et al., "Once-for-All Adversarial Training", NeurIPS 2020, section 3)
that starts as a copy of it. The module's own forward takes images alone, so the sites find their condition in a
`_Told` that the network shares with them and fills for the time of one forward. That is state of one network, not of
the program: networks do not meet, a deep copy has its own, and `torch.func.functional_call`, which exchanges tensors
alone, does not touch it. Two threads must not run the same network at once (functional_call forbids that anyway).

Letters: N images, C channels, G norm groups.
"""

import contextlib
import copy
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from oat_dist.config import ConditioningConfig
from oat_dist.errors import UserError
from oat_dist.models.condition import Condition, Frozen
from oat_dist.models.film import Generator
from oat_dist.models.network import ConditionalNetwork
from oat_dist.models.norm import FiLMDualBN2d


def conditionalise(
    module: nn.Module, conditioning: ConditioningConfig, *, seed: int, skip: Collection[str] = ()
) -> "ConditionalisedNetwork":
    """A conditional network that computes what a module does, with FiLM dual norms in place of its BatchNorm2d layers.

    With `film_start=identity` it answers as the module at every lambda, in evaluation mode, until it is trained.
    Dropout layers of the module are off in attacks and prediction; their masks come from torch's global generator.

    Args:
        module: From images [N, C, H, W] in [0, 1] to logits [N, K]; it is copied and stays as it is. Every norm must
            see the batch in the order and number of the images.
        conditioning: Encoding, FiLM and norm.
        seed: Seed of the FiLM generators and the encoding tables; the global random state is left as it was.
        skip: Names of norms (as in `module.named_modules()`) that get no FiLM, e.g. those of shortcuts.

    Returns:
        The network on the device and in the dtype of the module's first norm, in the modes of the module. Its
        parameters have the module's names after `module.`.

    Raises:
        UserError: A norm over the batch that cannot be replaced, no BatchNorm2d at all, or an unknown name in `skip`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConditionalisedNetwork(module, conditioning, seed=seed, skip=skip)


class ConditionalisedNetwork(ConditionalNetwork):
    """What `conditionalise` returns."""

    def __init__(self, module: nn.Module, cfg: ConditioningConfig, *, seed: int, skip: Collection[str] = ()) -> None:
        """Copy a module and replace its norms; see `conditionalise`."""
        names = list(_norms(module))
        unknown = sorted(set(skip) - set(names))
        if unknown:
            raise UserError(f"skip={unknown}: no such BatchNorm2d in the module; it has {', '.join(names)}")
        if cfg.kind == "float":
            raise UserError("conditioning.kind=float: the layers of other modules draw no noise; use kind=film")
        super().__init__(cfg, seed=seed)
        self.training = module.training
        self.module = copy.deepcopy(module)
        self._told = _Told()
        sites: dict[nn.BatchNorm2d, _ToldSite] = {}
        for name, norm in _norms(self.module).items():
            generator = None if name in skip else self._film(norm.num_features)
            sites[norm] = _ToldSite(norm, generator, self._told, **self._norm_groups)
        # A norm that stands in several places becomes one site in all of them.
        for path, norm in list(self.named_modules(remove_duplicate=False)):
            if norm in sites:
                self.set_submodule(path, sites[norm])
        self._number_sites()
        for part in (self.encoder, self.film_trunk):
            if part is not None:
                part.to(self.sites[0].weight.device, self.sites[0].weight.dtype)

    def _logits(self, x: Tensor, cond: Condition | Frozen) -> Tensor:
        with self._told.holding(cond):
            return self.module(x)

    def _features(self, x: Tensor, cond: Condition | Frozen) -> Tensor:
        name = type(self.module).__name__
        raise UserError(f"module {name}: does not say which of its values are the penultimate features; use a network")


class _Told:
    """The condition of the forward that runs now, if one does."""

    def __init__(self) -> None:
        self.cond: Condition | Frozen | None = None

    @contextlib.contextmanager
    def holding(self, cond: Condition | Frozen) -> Iterator[None]:
        """Tell the sites a condition until the block ends, however it ends."""
        before, self.cond = self.cond, cond
        try:
            yield
        finally:
            self.cond = before


class _ToldSite(FiLMDualBN2d):
    """A site that is called as the BatchNorm2d it replaces, with images alone."""

    @torch.no_grad()
    def __init__(self, norm: nn.BatchNorm2d, film: Generator | None, told: _Told, **groups: int) -> None:
        super().__init__(norm.num_features, film=film, momentum=norm.momentum, eps=norm.eps, **groups)
        self.to(norm.weight.device, norm.weight.dtype)
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(self, name).copy_(getattr(norm, name))
        self.weight.requires_grad_(norm.weight.requires_grad)
        self.bias.requires_grad_(norm.bias.requires_grad)
        self.training = norm.training
        self._told = told

    def forward(self, x: Tensor) -> Tensor:
        """Normalise under the condition of the forward that runs now."""
        if self._told.cond is None:
            raise UserError("network.module: has no lambda when called alone; call network.predict or network(x, cond)")
        return super().forward(x, self._told.cond, activate=False)


def _norms(module: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """The norms to replace, by name, after a check that there are some and that all can be replaced."""
    norms = {name: m for name, m in module.named_modules() if isinstance(m, _BatchNorm)}
    for name, norm in norms.items():
        kind, where = type(norm).__name__, f"module {name or '(root)'}"
        if isinstance(norm.weight, nn.UninitializedParameter):
            raise UserError(f"{where}: {kind} has no parameters yet; run the module once before")
        if isinstance(norm, nn.SyncBatchNorm):
            raise UserError(f"{where}: SyncBatchNorm; use BatchNorm2d and sync_statistics=True of the network instead")
        if not isinstance(norm, nn.BatchNorm2d):
            raise UserError(f"{where}: {kind} mixes the images of a batch and is not BatchNorm2d, the one replaceable")
        if not norm.affine or not norm.track_running_stats:
            raise UserError(f"{where}: {kind} needs affine=True and track_running_stats=True")
        if norm.momentum is None:
            raise UserError(f"{where}: {kind} with momentum=None (a cumulative mean); set a momentum, e.g. 0.1")
    if not norms:
        raise UserError(f"module {type(module).__name__}: has no BatchNorm2d, so nothing can take lambda")
    return norms
