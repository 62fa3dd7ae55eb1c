"""Whether the numbers of an evaluation can be believed: signs that an attack was fooled, not withstood.

The signs are those of Athalye et al., "Obfuscated Gradients Give a False Sense of Security" (ICML 2018, section 3), and
of AutoAttack's own checks; the thresholds are ours. A check is {"check", "flagged", "worst", "lambdas", "detail"}: the
worst value over all lambdas, the lambdas at which it was flagged, and what it means.

Letters: N images of a probe, K classes, L lambdas.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from oat_dist.attacks import evaluation_mode
from oat_dist.data import Batch
from oat_dist.distributed import World
from oat_dist.evaluation import autoattack
from oat_dist.evaluation.ball import Ball
from oat_dist.evaluation.iterated import margin
from oat_dist.evaluation.loop import CLEAN, ROBUST, Outcome
from oat_dist.evaluation.specs import EvaluationAttack
from oat_dist.evaluation.surface import Surface, Surfaces
from oat_dist.models.network import ConditionalNetwork
from oat_dist.random import draw_keys

PROBE = 32
"""Images whose answers and gradients are looked at, per lambda."""
REPEATS = 2
"""Forward passes of the same images."""
SEARCH_IMAGES, SEARCH_QUERIES = 32, 16
"""Images that withstood everything and are attacked once more without gradients, and the queries of that."""
_LOGITS_DIFFER = 1e-4
"""Distance of two answers to one image, of logits divided by their length."""
_SUM_TO_ONE = 1e-4
_ZERO_SHARE = 0.1
"""Share of images without a gradient that is many."""
_BETTER_COUNT, _BETTER_SHARE, _SEARCH_SHARE = 2, 0.002, 0.05
"""What a gradient-free attack must break beyond the gradient ones: this many images, and this share of all, or of those
that were searched."""
_SEARCH_RATIO = 0.5
"""And, where it is the short search, this ratio of its share to the share that gradients broke before: no gradient
attack finds everything, so a search finds some of the rest at an honest network too, but few."""


@dataclass
class _Probe:
    """What was seen at one lambda, as numbers that ranks can add."""

    differ: float = 0.0
    sums_to_one: float = 0.0
    zero_cross_entropy: float = 0.0
    zero_margin: float = 0.0
    in_training: float = 0.0
    searched: float = 0.0
    found: float = 0.0
    classes: float = 0.0


def self_checks(
    network: ConditionalNetwork, batches: Sequence[Batch], outcome: Outcome, *, world: World | None = None
) -> list[dict]:
    """Look for signs that an outcome is too good; every rank must call.

    Args:
        network: The network that was evaluated; its mode is restored.
        batches: The images, as for `run_plan`.
        outcome: What `run_plan` found.
        world: The ranks, which share the lambdas.

    Returns:
        All checks, flagged or not, as described above.
    """
    world = world or World(device=network.sites[0].weight.device)
    lambdas = outcome.plan.lambdas
    seen_L = torch.zeros(len(lambdas), len(astuple(_Probe())), dtype=torch.float64)
    with evaluation_mode(network):
        surfaces = Surfaces(network, lambdas, width=outcome.plan.width, seed=outcome.plan.seed)
        for at in range(world.rank, len(lambdas), world.ranks):
            seen = _probe(network, surfaces.fixed(lambdas[at]), batches, outcome, lambdas[at])
            seen_L[at] = torch.tensor(astuple(seen), dtype=torch.float64)
    probes = [_Probe(*row) for row in world.sum(seen_L.to(world.device)).tolist()]
    return [*_of_answers(lambdas, probes), _of_search(outcome, probes), *_of_attack(outcome, probes)]


def _probe(
    network: ConditionalNetwork, surface: Surface, batches: Sequence[Batch], outcome: Outcome, lam: float
) -> _Probe:
    """Look at the first images, and search without gradients at those that withstood."""
    x, label = batches[0].image_NCHW[:PROBE], batches[0].label_N[:PROBE]
    with torch.no_grad():
        answers = [surface.decide(x).float() for _ in range(REPEATS)]
    logits = answers[0]
    unit = [F.normalize(answer, dim=1) for answer in answers]
    sums = ((logits.sum(1) - 1).abs() < _SUM_TO_ONE).all() and bool((logits >= -_SUM_TO_ONE).all())
    searched, found = _search(surface, batches, outcome, lam)
    return _Probe(
        differ=max(float((one - unit[0]).norm(dim=1).max()) for one in unit),
        sums_to_one=float(sums),
        zero_cross_entropy=_without_gradient(surface, x, lambda z: F.cross_entropy(z, label, reduction="sum")),
        zero_margin=_without_gradient(surface, x, lambda z: margin(z, label).sum()),
        in_training=float(sum(module.training for module in network.modules())),
        searched=float(searched),
        found=float(found),
        classes=float(logits.shape[1]),
    )


def _without_gradient(surface: Surface, x: Tensor, loss: Callable[[Tensor], Tensor]) -> float:
    """Share of images at which the gradient of a loss is exactly zero, or not a number."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(loss(surface.decide(x)), x, allow_unused=True, materialize_grads=True)
    size = grad.flatten(1).abs().amax(1)
    return float((~(size > 0)).double().mean())


def _search(surface: Surface, batches: Sequence[Batch], outcome: Outcome, lam: float) -> tuple[int, int]:
    """Images that withstood all attacks and are searched by a short Square Attack, and how many of them it breaks."""
    robust = (outcome.of(lam) == ROBUST).nonzero().flatten()[:SEARCH_IMAGES]
    attack = outcome.plan.attack
    # Its patterns for L2 and L1 divide the image by five.
    too_small = attack.norm != "linf" and min(batches[0].image_NCHW.shape[2:]) < 5
    if too_small or len(robust) == 0 or not autoattack.is_installed():
        return 0, 0
    image, label = _images(batches, robust)
    square = EvaluationAttack(kind="square", eps=attack.eps, norm=attack.norm, steps=SEARCH_QUERIES)
    seed = int(draw_keys(outcome.plan.seed, "check")) % 2**31
    broken = autoattack.break_images(surface, image, label, square, seed=seed, ball=Ball(attack.norm, attack.eps))
    return len(image), int(broken.sum())


def _images(batches: Sequence[Batch], place: Tensor) -> tuple[Tensor, Tensor]:
    """Images and labels at increasing places among all batches."""
    parts, start = [], 0
    for batch in batches:
        here = place[(place >= start) & (place < start + len(batch.label_N))] - start
        here = here.to(batch.label_N.device)
        parts.append((batch.image_NCHW[here], batch.label_N[here]))
        start += len(batch.label_N)
    image, label = zip(*parts, strict=True)
    return torch.cat(image), torch.cat(label)


def _check(name: str, lambdas: Sequence[float], values: Sequence[float], limit: float, detail: str) -> dict:
    """A check that is flagged where a value exceeds its limit."""
    where = [lam for lam, value in zip(lambdas, values, strict=True) if value > limit]
    return {"check": name, "flagged": bool(where), "worst": max(values), "lambdas": where, "detail": detail}


def _of_answers(lambdas: Sequence[float], probes: Sequence[_Probe]) -> list[dict]:
    """Checks of the network's answers and gradients."""
    zero = [max(probe.zero_cross_entropy, probe.zero_margin) for probe in probes]
    return [
        _check("stochastic output", lambdas, [probe.differ for probe in probes], _LOGITS_DIFFER,
               "distance between answers to the same image; attacks need expectation over transformations"),
        _check("probabilities instead of logits", lambdas, [probe.sums_to_one for probe in probes], 0.5,
               "every row is non-negative and sums to 1; the gradient of the cross-entropy vanishes early"),
        _check("zero gradients", lambdas, zero, _ZERO_SHARE,
               "share of images at which cross-entropy or margin has no gradient; gradient attacks stand still there"),
        _check("training mode", lambdas, [probe.in_training for probe in probes], 0.5,
               "modules that stayed in training mode; answers depend on the batch"),
    ]  # fmt: skip


def _of_search(outcome: Outcome, probes: Sequence[_Probe]) -> dict:
    """Whether a gradient-free attack broke what the gradient attacks could not."""
    lambdas, parts = outcome.plan.lambdas, outcome.plan.attack.parts
    kinds = [part.kind for part in parts]
    shares = []
    for lam, probe in zip(lambdas, probes, strict=True):
        code = outcome.of(lam)
        late = [at + 1 for at, kind in enumerate(kinds) if kind == "square" and set(kinds[:at]) - {"square"}]
        count = sum(int((code == at).sum()) for at in late)
        answered = int((code != CLEAN).sum())
        by_gradient = (answered - count - int((code == ROBUST).sum())) / max(1, answered)
        found = probe.found / max(1.0, probe.searched)
        is_better = count >= _BETTER_COUNT and count > _BETTER_SHARE * len(code)
        is_better |= probe.found >= _BETTER_COUNT and found > max(_SEARCH_SHARE, _SEARCH_RATIO * by_gradient)
        shares.append(max(count / len(code), found) if is_better else 0.0)
    detail = (
        f"share of images that a gradient-free attack broke after the others had failed (square where it was asked for,"
        f" else {SEARCH_QUERIES} queries on up to {SEARCH_IMAGES} images per lambda); gradients may be masked"
    )
    detail += "" if autoattack.is_installed() else "; nothing was searched, pyautoattack is not installed"
    return _check("gradient-free attack better", lambdas, shares, 0.0, detail)


def _of_attack(outcome: Outcome, probes: Sequence[_Probe]) -> list[dict]:
    """Checks that concern the attack alone."""
    outside, classes = outcome.outside, int(probes[0].classes)
    few = classes < autoattack.DLR_CLASSES
    replaced = few and any(part.kind == "apgd-t" for part in outcome.plan.attack.parts)
    if not few:
        detail = "classes; the DLR loss is defined"
    elif replaced:
        detail = "classes: DLR is undefined; apgd-t used the difference of two logits"
    else:
        detail = "classes: DLR is undefined; no attack here uses it"
    return [
        {"check": "eps exceeded", "flagged": outside > 0, "worst": outside, "lambdas": [],
         "detail": "wrong answers outside ball or pixel range; they were not counted"},
        {"check": "fewer than 4 classes", "flagged": replaced, "worst": classes, "lambdas": [], "detail": detail},
    ]  # fmt: skip
