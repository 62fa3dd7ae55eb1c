"""The architecture: who may import what."""

import ast
import pathlib
import subprocess
import sys

import pytest

import kernels

ROOT = pathlib.Path(__file__).parent.parent
FLOORS = {"kernels": 0, "oat_dist": 1, "launch": 2, "tune": 2}
OWNERS = {
    "deepspeed": "oat_dist/engine.py",
    "ffcv": "oat_dist/data/ffcv_io.py",
    "jsonargparse": "oat_dist/config_io.py",
    "ray": "tune/cluster.py",
    "optuna": "tune/tpe.py",
    "wandb": "oat_dist/boards.py",
    "pyautoattack": "oat_dist/evaluation/autoattack.py",
    "onnx": "oat_dist/deployment/exporting.py",
}
SOURCES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))


def imported(path: pathlib.Path) -> set[str]:
    """Top-level packages that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_floor_imports_no_higher_floor_and_a_package_only_by_its_owner(path):
    name = str(path.relative_to(ROOT))
    floor = FLOORS[name.partition("/")[0]]
    for package in imported(path):
        assert FLOORS.get(package, -1) <= floor, f"{name} imports {package} of a higher floor"
        if package in OWNERS:
            assert OWNERS[package] == name, f"{name} imports {package}; only {OWNERS[package]} may"


def test_preparing_data_training_and_their_page_need_no_package_of_search_autoattack_or_ffcv():
    missing = ("ray", "optuna", "pyautoattack", "ffcv", "wandb", "foolbox")
    program = f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
    program += "import launch.prepare_data, launch.train, oat_dist.engine, oat_dist.trainer, oat_dist.page"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_lowest_floor_imports_only_torch_triton_and_itself():
    allowed = {"kernels", "torch", "triton", *sys.stdlib_module_names}
    for path in (ROOT / "kernels").rglob("*.py"):
        assert imported(path) <= allowed, path


def test_the_configuration_needs_the_standard_library_alone():
    allowed = {"oat_dist", "dataclasses", "hashlib", "itertools", "json", "math", "typing"}
    for name in ("config", "settings", "running_settings", "errors"):
        assert imported(ROOT / f"oat_dist/{name}.py") <= allowed, name


def test_the_kernels_that_are_imported_are_ours():
    assert pathlib.Path(kernels.__file__).parent == ROOT / "kernels"


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.name != "__init__.py"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_every_file_stays_small_enough_to_read(path):
    assert len(path.read_text().splitlines()) <= 400
