"""Unlabelled images: every source is read to the pixel in chunks, and bad input is named."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from oat_dist.data.archives import open_member
from oat_dist.data.sources import SourceOptions
from oat_dist.data.sources.unlabelled import Wanted, open_unlabelled
from oat_dist.errors import UserError
from tests.archives import pixels, stl10_members, write_tar

SMALL = (8, 8, 3)


def read(request, shape=SMALL, *, chunk_size=2, limit=None, **options):
    """Images of a source, the sizes of its chunks, and its checksums."""
    wanted = Wanted(image_shape=shape, chunk_size=chunk_size, limit=limit)
    with open_unlabelled(request, wanted, SourceOptions(**options)) as images:
        chunks = list(images.chunks)
        assert images.count == sum(map(len, chunks))
        assert all(chunk.dtype == np.uint8 and chunk.shape[1:] == shape for chunk in chunks)
        return np.concatenate(chunks), [len(chunk) for chunk in chunks], images.sha256()


def refuse(request, shape=SMALL, **options) -> str:
    with pytest.raises(UserError) as error:
        read(request, shape, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def resized(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def test_the_unlabelled_part_of_stl10_is_read_column_by_column(tmp_path):
    members, x, _ = stl10_members()
    path = write_tar(tmp_path / "s.tar.gz", members)
    images, chunks, sha256 = read("stl10-unlabeled", (96, 96, 3), archive=path)
    assert np.array_equal(images, x[:3]) and chunks == [2, 1]
    assert sha256 == {"s.tar.gz": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert np.array_equal(read("stl10-unlabeled", (96, 96, 3), archive=path, limit=1)[0], x[:1])
    small = read("stl10-unlabeled", (32, 32, 3), archive=path, size=32)[0]
    assert np.array_equal(small, [resized(image, 32) for image in x[:3]])


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda body: body[:-1], "unlabeled_X.bin: has 82943 bytes, must have a multiple of the 27648 of an image"),
     (lambda body: b"", "unlabeled_X.bin: has 0 bytes"),
     (None, "has no member stl10_binary/unlabeled_X.bin")],
)  # fmt: skip
def test_a_damaged_unlabelled_part_is_named(tmp_path, change, message):
    members, _, _ = stl10_members()
    name = "stl10_binary/unlabeled_X.bin"
    body = members.pop(name)
    path = write_tar(tmp_path / "s.tar.gz", members | ({name: change(body)} if change else {}))
    assert message in refuse("stl10-unlabeled", (96, 96, 3), archive=path)


def test_a_member_is_read_piece_by_piece_and_the_archive_to_its_end(tmp_path):
    path = write_tar(tmp_path / "a.tar.gz", {"a": b"0123456789", "b": bytes(range(256)) * 20})
    with open_member(path, "a", limit=10, max_total_bytes=1 << 20) as (size, read_bytes):
        assert size == 10 and [read_bytes(4), read_bytes(4)] == [b"0123", b"4567"]
    whole = path.read_bytes()
    for body, message in ((whole[:-9], "not readable as a whole"), (whole[:-1], "not readable as a whole")):
        path.write_bytes(body)
        with pytest.raises(UserError, match=message), open_member(path, "a", limit=10, max_total_bytes=1 << 20) as m:
            m[1](10)
    path.write_bytes(whole)
    with (
        pytest.raises(UserError, match="at most 9 are right"),
        open_member(path, "a", limit=9, max_total_bytes=1 << 20),
    ):
        pass


def test_an_error_within_the_block_is_not_taken_for_one_of_the_archive(tmp_path):
    path = write_tar(tmp_path / "a.tar.gz", {"a": b"0123456789"})
    with pytest.raises(OSError, match="full"), open_member(path, "a", limit=10, max_total_bytes=1 << 20):
        raise OSError("full")


@pytest.fixture
def folder(tmp_path):
    """Five images, in the folder and below it; their pixels in the order of names."""
    x = pixels(5, 8)
    for name, image in zip(("a.png", "b/1.png", "b/deep/0.PNG", "c/2.bmp", "d.png"), x, strict=True):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "set/.hidden").mkdir()
    (tmp_path / "set/.hidden/x.png").write_text("")
    (tmp_path / "set/notes.txt").write_text("")
    return tmp_path / "set", x


def test_a_folder_is_read_nested_and_flat_in_the_order_of_names(folder):
    path, x = folder
    images, chunks, sha256 = read(f"folder:{path}")
    assert np.array_equal(images, x) and chunks == [2, 2, 1]
    first = read(f"folder:{path}", limit=3)
    assert np.array_equal(first[0], x[:3]) and first[2] != sha256
    assert list(sha256) == ["set/ (listing by sha256sum)"]


def test_images_of_a_folder_are_resized_when_asked_and_else_named(folder):
    path, x = folder
    Image.fromarray(pixels(1, 16)[0]).save(path / "d.png")
    assert refuse(f"folder:{path}") == (
        f"{path}/d.png: is 16x16 pixels, the network was trained on 8x8; add --size N to crop and resize all"
    )
    images = read(f"folder:{path}", size=8)[0]
    assert np.array_equal(images[:4], x[:4]) and np.array_equal(images[4], resized(pixels(1, 16)[0], 8))


def test_grey_images_get_the_channels_of_the_network_and_colours_are_not_dropped(folder):
    path, x = folder
    grey = Image.fromarray(x[1, ..., 0])
    grey.save(path / "b/1.png")
    assert np.array_equal(read(f"folder:{path}")[0][1], np.repeat(x[1, ..., :1], 3, 2))
    assert refuse(f"folder:{path}", (8, 8, 1)) == f"{path}/a.png: has 3 channels, the network takes 1"


def test_a_folder_without_images_or_with_a_damaged_one_is_named(folder, tmp_path):
    path, _ = folder
    (path / "b/1.png").write_bytes((path / "b/1.png").read_bytes()[:60])
    assert refuse(f"folder:{path}").startswith(f"{path}/b/1.png: unreadable image: ")
    (tmp_path / "empty").mkdir()
    assert refuse(f"folder:{tmp_path}/empty").startswith(f"--images folder:{tmp_path}/empty: has no images (.bmp")
    assert refuse(f"folder:{tmp_path}/no") == f"--images folder:{tmp_path}/no: there is no such folder"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("key", ["x_unlabeled", "x_train"])
def test_an_npz_is_read_in_chunks(tmp_path, save, key):
    x, path = pixels(7, 8), tmp_path / "set.npz"
    save(path, **{key: x}, other=np.arange(3))
    images, chunks, sha256 = read(f"npz:{path}", chunk_size=3)
    assert np.array_equal(images, x) and chunks == [3, 3, 1]
    assert sha256 == {"set.npz": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert np.array_equal(read(f"npz:{path}", limit=4)[0], x[:4])
    save(path, **{key: x[..., 0]})
    assert np.array_equal(read(f"npz:{path}", (8, 8, 1))[0], x[..., :1])
    assert np.array_equal(read(f"npz:{path}")[0], np.repeat(x[..., :1], 3, 3))


def test_images_of_an_npz_are_resized_like_those_of_a_folder(tmp_path):
    x = pixels(3, 16)
    np.savez(tmp_path / "set.npz", x_unlabeled=x)
    assert np.array_equal(read(f"npz:{tmp_path}/set.npz", size=8)[0], [resized(image, 8) for image in x])


@pytest.mark.parametrize(
    ("content", "message"),
    [({"y_train": np.arange(3)}, "has no x_unlabeled and no x_train"),
     ({"x_train": pixels(3, 8), "y_train": np.arange(3)}, "its x_train has labels (y_train); name the images"),
     ({"x_unlabeled": pixels(3, 8) / 255}, "x_unlabeled: must be uint8 [N, H, W, C]"),
     ({"x_unlabeled": pixels(3, 8)[0, 0]}, "x_unlabeled: must be uint8 [N, H, W, C]"),
     ({"x_unlabeled": np.zeros((0, 8, 8, 3), np.uint8)}, "x_unlabeled: must be uint8 [N, H, W, C]"),
     ({"x_unlabeled": np.asfortranarray(pixels(3, 8))}, "got uint8 [3, 8, 8, 3] in Fortran order"),
     ({"x_unlabeled": pixels(3, 9)}, "images are 9x9 pixels, the network was trained on 8x8; add --size 8 to crop"),
     ({"x_unlabeled": np.zeros((3, 8, 8, 4), np.uint8)}, "images have 4 channels, the network takes 3"),
     ({"x_unlabeled": np.array([None])}, "with values 0 to 255, in C order, got object [1]")],
)  # fmt: skip
def test_an_npz_of_anything_else_is_named(tmp_path, content, message):
    path = tmp_path / "set.npz"
    np.savez(path, **content)
    said = refuse(f"npz:{path}")
    assert said.startswith(f"{path}: ") and message in said


def test_a_missing_or_damaged_npz_is_named(tmp_path):
    path = tmp_path / "set.npz"
    assert refuse(f"npz:{path}") == f"npz:{path}: there is no such file"
    np.savez_compressed(path, x_unlabeled=pixels(20, 8))
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)
    for limit in (None, 1):
        assert refuse(f"npz:{path}", limit=limit).startswith(f"{path}: damaged or not an .npz of plain arrays: ")


@pytest.mark.parametrize(
    ("request_", "options", "message"),
    [("imagenet", {}, "--images imagenet: expected one of stl10-unlabeled, folder:PATH, npz:FILE"),
     ("stl10-unlabeled:x", {}, "--images stl10-unlabeled:x: expected one of"),
     ("folder", {}, "--images folder: expected one of"),
     ("npz:", {}, "--images npz:: expected one of"),
     ("npz:x", {"archive": "a"}, "--source=a: --images npz:x does not take it; stl10-unlabeled does"),
     ("npz:x", {"size": 9}, "--size=9: must be that of the network's training images, 8x8"),
     ("stl10-unlabeled", {}, "--images stl10-unlabeled: images are 96x96 pixels, the network was trained on 8x8; add")],
)  # fmt: skip
def test_a_request_that_cannot_be_answered_is_named(request_, options, message):
    assert refuse(request_, **options).startswith(message)
