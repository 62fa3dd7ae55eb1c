"""The gallery: what it shows of an image is what the evaluation found, and its pictures stay small."""

import base64
import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from oat_dist.evaluation import EvaluationAttack, Plan, run_plan
from oat_dist.evaluation.ball import Ball
from oat_dist.evaluation.iterated import break_images
from oat_dist.evaluation.loop import ROBUST
from oat_dist.evaluation.surface import Surface, Surfaces
from oat_dist.page.finished import open_finished, read_images
from oat_dist.page.gallery import BYTES, _fit, _in_turn, _sheet, attacked, gallery
from tests.oat_dist.evaluation.networks import Linear, linear_images

CPU = torch.device("cpu")


def pixels(found: dict) -> np.ndarray:
    """[rows, columns, height, width] of a grey sheet."""
    picture = Image.open(io.BytesIO(base64.b64decode(found["sheet"].partition(",")[2])))
    height, width = found["height"], found["width"]
    values = np.asarray(picture).astype(int)
    return values.reshape(len(values) // height, height, -1, width).transpose(0, 2, 1, 3)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.02), ("l2", 0.1)])
@pytest.mark.parametrize("restarts", [1, 3])
def test_an_attacked_image_is_wrong_exactly_where_the_evaluation_counts_it_as_broken(norm, eps, restarts):
    network, attack = Linear(3).eval(), EvaluationAttack(eps=eps, steps=2, restarts=restarts, norm=norm)
    batch = linear_images(network, 64)
    decide = Surfaces(network, [0.5]).fixed(0.5).decide
    x, label = batch.image_NCHW, batch.label_N
    shown = attacked(decide, x, label, batch.index_N, attack, seed=3)
    code = run_plan(network, [batch], Plan(lambdas=(0.5,), attack=attack, seed=3)).of(0.5)
    is_broken = decide(shown).argmax(1) != label
    assert torch.equal(is_broken, code != ROBUST) and 8 < int(is_broken.sum()) < 56
    assert shown.min() >= 0 and shown.max() <= 1
    distance = (shown - x).flatten(1)
    assert (distance.abs().amax(1) if norm == "linf" else distance.norm(dim=1)).max() <= eps + 1e-6


def test_an_image_that_only_an_early_iterate_breaks_is_shown_broken():
    num_images = 32
    x, label = torch.full((num_images, 1, 1, 1), 0.5), torch.zeros(num_images, dtype=torch.int64)

    def logits_fn(x):  # wrong in a narrow band beside the image, which the attack passes through and leaves behind
        value = x.flatten(1)
        return torch.cat((0.9 - value, ((value - 0.55).abs() < 0.02).float()), 1)

    attack = EvaluationAttack(eps=0.2, steps=14, step_size=0.03)
    surface, index = Surface(decide=logits_fn, gradient=logits_fn), torch.arange(num_images)
    broken = break_images(surface, x, label, index, attack, seed=0, ball=Ball("linf", 0.2))
    shown = attacked(logits_fn, x, label, index, attack, seed=0)
    assert torch.equal(logits_fn(shown).argmax(1) != label, broken) and 8 < int(broken.sum()) < num_images
    assert bool((logits_fn(torch.full_like(x, 0.7)).argmax(1) == label).all()), "where an attack ends, all are right"


def test_the_sheet_has_the_clean_images_and_then_the_attacked_ones_by_lambda(shown_runs):
    run = open_finished(shown_runs[0])
    images = read_images(run)
    found = gallery(run, images, CPU, num_images=5, num_bytes=BYTES)
    row = [int((images.index == index).nonzero()) for index in found["index"]]
    tiles = pixels(found)
    assert tiles.shape == (1 + len(run.curve), 5, 8, 8)
    assert np.array_equal(tiles[0], images.image[row][..., 0].numpy())
    change = np.abs(tiles[1:] - tiles[0])
    assert change.max() <= round(run.config.attack.eps_255) + 1 and change.max(axis=(2, 3)).min() >= 1
    assert found["label"] == images.label[row].tolist() and found["gain"] == pytest.approx(127.5 / 5.1)
    for at, (point, _) in enumerate(run.curve):
        logits = run.network.predict(images.image[row].permute(0, 3, 1, 2) / 255, point["lam"]).double()
        assert found["clean"]["answer"][at] == logits.argmax(1).tolist()
        assert found["clean"]["confidence"][at] == pytest.approx(logits.softmax(1).amax(1).tolist(), abs=1e-5)


def test_images_are_the_first_of_every_class_in_turn():
    label = torch.tensor([2, 2, 0, 1, 0, 2, 1])
    assert _in_turn(label, 5).tolist() == [2, 3, 0, 4, 6]
    assert sorted(_in_turn(label, 100).tolist()) == list(range(7))


@pytest.mark.parametrize(("side", "lambdas", "runs"), [(32, 6, 1), (96, 21, 3), (224, 41, 8)])
def test_pictures_of_any_size_keep_the_page_under_ten_megabytes(side, lambdas, runs):
    bytes_of_one = (1 + lambdas) * side * side * 3
    num_images, factor = _fit(12, bytes_of_one, BYTES // runs)
    assert 4 <= num_images <= 12 and (factor == 1 or num_images == 4)
    noise = torch.rand(num_images, 3, side, side, generator=torch.Generator().manual_seed(0))
    sheet, width, height = _sheet([noise, 1 - noise], factor)
    assert width == height == max(1, int(side * factor))
    assert len(sheet) * (1 + lambdas) / 2 * runs < 8e6


def test_the_run_of_a_network_that_is_never_wrong_is_drawn_without_a_division_by_zero(shown_runs):
    run = open_finished(shown_runs[0])
    config = dataclasses.replace(run.config, attack=dataclasses.replace(run.config.attack, norm="l2", eps_255=0.0))
    found = gallery(dataclasses.replace(run, config=config), read_images(run), CPU, num_images=2, num_bytes=BYTES)
    assert found["gain"] == 1.0 and np.array_equal(*pixels(found)[[0, 1]])


@pytest.mark.gpu
def test_a_gpu_makes_the_gallery_of_the_cpu(shown_runs):
    found = []
    for device in (CPU, torch.device("cuda")):
        run = open_finished(shown_runs[0])
        found.append(gallery(run, read_images(run), device, num_images=5, num_bytes=BYTES))
    for name in ("clean", "attacked"):
        one, other = (np.array(each[name]["confidence"]) for each in found)
        assert np.abs(one - other).max() < 1e-2
    assert found[0]["index"] == found[1]["index"] and found[0]["clean"]["answer"] == found[1]["clean"]["answer"]
