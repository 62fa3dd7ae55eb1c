"""One width as a network of its own: the same logits to the last bit, on disk too; measured at every width."""

import json
import sys

import pytest
import torch

from launch import evaluate, export, run_main
from oat_dist import runs
from oat_dist.config import ConditioningConfig, Config, DataConfig, ModelConfig
from oat_dist.errors import UserError
from oat_dist.export import cut_out, export_run
from oat_dist.models import build_model
from tests.oat_dist.test_widths import KINDS, WIDTHS, build, images, lambdas_of, make


@pytest.mark.parametrize("name", ["resnet8", "wrn10_2"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_cut_out_width_has_the_same_logits_to_the_last_bit(name, width):
    network = build(make(name, width_heads=True), torch.float32)
    narrow, x = cut_out(network, width), images(dtype=torch.float32)
    lam = torch.tensor([0, 0.1, 0.25, 0.4, 0.05, 1.0])
    assert torch.equal(narrow.predict(x, lam), network.predict(x, lam, width=width))
    assert not [n for n in narrow.state_dict() if "narrow" in n] and narrow.slimming.widths == (1.0,)
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_out_width_of_every_conditioning_has_the_same_logits_to_the_last_bit(kind):
    config = make(conditioning=KINDS[kind])
    network, x = build(config, torch.float32), images(dtype=torch.float32)
    lam = lambdas_of(config)
    assert torch.equal(cut_out(network, 0.75).predict(x, lam), network.predict(x, lam, width=0.75))


def test_cutting_leaves_the_network_and_the_global_random_state_alone():
    network, state = build(make()), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    cut_out(network, 0.3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.predict(images(), 0.1, width=0.3).shape == (6, 10)


@pytest.fixture
def run(digits, tmp_path):
    """A finished run of two widths, untrained."""
    config = Config(
        name="slim", output_dir=str(tmp_path), model=ModelConfig(widths=(0.5, 1.0), width_heads=True),
        conditioning=ConditioningConfig(film="shared"),
        data=DataConfig(root=str(digits.folder.parent), loader="memory"),
    )  # fmt: skip
    folder = runs.create_run(config, digits, {}, 1)
    network = build_model(config, in_channels=1, num_classes=10)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    runs.save_model(network, digits, folder / "model.safetensors")
    return folder


def test_an_exported_width_is_read_like_a_run(run, capsys):
    export.main(["--run", str(run), "--width", "0.5"])
    folder = run / "width_0.5"
    assert capsys.readouterr().out.strip() == str(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "model.safetensors"]
    config, narrow = runs.load_run(folder)
    assert (config.model.channels, config.model.widths, config.name) == ((8, 8, 16, 32), (1.0,), "slim-width-0.5")
    x = torch.rand(5, 1, 8, 8)
    for lam in (0.0, 0.35, 1.0):
        assert torch.equal(narrow.predict(x, lam), runs.load_run(run)[1].predict(x, lam, width=0.5))


def test_an_export_that_cannot_be_is_one_line_and_writes_nothing(run, monkeypatch, capsys):
    before = sorted(run.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["export.py", "--run", str(run), "--width", "0.6"])
    with pytest.raises(SystemExit) as ended:
        run_main(export.main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: --width=0.6: was not trained; the model.widths of this network are 0.5, 1\n"
    )
    with pytest.raises(UserError, match=r"exists already"):
        export_run(run, 0.5, run)
    assert sorted(run.rglob("*")) == before


def test_every_width_is_measured_with_what_it_costs(run, capsys):
    evaluate.main(["--run", str(run), "--lambdas", "0", "1", "--steps", "1"])
    report = json.loads(next(run.glob("eval/*.json")).read_text())
    assert [(p["width"], p["lam"]) for p in report["points"]] == [(1.0, 0.0), (1.0, 1.0), (0.5, 0.0), (0.5, 1.0)]
    whole, narrow = report["widths"]
    assert narrow["parameters"] == sum(p.numel() for p in cut_out(runs.load_run(run)[1], 0.5).parameters())
    assert whole["forward_flops"] > 3 * narrow["forward_flops"]
    printed = capsys.readouterr().out
    assert f"{narrow['parameters']:,}" in printed and "MFLOPs" in printed
    evaluate.main(["--run", str(run), "--lambdas", "1", "--steps", "1", "--widths", "0.5"])
    again = json.loads(next(run.glob("eval/*-2.json")).read_text())
    assert again["points"] == report["points"][3:] and again["widths"] == [narrow]
    with pytest.raises(UserError, match=r"--widths=0.7: was not trained"):
        evaluate.main(["--run", str(run), "--widths", "0.7"])
    with pytest.raises(UserError, match=r"--widths=\(1.0, 0.5\): must be one, for which lambda is chosen"):
        evaluate.main(["--run", str(run), "--widths", "0.5", "1", "--target-sa", "0"])


def test_lambda_is_chosen_for_a_width_and_every_width_has_a_matrix_of_its_own(run, capsys):
    evaluate.main(["--run", str(run), "--lambdas", "0", "1", "--widths", "0.5", "--target-sa", "0", "--steps", "1"])
    report = json.loads(next(run.glob("eval/test*.json")).read_text())
    assert {p["width"] for p in (*report["points"], *report["chosen"]["points"])} == {0.5}
    evaluate.main(
        ["--run", str(run), "--lambdas", "0", "1", "--steps", "1", "--attack-lambdas", "--random-lambda", "2"]
    )
    report = json.loads(next(run.glob("eval/test*-2.json")).read_text())
    assert "matrix" not in report and "random_lambda" not in report
    assert {check["width"] for check in report["checks"]} == {0.5, 1.0}
    for width in report["widths"]:
        ra = [point["ra"] for point in report["points"] if point["width"] == width["width"]]
        assert [width["matrix"]["ra"][at][at] for at in (0, 1)] == ra and "ra" in width["random_lambda"]
    names = {path.name.partition("-2")[2] for path in run.glob("eval/test*-2*.safetensors")}
    assert names == {".images.safetensors", ".width_0.5.images.safetensors"}
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("attacked through (down), width") == 2 and printed.count("random") == 2
