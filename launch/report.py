"""Show finished runs on one page: curves, images at every lambda, training, origin. The page needs nothing but itself.

python launch/report.py runs/<run>                                    writes runs/<run>/report.html
python launch/report.py runs/<run> runs/<another> --out report.html   side by side
"""

import pathlib
from collections.abc import Sequence

from launch import ArgumentParser, run_main
from oat_dist.errors import require


def main(argv: Sequence[str]) -> None:
    """Parse, read the runs, attack some images, write."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("runs", type=pathlib.Path, nargs="+", metavar="RUN", help="folder of a finished run")
    add("--out", type=pathlib.Path, help="the page; default: report.html in the folder of a single run")
    add("--data-root", help="folder of data sets; default: that of each run")
    add("--images", type=int, default=12, help="images of the gallery, at most")
    args = parser.parse_args(argv)
    require(args.images >= 1, "--images", args.images, "must be at least 1")
    require(args.out is not None or len(args.runs) == 1, "--out", args.out, "must be given for several runs")
    # A mistake in the arguments is answered before the seconds that this import takes.
    from oat_dist.page import write_page

    path = args.out or args.runs[0] / "report.html"
    write_page(args.runs, path, data_root=args.data_root, num_images=args.images)
    print(path)


if __name__ == "__main__":
    run_main(main)
