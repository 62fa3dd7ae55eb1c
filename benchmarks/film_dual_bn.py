"""How close is the fused operator to copying memory, at every normalisation site of the published networks?

    python benchmarks/film_dual_bn.py [--networks resnet34 wrn16_8 wrn40_2] [--batch-size 512] [--without compile]

Runs `kernels.film_dual_bn` (training) on the joint batch of a step - N clean images, a sixth of them with lambda = 0,
and the partners of the others - and `kernels.modulate` (attack) on the partners alone, forward, backward and both.
Against it: the same out of PyTorch's modules (`sites.PlainSite`), that compiled by torch.compile, and a device copy
that moves the bytes which the operator cannot avoid, measured in the same rounds. "Share of copy" is the copy's time
over the operator's.

On a GPU times are CUDA events around one call, after 1 GiB was written (so the L2 cache holds none of its input) and
the queue was filled for three milliseconds (so the host's launches do not count). On a CPU they are wall-clock times
and caches are not flushed. Medians over rounds in which all take turns. Prints a table with the sum over all sites of a
network and writes benchmarks/results/film_dual_bn.csv with every site, after each network what there is so far.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from measuring import choose_precision, in_turns
from sites import PlainSite, Site, bytes_to_move, sites_of
from table import RESULTS, describe, environment, markdown, put_into_docs, save
from torch import Tensor

from kernels import film_dual_bn, modulate
from oat_dist.config import PAPER_LAMBDAS, Config, ModelConfig
from oat_dist.distributed import default_device
from oat_dist.models import build_model

SIZES = {"resnet34": 32, "wrn16_8": 32, "wrn40_2": 96, "wrn10_2": 32, "resnet8": 8}
GPU_BATCHES = {"resnet34": 512, "wrn16_8": 512, "wrn40_2": 128}
CPU_BATCHES = {"resnet34": 12, "wrn16_8": 12, "wrn40_2": 6, "wrn10_2": 48, "resnet8": 96}
NAMES = ("ours", "eager", "compile")
WAYS = ("forward", "backward", "both")
OPERATORS = ("film_dual_bn", "modulate")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One arrangement of one operator at one site."""

    forward: Callable[[], Tensor]
    """Runs it."""
    inputs: Sequence[Tensor]
    """What its backward gives gradients for."""


def make_calls(site: Site, operator: str, batch_size: int, dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    """Ours and the plain modules on equal inputs.

    Args:
        site: What is done.
        operator: "film_dual_bn" or "modulate".
        batch_size: N clean images.
        dtype: Of images and residual; parameters, statistics and FiLM are float32.
        device: Where.
    """
    gen = torch.Generator(device).manual_seed(0)
    num_zero, is_training = -(-batch_size // 6), operator == "film_dual_bn"
    num = 2 * batch_size - num_zero if is_training else batch_size - num_zero

    def images() -> Tensor:
        x = torch.randn(num, site.height, site.width, site.channels, generator=gen, device=device, dtype=dtype)
        return x.permute(0, 3, 1, 2).requires_grad_()

    def film() -> Tensor | None:
        shape = (len(PAPER_LAMBDAS), site.channels)
        return torch.rand(shape, generator=gen, device=device).requires_grad_(is_training) if site.has_film else None

    x, residual, scale_LC, shift_LC = images(), images() if site.has_residual else None, film(), film()
    row_N = torch.randint(1, len(PAPER_LAMBDAS), (num,), generator=gen, device=device)
    if is_training:
        row_N[:num_zero] = 0
    groups, boundaries = ((0, 1, 1), (num_zero, batch_size)) if is_training else ((0,), ())
    plain = PlainSite(site, boundaries=boundaries, groups=groups).to(device).train(is_training)
    plain.requires_grad_(is_training)
    inputs = [t for t in (x, residual, scale_LC, shift_LC) if t is not None and t.requires_grad]
    eager = Call(
        forward=lambda: plain(x, scale_LC, shift_LC, row_N, residual),
        inputs=[*inputs, *(p for p in plain.parameters() if p.requires_grad)],
    )
    if not is_training:
        shape = (len(PAPER_LAMBDAS), site.channels)
        # What freezing makes of statistics 0 and 1, affine 1 and 0, and FiLM.
        fold = torch.rsqrt(torch.ones((), device=device) + 1e-5)
        scale = fold * (scale_LC if site.has_film else torch.ones(shape, device=device))
        shift = shift_LC if site.has_film else torch.zeros(shape, device=device)
        ours = Call(forward=lambda: modulate(x, scale, shift, row_N, residual=residual, relu=site.relu), inputs=inputs)
        return {"ours": ours, "eager": eager}
    weight_GC = torch.ones(2, site.channels, device=device, requires_grad=True)
    bias_GC = torch.zeros(2, site.channels, device=device, requires_grad=True)
    mean_GC, var_GC = torch.zeros(2, site.channels, device=device), torch.ones(2, site.channels, device=device)
    segment_N = torch.repeat_interleave(
        torch.arange(3, dtype=torch.int32), torch.tensor([num_zero, batch_size - num_zero, num - batch_size])
    ).to(device)
    ours = Call(
        forward=lambda: film_dual_bn(
            x, weight_GC, bias_GC, mean_GC, var_GC, segment=segment_N, group_of_segment=groups,
            film_scale=scale_LC, film_shift=shift_LC, film_row=row_N if site.has_film else None,
            residual=residual, relu=site.relu, training=True,
        ),
        inputs=[*inputs, weight_GC, bias_GC],
    )  # fmt: skip
    return {"ours": ours, "eager": eager}


class Timer:
    """Milliseconds of one call on a device."""

    def __init__(self, device: torch.device) -> None:
        """Take the memory that empties the cache."""
        self._flush = torch.empty(2**30, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def __call__(self, run: Callable[[object], object], prepare: Callable[[], object] = lambda: None) -> float:
        """Run once; what `prepare` gives is handed to `run`, and not timed."""
        prepared = prepare()
        if self._flush is None:
            start = time.perf_counter()
            run(prepared)
            return 1000 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        # Some three milliseconds in which the host gets ahead.
        torch.cuda._sleep(6_000_000)
        begin.record()
        run(prepared)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def turns(call: Call, dy: Tensor, timer: Timer) -> dict[str, Callable[[], float]]:
    """Forward, backward and both of a call as functions that run and time them once."""

    def backward(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, call.inputs, dy)

    return {
        "forward": lambda: timer(lambda _: call.forward()),
        # Through a new graph each time: the forward pass moves running statistics, on which a graph may depend.
        "backward": lambda: timer(backward, call.forward),
        "both": lambda: timer(lambda _: backward(call.forward())),
    }


def peak_mib(call: Call, dy: Tensor, device: torch.device) -> float | None:
    """Memory that forward and backward take on a GPU beside their inputs."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    torch.autograd.grad(call.forward(), call.inputs, dy)
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)


def measure_site(site: Site, operator: str, args: argparse.Namespace, batch_size: int, timer: Timer) -> list[dict]:
    """One row per way (forward, backward, both)."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.precision]
    calls = make_calls(site, operator, batch_size, dtype, args.device)
    if "compile" not in args.without:
        # Every site is compiled for its own shape; without a reset the ninth would silently run uncompiled.
        torch._dynamo.reset()
        forward = torch.compile(calls["eager"].forward, dynamic=False)
        calls["compile"] = dataclasses.replace(calls["eager"], forward=forward)
    dy = torch.randn_like(calls["ours"].forward())
    images, size = len(dy), dy.element_size()
    needed = {way: bytes_to_move(site, operator, way, images, size) for way in WAYS}
    # A copy of n bytes reads n and writes n.
    buffer = torch.zeros(2, needed["both"] // 2, dtype=torch.uint8, device=args.device)
    runs = {}
    for way in WAYS:
        source, target = buffer[:, : needed[way] // 2]
        runs[f"copy {way}"] = lambda s=source, t=target: timer(lambda _: t.copy_(s))
    for name, call in calls.items():
        runs |= {f"{name} {way}": run for way, run in turns(call, dy, timer).items()}
    in_turns(runs, 2)
    ms = in_turns(runs, args.rounds)
    median = {name: statistics.median(values) for name, values in ms.items()}
    peaks = {name: peak_mib(call, dy, args.device) for name, call in calls.items()}
    return [
        {"operator": operator, "way": way, **dataclasses.asdict(site), "images": images}
        | {f"{name}_ms": median.get(f"{name} {way}") for name in (*NAMES, "copy")}
        | {"mbytes": needed[way] / 1e6}
        | {f"{name}_peak_mib": peaks.get(name) for name in NAMES}
        for way in WAYS
    ]


def with_ratios(row: dict) -> dict:
    """A row with GB/s, share of copy and ratios to the other arrangements; a missing one stays missing."""
    ours = row["ours_ms"]
    ratio = {f"{name}_over_ours": row[f"{name}_ms"] and row[f"{name}_ms"] / ours for name in ("eager", "compile")}
    return row | {"gbytes_per_s": row["mbytes"] / ours, "share_of_copy": row["copy_ms"] / ours} | ratio


def total(rows: Sequence[dict]) -> dict:
    """Sum over all sites of a network, of rows of one operator and way."""
    first = rows[0]
    summed = {
        key: None if first[key] is None else sum(row["sites"] * row[key] for row in rows)
        for key in ("ours_ms", "eager_ms", "compile_ms", "copy_ms", "mbytes")
    }
    largest = {key: first[key] and max(row[key] for row in rows) for key in first if key.endswith("peak_mib")}
    blank = dict.fromkeys(field.name for field in dataclasses.fields(Site))
    return with_ratios(first | blank | {"sites": sum(row["sites"] for row in rows)} | summed | largest)


def measure(network: str, args: argparse.Namespace) -> list[dict]:
    """Rows of every kind of site, then the totals."""
    batches, other = (GPU_BATCHES, 512) if args.device.type == "cuda" else (CPU_BATCHES, 12)
    batch_size = args.batch_size or batches.get(network, other)
    channels = 1 if network == "resnet8" else 3
    shadow = build_model(Config(model=ModelConfig(name=network)), in_channels=channels, num_classes=10).to("meta")
    counts = sites_of(shadow, (channels, SIZES[network], SIZES[network]))
    common = {"network": network, "batch_size": batch_size, "precision": args.precision}
    timer, rows = Timer(args.device), []
    for site, count in counts.items():
        for operator in OPERATORS:
            for row in measure_site(site, operator, args, batch_size, timer):
                rows.append(with_ratios(common | {"sites": count} | row))
        print(f"{network}: {count} of {site}", file=sys.stderr)
    totals = [
        total([row for row in rows if (row["operator"], row["way"]) == (operator, way)])
        for operator in OPERATORS
        for way in WAYS
    ]
    return [*rows, *totals]


def report(rows: Sequence[dict], conditions: dict[str, object]) -> str:
    """Table of the totals, and the conditions."""
    names = {
        "network": "network",
        "batch_size": "batch",
        "operator": "operator",
        "way": "pass",
        "sites": "sites",
        "ours_ms": "ours ms",
        "gbytes_per_s": "GB/s",
        "share_of_copy": "share of copy",
        "eager_over_ours": "eager / ours",
        "compile_over_ours": "compiled / ours",
        "ours_peak_mib": "ours peak MiB",
        "eager_peak_mib": "eager peak MiB",
    }
    totals = [row for row in rows if row["channels"] is None]
    shown = [{title: row[key] for key, title in names.items()} for row in totals]
    return f"{markdown(shown)}\n\n{describe({'precision': rows[0]['precision']} | conditions)}"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--networks", nargs="+", choices=list(SIZES), default=["resnet34", "wrn16_8", "wrn40_2"])
    add("--batch-size", type=int, help="clean images N; default: by network and device")
    add("--rounds", type=int, help="timed calls of each; default: 20 on a GPU, 3 on a CPU")
    add("--without", nargs="+", choices=["compile"], default=[], help="arrangements to leave out")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 where the device has it")
    add("--device", type=torch.device, default=default_device())
    add("--docs", action="store_true", help="put the table into docs/reproduction.md")
    add("--out", type=pathlib.Path, default=RESULTS / "film_dual_bn.csv")
    args = parser.parse_args()
    args.precision = choose_precision(args.precision, args.device)
    args.rounds = args.rounds or (20 if args.device.type == "cuda" else 3)
    conditions, rows = environment(args.device), []
    for network in args.networks:
        rows += measure(network, args)
        rounded = [{key: round(v, 5) if isinstance(v, float) else v for key, v in row.items()} for row in rows]
        save([row | conditions for row in rounded], args.out)
    text = report(rows, conditions)
    print(text)
    if args.docs:
        put_into_docs("film_dual_bn", text)


if __name__ == "__main__":
    main()
