"""A search from its configuration to its report: dedicated frontier, candidates, the chosen one with several seeds.

<output_dir>/<time>_<name>_search/
search.yaml  frontier.json (dedicated networks, validation)  search.csv  best.yaml  importance.csv  search.png|svg
report.json|csv|png|svg (test)  candidates.json (when all have ended)  trials/ report/ (run folders)  ray/
"""

import dataclasses
import datetime
import json
import pathlib
import time
from collections.abc import Sequence

from oat_dist.comparison import compare, print_comparison, write_comparison
from oat_dist.config import Config
from oat_dist.config_io import write_config
from oat_dist.data import PreparedData
from oat_dist.dedicated import dedicated_config, find_trained, frontier_file, measured_before, read_frontier
from oat_dist.errors import UserError
from oat_dist.evaluation import EvaluationAttack
from oat_dist.frontier import dedicated_frame
from oat_dist.losses import robust_term
from oat_dist.report import describe
from oat_dist.resume import RunLock
from oat_dist.runs import make_folder
from oat_dist.trainer import open_data
from oat_dist.weights import whole_file
from tune import results, tpe
from tune.cluster import Outcome, Slots, cluster, find_slots, run_jobs
from tune.progress import LiveTable
from tune.settings import SearchRun
from tune.space import Space, read_space


class Interrupted(Exception):  # noqa: N818 - the field's word; nothing went wrong
    """Ctrl-C: what there is has been written."""


class Search:
    """One search while it goes on."""

    def __init__(self, run: SearchRun, folder: pathlib.Path | None, frontier: pathlib.Path | None) -> None:
        """Check everything that can be checked without a cluster; nothing is written.

        Args:
            run: The configuration.
            folder: Of the search to go on with; None begins a new one.
            frontier: A frontier file to use instead of training dedicated networks, or None.

        Raises:
            UserError: A mistake in the configuration or the data.
        """
        self.run, self.cfg, self.base = run, run.search, absolute(run.base)
        self.space: Space = read_space(run.space, self.base)
        self.data: PreparedData = open_data(self.base)
        self.data.file("test", self.base.data.loader)
        self.attack = EvaluationAttack.of(self.base)
        self.samples = self._samples()
        self.folder, self.dedicated = folder, None
        if frontier is None:
            robust_term(self.base)  # dedicated networks are trained with it, whatever the space says
        else:
            self.dedicated = read_frontier(frontier, self.base, self.data, split="val")
            dedicated_frame(self.dedicated["points"])

    def go(self, address: str | None) -> pathlib.Path:
        """Run all phases that are left; returns the folder.

        Args:
            address: Of a Ray cluster; None makes one of this machine.

        Raises:
            UserError: Nothing answers, resources no node has, no trade-off between the dedicated ends, or no trial
                that finished.
            Interrupted: Ctrl-C.
        """
        lock = RunLock()
        with cluster(address):
            slots = find_slots(self.cfg)
            self.folder = self.folder or self._new_folder()
            lock.take(self.folder)
            print(f"{self.folder}: {slots.concurrent} trials at a time", flush=True)
            self.dedicated = self._frontier(slots)
            outcomes = self._candidates(slots)
            best = results.best_outcome(outcomes)
            if best is None:
                raise UserError(f"{self.folder}: no trial finished; search.csv says why")
            if self.cfg.report_seeds:
                self._report(best, slots)
        lock.release()
        return self.folder

    def _samples(self) -> list[dict] | None:
        """All samples, or None where they are suggested one by one."""
        if self.cfg.algorithm == "grid":
            return self.space.grid()
        return self.space.draw(self.cfg.trials, self.cfg.seed) if self.cfg.algorithm == "random" else None

    def _new_folder(self) -> pathlib.Path:
        now = datetime.datetime.now()
        folder = make_folder(pathlib.Path(self.base.output_dir) / f"{now:%Y%m%d-%H%M%S}_{self.run.name}_search")
        write_config(self.run, folder / "search.yaml")
        return folder

    def _phase(self, name: str, title: str, jobs, total: int, slots: Slots, points: Sequence[dict]) -> list[Outcome]:
        sampler = tpe.sampler(self.cfg.seed, self.cfg.trials) if callable(jobs) else None
        with LiveTable(title, total) as table:
            return run_jobs(
                name, jobs, folder=self.folder, base=self.base, dedicated=points, cfg=self.cfg, slots=slots,
                on_event=table.event, sampler=sampler,
            )  # fmt: skip

    def _once(self, name: str, title: str, jobs: Sequence[dict], slots: Slots) -> list[dict]:
        """Metrics of jobs that must all succeed; jobs are idempotent, so this is simply done again after a kill."""
        if not jobs:
            return []
        stamp = f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
        outcomes = self._phase(stamp, title, jobs, len(jobs), slots, [])
        for outcome in outcomes:
            if outcome.status == "failed":
                raise UserError(f"{title}: {_brief(outcome.job)} failed: {outcome.error}")
        if len(outcomes) < len(jobs) or any(outcome.status != "finished" for outcome in outcomes):
            raise Interrupted
        return [{**outcome.job, **outcome.metrics} for outcome in outcomes]

    def _dedicated_jobs(self, split: str) -> tuple[list[dict], list[dict]]:
        """Dedicated networks that are measured already, and jobs for the others."""
        if self.dedicated is not None:
            known = {(n["lam"], n["seed"]): n["run"] for n in self.dedicated["networks"]}
        else:
            seeds = range(self.base.seed, self.base.seed + self.cfg.frontier_seeds)
            known = {(lam, seed): None for lam in self.cfg.frontier_lambdas for seed in seeds}
        there, missing = [], []
        for (lam, seed), run in known.items():
            one = dedicated_config(self.base, lam, seed)
            found = pathlib.Path(run) if run else find_trained(one, self.data)
            points = measured_before(found, [lam], self.attack, self.data, split) if found else None
            network = {"lam": lam, "seed": seed, "run": str(found) if found else None}
            if points:
                there.append({**points[0], **network})
            else:
                missing.append({"kind": "dedicated", **network, "split": split})
        return there, missing

    def _dedicated_networks(self, split: str, slots: Slots, more: Sequence[dict] = ()) -> tuple[dict, list[dict]]:
        """The frontier file of a split, and the metrics of `more` jobs that run beside."""
        there, missing = self._dedicated_jobs(split)
        title = "dedicated networks" if split == "val" else "report"
        done = self._once(title.split()[0], title, [*more, *missing], slots)
        networks = there + [
            {**d["points"][0], "seed": d["seed"], "run": d["run"]} for d in done if d["kind"] == "dedicated"
        ]
        networks.sort(key=lambda network: (network["lam"], network["seed"]))
        content = frontier_file(self.base, networks, data=self.data, split=split, attack=self.attack)
        return content, [d for d in done if d["kind"] != "dedicated"]

    def _frontier(self, slots: Slots) -> dict:
        """The dedicated networks on validation: given, of an earlier part of this search, or trained now."""
        path = self.folder / "frontier.json"
        if self.dedicated is None and path.exists():
            return json.loads(path.read_text())
        found = self.dedicated or self._dedicated_networks("val", slots)[0]
        _write_json(found, path)
        dedicated_frame(found["points"])
        return found

    def _candidates(self, slots: Slots) -> list[Outcome]:
        """All trials of the space, with everything that can be said of them written down."""
        done = self.folder / "candidates.json"
        if done.exists():
            return [Outcome(**outcome) for outcome in json.loads(done.read_text())]
        total = len(self.samples) if self.samples is not None else self.cfg.trials
        job = {"kind": "search", "folder": str(self.folder / "trials")}
        jobs = tpe.Suggest(self.space, job) if self.samples is None else [{**job, "sample": s} for s in self.samples]
        start = time.monotonic()
        outcomes = self._phase("search", "trials", jobs, total, slots, self.dedicated["points"])
        wall_s, own_s = time.monotonic() - start, sum(o.metrics.get("seconds", 0.0) for o in outcomes)
        print(f"{wall_s:.0f} s for trials of {own_s:.0f} s together, {slots.concurrent} at a time")
        paths = results.write_results(
            self.folder, outcomes, base=self.base, evaluation=self.run.evaluation, space=self.space,
            dedicated=self.dedicated, table_by=self.cfg.table_by,
        )  # fmt: skip
        self._print(outcomes)
        print(*paths, sep="\n", flush=True)
        if len(outcomes) < total or any(outcome.status == "unfinished" for outcome in outcomes):
            raise Interrupted
        _write_json([dataclasses.asdict(outcome) for outcome in outcomes], done)
        return outcomes

    def _print(self, outcomes: Sequence[Outcome]) -> None:
        counts = {status: sum(o.status == status for o in outcomes) for status in ("finished", "stopped", "failed")}
        print("trials: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
        best = results.best_outcome(outcomes)
        if best is not None:
            print(f"best: validation frontier ratio {best.metrics['ratio']:.3f}, {_brief(best.job)}")
        results.print_importance(results.trial_importance(self.space, outcomes))
        if self.cfg.table_by:
            rows = results.ablation_rows(outcomes, self.cfg.table_by)
            results.print_ablation(rows, self.cfg.table_by, f"validation, n = {self.data.counts['val']}, percent")

    def _report(self, best: Outcome, slots: Slots) -> None:
        """Train the chosen configuration with several seeds, and hold it against the dedicated networks on test."""
        count = self.cfg.report_lambdas
        grid = {round(at / (count - 1), 10) for at in range(count)} if count else set()
        sample = {key: value for key, value in best.job["sample"].items() if key != "seed"}
        job = {"kind": "report", "sample": sample, "folder": str(self.folder / "report"), "split": "test",
               "lambdas": sorted(grid | set(self.cfg.frontier_lambdas))}  # fmt: skip
        seeds = range(self.base.seed, self.base.seed + self.cfg.report_seeds)
        dedicated, reports = self._dedicated_networks("test", slots, [{**job, "seed": seed} for seed in seeds])
        about = describe(self.base, self.data, "test", self.attack, dedicated["points"])
        about |= {"sample": sample, "runs": [report["run"] for report in reports]}
        comparison = compare(dedicated["points"], [report["points"] for report in reports])
        paths = write_comparison(comparison, about, self.folder / "report")
        print_comparison(comparison, about)
        print(*paths, sep="\n", flush=True)


def absolute(config: Config) -> Config:
    """A configuration that means the same in any working directory: Tune's trials have their own."""
    data = dataclasses.replace(config.data, root=str(pathlib.Path(config.data.root).absolute()))
    weights = config.model.init_from
    model = dataclasses.replace(config.model, init_from=weights and str(pathlib.Path(weights).absolute()))
    return dataclasses.replace(
        config, data=data, model=model, output_dir=str(pathlib.Path(config.output_dir).absolute())
    )


def _brief(job: dict) -> str:
    if job["kind"] == "dedicated":
        return f"the network of lambda {job['lam']:g}, seed {job['seed']}"
    return ", ".join(f"{key}={value}" for key, value in job["sample"].items())


def _write_json(content: object, path: pathlib.Path) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
