"""Images labelled by a trained network become a data set, and a network trains on it."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from launch import pseudo_label, run_main, train
from oat_dist import runs
from oat_dist.config import ConditioningConfig, Config, DataConfig
from oat_dist.data import open_prepared, prepare
from oat_dist.data.checksum import file_sha256
from oat_dist.data.ffcv_io import is_installed
from oat_dist.distributed import World
from oat_dist.errors import UserError
from oat_dist.models import build_model
from tests.archives import pixels
from tests.ranks import run_ranks


def start(main, args, monkeypatch) -> int:
    monkeypatch.setattr("sys.argv", ["script.py", *map(str, args)])
    try:
        run_main(main)
    except SystemExit as stop:
        return stop.code
    return 0


def predictions(network, images, lam=0.0):
    return network.eval().predict(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, lam)


@pytest.fixture(scope="module")
def teacher(digits, tmp_path_factory):
    """A run folder with a standard network whose predictions differ from image to image."""
    standard = ConditioningConfig(lambdas=(0.0,), film="none", norm="single")
    data = DataConfig(root=str(digits.folder.parent), loader="memory")
    config = Config(output_dir=str(tmp_path_factory.mktemp("runs")), conditioning=standard, data=data)
    network = build_model(config, in_channels=1, num_classes=10)
    # No class is preferred over all images, and no image is a clear case.
    logits = predictions(network, load_file(digits.folder / "train.safetensors")["image"])
    network.classifier.bias.data.sub_(logits.mean(0))
    for parameter in network.classifier.parameters():
        parameter.data.mul_(3 / logits.std(0).mean())
    folder = runs.create_run(config, digits, {}, 1)
    runs.save_model(network, digits, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def npz(digits, tmp_path_factory):
    """The first 60 training digits without their labels."""
    path = tmp_path_factory.mktemp("images") / "more.npz"
    np.savez(path, x_unlabeled=load_file(digits.folder / "train.safetensors")["image"][:60])
    return path


def predicted(teacher, images):
    """Confidences and labels at lambda = 0."""
    return predictions(runs.load_run(teacher)[1], images).double().softmax(1).max(1)


@pytest.fixture(scope="module")
def labelled(teacher, npz, tmp_path_factory):
    """The folder of data sets with `more`, labelled by the script."""
    root = tmp_path_factory.mktemp("root")
    args = ["--run", teacher, "--images", f"npz:{npz}", "--name", "more", "--out", root]
    pseudo_label.main([*map(str, args)])
    return root


def test_labels_are_the_predictions_of_the_network_at_lambda(teacher, npz, labelled, digits):
    images = np.load(npz)["x_unlabeled"]
    confidence, label = predicted(teacher, images)
    assert len(label.unique()) >= 3, "else the test says little"
    data = open_prepared(str(labelled), "more")
    written = load_file(data.file("train", "memory"))
    assert np.array_equal(written["image"], images) and np.array_equal(written["label"], label.numpy())
    assert written["index"].tolist() == list(range(60))
    assert data.counts == {"train": 60} and data.classes == digits.classes
    assert (data.image_shape, data.shift_pixels, data.flip) == ((8, 8, 1), 1, False)
    assert data.pixel_mean == pytest.approx([float((images / 255).mean())])
    assert set(data.sha256) == {"train.safetensors"} | ({"train.beton"} if is_installed() else set())
    by = json.loads((data.folder / "dataset.json").read_text())["labelled_by"]
    assert by["run"] == str(teacher) and by["model_sha256"] == file_sha256(teacher / "model.safetensors")
    assert by["mean_confidence"] == pytest.approx(float(confidence.mean())) and by["lam"] == 0
    assert list(by["counts_per_class"].values()) == torch.bincount(label, minlength=10).tolist()
    assert data.source_sha256 == {"more.npz": file_sha256(npz)}
    assert data.command == (
        f"python launch/pseudo_label.py --run {teacher} --images npz:{npz} --name more --out {labelled}"
    )
    assert sorted(p.name for p in data.folder.iterdir()) == sorted(["dataset.json", *data.sha256])
    assert [p.name for p in labelled.iterdir()] == ["more"]


def test_a_folder_of_images_is_labelled_and_the_least_confident_are_left_out(
    teacher, npz, tmp_path, monkeypatch, capsys
):
    images = np.load(npz)["x_unlabeled"][:20]
    for number, image in enumerate(images):
        path = tmp_path / f"images/{number % 2}/{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    order = [*range(0, 20, 2), *range(1, 20, 2)]
    confidence, label = (values[order] for values in predicted(teacher, images))
    least = float(confidence[:14].median())
    args = ["--run", teacher, "--images", f"folder:{tmp_path}/images", "--name", "some", "--out", tmp_path / "out"]
    assert start(pseudo_label.main, [*args, "--limit", 14, "--min-confidence", least], monkeypatch) == 0
    kept = (confidence[:14] >= least).nonzero().flatten()
    assert 0 < len(kept) < 14
    written = load_file(tmp_path / "out/some/train.safetensors")
    assert written["index"].tolist() == kept.tolist()
    assert np.array_equal(written["label"], label[kept].numpy())
    assert np.array_equal(written["image"], images[order][kept.numpy()])
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path}/out/some: 8x8x1, {len(kept)} of 14 images, mean confidence ")


def train_on(world, root, output):
    """One epoch of robust self-training; its metrics and the extra data set it records."""
    from oat_dist.config_io import load_config
    from oat_dist.engine import init_world
    from oat_dist.trainer import train

    argv = ["--data.dataset=small", "--data.extra=more", f"--data.root={root}", "--data.loader=memory"]
    argv += ["--loss.robust=rst_adv", "--optim.epochs=1", "--optim.batch_size=24", "--attack.steps=2"]
    argv += ["--evaluation.steps=1", "--evaluation.lambdas=[0]", f"--output_dir={output}"]
    run = train(load_config([*argv, "--logging.interval_steps=1", "--logging.tensorboard=false"]), init_world(1))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return lines, json.loads((run / "provenance.json").read_text())["extra_data"]


@pytest.mark.slow
@pytest.mark.dist
def test_a_network_trains_on_the_labelled_images_by_robust_self_training(labelled, digits, tmp_path):
    tensors = load_file(digits.folder / "train.safetensors")
    parts = {"train": slice(100, 160), "val": slice(160, 170), "test": slice(170, 180)}
    keys = {"x": "image", "y": "label"}
    arrays = {f"{key}_{part}": tensors[keys[key]][rows] for part, rows in parts.items() for key in keys}
    np.savez(tmp_path / "small.npz", **arrays)
    prepare(str(tmp_path / "data"), f"npz:{tmp_path}/small.npz")
    shutil.copytree(labelled / "more", tmp_path / "data/more")
    ((lines, extra),) = run_ranks(train_on, 1, str(tmp_path / "data"), str(tmp_path / "runs"))
    assert [line["step"] for line in lines] == list(range(1, 60 // 12 + 1))
    assert np.isfinite([line["loss"] for line in lines]).all()
    assert extra["sha256"] == open_prepared(str(labelled), "more").sha256


def test_without_labelled_images_robust_self_training_costs_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("oat_dist.engine.init_world", lambda threads: World())
    assert start(train.main, ["--loss.robust=rst_adv"], monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: data.extra=None: must name a data set with pseudo-labels") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [({"--run": "nowhere"}, "--run nowhere: not a run"),
     ({"--images": "imagenet"}, "--images imagenet: expected one of stl10-unlabeled, folder:PATH, npz:FILE"),
     ({"--images": "npz:nothing.npz"}, "npz:nothing.npz: there is no such file"),
     ({"--images": "npz:wide.npz"}, "wide.npz: x_unlabeled: images are 9x9 pixels, the network was trained on 8x8; "),
     ({"--name": "a/b"}, "--name='a/b': must be letters"),
     ({"--name": "taken"}, "--name='taken': out/taken is there already; remove it, or choose another name"),
     ({"--lam": "1.5"}, "--lam=1.5: must lie in [0, 1]"),
     ({"--min-confidence": "2"}, "--min-confidence=2.0: must lie in [0, 1]"),
     ({"--min-confidence": "1"}, "--min-confidence=1.0: no image of npz:few.npz is labelled with that confidence"),
     ({"--limit": "0"}, "--limit=0: must be at least 1"),
     ({"--size": "0"}, "--size=0: must be at least 1"),
     ({"--size": "9"}, "--size=9: must be that of the network's training images, 8x8"),
     ({"--data-root": "nowhere"}, "data.dataset='digits': no prepared data set at nowhere/digits"),
     ({"--source": "a.tar.gz"}, "--source=a.tar.gz: --images npz:few.npz does not take it")],
)  # fmt: skip
def test_a_mistake_costs_one_line_and_writes_nothing(teacher, change, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("few.npz", x_unlabeled=pixels(3, 8, 1))
    np.savez("wide.npz", x_unlabeled=pixels(3, 9, 1))
    (tmp_path / "out/taken").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    args = {"--run": teacher, "--images": "npz:few.npz", "--name": "new", "--out": "out"} | change
    assert start(pseudo_label.main, [part for pair in args.items() for part in pair], monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_whose_network_does_not_fit_the_data_set_of_that_name_is_refused(
    teacher, npz, tmp_path, monkeypatch, capsys
):
    other = {"classes": list("0123456789"), "image_shape": [8, 8, 3]}
    (tmp_path / "digits").mkdir()
    about = json.loads((open_digits(teacher).folder / "dataset.json").read_text())
    (tmp_path / "digits/dataset.json").write_text(json.dumps(about | other))
    args = ["--run", teacher, "--images", f"npz:{npz}", "--name", "x", "--data-root", tmp_path, "--out", tmp_path]
    assert start(pseudo_label.main, args, monkeypatch) == 2
    assert "has other classes or channels than the run was trained with" in capsys.readouterr().err


def open_digits(teacher):
    config, _ = runs.load_run(teacher)
    return open_prepared(config.data.root, "digits")


def test_a_disk_that_is_too_full_is_said_and_nothing_is_left(teacher, npz, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 100))
    args = ["--run", teacher, "--images", f"npz:{npz}", "--name", "x", "--out", tmp_path / "out"]
    assert start(pseudo_label.main, args, monkeypatch) == 2
    assert "are free there" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_labelled_data_set_cannot_be_measured_on(labelled):
    data = open_prepared(str(labelled), "more")
    with pytest.raises(UserError, match=r"more: has no val split, only train; it can be data.extra alone"):
        data.file("val", "memory")
