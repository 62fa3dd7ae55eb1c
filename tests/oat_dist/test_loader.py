"""Loaders: both read the same bits, augmentation is keyed, ranks share batches without changing them."""

import dataclasses
import json

import pytest
import torch

from oat_dist.config import Config, DataConfig, EngineConfig, OptimConfig
from oat_dist.data import TrainLoader, evaluation_batches, open_prepared, prepare
from oat_dist.data.augment import augment, cutout
from oat_dist.data.ffcv_io import is_installed
from oat_dist.data.loader import deal
from oat_dist.data.sources.digits import read_digits
from oat_dist.errors import UserError

CPU = torch.device("cpu")
needs_ffcv = pytest.mark.skipif(not is_installed(), reason="FFCV was left out of this installation (FFCV=0)")


def settings(data, loader="memory", *, accumulation=1, batch_size=100, shift_pixels=1, flip=True) -> Config:
    return Config(
        data=DataConfig(root=str(data.folder.parent), loader=loader, shift_pixels=shift_pixels, flip=flip),
        optim=OptimConfig(batch_size=batch_size),
        engine=EngineConfig(accumulation=accumulation),
    )


def epoch(data, config, number=0, *, rank=0, ranks=1):
    return list(TrainLoader(data, config, rank=rank, ranks=ranks, device=CPU).epoch(number))


@needs_ffcv
def test_ffcv_and_memory_loaders_give_bit_equal_batches_over_epochs(digits):
    loaders = [TrainLoader(digits, settings(digits, name), rank=0, ranks=1, device=CPU) for name in ("ffcv", "memory")]
    for number in (0, 1):
        ours, theirs = (list(loader.epoch(number)) for loader in loaders)
        assert len(ours) == len(theirs) == 14
        for (a,), (b,) in zip(ours, theirs, strict=True):
            for field in dataclasses.fields(a):
                assert torch.equal(getattr(a, field.name), getattr(b, field.name)), field.name


@needs_ffcv
def test_ffcv_reads_an_evaluation_split_whole_and_in_order(digits):
    for name in ("ffcv", "memory"):
        batches = evaluation_batches(digits, "test", DataConfig(loader=name), 64, device=CPU)
        assert [len(b.label_N) for b in batches] == [64, 64, 52]
        index = torch.cat([b.index_N for b in batches])
        source = read_digits()
        assert index.tolist() == source.splits["test"].tolist()
        pixels = torch.cat([b.image_NCHW for b in batches])[:, 0]
        assert torch.equal((pixels * 255).round().byte(), torch.from_numpy(source.images_NHWC[index.numpy(), :, :, 0]))


@pytest.mark.parametrize("loader", ["memory", pytest.param("ffcv", marks=needs_ffcv)])
def test_a_part_of_an_evaluation_split_is_spread_over_it(digits, loader):
    whole = read_digits().splits["test"]  # 180
    batches = evaluation_batches(digits, "test", DataConfig(loader=loader), 3, num_images=8, device=CPU)
    rows = [batch.index_N.tolist() for batch in batches]
    assert rows == [whole[[0, 22, 45]].tolist(), whole[[67, 90, 112]].tolist(), whole[[135, 157]].tolist()]


@needs_ffcv
def test_reading_leaves_the_number_of_threads_alone(digits):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    epoch(digits, settings(digits, "ffcv"))
    assert torch.get_num_threads() == threads + 1


def test_the_split_is_stratified_and_complete():
    source = read_digits()
    rows = [set(source.splits[name].tolist()) for name in ("train", "val", "test")]
    assert [len(r) for r in rows] == [1437, 180, 180]
    assert len(set.union(*rows)) == 1797
    for name in ("val", "test"):
        counts = torch.bincount(torch.from_numpy(source.labels_N[source.splits[name]]))
        assert counts.min() >= 17 and counts.max() <= 19


@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 1), (3, 1), (1, 2), (2, 2), (4, 1)])
def test_images_and_augmentation_do_not_depend_on_the_number_of_ranks(digits, ranks, accumulation):
    alone = {}
    for step, (batch,) in enumerate(epoch(digits, settings(digits), 3)):
        for i in range(len(batch.index_N)):
            alone[step, int(batch.position_N[i])] = (int(batch.index_N[i]), batch.image_NCHW[i], batch.label_N[i])
    seen = 0
    for rank in range(ranks):
        config = settings(digits, accumulation=accumulation)
        for step, micro_batches in enumerate(epoch(digits, config, 3, rank=rank, ranks=ranks)):
            assert len(micro_batches) == accumulation
            for batch in micro_batches:
                for i in range(len(batch.index_N)):
                    index, image, label = alone[step, int(batch.position_N[i])]
                    assert index == batch.index_N[i] and label == batch.label_N[i]
                    assert torch.equal(image, batch.image_NCHW[i])
                    seen += 1
    assert seen == len(alone) == 1400


@pytest.mark.parametrize("batch_size", [1, 7, 12, 100])
@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 3), (4, 2), (3, 1)])
def test_every_position_is_dealt_once_and_evenly(batch_size, ranks, accumulation):
    parts = [p for r in range(ranks) for p in deal(batch_size, rank=r, ranks=ranks, accumulation=accumulation)]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(batch_size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(torch.equal(p, p.sort().values) for p in parts)


def test_the_images_of_a_micro_batch_are_the_same_on_any_number_of_ranks():
    for micro in range(2):
        alone = deal(20, rank=0, ranks=1, accumulation=2)[micro]
        shared = torch.cat([deal(20, rank=r, ranks=3, accumulation=2)[micro] for r in range(3)])
        assert torch.equal(shared.sort().values, alone)


def test_an_epoch_visits_every_image_at_most_once_and_orders_differ(digits):
    orders = [torch.cat([b.index_N for (b,) in epoch(digits, settings(digits), number)]) for number in (0, 1)]
    assert all(len(order.unique()) == 1400 for order in orders)
    assert (orders[0] == orders[1]).float().mean() < 0.02


def test_a_shift_moves_pixels_by_the_drawn_offset_and_fills_with_zeros():
    x = torch.arange(1, 37, dtype=torch.uint8).view(1, 1, 6, 6).repeat(200, 2, 1, 1)
    out = augment(x, torch.arange(200), seed=0, epoch=0, shift_pixels=1, flip=False)
    padded = torch.nn.functional.pad(x[0], (1, 1, 1, 1))
    crops = {(i, j): padded[:, i : i + 6, j : j + 6] for i in range(3) for j in range(3)}
    found = [next(at for at, crop in crops.items() if torch.equal(image, crop)) for image in out]
    assert set(found) == set(crops), "every offset is drawn"
    assert out.dtype == torch.uint8


def test_a_flip_mirrors_about_half_of_the_images():
    x = torch.arange(12, dtype=torch.uint8).view(1, 1, 3, 4).repeat(400, 1, 1, 1)
    out = augment(x, torch.arange(400), seed=0, epoch=0, shift_pixels=0, flip=True)
    mirrored = [torch.equal(image, x[0].flip(2)) for image in out]
    assert all(m or torch.equal(image, x[0]) for m, image in zip(mirrored, out, strict=True))
    assert 160 < sum(mirrored) < 240


def test_cutout_fills_one_square_whose_centre_is_drawn_from_all_pixels():
    fill = torch.tensor([0.25, 0.75])
    x = torch.ones(600, 2, 6, 5)
    out = cutout(x, torch.arange(600), seed=0, epoch=0, pixels=3, fill_C=fill)
    blank = (out != 1).all(1)
    assert torch.equal(out, torch.where(blank[:, None], fill.view(1, 2, 1, 1), x))
    squares = set()
    for row in range(6):
        for column in range(5):
            square = torch.zeros(6, 5, dtype=torch.bool)
            square[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = True
            squares.add(tuple(square.flatten().tolist()))
    assert {tuple(b.flatten().tolist()) for b in blank} == squares, (
        "every centre, clipped at the edge, and nothing else"
    )
    assert not torch.equal(cutout(x, torch.arange(600), seed=0, epoch=1, pixels=3, fill_C=fill), out)
    assert cutout(x, torch.arange(600), seed=0, epoch=0, pixels=0, fill_C=fill) is x


def test_training_images_are_cut_out_with_the_mean_of_the_data_set(digits):
    plain = settings(digits, shift_pixels=0, flip=False)
    config = dataclasses.replace(plain, data=dataclasses.replace(plain.data, cutout_pixels=4))
    for (cut,), (whole,) in zip(epoch(digits, config)[:2], epoch(digits, plain)[:2], strict=True):
        mean = torch.tensor(digits.pixel_mean).view(1, -1, 1, 1)
        changed = cut.image_NCHW != whole.image_NCHW
        assert torch.equal(cut.image_NCHW, torch.where(changed, mean, whole.image_NCHW))
        assert changed.flatten(1).any(1).all() and changed.flatten(1).sum(1).max() <= 16


def test_no_augmentation_gives_the_stored_pixels(digits):
    config = settings(digits, shift_pixels=0, flip=False)
    source = read_digits()
    for (batch,) in epoch(digits, config)[:2]:
        stored = torch.from_numpy(source.images_NHWC[batch.index_N.numpy()]).permute(0, 3, 1, 2)
        assert torch.equal(batch.image_NCHW, stored.float() / 255)


@pytest.mark.parametrize(
    ("batch_size", "ranks", "accumulation", "message"),
    [(2000, 1, 1, "optim.batch_size=2000: must be at most the 1437 training images of digits"),
     (4, 5, 1, "optim.batch_size=4: must be at least ranks x engine.accumulation = 5 x 1"),
     (4, 2, 3, "optim.batch_size=4: must be at least ranks x engine.accumulation = 2 x 3")],
)  # fmt: skip
def test_more_ranks_than_images_or_too_large_a_batch_is_refused(digits, batch_size, ranks, accumulation, message):
    config = settings(digits, batch_size=batch_size, accumulation=accumulation)
    with pytest.raises(UserError) as error:
        TrainLoader(digits, config, rank=0, ranks=ranks, device=CPU)
    assert str(error.value).startswith(message)


def test_a_missing_data_set_is_named_with_what_would_be_right(tmp_path):
    with pytest.raises(UserError, match=r"data.dataset='cifar': no prepared data set at .*; run: python launch"):
        open_prepared(str(tmp_path), "cifar")


@pytest.mark.parametrize("damage", ["cut", "missing", "not listed"])
def test_a_damaged_or_missing_split_is_named_with_the_command_that_mends_it(tmp_path, damage):
    data = prepare(str(tmp_path), "digits")
    path = data.folder / "train.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    elif damage == "missing":
        path.unlink()
    else:
        about = json.loads((data.folder / "dataset.json").read_text())
        del about["sha256"][path.name]
        (data.folder / "dataset.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"train.safetensors.*python launch/prepare_data.py digits"):
        open_prepared(str(tmp_path), "digits").file("train", "memory")
    assert len(prepare(str(tmp_path), "digits").file("train", "memory").read_bytes()) > 100_000


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/digits: cannot write the data set"):
        prepare(str(tmp_path / "file"), "digits")


def test_without_ffcv_the_ffcv_loader_says_what_to_install(digits, monkeypatch):
    if not is_installed():
        pytest.skip("prepared without FFCV, there is no .beton to open")
    monkeypatch.setattr("oat_dist.data.ffcv_io.is_installed", lambda: False)
    with pytest.raises(UserError, match=r"data.loader='ffcv': FFCV is not installed; .*data.loader=memory"):
        epoch(digits, settings(digits, "ffcv"))
