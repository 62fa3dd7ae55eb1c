"""The preparation script as a user starts it."""

import pytest

from launch import prepare_data, run_main
from oat_dist.data import open_prepared
from oat_dist.data.sources import cifar
from tests.archives import cifar10_members, write_tar


def start(args, monkeypatch) -> int:
    monkeypatch.setattr("sys.argv", ["prepare_data.py", *map(str, args)])
    try:
        run_main(prepare_data.main)
    except SystemExit as stop:
        return stop.code
    return 0


def test_an_official_archive_becomes_a_data_set_with_one_command(tmp_path, monkeypatch, capsys):
    path = write_tar(tmp_path / "c.tar.gz", cifar10_members()[0])
    args = ["cifar10", "--out", tmp_path / "out", "--source", path, "--val", 20, "--name", "tiny"]
    assert start(args, monkeypatch) == 0
    said = capsys.readouterr()
    assert f"{tmp_path}/out/tiny: 32x32x3, 10 classes, 80 train, 20 val, 20 test" in said.out
    assert said.err.startswith(f"note: {path} is not the official cifar-10-binary.tar.gz (md5 ")
    data = open_prepared(str(tmp_path / "out"), "tiny")
    assert data.command == (
        f"python launch/prepare_data.py cifar10 --name tiny --source {path} --val 20 --out {tmp_path}/out"
    )
    assert (data.shift_pixels, data.flip) == (4, True)


def test_a_failed_download_costs_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    url = "http://127.0.0.1:1/cifar-10-binary.tar.gz"
    monkeypatch.setattr(cifar, "CIFAR10", cifar.Remote(url=url, checksum=cifar.CIFAR10.checksum))
    assert start(["cifar10", "--out", tmp_path / "out"], monkeypatch) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {url} -> {tmp_path}/out/archives/cifar-10-binary.tar.gz: download failed")
    assert errors[0].endswith("--source ARCHIVE")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("args", "message"),
    [(["imagenet"], "data set 'imagenet': expected one of digits, cifar10, "),
     (["folder:nowhere"], "folder:nowhere: there is no nowhere"),
     (["digits", "--val", "5"], "--val=5: digits does not take it"),
     (["digits", "--val", "five"], "argument --val: invalid int value: 'five'"),
     (["digits", "--name", "a/b"], "--name='a/b': must be letters"),
     (["cifar10", "--source", "nothing.tar.gz"], "--source nothing.tar.gz: there is no such file")],
)  # fmt: skip
def test_a_mistake_costs_one_line_and_writes_nothing(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert start(args, monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
