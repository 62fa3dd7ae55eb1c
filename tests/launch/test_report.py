"""launch/report.py as a user starts it: what it writes, what it refuses, and that it costs training nothing."""

import json
import pathlib
import shutil
import sys

import pytest
import torch

from launch import report, run_main, train


def start(args, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, args)])
    try:
        run_main(report.main)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def run(shown_runs, tmp_path) -> pathlib.Path:
    """A copy of a run, to be damaged."""
    return shutil.copytree(shown_runs[0], tmp_path / "runs/first")


def refusal(args, monkeypatch, capsys) -> str:
    """The one line of a command that fails before anything is computed."""
    monkeypatch.setattr(torch.nn.Module, "__call__", None)
    assert start(args, monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_page_of_one_run_goes_into_its_folder_and_its_path_is_printed(run, monkeypatch, capsys):
    before = {path.name for path in run.iterdir()}
    assert start([run, "--images", "2"], monkeypatch) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert {path.name for path in run.iterdir()} == before | {"report.html"}
    assert (run / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("name", "message"),
    [("config.yaml", "not a run (no config.yaml); name a folder that training made"),
     ("frontier.json", "incomplete, has no frontier.json; its training did not finish"),
     ("model.safetensors", "incomplete, has no model.safetensors; its training did not finish"),
     ("metrics.jsonl", "incomplete, has no metrics.jsonl; its training did not finish")],
)  # fmt: skip
def test_an_incomplete_run_costs_one_line_and_leaves_nothing(run, name, message, tmp_path, monkeypatch, capsys):
    (run / name).unlink()
    line = refusal([run, "--out", tmp_path / "page.html"], monkeypatch, capsys)
    assert line == f"error: {run}: {message}"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("frontier.json", "{", "damaged, not JSON"),
     ("frontier.json", '{"points": []}', "damaged, expected points and attack, dataset, model, num_examples, split"),
     ("metrics.jsonl", '{"step": 1}\n{"st', "damaged, a line is not JSON"),
     ("eval/other.json", "[]", "damaged, expected an object")],
)  # fmt: skip
def test_a_damaged_file_is_named(run, name, content, message, tmp_path, monkeypatch, capsys):
    (run / name).write_text(content)
    assert refusal([run, "--out", tmp_path / "page.html"], monkeypatch, capsys) == f"error: {run / name}: {message}"


def test_images_that_are_not_those_of_the_run_are_refused(run, tmp_path, monkeypatch, capsys):
    provenance = json.loads((run / "provenance.json").read_text())
    provenance["data"]["sha256"]["test.safetensors"] = "0" * 64
    (run / "provenance.json").write_text(json.dumps(provenance))
    assert "its test.safetensors is not the one in" in refusal([run], monkeypatch, capsys)
    assert "no prepared data set" in refusal([run, "--data-root", tmp_path], monkeypatch, capsys)
    assert not (run / "report.html").exists()


def test_an_output_that_cannot_be_written_is_found_before_the_runs_are_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    for out, message in (
        (tmp_path, "a folder; name a file"),
        (tmp_path / "nowhere/page.html", "cannot be written: No such file or directory"),
        (tmp_path / "file/page.html", "cannot be written: Not a directory"),
    ):
        assert refusal(["no-run", "--out", out], monkeypatch, capsys) == f"error: --out {out}: {message}"
    assert refusal(["a", "b"], monkeypatch, capsys) == "error: --out=None: must be given for several runs"
    assert refusal(["a", "--images", "0"], monkeypatch, capsys) == "error: --images=0: must be at least 1"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_page_that_cannot_be_made_does_not_make_training_fail(run, capsys):
    (run / "provenance.json").write_text("{")
    train.show(run)
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert said.out == "" and line.startswith(f"{run / 'report.html'}: not written ({run / 'provenance.json'}: damaged")
