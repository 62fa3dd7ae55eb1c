"""Label images by a trained network and write them as a data set for data.extra (robust self-training).

    python launch/pseudo_label.py --run RUN --images stl10-unlabeled --name stl10_pseudo [--source stl10_binary.tar.gz]
    python launch/pseudo_label.py --run RUN --images folder:PATH --name mine [--size 32] [--min-confidence 0.5]
    python launch/train.py ... --data.extra=mine --loss.robust=rst_adv

RUN is best that of a standard network: conditioning.lambdas=[0], film=none, norm=single; of a conditional one, --lam
chooses where on its curve it labels.
"""

import pathlib
from collections.abc import Sequence

from launch import ArgumentParser, run_main
from oat_dist.data.sources import SourceOptions
from oat_dist.data.sources.unlabelled import NAMES
from oat_dist.pseudo_labels import Labelling, pseudo_label


def main(argv: Sequence[str]) -> None:
    """Parse, label, say what came of it."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--run", required=True, type=pathlib.Path, help="folder of a finished run")
    add("--images", required=True, help=f"one of {', '.join(NAMES)}; an .npz has x_unlabeled, or x_train alone")
    add("--name", required=True, help="name of the new data set (data.extra)")
    add("--out", default="data", help="folder of the prepared data sets (data.root)")
    add("--lam", type=float, default=0.0, help="lambda of the predictions")
    add("--min-confidence", type=float, default=0.0, help="least probability of the predicted class; default: keep all")
    add("--limit", type=int, help="label the first images alone")
    add("--size", type=int, help="crop the middle square of each image and resize it to this many pixels")
    add("--source", type=pathlib.Path, help="your copy of the official archive (stl10-unlabeled)")
    add("--cache", type=pathlib.Path, help="folder of downloaded archives; default: OUT/archives")
    add("--data-root", help="folder of the data set that the run was trained on; default: that of training")
    args = parser.parse_args(argv)
    cache = args.cache or pathlib.Path(args.out) / "archives"
    labelling = Labelling(
        run=args.run,
        request=args.images,
        name=args.name,
        lam=args.lam,
        min_confidence=args.min_confidence,
        limit=args.limit,
        options=SourceOptions(archive=args.source, cache=cache, size=args.size),
        data_root=args.data_root,
    )
    data, by = pseudo_label(labelling, args.out)
    shape = "x".join(map(str, data.image_shape))
    kept = f"{data.counts['train']} of {by['num_images']} images"
    print(f"{data.folder}: {shape}, {kept}, mean confidence {by['mean_confidence']:.3f}")
    print(", ".join(f"{name} {count}" for name, count in by["counts_per_class"].items()))


if __name__ == "__main__":
    run_main(main)
