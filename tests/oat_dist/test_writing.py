"""Preparing: what dataset.json says, that a failure leaves what was there before, that writing cannot hang."""

import errno
import json
import os
import resource
import shutil

import numpy as np
import pytest
import torch

from oat_dist.config import Config, DataConfig, OptimConfig
from oat_dist.data import TrainLoader, ffcv_io, open_prepared, prepare, writing
from oat_dist.data.sources import SourceOptions
from oat_dist.errors import UserError
from tests.archives import pixels

needs_ffcv = pytest.mark.skipif(not ffcv_io.is_installed(), reason="FFCV was left out of this installation (FFCV=0)")


@pytest.fixture
def npz(tmp_path):
    x, y = pixels(60, 8), np.arange(60) % 10
    np.savez(tmp_path / "tiny.npz", x_train=x[:50], y_train=y[:50], x_test=x[50:], y_test=y[50:])
    return tmp_path / "tiny.npz"


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_description_has_statistics_augmentation_checksums_and_the_command(npz, tmp_path):
    data = prepare(str(tmp_path / "out"), f"npz:{npz}", options=SourceOptions(num_val=10))
    assert data == open_prepared(str(tmp_path / "out"), "tiny")
    about = json.loads((data.folder / "dataset.json").read_text())
    assert about["counts"] == {"train": 40, "val": 10, "test": 10}
    assert about["augmentation"] == {"shift_pixels": 1, "flip": True}, "an eighth of 8 pixels"
    assert list(about["source_sha256"]) == ["tiny.npz"]
    assert data.command == f"python launch/prepare_data.py npz:{npz} --val 10 --out {tmp_path}/out"
    train = TrainLoader(
        data,
        Config(data=DataConfig(loader="memory", shift_pixels=0, flip=False), optim=OptimConfig(batch_size=40)),
        rank=0, ranks=1, device=torch.device("cpu"),
    )  # fmt: skip
    ((batch,),) = train.epoch(0)
    x = batch.image_NCHW.double()
    assert x.mean((0, 2, 3)).tolist() == pytest.approx(data.pixel_mean, abs=1e-7)
    assert x.std((0, 2, 3), correction=0).tolist() == pytest.approx(data.pixel_std, abs=1e-7)


@needs_ffcv
@pytest.mark.parametrize("shape", [(70, 5, 7, 2), (9, 1024, 1024, 3)], ids=["small", "larger than a page"])
def test_a_beton_holds_the_pixels_and_the_same_input_gives_the_same_bytes(tmp_path, shape):
    rng = np.random.default_rng(0)
    tensors = {
        "image": rng.integers(0, 256, shape, dtype=np.uint8),
        "label": rng.integers(0, 9, shape[0]),
        "index": np.arange(shape[0]) * 3,
    }
    for name in ("a.beton", "b.beton"):
        ffcv_io.write_beton(tmp_path / name, **tensors)
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()
    ((image, label, index),) = ffcv_io.BetonReader(tmp_path / "a.beton", workers=1).batches(
        torch.arange(shape[0]), shape[0]
    )
    assert all(
        np.array_equal(tensors[name], value) for name, value in (("image", image), ("label", label), ("index", index))
    )


@needs_ffcv
@pytest.mark.parametrize("limit", [100, 1 << 20, 3 << 20])
def test_a_beton_that_does_not_fit_on_the_disk_is_an_error_and_not_a_wait(tmp_path, limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    image = pixels(700, 40)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError) as error:
            ffcv_io.write_beton(tmp_path / "a.beton", image=image, label=np.arange(700), index=np.arange(700))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno in (errno.EFBIG, errno.ENOSPC)


@pytest.mark.parametrize("write", ["first", "again"])
def test_a_full_disk_is_named_and_leaves_what_was_there_before(npz, tmp_path, write):
    out = tmp_path / "out"
    if write == "again":
        prepare(str(out), f"npz:{npz}")
    before = files(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(UserError) as error:
            prepare(str(out), f"npz:{npz}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value) == f"{out}/tiny: cannot write the data set: {os.strerror(errno.EFBIG)}"
    assert files(tmp_path) == before
    assert out.exists() == (write == "again")


def test_too_little_free_space_is_said_before_anything_is_written(npz, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 100))
    with pytest.raises(UserError, match=r"out: the data set takes 0 MiB, but 0 MiB are free there"):
        prepare(str(tmp_path / "out"), f"npz:{npz}")
    assert not (tmp_path / "out").exists()


def test_preparing_again_replaces_the_data_set_and_nothing_else(npz, tmp_path):
    data = prepare(str(tmp_path), f"npz:{npz}", name="mine")
    (data.folder / "notes.txt").write_text("keep me")
    (data.folder / "val.beton").write_text("of an installation that had FFCV")
    smaller = prepare(str(tmp_path), f"npz:{npz}", name="mine", options=SourceOptions(num_val=20))
    assert smaller.counts["val"] == 20 and (data.folder / "notes.txt").read_text() == "keep me"
    for name in smaller.sha256:
        split, _, suffix = name.partition(".")
        smaller.file(split, "ffcv" if suffix == "beton" else "memory")
    assert not any(path.name.startswith(".") for path in tmp_path.rglob("*"))


def test_a_source_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "bad.npz").write_text("")
    with pytest.raises(UserError, match=r"bad.npz: damaged"):
        prepare(str(tmp_path / "deep/out"), f"npz:{tmp_path}/bad.npz")
    assert files(tmp_path) == {"bad.npz": b""} and not (tmp_path / "deep").exists()


def test_a_source_that_the_disk_does_not_give_is_not_called_a_failure_to_write(npz, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(npz))

    monkeypatch.setattr(writing, "read_source", refuse)
    with pytest.raises(UserError, match=rf"npz:{npz}: cannot read {npz}: Permission denied"):
        prepare(str(tmp_path / "out"), f"npz:{npz}")


@pytest.mark.parametrize("name", ["archives", ".hidden", "../up", "a/b", "a b", ""])
def test_a_name_that_is_no_folder_of_its_own_is_refused(npz, tmp_path, name):
    with pytest.raises(UserError, match=r"--name=.*: must be letters, digits"):
        prepare(str(tmp_path / "out"), f"npz:{npz}", name=name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["older", "not JSON", "no statistics"])
def test_a_description_of_an_older_version_or_damaged_says_to_prepare_again(tmp_path, digits, change):
    folder = tmp_path / "digits"
    folder.mkdir()
    about = json.loads((digits.folder / "dataset.json").read_text())
    if change == "older":
        del about["format"]
    elif change == "no statistics":
        del about["pixel_mean"]
    text = json.dumps(about)
    (folder / "dataset.json").write_text(text[:-5] if change == "not JSON" else text)
    with pytest.raises(UserError) as error:
        open_prepared(str(tmp_path), "digits")
    again = f"run: python launch/prepare_data.py digits --out {tmp_path}"
    assert str(error.value) == f"{folder}/dataset.json: damaged, or written by an older version; {again}"


def test_augmentation_is_the_data_sets_own_unless_set(npz, tmp_path):
    data = prepare(str(tmp_path), f"npz:{npz}")

    def images(**settings):
        config = Config(data=DataConfig(loader="memory", **settings), optim=OptimConfig(batch_size=45))
        loader = TrainLoader(data, config, rank=0, ranks=1, device=torch.device("cpu"))
        return next(iter(loader.epoch(0)))[0].image_NCHW

    assert torch.equal(images(), images(shift_pixels=1, flip=True))
    assert not torch.equal(images(), images(shift_pixels=0))
    assert not torch.equal(images(), images(flip=False))


def test_pixel_statistics_are_exact():
    images = pixels(2100, 3)
    mean, std = writing.pixel_statistics(images)
    assert mean == pytest.approx((images / 255).mean((0, 1, 2)), abs=1e-12)
    assert std == pytest.approx((images / 255).std((0, 1, 2)), abs=1e-12)
