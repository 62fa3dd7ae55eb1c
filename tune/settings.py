"""The configuration of a search: that of a training run, a section `search`, and the `space`. Standard library only."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from oat_dist.config import PAPER_LAMBDAS, Config
from oat_dist.errors import require


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How the space is searched, and with how much of what."""

    algorithm: Literal["tpe", "random", "grid"] = "tpe"
    """`tpe`: Optuna's tree-structured Parzen estimator; `random`; `grid`: every valid combination."""
    objective: Literal["ratio", "sa_ra"] = "ratio"
    """`ratio`: validation frontier ratio; `sa_ra`: mean SA and mean RA over the frontier's lambdas, two objectives,
    without early stopping. The chosen trial is the one of the highest ratio either way."""
    trials: int = 16
    """Number of trials; `grid` has as many as the space has combinations."""
    early_stopping: bool = True
    """Stop weak trials at an intermediate score (ASHA; Li et al., MLSys 2020); not with `sa_ra`."""
    grace_epochs: int = 4
    """Epochs before a trial may be stopped."""
    reduction: int = 3
    """One trial in so many goes on at each rung of ASHA."""
    interval_epochs: int = 4
    """Epochs between two intermediate scores of a trial."""
    seed: int = 0
    """Seed of the sampler; that of training is `seed`."""
    frontier_lambdas: tuple[float, ...] = PAPER_LAMBDAS
    """Lambdas of the dedicated networks, where trials are measured too; with both ends."""
    frontier_seeds: int = 3
    """Dedicated networks per lambda."""
    report_seeds: int = 3
    """Seeds with which the chosen configuration is trained and reported on test; 0 reports nothing."""
    report_lambdas: int = 21
    """Evenly spaced lambdas of the reported curve, beside those of the frontier; 0 for the latter alone."""
    table_by: tuple[str, ...] = ()
    """Dotted keys of the space by which trials are averaged, one row each, into ablation.csv."""
    workers_per_trial: int = 1
    """Processes that train one trial together; with more than one a trial may span nodes."""
    cpus_per_worker: int = 1
    """CPUs, and CPU threads, of each process."""
    gpus_per_worker: float | None = None
    """GPUs of each process, a fraction to share one; default 1 where the cluster has GPUs, else 0."""
    retries: int = 0
    """How often a trial that failed is tried again, from its checkpoint."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for key in ("trials", "grace_epochs", "interval_epochs", "frontier_seeds", "workers_per_trial",
                    "cpus_per_worker"):  # fmt: skip
            require(getattr(self, key) >= 1, f"search.{key}", getattr(self, key), "must be at least 1")
        for key in ("seed", "report_seeds", "report_lambdas", "retries"):
            require(getattr(self, key) >= 0, f"search.{key}", getattr(self, key), "must be at least 0")
        require(self.reduction >= 2, "search.reduction", self.reduction, "must be at least 2")
        require(self.report_lambdas != 1, "search.report_lambdas", 1, "must be 0, or at least 2")
        lambdas = self.frontier_lambdas
        ok = lambdas == tuple(sorted(set(lambdas))) and lambdas[:1] == (0,) and lambdas[-1:] == (1,)
        require(ok, "search.frontier_lambdas", lambdas, "must increase from 0 to 1, both included")
        gpus = self.gpus_per_worker
        require(gpus is None or gpus >= 0, "search.gpus_per_worker", gpus, "must be at least 0")
        ok = not gpus or gpus == int(gpus) or (gpus < 1 and self.workers_per_trial == 1)
        expected = "a fraction of a GPU must be below 1 and needs search.workers_per_trial=1 (ranks cannot share a GPU)"
        require(ok, "search.gpus_per_worker", gpus, expected)


@dataclass(frozen=True, kw_only=True)
class SearchRun(Config):
    """A search, complete: everything its trials share, and what they differ in."""

    search: SearchConfig = field(default_factory=SearchConfig)
    """How the space is searched."""
    space: dict[str, Any] = field(default_factory=dict)
    """Dotted key of a setting -> list of values, or {low, high, log: false}. A value of conditioning.distribution may
    be written discrete(0, 0.1, 1, weights=[2, 1, 1]), uniform(0, 1, zero=0.1) or beta(0.5, 1, zero=0.1, knots=[0,
    1])."""

    @property
    def base(self) -> Config:
        """The training run that trials start from, measured on validation at the frontier's lambdas."""
        names = [f.name for f in dataclasses.fields(Config)]
        config = Config(**{name: getattr(self, name) for name in names})
        measured = dataclasses.replace(
            self.evaluation, lambdas=self.search.frontier_lambdas, split="val", interval_epochs=0
        )
        threads = dataclasses.replace(self.engine, threads=self.search.cpus_per_worker)
        return dataclasses.replace(config, evaluation=measured, engine=threads)
