"""Run folders: new every time, complete, readable back, errors that name the file."""

import json

import pytest
import safetensors.torch
import torch

from oat_dist import report, runs
from oat_dist.boards import open_boards
from oat_dist.config import Config, ModelConfig
from oat_dist.config_io import write_config
from oat_dist.errors import UserError
from oat_dist.metrics import MetricsWriter
from oat_dist.models import build_model
from oat_dist.weights import whole_file


@pytest.fixture
def run(tmp_path, digits):
    """A run folder with an untrained network."""
    config = Config(output_dir=str(tmp_path), name="try")
    folder = runs.create_run(config, digits, {"train_micro_batch_size_per_gpu": 128}, 1)
    runs.save_model(build_model(config, in_channels=1, num_classes=10), digits, folder / "model.safetensors")
    return folder


def test_a_run_writes_down_what_it_is_made_from(run, digits):
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["data"]["sha256"] == digits.sha256
    assert provenance["packages"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert {"command", "started", "ranks", "commit", "machine"} <= set(provenance)
    assert json.loads((run / "deepspeed.json").read_text()) == {"train_micro_batch_size_per_gpu": 128}


def test_two_runs_at_the_same_second_get_their_own_folders(tmp_path, digits):
    config = Config(output_dir=str(tmp_path))
    folders = {runs.create_run(config, digits, {}, 1) for _ in range(3)}
    assert len(folders) == 3


def test_a_saved_network_reads_back_equal(run):
    config, network = runs.load_run(run)
    x = torch.rand(3, 1, 8, 8)
    original = build_model(config, in_channels=1, num_classes=10)
    assert config.name == "try" and not network.training
    assert torch.equal(network.predict(x, 0.25), original.predict(x, 0.25))


def test_the_encoding_table_is_in_the_file(run):
    tensors = safetensors.torch.load_file(run / "model.safetensors")
    assert tensors["encoder.codes_KE"].shape == (6, 128)


def test_a_folder_that_is_not_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--run .*: not a run"):
        runs.load_run(tmp_path)


def test_an_unfinished_run_is_named(run):
    (run / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"--run .*: has no model.safetensors"):
        runs.load_run(run)


@pytest.mark.parametrize("content", [b"", b"\x80\x04junk", None], ids=["empty", "a pickle", "cut"])
def test_a_damaged_model_is_named(run, content):
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UserError, match=r"model.safetensors: damaged"):
        runs.load_run(run)


def test_a_model_of_another_network_is_refused_by_name(run):
    config, _ = runs.load_run(run)
    other = Config(name=config.name, model=ModelConfig(name="wrn10_2"))
    write_config(other, run / "config.yaml")
    with pytest.raises(
        UserError, match=r"model.safetensors: does not fit the network; missing: .*; unexpected: .*; shape: "
    ):
        runs.load_run(run)


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_free_stems_never_name_an_existing_report(tmp_path):
    assert runs.free_stem(tmp_path / "eval", "test") == tmp_path / "eval/test"
    (tmp_path / "eval/test.json").write_text("{}")
    (tmp_path / "eval/test-2.json").write_text("{}")
    assert runs.free_stem(tmp_path / "eval", "test") == tmp_path / "eval/test-3"


def test_metrics_and_timings_are_json_lines_and_tensorboard_gets_the_same(tmp_path):
    with MetricsWriter(tmp_path, open_boards(Config(), tmp_path)) as metrics:
        metrics.write(10, {"loss": 0.5}, images=1280)
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 10, "loss": 0.5}
        metrics.write(20, {"loss": 0.25}, images=1280)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 10, "loss": 0.5}, {"step": 20, "loss": 0.25}]
    timings = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    assert all(set(line) == {"step", "elapsed_s", "images_per_s"} for line in timings)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 0.5), (20, 0.25)]


def test_a_report_is_written_as_json_and_as_two_figures(tmp_path, capsys):
    about = {
        "model": "resnet8", "dataset": "digits", "split": "test", "num_examples": 180,
        "attack": {"name": "pgd-20", "norm": "linf", "eps": 0.3},
        "points": [{"lam": 0.0, "sa": 0.99, "ra": 0.05}, {"lam": 1.0, "sa": 0.97, "ra": 0.5}],
    }  # fmt: skip
    paths = report.write_report(about, tmp_path / "eps7.5")
    assert [p.name for p in paths] == ["eps7.5.json", "eps7.5.png", "eps7.5.svg"]
    assert json.loads(paths[0].read_text()) == about
    assert paths[1].read_bytes().startswith(b"\x89PNG") and b"</svg>" in paths[2].read_bytes()
    report.print_report(about, paths)
    printed = capsys.readouterr().out
    assert "99.0" in printed and "5.0" in printed and "eps 76.5/255" in printed and str(paths[0]) in printed
