"""Write one width of a slimmable run as an ordinary network: a folder that load_run and launch/evaluate.py read.

python launch/export.py --run RUN --width 0.5 [--out FOLDER]
"""

import pathlib
from collections.abc import Sequence

from launch import ArgumentParser, run_main
from oat_dist.export import export_run


def main(argv: Sequence[str]) -> None:
    """Parse, cut, write."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--run", required=True, help="folder of a finished run")
    parser.add_argument("--width", type=float, required=True, help="one of the run's model.widths")
    parser.add_argument("--out", type=pathlib.Path, help="folder to make; default: RUN/width_<width>")
    args = parser.parse_args(argv)
    print(export_run(args.run, args.width, args.out, key="--width"))


if __name__ == "__main__":
    run_main(main)
