"""Cost of a run before it starts: counts against hand-worked ones, and the dry run as a user starts it."""

import pytest
import torch

from launch import train
from oat_dist import cost
from oat_dist.config import AttackConfig, ConditioningConfig, Config, ModelConfig, OptimConfig
from oat_dist.errors import UserError
from oat_dist.models import build_model

PUBLISHED = {
    "cifar10_resnet34": ("33,355,466", "21,282,122", "32 x 32 x 3", "8,985,600"),
    "svhn_wrn16_8": ("16,228,922", "10,961,370", "32 x 32 x 3", "13,644,800"),
    "stl10_wrn40_2": ("3,886,394", "2,243,546", "96 x 96 x 3", "896,000"),
}


def test_flops_are_two_per_multiply_add_of_convolutions_and_classifier():
    network = build_model(Config(), in_channels=1, num_classes=10)
    sizes = {"stem": 64, "blocks.0": 64, "blocks.1": 16, "blocks.2": 4}
    expected = 64 * 10
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            pixels = next(pixels for prefix, pixels in sizes.items() if name.startswith(prefix))
            expected += module.weight.numel() * pixels
    assert cost.forward_flops(network, (1, 8, 8)) == 2 * expected
    assert network.stem.weight.device.type == "cpu" and network.training


def test_forward_units_follow_the_attack_and_the_share_of_lambda_above_zero():
    def units(steps, lambdas, weights=None, **optim):
        config = Config(
            attack=AttackConfig(steps=steps),
            conditioning=ConditioningConfig(lambdas=lambdas, weights=weights),
            optim=OptimConfig(epochs=3, batch_size=100, **optim),
        )
        return cost.training_cost(config, in_channels=1, image_size=(8, 8), num_classes=10, num_train_images=250)

    # Half of the images attacked: 0.5 * 10 * 2 for the attack, 1.5 * 3 for training.
    half = units(10, (0.0, 1.0))
    assert half.units_per_image == pytest.approx(14.5)
    assert half.images == 3 * 200
    assert half.units == pytest.approx(14.5 * 600) and half.flops == pytest.approx(half.units * half.forward_flops)
    assert units(7, (0.0, 1.0), (1.0, 3.0)).units_per_image == pytest.approx(0.75 * 7 * 2 + 1.75 * 3)
    # With perturbed weights the training forward and backward come twice, here in three quarters of the run.
    perturbed = units(10, (0.0, 1.0), awp_gamma=0.01, awp_warmup_share=0.25)
    assert perturbed.units_per_image == pytest.approx(0.5 * 10 * 2 + 1.5 * 3 * 1.75)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_dry_run_prints_the_published_sizes_and_touches_no_data(name, tmp_path, monkeypatch, capsys):
    config = f"{train.__file__.rpartition('/')[0]}/configs/{name}_published.yaml"
    monkeypatch.chdir(tmp_path)
    train.main(["--config", config, "--dry-run"])
    printed = capsys.readouterr().out
    for text in (*PUBLISHED[name], "17.17", "GFLOPs", "forward units of the run"):
        assert text in printed, text
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_takes_an_unknown_data_set_from_its_description(digits, tmp_path, capsys):
    (tmp_path / "mine").symlink_to(digits.folder)
    train.main(["--data.dataset=mine", f"--data.root={tmp_path}", "--optim.epochs=1", "--dry-run"])
    printed = capsys.readouterr().out
    assert "8 x 8 x 1" in printed and f"{1437 // 128 * 128:,}" in printed


def test_a_dry_run_of_a_data_set_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data.dataset='mine': no prepared data set"):
        train.main(["--data.dataset=mine", f"--data.root={tmp_path}", "--dry-run"])


def test_dropout_and_pixel_normalisation_cost_no_flops():
    plain = build_model(Config(model=ModelConfig(name="wrn10_2")), in_channels=3, num_classes=10)
    other = build_model(Config(model=ModelConfig(name="wrn10_2", dropout=0.3)), in_channels=3, num_classes=10)
    other.normalise_pixels((0.5,) * 3, (0.2,) * 3)
    assert cost.forward_flops(plain, (3, 8, 8)) == cost.forward_flops(other, (3, 8, 8))


def test_every_width_of_a_step_costs_its_share_of_the_flops(capsys):
    def cost_of(**model):
        config = Config(model=ModelConfig(**model))
        return cost.training_cost(config, in_channels=1, image_size=(8, 8), num_classes=10, num_train_images=128)

    whole, both = cost_of(), cost_of(widths=(0.5, 1.0))
    share = both.widths[1]["forward_flops"] / both.forward_flops
    assert 0.25 < share < 0.26  # a quarter, but for the first convolution and the classifier
    assert both.units_per_image == pytest.approx(whole.units_per_image * (1 + share))
    assert (both.forward_flops, both.plain_parameters) == (whole.forward_flops, whole.plain_parameters)
    sandwich = cost_of(widths=(0.25, 0.5, 0.75, 1.0), width_rule="sandwich", width_samples=1)
    first, *middle, last = (c["forward_flops"] / sandwich.forward_flops for c in sandwich.widths)
    expected = whole.units_per_image * (first + sum(middle) / 2 + last)
    assert sandwich.units_per_image == pytest.approx(expected)
    train.main(["--model.widths=[0.5,1]", "--dry-run"])
    assert f"{both.widths[1]['parameters']:,}" in capsys.readouterr().out
