"""Latency of a trained network in every form in which it can be served, and that the forms agree.

    python benchmarks/deployment.py [--models resnet8 wrn10_2] [--batch-sizes 1 128] [--rounds 21] [--docs]

Forms: "conditional" is `network.predict` with one lambda per image; "lambda input" is the graph of `with_lambda` as
`torch.export` gives it back; "folded" is the graph of `fold_network`; "plain" is that of an ordinary network of the
same channels without lambda, with its `nn.BatchNorm2d` norms, "plain folded" of it with its norms folded in the same
way. All take their turn in every round of one process; ratios are to "plain folded", within a round. Writes
benchmarks/results/deployment_<device>.csv.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch
from measuring import in_turns, ratios, spread, wait_for
from table import RESULTS, describe, environment, markdown, put_into_docs, save
from torch import Tensor, nn

from oat_dist.config import ConditioningConfig, Config, ModelConfig
from oat_dist.deployment import fold_network, with_lambda
from oat_dist.deployment.exporting import traced
from oat_dist.deployment.plain import Site, normalised, plain_copy
from oat_dist.distributed import default_device
from oat_dist.models import build_model
from oat_dist.models.network import ConditionalNetwork
from oat_dist.models.norm import FiLMDualBN2d

LAM = 0.3
BASELINE = "plain folded"
SIZE = 32
NUM_CLASSES = 10
_LEAST_S = 0.2


class BatchNormSite(Site):
    """An ordinary batch norm where the conditional one was."""

    def __init__(self, norm: FiLMDualBN2d) -> None:
        """Make one of as many channels."""
        super().__init__()
        self.norm = nn.BatchNorm2d(norm.weight.shape[1])

    def scaled(self, x: Tensor, cond: object) -> Tensor:
        """See `Site`."""
        return self.norm(x)


class PlainNetwork(nn.Module):
    """A network without lambda, as torch users write it."""

    def __init__(self, network: ConditionalNetwork) -> None:
        """Copy a network of film=none, norm=single."""
        super().__init__()
        frozen = network.freeze(network.condition(torch.zeros(1, dtype=torch.float64)))
        self.network = plain_copy(network, frozen, BatchNormSite)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        return self.network._logits(normalised(self.network, x), None)


def forms(model: str, device: torch.device) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Each form of a network as a function of images and lambdas [N] float32."""
    about = {"image_shape": (SIZE, SIZE, 3), "classes": list(range(NUM_CLASSES)), "lam": LAM}

    def made(conditioning: ConditioningConfig) -> ConditionalNetwork:
        config = Config(model=ModelConfig(name=model), conditioning=conditioning)
        return build_model(config, in_channels=3, num_classes=NUM_CLASSES).eval()

    def graph(module: nn.Module, lam: object = LAM) -> nn.Module:
        return traced(module, {**about, "lam": lam})[0].module().to(device)

    conditional = made(ConditioningConfig())
    plain = made(ConditioningConfig(film="none", norm="single"))
    served, folded = graph(with_lambda(conditional), "input"), graph(fold_network(conditional, LAM))
    ordinary, ordinary_folded = graph(PlainNetwork(plain).eval()), graph(fold_network(plain, 0.0))
    conditional.to(device)
    return {
        "conditional": lambda x, lam_N: conditional.predict(x, lam_N),
        "lambda input": served,
        "folded": lambda x, lam_N: folded(x),
        "plain": lambda x, lam_N: ordinary(x),
        BASELINE: lambda x, lam_N: ordinary_folded(x),
    }


@torch.no_grad()
def latency_rows(model: str, batch_size: int, rounds: int, device: torch.device) -> list[dict[str, object]]:
    """Milliseconds per call of every form, and the ratio to the baseline in the same round."""
    x, lam_N = torch.rand(batch_size, 3, SIZE, SIZE, device=device), torch.full((batch_size,), LAM)
    made = forms(model, device)
    wanted = made["conditional"](x, lam_N)
    bound = 1e-4 * wanted.abs().max()
    for name in ("lambda input", "folded"):
        assert (made[name](x, lam_N.to(device)) - wanted).abs().max() <= bound, name

    def one_turn(name: str, calls: int) -> Callable[[], float]:
        lam = lam_N if name == "conditional" else lam_N.to(device)

        def run() -> float:
            wait_for(device)
            start = time.perf_counter()
            for _ in range(calls):
                made[name](x, lam)
            wait_for(device)
            return (time.perf_counter() - start) / calls

        return run

    warm = in_turns({name: one_turn(name, 2) for name in made}, 2)
    calls = max(1, round(_LEAST_S / len(made) / min(warm[BASELINE])))
    seconds = in_turns({name: one_turn(name, calls) for name in made}, rounds)
    common = {"model": model, "image": f"{SIZE}x{SIZE}x3", "batch_size": batch_size, "rounds": rounds, "calls": calls}
    return [
        common
        | {"form": name}
        | {f"ms_{key}": value for key, value in spread([1000 * s for s in seconds[name]]).items()}
        | {f"ratio_{key}": value for key, value in spread(ratios(seconds[name], seconds[BASELINE])).items()}
        | environment(device)
        for name in made
    ]


def table(rows: Sequence[dict[str, object]]) -> str:
    """The rows for the documentation."""
    shown = [
        {
            "network": row["model"],
            "images per call": row["batch_size"],
            "form": row["form"],
            "ms": row["ms_median"],
            f"time / {BASELINE}": f"{row['ratio_median']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})",
        }
        for row in rows
    ]
    first = {key: rows[0][key] for key in ("rounds", *environment(torch.device("cpu")))}
    return f"{markdown(shown)}\n\nMedians; ratios within a round, least and largest in brackets. {describe(first)}."


def main(argv: Sequence[str]) -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet8", "wrn10_2"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 128])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--docs", action="store_true", help="write the table into docs/serving.md")
    args = parser.parse_args(argv)
    device = default_device()
    rows = [
        row for model in args.models for n in args.batch_sizes for row in latency_rows(model, n, args.rounds, device)
    ]
    print(table(rows))
    save(rows, RESULTS / f"deployment_{device.type}.csv")
    if args.docs:
        put_into_docs(f"deployment_{device.type}", table(rows), RESULTS.parents[1] / "docs/serving.md")


if __name__ == "__main__":
    main(sys.argv[1:])
