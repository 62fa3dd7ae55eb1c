"""SA and RA of a conditional network at any lambda.

SA is the share of images classified correctly. RA is the share classified correctly both clean and after every restart
of the attack: the clean image lies in the ball too, so an image that is wrong without an attack is not robust.

Letters: N images, K classes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from oat_dist.attacks import evaluation_mode, pgd
from oat_dist.config import Config, default_step_size
from oat_dist.data import Batch
from oat_dist.distributed import World
from oat_dist.models.condition import Frozen, FrozenDraws
from oat_dist.models.network import ConditionalNetwork
from oat_dist.progress import progress_bar
from oat_dist.random import draw_keys


@dataclass(frozen=True, kw_only=True)
class EvaluationAttack:
    """PGD as an evaluation uses it; lengths in pixel units of [0, 1]."""

    eps: float
    """Radius of the ball."""
    steps: int = 20
    """Gradient steps per restart."""
    norm: str = "linf"
    """Norm of the ball."""
    step_size: float | None = None
    """Length of a step; default min(1.25 eps, eps + 4/255) / steps."""
    restarts: int = 1
    """Random starts."""

    @classmethod
    def of(cls, config: Config) -> "EvaluationAttack":
        """The attack of a configuration's measurements: ball of `attack`, steps and restarts of `evaluation`."""
        cfg = config.evaluation
        return cls(norm=config.attack.norm, eps=config.attack.eps, steps=cfg.steps, restarts=cfg.restarts)

    @property
    def name(self) -> str:
        """As papers write it, e.g. pgd-20."""
        return f"pgd-{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "")

    def to_dict(self) -> dict:
        """For the JSON report, with the step size spelled out."""
        step_size = default_step_size(self.eps, self.steps) if self.step_size is None else self.step_size
        return {"name": self.name, **asdict(self), "step_size": step_size}


def evaluate(
    network: ConditionalNetwork,
    batches: Sequence[Batch],
    lambdas: Sequence[float],
    attack: EvaluationAttack,
    *,
    seed: int = 0,
    world: World | None = None,
    width: float = 1.0,
) -> list[dict]:
    """Measure SA and RA at each lambda.

    A network with weight noise answers with the mean probabilities of `network.noise_draws` draws, and the attack goes
    through that mean (expectation over transformation: Athalye et al., ICML 2018).

    Args:
        network: The network, on the device of the batches; its mode is restored.
        batches: Images of this rank (`oat_dist.data.evaluation_batches`).
        lambdas: Values in [0, 1]; the attack goes through the lambda that is measured.
        attack: The attack.
        seed: Seed of weight noise, and of the random starts, keyed by image, so that ranks and batch size do not
            matter.
        world: The ranks that share the images; default: this process has all.
        width: Share of the channels, one of the network's widths.

    Returns:
        One {"lam", "sa", "ra"} per lambda, with "width" too where the network has several; accuracies are fractions in
        [0, 1].
    """
    world = world or World(device=network.sites[0].weight.device)
    networks = network.frozen_at(lambdas, width=width, seed=seed)
    counts_L3 = torch.zeros(len(lambdas), 3, dtype=torch.int64, device=world.device)
    total = len(networks) * len(batches)
    with evaluation_mode(network), progress_bar("evaluating", total, is_main=world.is_main) as advance:
        for at, (frozen, row) in enumerate(networks):
            for batch in batches:
                clean_N, robust_N = _correct(network, frozen, row, batch, attack, seed)
                counts_L3[at] += torch.stack((torch.ones_like(clean_N), clean_N, robust_N)).sum(1)
                advance()
    counts = world.sum(counts_L3).tolist()
    told = {"width": width} if len(network.slimming.widths) > 1 else {}
    return [{"lam": lam, **told, "sa": sa / n, "ra": ra / n} for lam, (n, sa, ra) in zip(lambdas, counts, strict=True)]


def _correct(
    network: ConditionalNetwork,
    frozen: Frozen | FrozenDraws,
    row: int,
    batch: Batch,
    attack: EvaluationAttack,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Which images are classified correctly clean, and which under attack too; int64 [N] each.

    Only images that are still correct are attacked.
    """

    def logits_fn(images: Tensor) -> Tensor:
        return network.attack_logits(images, frozen.for_row(row, len(images)))

    with torch.no_grad():
        clean_N = logits_fn(batch.image_NCHW).argmax(1) == batch.label_N
    robust_N = clean_N.clone()
    for restart in range(attack.restarts):
        left = robust_N.nonzero().flatten()
        x, label = batch.image_NCHW[left], batch.label_N[left]
        key = draw_keys(seed, "evaluation start", restart, batch.index_N.to(x.device)[left])
        x_adv = pgd(
            logits_fn, x, label, eps=attack.eps, steps=attack.steps, step_size=attack.step_size, norm=attack.norm,
            start_key=key,
        )  # fmt: skip
        with torch.no_grad():
            robust_N[left] = logits_fn(x_adv).argmax(1) == label
    return clean_N.long(), robust_N.long()
