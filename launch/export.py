"""Write a finished run's network for use elsewhere: at one lambda, with lambda as an input, or one width as a run.

python launch/export.py --run RUN --lam 0.3 [--format safetensors|pt2|onnx] [--width 0.5] [--out FILE]
python launch/export.py --run RUN --lam input --format onnx [--opset 20]
python launch/export.py --run RUN --width 0.5 [--out FOLDER]      a folder that load_run and launch/evaluate.py read
"""

import pathlib
from collections.abc import Sequence

from launch import ArgumentParser, run_main
from oat_dist.deployment import FORMATS, export_model
from oat_dist.errors import UserError
from oat_dist.export import export_run


def main(argv: Sequence[str]) -> None:
    """Parse, fold or cut, write."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--run", required=True, help="folder of a finished run")
    parser.add_argument("--lam", help="lambda in [0, 1] to fold in, or input: one lambda per image as a second input")
    parser.add_argument("--format", choices=FORMATS, help="with --lam; default: safetensors")
    parser.add_argument("--opset", type=int, help="ONNX operator set; default: torch's")
    parser.add_argument("--width", type=float, help="one of the run's model.widths; with --lam default 1")
    parser.add_argument("--out", type=pathlib.Path, help="file (with --lam) or folder to make; default: in RUN")
    args = parser.parse_args(argv)
    if args.lam is None:
        for name in ("format", "opset"):
            if (value := getattr(args, name)) is not None:
                raise UserError(f"--{name}={value}: needs --lam, a lambda in [0, 1] or input")
        if args.width is None:
            raise UserError("--lam, --width: give a lambda to export at (or input), a width to cut out, or both")
        print(export_run(args.run, args.width, args.out, key="--width"))
        return
    width = 1.0 if args.width is None else args.width
    kind = args.format or FORMATS[0]
    print(export_model(args.run, _lam(args.lam), kind, args.out, width=width, opset=args.opset))


def _lam(text: str) -> float | None:
    """A lambda, or None for `input`."""
    try:
        return None if text == "input" else float(text)
    except ValueError:
        raise UserError(f"--lam={text}: must be a number in [0, 1], or input") from None


if __name__ == "__main__":
    run_main(main)
