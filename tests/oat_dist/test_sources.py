"""Sources: every official layout is read to the pixel, splits are as published, and bad input is named."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from oat_dist.data.sources import SourceOptions, cifar, folder, npz, read_source, stl10, svhn
from oat_dist.data.sources.source import split_rows
from oat_dist.errors import UserError
from tests.archives import cifar10_members, cifar100_members, pixels, stl10_members, write_svhn, write_tar


def refuse(request: str, **options) -> str:
    with pytest.raises(UserError) as error:
        read_source(request, SourceOptions(**options))
    assert "\n" not in str(error.value)
    return str(error.value)


def check(source, x, y, num_test: int, num_val: int) -> None:
    assert np.array_equal(source.images_NHWC, x)
    assert np.array_equal(source.labels_N, y) and source.labels_N.dtype == np.int64
    train, val, test = (source.splits[name] for name in ("train", "val", "test"))
    assert test.tolist() == list(range(len(x) - num_test, len(x)))
    assert len(val) == num_val and sorted([*train, *val]) == list(range(len(x) - num_test))


def test_cifar10_is_read_to_the_pixel(tmp_path):
    members, x, y = cifar10_members()
    path = write_tar(tmp_path / "mine.tar.gz", members)
    source = read_source("cifar10", SourceOptions(archive=path, num_val=30))
    check(source, x, y, num_test=20, num_val=30)
    assert np.bincount(y[source.splits["val"]]).tolist() == [3] * 10
    assert source.classes[0] == "airplane" and source.classes[9] == "truck"
    assert (source.shift_pixels, source.flip) == (4, True)
    assert list(source.sha256) == ["mine.tar.gz"] and len(source.sha256["mine.tar.gz"]) == 64


def test_cifar100_takes_the_fine_labels(tmp_path):
    members, x, y = cifar100_members()
    path = write_tar(tmp_path / "c.tar.gz", members)
    source = read_source("cifar100", SourceOptions(archive=path, num_val=100))
    check(source, x, y, num_test=100, num_val=100)
    assert source.classes[:2] == ("name_00", "name_01") and len(source.classes) == 100


def test_svhn_reads_the_label_ten_as_the_digit_zero_and_is_not_augmented(tmp_path):
    where, x, y = write_svhn(tmp_path / "svhn")
    source = read_source("svhn", SourceOptions(archive=where, num_val=10))
    check(source, x, y, num_test=10, num_val=10)
    assert (source.shift_pixels, source.flip) == (0, False)
    assert set(source.sha256) == {"train_32x32.mat", "test_32x32.mat"}


def test_stl10_is_read_column_by_column_and_never_selects_on_its_test_images(tmp_path):
    members, x, y = stl10_members()
    path = write_tar(tmp_path / "s.tar.gz", members)
    check(read_source("stl10", SourceOptions(archive=path, num_val=10)), x, y, num_test=10, num_val=10)


@pytest.mark.parametrize(("num_train", "default", "num_val"), [(50_000, 5000, 5000), (5000, 500, 500), (800, None, 80)])
def test_the_published_numbers_of_validation_images_come_off_the_training_images_alone(num_train, default, num_val):
    labels = np.random.default_rng(0).integers(0, 10, num_train + 100)
    splits = split_rows(labels, {"train": num_train}, SourceOptions(), where="x", default_val=default)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [num_train - num_val, num_val, 100]
    share = np.bincount(labels[splits["val"]]) / np.bincount(labels[:num_train])
    assert np.abs(share - num_val / num_train).max() < 1 / np.bincount(labels[:num_train]).min()
    again = split_rows(labels, {"train": num_train}, SourceOptions(), where="x", default_val=default)
    assert np.array_equal(splits["val"], again["val"])


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda body: body[:-1], "data_batch_3.bin: has 61459 bytes, must be a multiple of the 3073 of a record"),
     (lambda body: b"", "data_batch_3.bin: has 0 bytes"),
     (lambda body: b"\x0a" + body[1:], "data_batch_3.bin: label 10 is out of range, 10 classes have 0 to 9")],
)  # fmt: skip
def test_a_damaged_member_of_cifar_is_named(tmp_path, change, message):
    members, _, _ = cifar10_members()
    name = "cifar-10-batches-bin/data_batch_3.bin"
    members[name] = change(members[name])
    path = write_tar(tmp_path / "c.tar.gz", members)
    assert refuse("cifar10", archive=path).startswith(f"{path}: cifar-10-batches-bin/{message}")


def test_class_names_that_are_not_a_hundred_different_ones_are_refused(tmp_path):
    members, _, _ = cifar100_members()
    members["cifar-100-binary/fine_label_names.txt"] = b"apple\n" * 100
    path = write_tar(tmp_path / "c.tar.gz", members)
    assert "fine_label_names.txt: must hold 100 different names" in refuse("cifar100", archive=path)


def test_a_truncated_archive_of_another_data_set_and_too_large_a_split_are_named(tmp_path):
    members, _, _ = cifar10_members()
    path = write_tar(tmp_path / "c.tar.gz", members)
    assert "has no member stl10_binary/train_X.bin" in refuse("stl10", archive=path)
    assert refuse("cifar10", archive=path) == "--val=5000: must be less than the 100 training images"
    assert "would leave class 0 without training images" in refuse("cifar10", archive=path, num_val=99)
    path.write_bytes(path.read_bytes()[:-2000])
    assert "not readable as a whole .tar.gz archive" in refuse("cifar10", archive=path)


def test_a_damaged_part_of_stl10_is_named(tmp_path):
    members, _, _ = stl10_members()
    short = {**members, "stl10_binary/test_X.bin": members["stl10_binary/test_X.bin"][:-5]}
    assert "test_X.bin: has 276475 bytes, must have 27648 for each of the 10 labels" in refuse(
        "stl10", archive=write_tar(tmp_path / "a.tar.gz", short)
    )
    unlabelled = {**members, "stl10_binary/train_y.bin": bytes(40)}
    assert "label -1 is out of range" in refuse("stl10", archive=write_tar(tmp_path / "b.tar.gz", unlabelled))


@pytest.mark.parametrize("damage", ["cut", "text", "other", "labels"])
def test_a_damaged_matlab_file_is_named(tmp_path, damage):
    import scipy.io

    where, x, _ = write_svhn(tmp_path / "svhn")
    path = where / "test_32x32.mat"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-3000])
    elif damage == "text":
        path.write_text("404 not found")
    elif damage == "other":
        scipy.io.savemat(path, {"X": np.zeros((3, 3))})
    else:
        scipy.io.savemat(path, {"X": x[:3].transpose(1, 2, 3, 0), "y": np.array([[1], [11], [2]], np.uint8)})
    said = {"cut": "damaged or not a MATLAB file", "text": "damaged or not a MATLAB file",
            "other": "X must be uint8 [32, 32, 3, N]", "labels": "y: label 11 is out of range"}[damage]  # fmt: skip
    assert refuse("svhn", archive=where, num_val=10).startswith(f"{path}: {said}")


def test_svhn_from_a_file_instead_of_a_folder_says_what_the_folder_holds(tmp_path):
    where, _, _ = write_svhn(tmp_path / "svhn")
    said = refuse("svhn", archive=where / "train_32x32.mat")
    assert said.endswith("not a folder; for svhn it holds train_32x32.mat and test_32x32.mat")


def write_folder(path, parts=("train", "test"), num=6, size=(8, 8), mode="RGB", suffix="png"):
    for part in parts:
        for label, name in enumerate(("cat", "dog")):
            (path / part / name).mkdir(parents=True)
            for i in range(num):
                rng = np.random.default_rng([len(part), label, i])
                shape = size[::-1] if mode == "L" else (*size[::-1], 3)
                image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
                image.save(path / part / name / f"{i}.{suffix}")
    return path


def test_a_folder_of_images_is_read_to_the_pixel_in_the_order_of_names(tmp_path):
    path = write_folder(tmp_path / "set", num=10)
    (path / "train/cat/notes.txt").write_text("not an image")
    (path / "train/.hidden").mkdir()
    source = read_source(f"folder:{path}", SourceOptions())
    assert source.classes == ("cat", "dog")
    assert source.labels_N.tolist() == [0] * 10 + [1] * 10 + [0] * 10 + [1] * 10
    assert [len(source.splits[name]) for name in ("train", "val", "test")] == [18, 2, 20]
    assert source.labels_N[source.splits["val"]].tolist() == [0, 1]
    for row, name in ((3, "train/cat/3.png"), (39, "test/dog/9.png")):
        assert np.array_equal(source.images_NHWC[row], np.asarray(Image.open(path / name)))
    before = source.sha256
    Image.new("RGB", (8, 8)).save(path / "test/dog/9.png")
    assert read_source(f"folder:{path}", SourceOptions()).sha256 != before


def test_a_folder_keeps_its_own_validation_images_and_gives_up_the_last_of_each_class_to_test(tmp_path):
    own = write_folder(tmp_path / "own", parts=("train", "val", "test"))
    splits = read_source(f"folder:{own}", SourceOptions()).splits
    assert {name: rows.tolist() for name, rows in splits.items()} == {
        "train": list(range(12)), "val": list(range(12, 24)), "test": list(range(24, 36))
    }  # fmt: skip
    assert refuse(f"folder:{own}", num_val=2).endswith("has validation images of its own")
    bare = write_folder(tmp_path / "bare", parts=("train",))
    assert "has no test images; add them, or move N training images there with --test N" in refuse(f"folder:{bare}")
    splits = read_source(f"folder:{bare}", SourceOptions(num_test=4, num_val=2)).splits
    assert splits["test"].tolist() == [4, 5, 10, 11] and len(splits["val"]) == 2 and len(splits["train"]) == 6


def test_grey_images_have_one_channel_and_a_mixture_three(tmp_path):
    path = write_folder(tmp_path / "set", mode="L")
    assert read_source(f"folder:{path}", SourceOptions()).images_NHWC.shape == (24, 8, 8, 1)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(path / "test/dog/0.png")
    images = read_source(f"folder:{path}", SourceOptions()).images_NHWC
    assert images.shape == (24, 8, 8, 3) and images[18, 0, 0].tolist() == [1, 2, 3]
    assert np.array_equal(images[0, ..., 0], images[0, ..., 2])


def test_images_of_many_sizes_are_cropped_and_resized_when_asked_and_else_named(tmp_path):
    path = write_folder(tmp_path / "set")
    # A wide image whose middle square is red.
    wide = Image.new("RGB", (40, 20))
    wide.paste((255, 0, 0), (10, 0, 30, 20))
    wide.save(path / "train/dog/2.png")
    assert refuse(f"folder:{path}") == (
        f"{path}/train/dog/2.png: is 40x20 pixels, {path}/train/cat/0.png 8x8; add --size N to crop and resize all"
    )
    images = read_source(f"folder:{path}", SourceOptions(size=6)).images_NHWC
    assert images.shape == (24, 6, 6, 3)
    # The filter reaches a little beyond the square at its left and right.
    assert (images[8, :, 1:5] == [255, 0, 0]).all() and (images[8] >= [230, 0, 0]).all()


@pytest.mark.parametrize("size", [(8, 8), (128, 130)], ids=["small", "in threads"])
def test_an_unreadable_image_is_named(tmp_path, size):
    path = write_folder(tmp_path / "set", num=2, size=size, suffix="jpg")
    bad = path / "test/cat/1.jpg"
    whole = bad.read_bytes()
    for body in (whole[: len(whole) * 3 // 4], whole[:20], b"", b"%!PS-Adobe-3.0 EPSF-3.0"):
        bad.write_bytes(body)
        assert refuse(f"folder:{path}").startswith(f"{bad}: unreadable image: ")


def test_an_image_that_decodes_to_too_much_or_has_too_many_bits_is_named(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "set")
    bad = path / "train/cat/5.png"
    Image.new("I;16", (8, 8)).save(bad)
    assert refuse(f"folder:{path}").startswith(f"{bad}: has more than 8 bits per channel")
    Image.new("1", (12_000, 12_000)).save(bad)
    assert bad.stat().st_size < 50_000
    assert refuse(f"folder:{path}", size=8) == f"{bad}: refused, it would decode to more than 67108864 pixels"
    Image.new("1", (9000, 9000)).save(bad)
    assert refuse(f"folder:{path}", size=8) == f"{bad}: refused, it would decode to more than 67108864 pixels"


def test_folders_that_do_not_fit_are_named(tmp_path):
    path = write_folder(tmp_path / "set")
    (path / "test/emu").mkdir()
    assert "class 'emu' is in test but not in train" in refuse(f"folder:{path}")
    (path / "train/emu").mkdir()
    assert refuse(f"folder:{path}").startswith(f"{path}/train/emu: has no images")
    (path / "test/emu").rmdir()
    Image.new("RGB", (8, 8)).save(path / "train/emu/0.png")
    assert "class 'emu' is in train but not in test" in refuse(f"folder:{path}")
    assert "has no train/; expected train/<class>" in refuse(f"folder:{path}/train")
    (tmp_path / "empty/train").mkdir(parents=True)
    assert "has no class folders" in refuse(f"folder:{tmp_path}/empty")
    assert "there is no" in refuse(f"folder:{tmp_path}/nowhere")


def arrays(num_train=40, num_test=10) -> dict[str, np.ndarray]:
    x, y = pixels(num_train + num_test, 4), np.arange(num_train + num_test) % 10
    return {"x_train": x[:num_train], "y_train": y[:num_train], "x_test": x[num_train:], "y_test": y[num_train:]}


def write_npz(path, **content):
    np.savez_compressed(path, **content)
    return path


def test_an_npz_is_read_and_its_last_training_images_can_join_the_test_images(tmp_path):
    path = write_npz(tmp_path / "set.npz", **arrays(), classes=np.array(list("abcdefghij")))
    source = read_source(f"npz:{path}", SourceOptions(num_test=7, num_val=5))
    assert np.array_equal(source.images_NHWC, pixels(50, 4)) and source.classes == tuple("abcdefghij")
    assert source.splits["test"].tolist() == list(range(33, 50))
    assert [len(source.splits[name]) for name in ("train", "val")] == [28, 5]


def test_grey_arrays_without_channels_and_own_validation_parts_are_read(tmp_path):
    content = {key: value[..., 0] if key[0] == "x" else value for key, value in arrays().items()}
    content |= {"x_val": content["x_test"][:3], "y_val": content["y_test"][:3]}
    source = read_source(f"npz:{write_npz(tmp_path / 'set.npz', **content)}", SourceOptions())
    assert source.images_NHWC.shape == (53, 4, 4, 1)
    assert source.splits["val"].tolist() == [40, 41, 42] and source.classes == tuple("0123456789")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"x_train": None}, "has no x_train"),
     ({"y_test": None}, "has no y_test"),
     ({"x_test": None, "y_test": None}, "has no test images"),
     ({"x_train": pixels(40, 4).astype(np.float32)}, "x_train: must be uint8 [N, H, W, C] or [N, H, W]"),
     ({"x_train": pixels(40, 4).transpose(0, 3, 1, 2)[..., None]}, "x_train: must be uint8 [N, H, W, C]"),
     ({"x_train": np.zeros((40, 3, 32, 32), np.uint8)}, "x_train: channels come last and are at most 4"),
     ({"x_test": pixels(10, 5)}, "x_test: images are (5, 5, 3), those of x_train (4, 4, 3)"),
     ({"y_train": np.arange(39)}, "y_train: must be 40 integers, one per image, got int64 [39]"),
     ({"y_train": np.arange(40).reshape(40, 1)}, "y_train: must be 40 integers"),
     ({"y_train": np.arange(40) / 40}, "y_train: must be 40 integers"),
     ({"y_train": np.arange(40) % 10 - 1}, "y_train: label -1 is out of range"),
     ({"y_train": np.full(40, 10**12)}, "y_train: label 1000000000000 is out of range"),
     ({"y_test": np.full(10, 10)}, "y_test: label 10 is out of range, 10 classes have 0 to 9"),
     ({"y_train": np.arange(40) % 10 * 2}, "y_train: class 1 of 19 has no training image"),
     ({"classes": np.array(["a", "a"])}, "classes must be distinct names"),
     ({"x_train": np.array([object()])}, "damaged or not an .npz of plain arrays: Object arrays cannot be loaded")],
)  # fmt: skip
def test_an_array_that_does_not_fit_is_named(tmp_path, change, message):
    content = {key: value for key, value in (arrays() | change).items() if value is not None}
    path = write_npz(tmp_path / "set.npz", **content)
    assert refuse(f"npz:{path}").startswith(f"{path}: {message}")


def test_a_damaged_npz_is_named_and_one_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    path = write_npz(tmp_path / "set.npz", **arrays())
    body = path.read_bytes()
    monkeypatch.setattr(npz, "MAX_BYTES", 100)
    assert "unpacks to" in refuse(f"npz:{path}")
    monkeypatch.undo()
    for damaged in (body[: len(body) // 2], body[:300] + b"\xff" * 50 + body[350:], b"PK", b""):
        path.write_bytes(damaged)
        assert refuse(f"npz:{path}").startswith(f"{path}: damaged or not an .npz of plain arrays: ")


def test_every_remote_is_official_and_has_a_checksum():
    for remote in (cifar.CIFAR10, cifar.CIFAR100, svhn.SVHN_TRAIN, svhn.SVHN_TEST, stl10.STL10):
        algorithm, _, digits = remote.checksum.partition(":")
        assert algorithm == "md5" and len(bytes.fromhex(digits)) == 16
        assert remote.url.split("/")[2] in ("www.cs.toronto.edu", "ufldl.stanford.edu", "ai.stanford.edu")
    assert dataclasses.replace(cifar.CIFAR10, url="http://h/x.bin").name == "x.bin"


@pytest.mark.parametrize(
    ("request_", "options", "message"),
    [("imagenet", {}, "data set 'imagenet': expected one of digits, cifar10, cifar100, svhn, stl10, folder:PATH, npz:"),
     ("folder", {}, "data set 'folder': expected one of"),
     ("npz:", {}, "data set 'npz:': expected one of"),
     ("cifar10:x", {}, "data set 'cifar10:x': expected one of"),
     ("digits", {"num_val": 3}, "--val=3: digits does not take it; these do: cifar10, cifar100, svhn, stl10, folder"),
     ("cifar10", {"num_test": 3}, "--test=3: cifar10 does not take it; these do: folder, npz"),
     ("npz:x", {"size": 3}, "--size=3: npz does not take it; these do: folder"),
     ("cifar10", {"num_val": 0}, "--val=0: must be at least 1")],
)  # fmt: skip
def test_a_request_that_no_source_answers_is_named(request_, options, message):
    assert refuse(request_, **options).startswith(message)


def test_decoders_that_start_other_programs_are_not_reached():
    assert set(folder._FORMATS) == {"BMP", "JPEG", "PNG", "PPM", "WEBP"}
