"""Write a data set in the formats of the loaders: one file per split and format, and dataset.json.

python launch/prepare_data.py digits --root data
"""

from collections.abc import Sequence

from launch import ArgumentParser, run_main
from oat_dist.data import prepare
from oat_dist.data.sources import SOURCES


def main(argv: Sequence[str]) -> None:
    """Parse, prepare, say where."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("dataset", choices=sorted(SOURCES))
    parser.add_argument("--root", default="data", help="folder of the prepared data sets (data.root)")
    args = parser.parse_args(argv)
    data = prepare(args.root, args.dataset)
    counts = ", ".join(f"{count} {split}" for split, count in data.counts.items())
    print(f"{data.folder}: {counts}; {', '.join(sorted(data.sha256))}")


if __name__ == "__main__":
    run_main(main)
