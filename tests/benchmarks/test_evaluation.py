"""The plain loop that the evaluation is timed against does the same work."""

import evaluation
import torch

from oat_dist.config import DataConfig
from oat_dist.data import evaluation_batches
from oat_dist.evaluation import EvaluationAttack, Plan, run_plan
from oat_dist.evaluation.loop import ROBUST
from tests.oat_dist.evaluation.networks import answered, perturbed_network


def test_the_plain_loop_judges_every_image_as_the_evaluation_does(digits):
    cfg, cpu = DataConfig(loader="memory"), torch.device("cpu")
    network = perturbed_network()
    ours, plain = (
        answered(network, evaluation_batches(digits, "test", cfg, size, device=cpu, num_images=48), 0.3)
        for size in (48, 20)
    )
    plan = Plan(lambdas=(0.0, 0.3), attack=EvaluationAttack(eps=0.02, steps=4))
    robust_LM = evaluation.plain_loop(network, plain, plan)
    assert torch.equal(robust_LM, run_plan(network, ours, plan).code_CM == ROBUST)
    assert 0 < robust_LM[1].sum() < 48
    row = evaluation._row("ours", [1.0, 2.0], [3.0, 4.0], ~robust_LM, robust_LM)
    assert row["images judged otherwise"] == 96 and row["plain / this: median (min to max)"] == "2.5 (2.0 to 3.0)"
