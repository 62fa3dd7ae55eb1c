"""Rows of a benchmark as a CSV file in benchmarks/results, as a Markdown table, and what they were measured on."""

import csv
import pathlib
import platform
import subprocess
from collections.abc import Mapping, Sequence

import torch

RESULTS = pathlib.Path(__file__).parent / "results"
DOCS = pathlib.Path(__file__).parents[1] / "docs/reproduction.md"
_BF16_FLAGS = ("avx512_bf16", "amx_bf16")


def save(rows: Sequence[Mapping[str, object]], path: pathlib.Path) -> None:
    """Write rows of equal keys and print the path.

    Args:
        rows: At least one.
        path: Target; its folder is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(path)


def kept(path: pathlib.Path, new: Sequence[Mapping[str, object]], same: Sequence[str]) -> list[dict[str, object]]:
    """Rows that an earlier command wrote and that go on beside new ones: a table can grow row by row.

    Args:
        path: A file of `save`; there need not be one.
        new: Rows that were measured now.
        same: Columns in which an old row must agree with the new ones.

    Returns:
        The old rows, numbers as numbers and empty cells as None; rows without one of the columns `same` are left out.
    """
    if not path.is_file():
        return []
    with path.open(newline="") as stream:
        rows = [{name: _parsed(cell) for name, cell in row.items()} for row in csv.DictReader(stream)]
    wanted = [_parsed(_text(new[0][name])) for name in same]
    return [row for row in rows if [row.get(name) for name in same] == wanted]


def cpu_bf16_instructions() -> str:
    """The processor's bfloat16 instruction sets, "none", or "unknown" where the system does not say."""
    try:
        words = set(pathlib.Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return "unknown"
    return " ".join(flag for flag in _BF16_FLAGS if flag in words) or "none"


def environment(device: torch.device) -> dict[str, object]:
    """Columns that say where and with what a benchmark ran.

    Args:
        device: What was measured.
    """
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else f"{_processor()} CPU",
        "threads": torch.get_num_threads(),
        "cpu_bf16": cpu_bf16_instructions(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": _git("rev-parse", "--short=12", "HEAD") or "unknown",
        # The files that benchmarks write are no change of what was measured.
        "dirty": {"": "no", None: "unknown"}.get(
            _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs"), "yes"
        ),
    }


def describe(environment: Mapping[str, object]) -> str:
    """One line under a table."""
    return ", ".join(f"{key} {value}" for key, value in environment.items())


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """A Markdown table; the first column is aligned left, the others right."""
    names = list(rows[0])
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *([_cell(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def put_into_docs(name: str, text: str, path: pathlib.Path = DOCS) -> None:
    """Replace what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` in a document.

    Args:
        name: Name of the markers.
        text: What to put there.
        path: The document.

    Raises:
        SystemExit: The document has no such markers.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    document = path.read_text()
    if begin not in document or end not in document.partition(begin)[2]:
        raise SystemExit(f"{path}: has no lines {begin} and {end}; add them where the table should stand")
    head, _, rest = document.partition(begin)
    path.write_text(f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}")
    print(path)


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _parsed(cell: str) -> object:
    for kind in (int, float):
        try:
            number = kind(cell)
        except ValueError:
            continue
        # Not the commit 12e4567.
        if str(number) == cell:
            return number
    return cell or None


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return _text(value)


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0].removesuffix(" Processor") if names else platform.machine()


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def _git(*arguments: str) -> str | None:
    """What git prints about this checkout, or None where there is no git or no checkout."""
    command = ["git", "-C", str(pathlib.Path(__file__).parents[1]), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
