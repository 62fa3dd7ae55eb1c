"""A network at one lambda as other programs take it, and its result as RobustBench keeps results."""

import json

import pytest
import torch
from pyautoattack import AutoAttack

import oat_dist
from oat_dist import runs
from oat_dist.config import Config, DataConfig
from oat_dist.data import evaluation_batches
from oat_dist.errors import UserError
from oat_dist.evaluation import parse_attacks
from oat_dist.robustbench import FixedLambda, architecture, model_info, write_model_infos
from tests.oat_dist.evaluation.networks import answered, perturbed_network

LAM = 0.3


@pytest.fixture(scope="module")
def images(digits):
    batches = evaluation_batches(
        digits, "test", DataConfig(loader="memory"), 24, device=torch.device("cpu"), num_images=24
    )
    (batch,) = answered(perturbed_network(), batches, LAM)
    return batch.image_NCHW, batch.label_N


@pytest.fixture
def model():
    return FixedLambda(perturbed_network(), LAM)


def test_a_run_becomes_a_plain_module_with_the_answers_of_its_network(images, digits, tmp_path):
    network = perturbed_network()
    run = runs.create_run(Config(output_dir=str(tmp_path)), digits, {}, 1)
    with pytest.raises(UserError, match=r"has no model\.safetensors; its training did not finish"):
        oat_dist.robustbench_model(run, LAM)
    runs.save_model(network, digits, run / "model.safetensors")
    model = oat_dist.robustbench_model(run, LAM)
    x, _ = images
    assert torch.equal(model(x), network.predict(x, LAM)) and not model.training
    assert not torch.equal(model(x), oat_dist.robustbench_model(run, 1.0)(x))
    assert torch.equal(model.train()(x), model.eval()(x)), "its mode must make no difference"
    with pytest.raises(UserError, match=r"lam=1\.5: lambda must lie in \[0, 1\]"):
        oat_dist.robustbench_model(run, 1.5)


def test_gradients_reach_the_images_alone_and_everything_moves_with_the_module(images, model):
    x, label = images
    x = x.clone().requires_grad_(True)
    torch.nn.functional.cross_entropy(model(x), label).backward()
    assert x.grad.abs().sum() > 0 and not any(p.requires_grad for p in model.parameters())
    exact = model.to(torch.float64)(x.detach().double())
    assert exact.dtype == torch.float64 and torch.allclose(
        exact, FixedLambda(perturbed_network(), LAM)(x).double(), rtol=1e-3, atol=1e-2
    )


def test_autoattack_takes_the_module(images, model):
    x, label = images
    adversary = AutoAttack(model, norm="Linf", eps=0.02, version="custom", attacks=["apgd-ce", "square"], seed=0)
    adversary.apgd.n_restarts, adversary.square.n_queries = 1, 5
    x_adv, y_adv = adversary.run_standard_evaluation(x, label, batch_size=12)
    assert (x_adv - x).abs().max() <= 0.02 + 1e-6 and torch.equal(y_adv, model(x_adv).argmax(1))
    assert 0 < (y_adv != label).sum() < len(x)


def test_foolbox_takes_the_module(images, model):
    foolbox = pytest.importorskip("foolbox", reason="foolbox is no dependency; this shows that it takes our module")
    x, label = images
    x = x.contiguous()
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    assert foolbox.accuracy(wrapped, x, label) == 1.0
    _, (clipped,), success = foolbox.attacks.LinfPGD(steps=5)(wrapped, x, label, epsilons=[0.1])
    assert success.any() and torch.equal(success[0], model(clipped).argmax(1) != label)


def test_robustbench_takes_the_module(images, model):
    utils = pytest.importorskip(
        "robustbench.utils", reason="robustbench is no dependency; this shows that its accuracy takes our module"
    )
    x, label = images
    assert utils.clean_accuracy(model, x, label, batch_size=7) == 1.0


ATTACKS = parse_attacks(["autoattack", "cw-50"], eps=8 / 255, norm="linf")
REPORT = {
    "model": "wrn10_2", "dataset": "cifar10", "split": "test", "num_examples": 1000, "attack": ATTACKS.to_dict(),
    "points": [{"lam": 0.2, "sa": 0.90125, "ra": 0.46, "ra_after": dict(zip(
        ("apgd-ce", "apgd-t", "fab-t", "square", "cw-50"), (0.5, 0.48, 0.475, 0.47, 0.46), strict=True))}],
    "checks": [{"check": "zero gradients", "flagged": False}],
}  # fmt: skip


def test_a_result_has_the_fields_of_robustbench(tmp_path):
    (path,) = write_model_infos(REPORT, tmp_path / "test")
    assert path == tmp_path / "robustbench/cifar10/Linf/test_lam0.2.json"
    info = json.loads(path.read_text())
    assert info == model_info(REPORT, REPORT["points"][0])
    expected = {"dataset": "cifar10", "architecture": "WideResNet-10-2", "eps": "8/255", "clean_acc": "90.12",
                "autoattack_acc": "47.00", "external": "46.00"}  # fmt: skip
    assert info | expected == info
    assert info["threat_model"] == "Linf" and info["unreliable"] is False and info["number_forward_passes"] == 1
    assert {"link", "name", "authors", "additional_data", "venue", "reported", "footnote"} <= info.keys()
    assert [architecture(name) for name in ("resnet34", "preactresnet18")] == ["ResNet-34", "PreActResNet-18"]


def test_there_is_no_result_without_the_whole_of_autoattack(tmp_path):
    part = parse_attacks(["apgd-ce", "apgd-t", "square"], eps=8 / 255, norm="linf")
    assert write_model_infos(REPORT | {"attack": part.to_dict()}, tmp_path / "test") == []
    assert list(tmp_path.iterdir()) == []
