"""One training step up to the loss: condition once, attack the frozen network, one joint forward, per-image losses.

This is the whole algorithm of Wang et al., "Once-for-All Adversarial Training" (NeurIPS 2020, Algorithm 1), and knows
nothing of ranks or optimisers. Given the same adversarial images it equals the published three calls (clean forward,
adversarial forward, backward) in losses, gradients and running statistics; docs/numerics.md says where the adversarial
images differ. Nothing here waits for the device.

Letters: N images, A of them with lambda > 0, M of them in the clean part of the joint forward, K classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oat_dist.adversary import answers_at_zero, attack_dtype, attack_images, noisy_images
from oat_dist.attacks import AttackPlan, at_least_float32
from oat_dist.config import Config
from oat_dist.data import Batch
from oat_dist.graphed import GraphReplay
from oat_dist.losses import Examples, Objective, once_for_all_loss, robust_term, settings_at
from oat_dist.losses.distillation import learning_from
from oat_dist.losses.self_distillation import taught_targets
from oat_dist.models.condition import Condition
from oat_dist.models.network import ConditionalNetwork
from oat_dist.random import draw_keys

Forward = Callable[..., Any]
"""(images, condition, with_features=False, within=None) -> logits, or a tuple; see `ConditionalNetwork.forward`."""


@dataclass(frozen=True, kw_only=True)
class StepLosses:
    """Losses of one micro-batch and what is counted for the log."""

    loss_N: Tensor
    """Once-for-all loss of each image, with a graph; of extra images times `data.extra_weight`."""
    counts: dict[str, Tensor]
    """Scalars on the device, to be summed over images, micro-batches and ranks."""
    num_clean: int
    """Images that took part clean, over which the clean counts go."""
    correct_clean_M: Tensor
    """Whether each of these was classified correctly."""
    correct_robust_A: Tensor
    """Whether each attacked image was."""
    logits: tuple[Tensor, Tensor]
    """Logits of those and of the adversarial images, without a graph: what narrower widths may be taught."""
    x_adv: Tensor
    """[A, C, H, W] the adversarial images."""


def training_losses(
    network: ConditionalNetwork,
    batch: Batch,
    lam_N: Tensor,
    *,
    config: Config,
    epoch: int,
    forward: Forward,
    plan: AttackPlan | None = None,
    replay: GraphReplay | None = None,
    step: int = 0,
    width: float = 1.0,
    teacher: StepLosses | None = None,
    x_adv: Tensor | None = None,
    on_attacked: Callable[[], None] = lambda: None,
) -> StepLosses:
    """Losses of a micro-batch.

    Args:
        network: The network, in training mode.
        batch: Images whose lambdas are `lam_N`, those with lambda = 0 first.
        lam_N: [N] float64 on the host.
        config: Configuration of the run.
        epoch: Epoch, part of the key of the random starts.
        forward: The training forward: the network itself or an engine around it.
        plan: The attack; default: that of the configuration in this epoch.
        replay: Runs the attack as one recorded graph; always the same for one network and plan.
        step: Step within the epoch, part of the key of the weight noise of conditioning.kind=float, which attack and
            training forward share.
        width: Share of the channels, one of the network's widths; attack and forward go through that subnetwork.
        teacher: What the whole network answered on the same batch, which this width learns in place of the objective.
        x_adv: [A, C, H, W] adversarial images, where an earlier call has made them.
        on_attacked: Called between attack and training forward.

    Returns:
        Per-image losses and counts.
    """
    x, label_N = batch.image_NCHW.contiguous(memory_format=torch.channels_last), batch.label_N
    objective, condition_on = robust_term(config), config.loss.condition_on
    noise_key = draw_keys(config.seed, "weight noise", epoch, step) if network.is_stochastic else None
    cond = network.condition(lam_N, width=width, noise_key=noise_key)
    attacked = slice(cond.num_zero, None)
    of_attacked = x[attacked], label_N[attacked], batch.index_N[attacked]
    if x_adv is None:
        frozen = network.freeze(cond.attacked(), dtype=attack_dtype(config.engine.precision))
        x_adv = attack_images(network, frozen, *of_attacked, config=config, epoch=epoch, plan=plan, replay=replay)
    clean_M = None if config.loss.clean_at_one else _clean_positions(lam_N, x.device)
    targets = _targets(network, x, label_N, clean_M, cond.num_zero, config=config, width=width, teacher=teacher)
    if targets is not None:
        objective, condition_on = learning_from(targets[1]), None
    on_attacked()
    images = [x[attacked], x_adv]
    if "noisy_logits" in objective.needs:
        images.append(noisy_images(x[attacked], batch.index_N[attacked], config=config, epoch=epoch))
    if config.model.dropout:
        _seed_dropout(config.seed, epoch, batch.index_N)
    x_clean, clean_label = (x, label_N) if clean_M is None else (x[clean_M], label_N[clean_M])
    joint, smoothing = torch.cat((x_clean, *images[1:])), config.loss.label_smoothing
    sizes = [len(x_clean), *map(len, images[1:])]
    outputs = _forward(
        forward, joint, cond.joint(clean_M, objective.view_statistics), objective,
        sizes=sizes, label_A=label_N[attacked], label_smoothing=smoothing,
    )  # fmt: skip
    logits = outputs["logits_AK"].split(sizes)
    lam_N = lam_N.to(x.device, logits[0].dtype, non_blocking=True)
    examples = Examples(
        label_A=label_N[attacked],
        settings=settings_at(objective, condition_on, lam_N[attacked]),
        label_smoothing=smoothing,
        **_fields("image_ACHW", images),
        **_fields_of_outputs(outputs, sizes, attacked if clean_M is None else None),
    )
    robust_A = objective.loss(examples)
    loss_N, clean_loss_M = once_for_all_loss(
        logits[0], robust_A, label_N, lam_N, label_smoothing=smoothing, clean_M=clean_M,
        is_driven=condition_on is not None, target_MK=None if targets is None else targets[0],
    )  # fmt: skip
    if config.data.extra is not None:
        loss_N = loss_N * _weights(batch, config.data.extra_weight).to(loss_N.device, loss_N.dtype, non_blocking=True)
    labels = clean_label, label_N[attacked]
    return _counted(loss_N, clean_loss_M, robust_A, labels, (logits[0].detach(), logits[1].detach()), x_adv)


def _targets(
    network: ConditionalNetwork, x: Tensor, label_N: Tensor, clean_M: Tensor | None, num_zero: int, *,
    config: Config, width: float, teacher: StepLosses | None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Probabilities, in place of labels, for the clean images that take part and for the adversarial ones; or None."""
    if teacher is not None:
        return teacher.logits[0].softmax(1), teacher.logits[1].softmax(1)
    cfg = config.loss
    if not cfg.self_distillation or num_zero == len(x):
        return None
    answer_AK = answers_at_zero(network, x[num_zero:], config=config, width=width)
    target_NK = taught_targets(label_N, answer_AK, share=cfg.self_distillation, label_smoothing=cfg.label_smoothing)
    return target_NK if clean_M is None else target_NK.index_select(0, clean_M), target_NK[num_zero:]


def _counted(
    loss_N: Tensor, clean_loss_M: Tensor, robust_A: Tensor, labels: tuple[Tensor, Tensor],
    logits: tuple[Tensor, Tensor], x_adv: Tensor,
) -> StepLosses:  # fmt: skip
    """The losses, with what is counted of them; labels and logits are those of clean and of adversarial images."""
    correct_clean_M, correct_robust_A = (
        answer.argmax(1) == label for answer, label in zip(logits, labels, strict=True)
    )
    counts = {
        "loss": loss_N.sum(),
        "loss_clean": clean_loss_M.sum(),
        "loss_robust": robust_A.sum(),
        "correct_clean": correct_clean_M.sum(),
        "correct_robust": correct_robust_A.sum(),
    }
    return StepLosses(
        loss_N=loss_N,
        counts={key: value.detach() for key, value in counts.items()},
        num_clean=len(correct_clean_M),
        correct_clean_M=correct_clean_M,
        correct_robust_A=correct_robust_A,
        logits=logits,
        x_adv=x_adv,
    )


def _fields_of_outputs(
    outputs: Mapping[str, Tensor], sizes: Sequence[int], attacked: slice | None
) -> dict[str, Tensor | None]:
    """Fields of `Examples` for outputs of the joint forward; those of the clean images if all have some."""
    fields = {}
    for name, joint in outputs.items():
        clean, *views = joint.split(sizes)
        fields |= _fields(name, (None if attacked is None else clean[attacked], *views))
    return fields


def _fields(name: str, views: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    """Fields of `Examples` for what there is of the clean, the adversarial and the noisy images."""
    return dict(zip((f"clean_{name}", f"adversarial_{name}", f"noisy_{name}"), views, strict=False))


def _forward(
    forward: Forward,
    joint: Tensor,
    cond: Condition,
    objective: Objective,
    *,
    sizes: Sequence[int],
    label_A: Tensor,
    label_smoothing: float,
) -> dict[str, Tensor]:
    """Outputs of the training forward that an objective needs, for all images, in float32 at least."""
    names, asked = ["logits_AK"], {}
    if "features" in objective.needs:
        names.append("features_AF")
        asked["with_features"] = True
    if objective.has_input_gradient:
        names.append("gradient_ACHW")
        joint.requires_grad_(True)
        asked["within"] = partial(_input_gradient, joint, sizes=sizes, label_A=label_A, label_smoothing=label_smoothing)
    outputs = forward(joint, cond, **asked)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {name: at_least_float32(output) for name, output in zip(names, outputs, strict=True)}


def _input_gradient(
    joint: Tensor, logits: Tensor, *, sizes: Sequence[int], label_A: Tensor, label_smoothing: float
) -> tuple[Tensor]:
    """Gradient, with a graph, of the summed cross-entropies of attacked images, clean and noisy, to all images."""
    # The network runs under autocast; gradients of gradients would be cast once more.
    with torch.autocast(logits.device.type, enabled=False):
        clean, _, *noisy = at_least_float32(logits).split(sizes)
        total = sum(
            F.cross_entropy(part, label_A, reduction="sum", label_smoothing=label_smoothing)
            for part in (clean[len(clean) - len(label_A) :], *noisy)
        )
        return torch.autograd.grad(total, joint, create_graph=True)


def _weights(batch: Batch, extra_weight: float) -> Tensor:
    """[N] float64 on the host: weights of the losses of a batch with images of `data.extra`."""
    return torch.ones(len(batch.index_N), dtype=torch.float64).masked_fill(batch.is_extra_N, extra_weight)


def _clean_positions(lam_N: Tensor, device: torch.device) -> Tensor:
    """[M] positions of the images whose clean loss has weight, those with lambda < 1."""
    return (lam_N < 1).nonzero().flatten().to(device, non_blocking=True)


def _seed_dropout(seed: int, epoch: int, index_N: Tensor) -> None:
    """Seed torch's generator, the source of dropout masks, by run, epoch and first image of the micro-batch.

    So a resumed run draws the masks of an undisturbed one with no generator state in its checkpoint. Unlike every other
    draw, masks change with the number of ranks and with the device.
    """
    torch.manual_seed(draw_keys(seed, "dropout", epoch, index_N[:1]).tolist()[0])
