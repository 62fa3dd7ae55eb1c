"""Every kernel compiles for a GPU as its launcher asks: no spills, 16-byte loads and stores. Needs no GPU.

A sample in a process of its own, because here Triton is the interpreter; `python benchmarks/kernel_resources.py` has
all sites, dtypes and targets.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
ELEMENTWISE = {"_apply_kernel", "_modulate_kernel", "_modulate_grad_kernel", "_input_grad_kernel"}
REDUCTIONS = {"_stats_kernel", "_reduce_grads_kernel"}
SMALL = {"_merge_stats_kernel", "_merge_grads_kernel", "_update_running_kernel"}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kernel_resources.py", "--few"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_kernel_is_compiled(rows):
    assert {row["kernel"] for row in rows} == ELEMENTWISE | REDUCTIONS | SMALL


def test_no_kernel_spills_registers_or_uses_a_stack(rows):
    assert [row for row in rows if row["stack_bytes"]] == []


def test_images_are_loaded_and_stored_16_bytes_at_a_time(rows):
    for row in rows:
        if row["kernel"] in ELEMENTWISE | REDUCTIONS:
            assert row["load_bytes"] == 16, row
        if row["kernel"] in ELEMENTWISE:
            assert row["store_bytes"] == 16, row
            # Images are the only bfloat16 tensors, so nothing of them is moved value by value.
            assert row["narrow_half"] == 0, row


def test_enough_programs_fit_a_processor_to_keep_memory_busy(rows):
    registers_per_processor, threads = 65536, 128
    for row in rows:
        if row["kernel"] in ELEMENTWISE | REDUCTIONS:
            # Statistics keep five tiles under way by themselves and run two programs to a processor.
            least = 2 if row["kernel"] == "_stats_kernel" else 4
            assert registers_per_processor // (threads * row["registers"]) >= least, row
