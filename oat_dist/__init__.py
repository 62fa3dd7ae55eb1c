"""Once-for-all adversarial training: one network, the whole accuracy/robustness curve.

The public names for use from Python:

    config, network = oat_dist.load_run("runs/...")       a trained network, on the CPU
    logits = network.predict(images, lam=0.3)             images [N, C, H, W] in [0, 1]
    model = oat_dist.load("runs/...")                     to serve it: model(images, lam), one lambda or one per image
    network = oat_dist.conditionalise(module, config.conditioning, seed=0)      lambda for a network of your own
    module = oat_dist.robustbench_model("runs/...", lam=0.3)      images to logits, for other programs
    x_adv = oat_dist.pgd(lambda x: ..., images, labels, eps=8 / 255, steps=20)
"""

from oat_dist.attacks import pgd
from oat_dist.config import Config
from oat_dist.deployment import load
from oat_dist.errors import UserError
from oat_dist.evaluation import EvaluationAttack, evaluate
from oat_dist.models import build_model
from oat_dist.models.conditionalise import conditionalise
from oat_dist.robustbench import robustbench_model
from oat_dist.runs import load_run

__all__ = [
    "Config",
    "EvaluationAttack",
    "UserError",
    "build_model",
    "conditionalise",
    "evaluate",
    "load",
    "load_run",
    "pgd",
    "robustbench_model",
]
