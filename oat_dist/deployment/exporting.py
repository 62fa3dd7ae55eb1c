"""Files of a trained network for programs without this package.

    safetensors   the tensors of the deployed network, under a header that names it; `oat_dist.load` reads it
    pt2           torch.export: standard ATen operators, torch alone reads it
    onnx          ONNX: onnxruntime and others read it

Graphs have inputs x [N, C, H, W] in [0, 1] and, with lambda as an input, lam [N]; their output is logits [N, K]. N is
free, image size and channels are those of the training images.

Letters: N images, C channels, K classes.
"""

import contextlib
import importlib.util
import io
import json
import logging
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from oat_dist.config import to_dict
from oat_dist.deployment.folding import fold_network
from oat_dist.deployment.lambda_input import with_lambda
from oat_dist.deployment.loading import about_export
from oat_dist.errors import UserError, require
from oat_dist.export import cut_config, cut_out
from oat_dist.runs import load_run
from oat_dist.weights import read_about, whole_file, write_tensors

FORMATS = ("safetensors", "pt2", "onnx")
_LOWEST_OPSET = 18
"""What torch.onnx has operators for; it converts no graph downwards reliably."""


def export_model(
    run: str | pathlib.Path,
    lam: float | None,
    kind: str,
    out: str | pathlib.Path | None = None,
    *,
    width: float = 1.0,
    opset: int | None = None,
) -> pathlib.Path:
    """Write a finished run's network at one lambda, or with lambda as an input, as one file.

    Args:
        run: Folder of the run.
        lam: In [0, 1], or None for an input.
        kind: One of `FORMATS`.
        out: The file; default: lam_<lambda>[_width_<width>].<kind> in the folder of the run.
        width: One of its widths.
        opset: ONNX operator set; default: torch's.

    Returns:
        The file, which appears whole or not at all.

    Raises:
        UserError: Bad input, named by its argument of launch/export.py; it is found before anything is computed.
    """
    require(kind in FORMATS, "--format", kind, f"must be one of {', '.join(FORMATS)}")
    require(lam is None or 0 <= lam <= 1, "--lam", lam, "must lie in [0, 1], or be input")
    _check_opset(kind, opset)
    if out is None:
        of_width = f"_width_{width:g}" if width != 1 else ""
        out = pathlib.Path(run, f"lam_{'input' if lam is None else f'{lam:g}'}{of_width}.{kind}")
    config, network = load_run(run)
    network.slimming.require(width, "--width")
    out = _checked_target(pathlib.Path(out), kind)
    about = read_about(pathlib.Path(run, "model.safetensors"))
    if kind != "safetensors" and "image_shape" not in about:
        raise UserError(f"--run {run}: does not say the size of its images, which a graph needs; use safetensors")
    if len(config.model.widths) > 1:
        config, network = cut_config(config, width), cut_out(network, width)
    model = with_lambda(network, key="--lam") if lam is None else fold_network(network, lam, key="--lam")
    about = about_export(network, to_dict(config), lam, about)
    try:
        write_model(model, kind, out, about, opset=opset)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from None
    return out


def write_model(model: nn.Module, kind: str, out: pathlib.Path, about: dict, *, opset: int | None = None) -> None:
    """Write a deployed network.

    Args:
        model: Of `fold_network` or `with_lambda`.
        kind: One of `FORMATS`.
        out: The file; it appears whole or not at all.
        about: What the file says of itself; of a graph, `image_shape` and `lam` are used.
        opset: ONNX operator set; default: torch's.

    Raises:
        UserError: torch cannot convert the graph to the operator set.
        OSError: The file cannot be written.
    """
    if kind == "safetensors":
        write_tensors(model.state_dict(), out, about)
        return
    write: Callable[..., bytes] = _pt2 if kind == "pt2" else _onnx
    with _quiet():
        data = write(model, about, *(() if kind == "pt2" else (opset,)))
    with whole_file(out) as temporary:
        temporary.write_bytes(data)


def traced(model: nn.Module, about: dict) -> tuple[torch.export.ExportedProgram, tuple[Tensor, ...]]:
    """The graph of a deployed network with any number of images, and the example it was traced with.

    Args:
        model: Of `fold_network` or `with_lambda`; its convolutions become channels last, the faster layout.
        about: With `image_shape`, (H, W, C), and `lam`.
    """
    model.to(memory_format=torch.channels_last)
    height, width, channels = about["image_shape"]
    dtype = next(tensor.dtype for tensor in model.state_dict().values())
    # Two images: a dimension of 1 would be taken for a constant.
    example = (torch.rand(2, channels, height, width).to(dtype),)
    if about["lam"] == "input":
        example += (torch.tensor([0.0, 1.0], dtype=dtype),)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, example, dynamic_shapes=tuple({0: batch} for _ in example))
    return program, example


def _pt2(model: nn.Module, about: dict) -> bytes:
    buffer, program = io.BytesIO(), traced(model, about)[0]
    # torch would store the example as a pickle.
    program.example_inputs = None
    torch.export.save(program, buffer, extra_files={"about.json": json.dumps(about)})
    return buffer.getvalue()


def _onnx(model: nn.Module, about: dict, opset: int | None) -> bytes:
    program, example = traced(model, about)
    names = ["x", "lam"][: len(example)]
    shapes = tuple({0: torch.export.Dim("batch", min=1)} for _ in example)
    onnx_program = torch.onnx.export(
        program, example, dynamo=True, verbose=False, opset_version=opset, input_names=names, output_names=["logits"],
        dynamic_shapes=shapes,
    )  # fmt: skip
    model_proto = onnx_program.model_proto
    made = [entry.version for entry in model_proto.opset_import if not entry.domain]
    if opset is not None and made != [opset]:
        raise UserError(f"--opset={opset}: torch {torch.__version__} could not convert the graph to it; leave it out")
    entry = model_proto.metadata_props.add()
    entry.key, entry.value = "about", json.dumps(about)
    return model_proto.SerializeToString()


def _check_opset(kind: str, opset: int | None) -> None:
    """An operator set is asked for ONNX alone and is one that exists; the packages are there."""
    require(opset is None or kind == "onnx", "--opset", opset, f"goes with --format onnx, not {kind}")
    if kind != "onnx":
        return
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx: needs {' and '.join(missing)}; install the extra: pip install -e '.[export]'")
    import onnx.defs

    newest = onnx.defs.onnx_opset_version()
    expected = f"must lie between {_LOWEST_OPSET}, torch's oldest, and {newest}, the newest of onnx {onnx.__version__}"
    require(opset is None or _LOWEST_OPSET <= opset <= newest, "--opset", opset, expected)


def _checked_target(out: pathlib.Path, kind: str) -> pathlib.Path:
    if out.suffix != f".{kind}":
        raise UserError(f"--out {out}: must end in .{kind} with --format {kind}")
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out}: exists already; name another file, or remove it")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            return out
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}; name another file") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks on its own ways; what fails still raises."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
