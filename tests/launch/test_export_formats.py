"""Exported files hold standard operators, load in a process that cannot import this package, and answer alike."""

import json
import pathlib
import subprocess
import sys
import zipfile

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import oat_dist
from launch import export, run_main
from oat_dist.deployment import exporting, load
from tests.oat_dist.test_deployment import KINDS, LAMBDAS, assert_close, build, images, make, make_run

CASES = [
    ("resnet8", "knots", "0.3", "pt2"),
    ("resnet8", "knots", "input", "pt2"),
    ("wrn10_2", "fourier", "0.3", "onnx"),
    ("wrn10_2", "fourier", "input", "onnx"),
]
"""Network, conditioning, --lam and --format: in each format a network folded and one with lambda as an input."""

FOREIGN = """
import sys
for name in ("oat_dist", "kernels", "launch", "triton", "deepspeed"):
    sys.modules[name] = None
sys.path[:] = [path for path in sys.path if path not in sys.argv[2:]]
import numpy as np, torch
torch.set_num_threads(1)
arrays = dict(np.load(sys.argv[1] + "/given.npz"))
answers = {}
for name in str(arrays.pop("names")).split():
    for num in (1, 7):
        feeds = {"x": arrays["x"][:num]} | ({"lam": arrays["lam"][:num]} if "input" in name else {})
        if name.endswith("pt2"):
            program = torch.export.load(f"{sys.argv[1]}/{name}")
            answer = program.module()(*map(torch.from_numpy, feeds.values())).detach().numpy()
        else:
            import onnxruntime
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            session = onnxruntime.InferenceSession(f"{sys.argv[1]}/{name}", options, ["CPUExecutionProvider"])
            assert [i.name for i in session.get_inputs()] == list(feeds)
            (answer,) = session.run(["logits"], feeds)
        answers[f"{name} {num}"] = answer
assert not [m for m in sys.modules if m.partition(".")[0] in ("oat_dist", "kernels") and sys.modules[m]]
np.savez(sys.argv[1] + "/answers.npz", **answers)
"""


def name_of(network, lam, kind):
    return f"{network}_{lam}.{kind}"


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """A finished run of each network, moved from its start."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: make_run(digits, folder, make(name, conditioning=KINDS[kind], widths=widths))
        for name, kind, widths in (("resnet8", "knots", (0.5, 1.0)), ("wrn10_2", "fourier", (1.0,)))
    }


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """Folder of the files of all cases, written by the script."""
    folder = tmp_path_factory.mktemp("exported")
    for network, _, lam, kind in CASES:
        out = folder / name_of(network, lam, kind)
        export.main(["--run", str(runs[network]), "--lam", lam, "--format", kind, "--out", str(out)])
    return folder


def test_graphs_load_and_agree_in_a_process_without_this_package(runs, exported):
    x = images(7, torch.float32, channels=1)
    names = [name_of(network, lam, kind) for network, _, lam, kind in CASES]
    lam_N = torch.tensor(LAMBDAS)
    np.savez(exported / "given.npz", x=x.numpy(), lam=lam_N.numpy(), names=" ".join(names))
    ours = ["", str(pathlib.Path(exporting.__file__).parents[2])]
    command = [sys.executable, "-c", FOREIGN, str(exported), *ours]
    done = subprocess.run(command, capture_output=True, text=True, cwd=exported)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = np.load(exported / "answers.npz")
    for network, _, lam, kind in CASES:
        conditional = oat_dist.load_run(runs[network])[1]
        wanted = conditional.predict(x, lam_N.double() if lam == "input" else float(lam))
        for num in (1, 7):
            found = torch.from_numpy(answers[f"{name_of(network, lam, kind)} {num}"])
            assert found.shape == (num, 10)
            assert_close(found, wanted[:num])


@pytest.mark.parametrize("name", [name_of(network, lam, "pt2") for network, _, lam, kind in CASES if kind == "pt2"])
def test_a_pt2_archive_holds_aten_operators_alone_and_nothing_pickled(exported, name):
    extra = {"about.json": ""}
    program = torch.export.load(exported / name, extra_files=extra)
    for node in program.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            assert node.target.namespace == "aten", node.target
        else:
            assert node.op in ("placeholder", "output") or node.target.__name__ == "getitem", node.target
    with zipfile.ZipFile(exported / name) as archive:
        assert not archive.read(next(path for path in archive.namelist() if "sample_inputs" in path))
        configs = [json.loads(archive.read(path)) for path in archive.namelist() if path.endswith("_config.json")]
        assert not [entry for config in configs for entry in config["config"].values() if entry["use_pickle"]]
    assert json.loads(extra["about.json"])["architecture"] == name.rpartition("_")[0]


@pytest.mark.parametrize("name", [name_of(network, lam, "onnx") for network, _, lam, kind in CASES if kind == "onnx"])
def test_an_onnx_graph_holds_standard_operators_alone_and_any_number_of_images(exported, name):
    model = onnx.load(exported / name)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"} and not model.functions
    assert [entry.domain for entry in model.opset_import] == [""]
    for value in model.graph.input:
        assert value.type.tensor_type.shape.dim[0].dim_param
    about = {entry.key: entry.value for entry in model.metadata_props}["about"]
    assert json.loads(about)["format"] == "oat-dist-deployed/1"


def test_graphs_of_float64_agree_to_eleven_digits(tmp_path):
    """onnxruntime has no float64 convolution; the reference evaluator of onnx has."""
    network, x, lam = build(make("resnet8")), images(3), torch.tensor([0, 0.3, 0.05], dtype=torch.float64)
    about = {"lam": "input", "image_shape": (8, 8, 3), "classes": list("abcde")}
    model = oat_dist.deployment.with_lambda(network)
    exporting.write_model(model, "onnx", tmp_path / "m.onnx", about)
    wanted = network.predict(x, lam)
    assert_close(exporting.traced(model, about)[0].module()(x, lam), wanted)
    (found,) = ReferenceEvaluator(onnx.load(tmp_path / "m.onnx")).run(None, {"x": x.numpy(), "lam": lam.numpy()})
    assert_close(torch.from_numpy(found), wanted)


def test_a_width_is_exported_by_lambda_and_its_file_is_loaded(runs, capsys):
    export.main(["--run", str(runs["resnet8"]), "--lam", "0.3", "--width", "0.5"])
    path = runs["resnet8"] / "lam_0.3_width_0.5.safetensors"
    assert capsys.readouterr().out.strip() == str(path)
    x = images(3, torch.float32, channels=1)
    assert_close(load(path)(x, 0.3), oat_dist.load_run(runs["resnet8"])[1].predict(x, 0.3, width=0.5))
    path.unlink()


def test_bad_input_is_one_line_exit_code_2_and_no_file(runs, tmp_path, monkeypatch, capsys):
    run, empty = str(runs["resnet8"]), tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "there.onnx").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = sorted([*tmp_path.rglob("*"), *runs["resnet8"].rglob("*")])
    out = f"--out={tmp_path}/new.pt2"
    for argv, message in (
        ([run, "--lam=1.5"], r"--lam=1.5: must lie in [0, 1], or be input"),
        ([run, "--lam=nan"], r"--lam=nan: must lie in [0, 1], or be input"),
        ([run, "--lam=much"], "--lam=much: must be a number in [0, 1], or input"),
        ([run, "--lam=0.3", "--format=onnx", "--opset=99"], "--opset=99: must lie between 18, torch's oldest, and"),
        ([run, "--lam=0.3", "--format=onnx", "--opset=3"], "--opset=3: must lie between 18"),
        ([run, "--lam=0.3", "--format=pt2", "--opset=20"], "--opset=20: goes with --format onnx, not pt2"),
        ([run, "--lam=0.3", "--format=onnx", out], "new.pt2: must end in .onnx with --format onnx"),
        ([run, "--lam=0.3", "--format=onnx", f"--out={tmp_path}/there.onnx"], "there.onnx: exists already"),
        ([run, "--lam=0.3", "--format=pt2", f"--out={tmp_path}/no/new.pt2"], "there is no folder"),
        ([run, "--lam=0.3", "--format=pt2", f"--out={tmp_path}/file/new.pt2"], "there is no folder"),
        ([run, "--lam=0.3", "--format=pt2", "--out=/proc/new.pt2"], "--out /proc/new.pt2: cannot be written: "),
        ([run, "--lam=0.3", "--format=jpeg"], "argument --format: invalid choice"),
        ([run, "--lam=0.3", "--width=0.7"], "--width=0.7: was not trained"),
        ([run, "--format=pt2"], "--format=pt2: needs --lam"),
        ([run], "--lam, --width: give a lambda to export at"),
        ([str(empty), "--lam=0.3"], "not a run (no config.yaml)"),
    ):
        monkeypatch.setattr(sys, "argv", ["export.py", "--run", *argv])
        with pytest.raises(SystemExit) as ended:
            run_main(export.main)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.count("\n") == 1 and message in error, error
    assert sorted([*tmp_path.rglob("*"), *runs["resnet8"].rglob("*")]) == before


def test_a_disk_that_gives_up_leaves_nothing_behind(runs, tmp_path, monkeypatch):
    def full(path, data):
        with path.open("wb") as stream:
            stream.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting.pathlib.Path, "write_bytes", full)
    for kind in ("safetensors", "pt2"):
        with pytest.raises(oat_dist.UserError, match=rf"--out .*new.{kind}: cannot be written: No space left"):
            exporting.export_model(runs["resnet8"], 0.3, kind, tmp_path / f"new.{kind}")
    assert not list(tmp_path.iterdir())
