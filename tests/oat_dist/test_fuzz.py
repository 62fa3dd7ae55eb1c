"""Whatever stands in a file or on the command line, it is a configuration, a data set, a checkpoint - or one error."""

import contextlib
import json
import os
import pathlib
import string
import subprocess

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oat_dist.checkpoint import CheckpointStore
from oat_dist.config import Config, to_dict
from oat_dist.config_io import load_config
from oat_dist.data import open_prepared, prepare
from oat_dist.errors import UserError
from oat_dist.guard import read_collapse
from oat_dist.runs import create_run, load_run
from oat_dist.weights import read_tensors

SETTINGS = to_dict(Config())
SECTIONS = sorted(key for key, value in SETTINGS.items() if isinstance(value, dict))
KEYS = [*sorted(f"{s}.{key}" for s in SECTIONS for key in SETTINGS[s]), "name", "seed", "output_dir"]
fuzz = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "60")), deadline=5000, derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from(["1e309", "-0", "${oc.env:HOME}", "!!python/object/apply:os.system [id]", "../../x", "\x00", "a\nb",
                     "*a", "[", "{", "0x10", "1_000", "nan", "~", "2001-01-01"]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to be in; nothing may appear beside `input`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input").mkdir()
    yield tmp_path / "input"
    assert [path.name for path in tmp_path.iterdir()] == ["input"], "something was written"


def require_config_or_error(argv: list[str]) -> None:
    try:
        assert isinstance(load_config(argv), Config)
    except UserError as error:
        message = str(error)
        assert message and len(message.splitlines()) == 1, message


@fuzz
@given(st.dictionaries(st.sampled_from(KEYS), values, min_size=1, max_size=4))
def test_any_value_of_any_setting_in_a_file_is_taken_or_refused_in_one_line(place, chosen):
    tree: dict = {}
    for key, value in chosen.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    path = place / "config.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    require_config_or_error(["--config", str(path)])


@fuzz
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode(errors="replace"))))
def test_any_bytes_as_a_configuration_file_are_refused_in_one_line_or_taken(place, content):
    (place / "config.yaml").write_bytes(content)
    require_config_or_error(["--config", str(place / "config.yaml")])


@pytest.mark.parametrize(
    "content",
    ["&a [*a]", "optim: &a {lr: *a}", "? [a, b]\n: 1", "a: !!python/object/apply:os.mkdir [owned]", "--- 1\n--- 2",
     "conditioning: {lambdas: &a [0, *a]}", "optim:\n  <<: {lr: 1}", "[" * 3000, "loss: {settings: {1: 2}}",
     "conditioning: {lambdas: [[0], [1]]}", "loss: {settings: {beta: [1]}}", "data: {extra_share: .nan}"],
)  # fmt: skip
def test_a_configuration_file_made_to_confuse_is_refused_in_one_line_or_taken(place, content):
    (place / "config.yaml").write_text(content)
    require_config_or_error(["--config", str(place / "config.yaml")])


printable = st.text(string.printable, max_size=15)


@fuzz
@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(KEYS), scalars).map(lambda pair: f"--{pair[0]}={pair[1]}"),
            st.tuples(st.sampled_from(SECTIONS), printable).map(lambda pair: f"--{pair[0]}={pair[1]}"),
            printable.filter(lambda text: text not in ("--help", "-h") and not text.startswith("--print")),
        ),
        max_size=4,
    )
)
def test_any_command_line_is_taken_or_refused_in_one_line(place, argv):
    require_config_or_error([argument.replace("\x00", "0") for argument in argv])


@pytest.fixture(scope="module")
def good(digits, tmp_path_factory):
    """The files a user may hand over or a disk may damage: path -> content."""
    root = tmp_path_factory.mktemp("good")
    arrays = {f"x_{split}": np.zeros((4, 2, 2, 1), np.uint8) for split in ("train", "val", "test")}
    arrays |= {f"y_{split}": np.array([0, 1, 0, 1]) for split in ("train", "val", "test")}
    np.savez(root / "tiny.npz", **arrays)
    prepare(str(root), f"npz:{root / 'tiny.npz'}")
    run = create_run(Config(output_dir=str(root)), digits, {}, 1)
    run.rename(root / "run")
    store = CheckpointStore(root / "run/checkpoints", keep=2)
    for step in (1, 2):
        store.save({"step": step, "log": {}}, {"network": {"weight": torch.ones(3)}})
        store.wait()
    (root / "run/guard.json").write_text(json.dumps({
        "epoch": 1, "step": 2, "ra_before": 0.5, "ra_after": 0.0, "restored_step": 1, "action": "stop"}))  # fmt: skip
    safetensors.torch.save_file({"a": torch.ones(2)}, root / "run/model.safetensors")
    return root


READERS = {
    "tiny/dataset.json": lambda root: open_prepared(str(root), "tiny").file("train", "memory"),
    "tiny/train.safetensors": lambda root: open_prepared(str(root), "tiny").file("train", "memory"),
    "tiny/train.beton": lambda root: open_prepared(str(root), "tiny").file("train", "ffcv"),
    "run/config.yaml": lambda root: load_run(root / "run"),
    "run/model.safetensors": lambda root: read_tensors(root / "run/model.safetensors"),
    "run/guard.json": lambda root: read_collapse(root / "run"),
    "run/checkpoints/step_00000002/state.json": lambda root: CheckpointStore(root / "run/checkpoints", keep=2).newest(),
}


@settings(fuzz, max_examples=25)
@given(st.data())
@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore:.*damaged")
def test_a_damaged_file_is_refused_in_one_line_and_never_taken_for_something_else(good, name, data):
    path = good / name
    if not path.is_file():
        pytest.skip("prepared without FFCV, there is no .beton to damage")
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1), label="at")
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "other"]), label="kind")
    changed = {
        "flip": lambda: content[:at] + bytes([content[at] ^ (1 << data.draw(st.integers(0, 7)))]) + content[at + 1 :],
        "cut": lambda: content[:at],
        "insert": lambda: content[:at] + data.draw(st.binary(min_size=1, max_size=5)) + content[at:],
        "other": lambda: data.draw(st.binary(max_size=50)),
    }[kind]()
    path.write_bytes(changed)
    try:
        result = READERS[name](good)
        if name.startswith("tiny/train"):
            raise AssertionError("images that are not those that were prepared were taken")
        if "checkpoints" in name and result.step != 1:
            assert json.loads(changed) == json.loads(content), "a damaged checkpoint was taken"
    except UserError as error:
        assert len(str(error).splitlines()) == 1, error
    finally:
        path.write_bytes(content)


def test_secrets_of_the_environment_are_in_no_file_of_a_run(digits, tmp_path, monkeypatch):
    secret = "s3cr3t-0f-the-environment"
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_TOKEN"):
        monkeypatch.setenv(name, secret)
    run = create_run(Config(output_dir=str(tmp_path)), digits, {}, 1)
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) >= 3 and not any(secret in path.read_text() for path in files)


@contextlib.contextmanager
def disk(folder: pathlib.Path, *options: str):
    """A small disk at a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(("size=1m", *options)), "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a disk")
@pytest.mark.parametrize(("fault", "reason"), [("full", "No space left on device"), ("read-only", "Read-only")])
def test_a_disk_that_fails_under_a_checkpoint_leaves_the_one_before_valid(tmp_path, fault, reason):
    with disk(tmp_path / "checkpoints") as folder:
        store = CheckpointStore(folder, keep=2)
        store.save({"step": 1}, {"network": {"weight": torch.ones(50_000)}})
        store.wait()
        if fault == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        size = 250_000 if fault == "full" else 1
        store.save({"step": 2}, {"network": {"weight": torch.ones(size)}})
        with pytest.raises(UserError, match=f"cannot write a checkpoint: {reason}.*; older ones are kept"):
            store.wait()
        assert store.newest().step == 1
        assert store.newest().tensors("network")["weight"].sum() == 50_000
        assert [path.name for path in folder.iterdir()] == ["step_00000001"]
