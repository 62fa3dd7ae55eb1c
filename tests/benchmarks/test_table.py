"""Tables of benchmarks, and what they are measured with."""

import csv

import measuring
import pytest
import table
import torch
import train_step

CPU = torch.device("cpu")


def test_a_table_stands_between_its_markers_and_can_be_replaced(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- begin one -->\n<!-- end one -->\nafter <!-- begin two -->x<!-- end two -->\n")
    for text in ("first", "second"):
        table.put_into_docs("one", text, path)
    expected = "before\n<!-- begin one -->\nsecond\n<!-- end one -->\nafter <!-- begin two -->x<!-- end two -->\n"
    assert path.read_text() == expected


def test_a_document_without_the_markers_is_left_alone_and_named(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("<!-- end one --> <!-- begin one -->")
    with pytest.raises(SystemExit, match=r"page\.md: has no lines <!-- begin one -->"):
        table.put_into_docs("one", "text", path)
    assert path.read_text() == "<!-- end one --> <!-- begin one -->"


def test_markdown_shows_numbers_shortly_and_missing_ones_as_nothing():
    text = table.markdown([{"a": "x", "b": 1234.56, "c": 0.12345}, {"a": "y", "b": None, "c": 7}])
    assert text.splitlines() == [
        "| a | b | c |", "| --- | ---: | ---: |", "| x | 1,235 | 0.123 |", "| y |  | 7 |",
    ]  # fmt: skip


def test_results_say_what_they_were_measured_with(tmp_path):
    conditions = table.environment(CPU)
    table.save([{"value": 1} | conditions], tmp_path / "new/x.csv")
    (row,) = csv.DictReader((tmp_path / "new/x.csv").open(newline=""))
    assert set(row) == {"value", "device", "threads", "cpu_bf16", "torch", "triton", "commit", "dirty"}
    assert row["torch"] == torch.__version__ and all(row.values())


def test_a_stopwatch_adds_up_phases_and_leaves_out_what_lies_between_steps(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr("oat_dist.stopwatch.time.perf_counter", lambda: next(times))
    clock = measuring.Stopwatch(CPU)
    clock.start()
    clock.mark("attack")
    clock.mark("backward")
    clock.start()
    clock.mark("attack")
    assert clock.read_ms() == {"attack": 5000.0, "backward": 2000.0}
    assert clock.read_ms() == {}


def test_runs_take_turns():
    order = []
    seconds = measuring.in_turns({n: lambda n=n: order.append(n) or float(len(order)) for n in "ab"}, 2)
    assert order == ["a", "b", "a", "b"] and seconds == {"a": [1.0, 3.0], "b": [2.0, 4.0]}
    assert measuring.ratios(seconds["b"], seconds["a"]) == [2.0, 4.0 / 3.0]


def test_peak_memory_counts_what_was_given_back_but_nothing_before_the_restart():
    memory = measuring.PeakMemory(CPU)
    block = torch.ones(128 * 2**20 // 4)
    del block
    before = memory.read_mib()["peak_mib"]
    memory.restart()
    after = memory.read_mib()["peak_mib"]
    assert before > 120 and after < 40


def test_a_failed_child_is_named_with_what_it_said():
    with pytest.raises(RuntimeError, match=r"train_step\.py --model=nothing: exit 2\n(?s:.*)invalid choice"):
        measuring.last_line_of("train_step.py", ["--model=nothing"])


def test_the_documents_have_a_place_for_every_table():
    text = table.DOCS.read_text()
    names = [f"train_step {model}" for model in train_step.SHAPES]
    for name in [*names, "batch_size wrn10_2", "film_dual_bn"]:
        assert text.count(f"<!-- begin {name} -->") == text.count(f"<!-- end {name} -->") == 1, name
