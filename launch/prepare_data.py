"""Write a data set in the formats of the loaders: one file per split and format, and dataset.json.

python launch/prepare_data.py digits --out data
python launch/prepare_data.py cifar10 --out data [--source cifar-10-binary.tar.gz]
python launch/prepare_data.py folder:PATH --name mine --size 32
"""

import pathlib
from collections.abc import Sequence

from launch import ArgumentParser, run_main
from oat_dist.data import prepare
from oat_dist.data.sources import NAMES, SourceOptions


def main(argv: Sequence[str]) -> None:
    """Parse, prepare, say where."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("dataset", help=f"one of {', '.join(NAMES)}; what comes from the network is checked by its official checksum")
    add("--out", default="data", help="folder of the prepared data sets (data.root)")
    add("--source", type=pathlib.Path, help="your copy of the official archive (svhn: a folder with both .mat files)")
    add("--name", help="name of the data set (data.dataset); default: that of the source, or of the file or folder")
    add("--val", type=int, help="training images to hold out for validation; default: 5000, STL-10 500, others a tenth")
    add("--test", type=int, help="last training images to move to the test split (folder, npz)")
    add("--size", type=int, help="crop the middle square of each image and resize it to this many pixels (folder)")
    add("--cache", type=pathlib.Path, help="folder of downloaded archives; default: OUT/archives")
    args = parser.parse_args(argv)
    options = SourceOptions(
        archive=args.source,
        cache=args.cache or pathlib.Path(args.out) / "archives",
        num_val=args.val,
        num_test=args.test,
        size=args.size,
    )
    data = prepare(args.out, args.dataset, name=args.name, options=options)
    counts = ", ".join(f"{count} {split}" for split, count in data.counts.items())
    shape = "x".join(map(str, data.image_shape))
    print(f"{data.folder}: {shape}, {len(data.classes)} classes, {counts}; {', '.join(sorted(data.sha256))}")


if __name__ == "__main__":
    run_main(main)
