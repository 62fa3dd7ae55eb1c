"""Some images at every lambda: what the network says of them clean and attacked, and the attacked images themselves.

Letters: N images, L lambdas, K classes, T tiles, H, W, C.
"""

import base64
import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from oat_dist.attacks import LogitsFn, cross_entropy, pgd
from oat_dist.evaluation import EvaluationAttack
from oat_dist.evaluation.surface import Surfaces
from oat_dist.page.finished import FinishedRun, Images
from oat_dist.random import draw_keys

BYTES = 5 << 20
"""Bytes of uncompressed pixels that the galleries of a page may have together: PNG makes noise little smaller, and
base64 makes it a third larger."""
_FEWEST = 4
"""Images below which tiles are made smaller instead."""


def gallery(run: FinishedRun, images: Images, device: torch.device, *, num_images: int, num_bytes: int) -> dict:
    """Attack some images at every lambda of a run's curve with the attack of its own measurement.

    Args:
        run: The run.
        images: The images it was measured on; the first of every class are taken in turn.
        device: Where to compute.
        num_images: Images at most.
        num_bytes: Uncompressed pixels of all tiles at most.

    Returns:
        {"index" [N], "label" [N], "width", "height", "sheet": data URL of a PNG whose rows are the clean images and
        then the attacked ones by lambda, "clean" and "attacked": {"answer" [L][N], "confidence" [L][N]}, "gain": factor
        of the difference that brings eps to half the pixel range}.
    """
    lambdas = [point["lam"] for point, _ in run.curve]
    shape = run.data.image_shape
    num_images, factor = _fit(num_images, (1 + len(lambdas)) * shape[0] * shape[1] * shape[2], num_bytes)
    rows = _in_turn(images.label, num_images)
    x = images.image[rows].permute(0, 3, 1, 2).to(device, torch.float32) / 255
    label, index = images.label[rows].to(device), images.index[rows].to(device)
    attack = EvaluationAttack.of(run.config)
    surfaces = Surfaces(run.network.to(device), lambdas)
    tiles, said = [x], {"clean": [], "attacked": []}
    for lam in lambdas:
        decide = surfaces.fixed(lam).decide
        tiles.append(attacked(decide, x, label, index, attack, seed=run.config.seed))
        for name, shown in (("clean", x), ("attacked", tiles[-1])):
            with torch.no_grad():
                said[name].append(decide(shown).double().softmax(1).max(1))
    answers = {
        name: {"answer": [s.indices.tolist() for s in each], "confidence": [s.values.tolist() for s in each]}
        for name, each in said.items()
    }
    sheet, width, height = _sheet(tiles, factor)
    largest = max(float((tile - x).abs().max()) for tile in tiles)
    gain = 0.5 / (attack.eps if attack.norm == "linf" else largest or 1.0) if attack.eps else 1.0
    return {"index": index.tolist(), "label": label.tolist(), "width": width, "height": height, "sheet": sheet,
            "gain": gain, **answers}  # fmt: skip


def attacked(
    logits_fn: LogitsFn, x: Tensor, label: Tensor, index: Tensor, attack: EvaluationAttack, *, seed: int
) -> Tensor:
    """Attacked images that are wrong exactly where the evaluation counts them as broken.

    Args:
        logits_fn: [N, C, H, W] images to [N, K] logits.
        x: [N, C, H, W] images in [0, 1].
        label: [N] int64 classes.
        index: [N] dataset indices, for the keys of the random starts.
        attack: PGD as the evaluation runs it.
        seed: Seed of the random starts.

    Returns:
        [N, C, H, W]: the last iterate of the first start that ends in a wrong answer; else the first wrong iterate;
        else the last iterate of the first start.
    """
    ends, seen = [], []
    for restart in range(attack.restarts):
        key = draw_keys(seed, "evaluation start", restart, index)
        watch = _FirstWrong(x, label)
        ends.append(pgd(logits_fn, x, label, eps=attack.eps, steps=attack.steps, step_size=attack.length,
                        norm=attack.norm, start_key=key, maximise=watch))  # fmt: skip
        seen.append(watch)
    shown = ends[0].clone()
    for watch in reversed(seen):
        shown[watch.found] = watch.iterate[watch.found]
    for end in reversed(ends):
        with torch.no_grad():
            is_wrong = logits_fn(end).argmax(1) != label
        shown[is_wrong] = end[is_wrong]
    return shown


class _FirstWrong:
    """Cross-entropy as what is made large; it keeps the first iterate of every image that is answered wrongly."""

    def __init__(self, x: Tensor, label: Tensor) -> None:
        self.iterate, self.label = x.clone(), label
        self.found = torch.zeros_like(label, dtype=torch.bool)

    def __call__(self, logits_fn: LogitsFn, x: Tensor, label: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        inner = cross_entropy(logits_fn, x, label)

        def made_large(x_adv: Tensor, logits: Tensor) -> Tensor:
            is_new = (logits.detach().argmax(1) != self.label) & ~self.found
            self.iterate = torch.where(is_new.view(-1, 1, 1, 1), x_adv.detach(), self.iterate)
            self.found |= is_new
            return inner(x_adv, logits)

        return made_large


def _fit(num_images: int, bytes_of_one: int, num_bytes: int) -> tuple[int, float]:
    """Images that fit, and the factor by which the sides of tiles must be multiplied, at most 1."""
    if num_images * bytes_of_one <= num_bytes:
        return num_images, 1.0
    fitting = min(num_images, max(_FEWEST, num_bytes // bytes_of_one))
    return fitting, min(1.0, (num_bytes / (fitting * bytes_of_one)) ** 0.5)


def _in_turn(label_M: Tensor, num_images: int) -> Tensor:
    """[N] rows: the first image of every class, then the second, and so on; by class within a round."""
    round_M = torch.zeros_like(label_M)
    for label in label_M.unique():
        is_it = label_M == label
        round_M[is_it] = torch.arange(int(is_it.sum()))
    order = torch.argsort(round_M * (int(label_M.max()) + 1) + label_M, stable=True)
    return order[:num_images]


def _sheet(tiles: list[Tensor], factor: float) -> tuple[str, int, int]:
    """Data URL of a PNG with a row of images per tensor, and the width and height of one image in it."""
    pixels_TNHWC = torch.stack(tiles).mul(255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).cpu().numpy()
    rows, columns, height, width, channels = pixels_TNHWC.shape
    if channels not in (1, 3):
        pixels_TNHWC = pixels_TNHWC[..., :1]
    sheet = pixels_TNHWC.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, -1)
    picture = Image.fromarray(np.ascontiguousarray(sheet.squeeze(2) if sheet.shape[2] == 1 else sheet))
    if factor < 1:
        width, height = max(1, int(width * factor)), max(1, int(height * factor))
        picture = picture.resize((columns * width, rows * height), Image.Resampling.BOX)
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode(), width, height
