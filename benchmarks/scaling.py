"""How well do two processes train together, and what do they send?

    python benchmarks/scaling.py [--model wrn10_2] [--batch-size 32] [--rounds 7] [--steps 2]

One process per core, pinned to it, with one thread (per GPU, where there are two). The arrangements take turns, so
ratios hold on a machine whose speed drifts; what is not at turn waits for a line on its standard input.

    alone         one process, B images; the other core is idle
    apart         two processes that know nothing of each other, B images each, at the same time
    weak          two processes as one run, 2 B images a step; efficiency = its images/s over those of `apart`
    strong        two processes as one run, B images a step; speed-up = its images/s over those of `alone`
    zero 2        as weak, with ZeRO 2 and overlap_comm=false
    zero 2 overlap  as that, with overlap_comm=true

`apart` shares memory and caches as `weak` does, so their ratio is what joining costs; the bound is 0.9. Prints a table
and writes benchmarks/results/scaling.csv. `sent_mib_per_step` is what one process hands to the network, counted call by
call; `communication` the share of its time in those calls.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import torch
from measuring import ratios, spread, wait_for
from table import RESULTS, describe, environment, markdown, save
from train_step import SHAPES, make_batch

from oat_dist.config import AttackConfig, Config, EngineConfig, ModelConfig, OptimConfig
from oat_dist.data import Batch

BOUND = 0.9
JOINED = {"weak": (2, {}), "strong": (1, {}), "zero 2": (2, {"zero_stage": 2, "overlap_comm": False}),
          "zero 2 overlap": (2, {"zero_stage": 2, "overlap_comm": True})}  # fmt: skip
"""Name -> images of a step in units of B, engine settings."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=list(SHAPES), default="wrn10_2")
    add("--batch-size", type=int, default=32, help="images of one process and step")
    add("--rounds", type=int, default=7, help="timed turns of each, after the warm-up")
    add("--steps", type=int, default=2, help="steps of a turn")
    add("--out", type=pathlib.Path, default=RESULTS / "scaling.csv")
    add("--worker", choices=["joined", "single"], help="be one process; used by the script itself")
    return parser.parse_args(argv)


class Worker:
    """One process: a pinned child that takes turns when asked."""

    def __init__(self, kind: str, rank: int, port: int, args: argparse.Namespace) -> None:
        """Start it.

        Args:
            kind: `joined` or `single`.
            rank: Its rank if joined, and its core.
            port: Where joined ones meet.
            args: The command line.
        """
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CORE": str(rank)}
        if kind == "joined":
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2",
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        command = [sys.executable, __file__, "--worker", kind, "--model", args.model,
                   "--batch-size", str(args.batch_size), "--steps", str(args.steps)]  # fmt: skip
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, name: str) -> None:
        """Begin a turn."""
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, float]:
        """Wait for the end of the turn."""
        while True:
            line = self._process.stdout.readline()
            if not line:
                raise RuntimeError(f"a worker ended: exit {self._process.wait()}")
            if line.startswith("{"):
                return json.loads(line)

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait(60)


def work(args: argparse.Namespace) -> None:
    """A worker: one engine per arrangement, a turn per line of standard input."""
    core, kind = int(os.environ["CORE"]), args.worker
    if not torch.cuda.is_available():
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})
    elif kind == "single":  # joined ranks take the GPU of their place
        os.environ |= {"RANK": "0", "LOCAL_RANK": str(core), "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    from oat_dist.engine import Engine, init_world
    from oat_dist.models import build_model
    from oat_dist.step import training_losses
    from oat_dist.stopwatch import Stopwatch

    world = init_world(threads=1)
    engines = {}
    for name, (share, settings) in (JOINED if kind == "joined" else {"single": (1, {})}).items():
        config = _config(args, share * args.batch_size, settings)
        network = build_model(config, in_channels=SHAPES[args.model][2], num_classes=10).to(world.device)
        batch, lam_N = make_batch(_chw(args.model), share * args.batch_size // world.ranks)
        engines[name] = config, network, Engine(network, config, world), batch, lam_N.sort()[0]
    for line in sys.stdin:
        name = line.strip()
        config, network, engine, batch, lam_N = engines[name]
        clock, sent = Stopwatch(world.device), 0.0

        def communicate(call, size, clock=clock):
            nonlocal sent
            sent += size
            clock.mark("computing")
            result = call()
            clock.mark("communication")
            return result

        batch = _on(batch, world.device)
        wait_for(world.device)
        start = time.perf_counter()
        clock.start()
        with engine.metered(communicate):
            for _ in range(args.steps):
                losses = training_losses(network, batch, lam_N, config=config, epoch=0, forward=engine.forward)
                engine.backward_and_step(losses.loss_N, 0.01)
        clock.mark("computing")
        wait_for(world.device)
        seconds, phases = time.perf_counter() - start, clock.read_ms()
        share = phases.get("communication", 0.0) / sum(phases.values())
        images = args.steps * len(lam_N)
        print(json.dumps({"seconds": seconds, "images": images, "communication": share,
                          "sent_mib_per_step": sent / args.steps / 2**20}), flush=True)  # fmt: skip


def measure(args: argparse.Namespace, port: int) -> dict[str, list[dict[str, float]]]:
    """Arrangement -> images/s, communication share and MiB per step of each round."""
    joined, single = ([Worker(kind, rank, port, args) for rank in (0, 1)] for kind in ("joined", "single"))
    turns = {"alone": single[:1], "apart": single, **dict.fromkeys(JOINED, joined)}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in turns}
    try:
        for at in range(-1, args.rounds):
            for name, workers in turns.items():
                for worker in workers:
                    worker.ask(name if name in JOINED else "single")
                answers = [worker.answer() for worker in workers]
                slowest = max(answer["seconds"] for answer in answers)
                turn = {"images_per_s": sum(answer["images"] for answer in answers) / slowest}
                turn |= {key: answers[0][key] for key in ("communication", "sent_mib_per_step")}
                if at >= 0:  # the first turn warms up
                    results[name].append(turn)
    finally:
        for worker in joined + single:
            worker.close()
    return results


def rows_of(results: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, object]]:
    """One row per arrangement; ratios are taken within a round."""
    rates = {name: [turn["images_per_s"] for turn in turns] for name, turns in results.items()}
    rows = []
    for name, turns in results.items():
        against = {"strong": "alone", "alone": "alone"}.get(name, "apart")
        ratio = spread(ratios(rates[name], rates[against]))
        rows.append({
            "arrangement": name,
            "images_per_s": spread(rates[name])["median"],
            "against": against,
            **{f"ratio_{key}": value for key, value in ratio.items()},
            "communication": round(sum(turn["communication"] for turn in turns) / len(turns), 4),
            "sent_mib_per_step": round(turns[0]["sent_mib_per_step"], 4),
        })  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    args = parse(argv)
    if args.worker:
        work(args)
        return
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("needs two cores")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = os.getloadavg()[0]
    rows = rows_of(measure(args, port))
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    about = {"model": args.model, "batch_size": args.batch_size, "rounds": args.rounds, "steps": args.steps,
             "load_before": round(before, 1), **environment(device), "threads": 1}  # fmt: skip
    print(markdown(rows))
    print(describe(about))
    efficiency = next(row["ratio_median"] for row in rows if row["arrangement"] == "weak")
    print(f"weak scaling efficiency of two processes: {efficiency:.3f} (bound {BOUND})")
    save([{**row, **about} for row in rows], args.out)


def _config(args: argparse.Namespace, batch_size: int, settings: Mapping[str, object]) -> Config:
    return Config(
        model=ModelConfig(name=args.model), attack=AttackConfig(eps_255=8.0, steps=7),
        optim=OptimConfig(lr=0.01, batch_size=batch_size), engine=EngineConfig(**settings),
    )  # fmt: skip


def _chw(model: str) -> tuple[int, int, int]:
    return SHAPES[model][2], *SHAPES[model][:2]


def _on(batch: Batch, device: torch.device) -> Batch:
    return dataclasses.replace(batch, image_NCHW=batch.image_NCHW.to(device), label_N=batch.label_N.to(device))


if __name__ == "__main__":
    main()
