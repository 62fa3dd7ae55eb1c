"""Choosing the network by its frontier score on the validation split; the test split has no part in it."""

import pathlib

from torch import nn

from oat_dist.config import Config
from oat_dist.data import PreparedData, evaluation_batches
from oat_dist.distributed import World
from oat_dist.evaluation import EvaluationAttack, evaluate
from oat_dist.frontier import frontier_score, loose_frame
from oat_dist.models.network import ConditionalNetwork
from oat_dist.weights import load_exactly, read_tensors, write_tensors


class Validator:
    """Measures the validation split from time to time and keeps the best network as checkpoints/best.safetensors."""

    def __init__(self, config: Config, data: PreparedData, *, world: World, run: pathlib.Path) -> None:
        """Read the validation split; a best network of an earlier part of the run counts.

        Args:
            config: Configuration of the run.
            data: Its data set.
            world: The ranks that share the images.
            run: Folder of the run.
        """
        cfg = config.evaluation
        self.config, self.world, self.path = config, world, run / "checkpoints/best.safetensors"
        self.frame = loose_frame(len(data.classes))
        self.attack = EvaluationAttack.of(config)
        self.batches = evaluation_batches(data, "val", config.data, cfg.batch_size, device=world.device)
        self.best = float("-inf")
        if self.path.exists():
            self.best = read_tensors(self.path)[1]["score"]

    def measure(self, network: ConditionalNetwork, step: int) -> dict[str, float]:
        """Measure every width, and keep the network if its score, the mean over widths, is the best so far.

        Args:
            network: The network, equal on all ranks.
            step: Optimiser steps done.

        Returns:
            Name -> value for the metrics.
        """
        lambdas, scores, values = self.config.evaluation.lambdas, [], {}
        for width in reversed(network.slimming.widths):
            points = evaluate(
                network, self.batches, lambdas, self.attack, seed=self.config.seed, world=self.world, width=width
            )
            scores.append(frontier_score(points, self.frame))
            of_width = "" if width == 1 else f"width_{width:g}/"
            for point in points:
                values |= {f"{of_width}val_{key}/{point['lam']:g}": point[key] for key in ("sa", "ra")}
        score = sum(scores) / len(scores)
        if score > self.best:
            self.best = score
            if self.world.is_main:
                self.path.parent.mkdir(exist_ok=True)
                write_tensors(network.state_dict(), self.path, {"step": step, "score": score})
        return {"val_frontier_score": score, **values}

    def load_best(self, network: nn.Module) -> None:
        """Load the best network so far; every rank must call."""
        self.world.on_main(lambda: None)  # the main rank may still be writing it
        load_exactly(network, read_tensors(self.path)[0], self.path)
