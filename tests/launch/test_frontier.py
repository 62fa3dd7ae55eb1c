"""launch/frontier.py: what it trains, what it does not train again, what it writes and what it refuses."""

import csv
import json
import os
import pathlib

import pytest

from launch import frontier, run_main, train
from oat_dist.config_io import load_config
from oat_dist.data import open_prepared
from oat_dist.dedicated import dedicated_config, find_trained, read_frontier
from oat_dist.distributed import World
from oat_dist.errors import UserError

# Short, but with a trade-off between the ends: the network of lambda = 1 lags behind after three epochs.
RECIPE = ["--config", "launch/configs/digits.yaml", "--data.loader=memory", "--optim.epochs=3",
          "--optim.batch_size=120", "--optim.lr=0.1", "--attack.steps=2", "--attack.eps_255=51",
          "--evaluation.steps=3", "--logging.tensorboard=false", "--engine.threads=1"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_process_group():
    """DeepSpeed cannot join a second process group, so all mains here share one; its variables go again."""
    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "close", lambda world: None)
        yield
    World().close()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def settings(digits, tmp_path_factory) -> list[str]:
    return [*RECIPE, f"--data.root={digits.folder.parent}", f"--output_dir={tmp_path_factory.mktemp('runs')}"]


@pytest.fixture(scope="module")
def output(settings) -> pathlib.Path:
    """Folder with a conditional run and a frontier of two lambdas and two seeds."""
    folder = pathlib.Path(settings[-1].partition("=")[2])
    train.main(settings)
    (run,) = folder.iterdir()
    args = ["--lambdas", "0", "1", "--seeds", "2", "--grid", "3", "--run", str(run)]
    frontier.main([*args, *settings])
    return folder


def start(args, monkeypatch) -> int:
    monkeypatch.setattr("sys.argv", ["frontier.py", *args])
    try:
        run_main(frontier.main)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.slow
def test_the_frontier_has_means_over_seeds_controls_and_the_conditional_curve(output):
    found = json.loads((output / "digits_frontier/test.json").read_text())
    assert [(n["lam"], n["seed"]) for n in found["networks"]] == [(0.0, 0), (0.0, 1), (1.0, 0), (1.0, 1)]
    for point in found["points"]:
        same = [n for n in found["networks"] if n["lam"] == point["lam"]]
        assert point["sa"] == pytest.approx(sum(n["sa"] for n in same) / 2) and point["seeds"] == 2
    assert [p["lam"] for p in found["conditional"]["curve"]] == [0.0, 0.5, 1.0]
    assert found["conditional"]["ratio"] == found["conditional"]["ratios"][0]
    assert len(found["controls"]) == 2
    rows = list(csv.DictReader((output / "digits_frontier/test.csv").open()))
    assert {row["network"] for row in rows} == {"dedicated", "conditional", *found["controls"]}
    assert {p.name for p in (output / "digits_frontier").iterdir()} == {
        f"test.{s}" for s in ("json", "csv", "png", "svg")
    }


@pytest.mark.slow
def test_the_same_command_trains_nothing_again_and_a_lost_network_alone(output, settings, capsys):
    before = {p for p in output.iterdir() if "dedicated" in p.name}
    written = (output / "digits_frontier/test.json").read_bytes()
    frontier.main(["--lambdas", "0", "1", "--seeds", "2", *settings])
    assert {p for p in output.iterdir() if "dedicated" in p.name} == before
    printed = capsys.readouterr().out
    assert "dedicated lambda = 0 at every lambda" in printed and "going on" not in printed
    # Interrupted before the end: the network goes on from its checkpoint and becomes the same.
    config = load_config(settings)
    data = open_prepared(config.data.root, "digits")
    lost = find_trained(dedicated_config(config, 1.0, 1), data)
    for name in ("frontier.json", "model.safetensors"):
        (lost / name).unlink()
    for path in lost.glob("eval/*"):
        path.unlink()
    frontier.main(["--lambdas", "0", "1", "--seeds", "2", *settings])
    assert {p for p in output.iterdir() if "dedicated" in p.name} == before
    assert "going on with" in capsys.readouterr().out
    again = json.loads((output / "digits_frontier/test.json").read_text())
    assert again["networks"] == json.loads(written)["networks"]


@pytest.mark.slow
def test_dedicated_networks_do_not_depend_on_conditioning_measurement_loader_or_threads(settings, output, digits):
    config = load_config([*settings, "--conditioning.encoding=fourier", "--conditioning.norm=single",
                          "--evaluation.steps=9", "--engine.threads=3", "--name=other"])  # fmt: skip
    assert find_trained(dedicated_config(config, 0.0, 0), digits) is not None
    assert find_trained(dedicated_config(config, 0.5, 0), digits) is None
    assert find_trained(dedicated_config(load_config([*settings, "--optim.lr=0.2"]), 0.0, 0), digits) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [("--optim.lr=0.2", "of another optim.lr: 0.1 there, 0.2 here"),
     ("--evaluation.steps=9", "of another attack: "),
     ("--evaluation.lambdas=[0, 0.5]", r"evaluation.lambdas=\(0.0, 0.5\): must include the lambdas of .*: 0, 1")],
)  # fmt: skip
def test_a_frontier_file_of_another_recipe_is_refused_by_name(change, message, settings, output, digits):
    path = output / "digits_frontier/test.json"
    assert read_frontier(path, load_config(settings), digits, split="test")["points"][0]["lam"] == 0.0
    with pytest.raises(UserError, match=message):
        read_frontier(path, load_config([*settings, change]), digits, split="test")


@pytest.mark.slow
def test_a_frontier_file_of_other_data_is_refused(settings, output, digits, tmp_path):
    path = output / "digits_frontier/test.json"
    config = load_config(settings)
    with pytest.raises(UserError, match="of another split: test there, val here"):
        read_frontier(path, config, digits, split="val")
    other = json.loads(path.read_text()) | {"data_sha256": "0" * 64}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"of another training data: 000000000000\.\.\. there"):
        read_frontier(tmp_path / "other.json", config, digits, split="test")
    (tmp_path / "other.json").write_text(json.dumps(other | {"dataset": "cifar10"}))
    with pytest.raises(UserError, match="of another dataset: cifar10 there, digits here"):
        read_frontier(tmp_path / "other.json", config, digits, split="test")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="not a frontier file; name"):
        read_frontier(tmp_path / "other.json", config, digits, split="test")


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--lambdas", "0", "0.5"], "--lambdas=(0.0, 0.5): must lie in [0, 1] and have both ends"),
     (["--seeds", "0"], "--seeds=0: must be at least 1"),
     (["--seeds", "1", "--optim.lrr=1"], "optim.lrr: unknown key; did you mean optim.lr?")],
)  # fmt: skip
def test_a_mistake_on_the_command_line_costs_one_line(args, message, monkeypatch, capsys):
    assert start(args, monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and said.count("\n") == 1


@pytest.mark.slow
def test_a_run_of_another_recipe_is_not_compared(output, settings, monkeypatch, capsys):
    (run,) = [p for p in output.iterdir() if "dedicated" not in p.name and p.name != "digits_frontier"]
    assert start(["--run", str(run), *settings, "--optim.lr=0.2"], monkeypatch) == 2
    assert f"--run {run}: trained with optim.lr=0.1, the dedicated networks with 0.2" in capsys.readouterr().err
