"""Finished runs for the page, made in seconds: a network that was not trained, measured as training would."""

import dataclasses
import json
import pathlib
import shutil

import safetensors.torch
import torch

from oat_dist import runs
from oat_dist.comparison import compare
from oat_dist.config import AttackConfig, Config, DataConfig, EvaluationConfig
from oat_dist.config_io import write_config
from oat_dist.data import PreparedData, evaluation_batches, open_prepared
from oat_dist.data.checksum import file_sha256
from oat_dist.dedicated import frontier_file
from oat_dist.evaluation import EvaluationAttack, Plan, run_plan
from oat_dist.evaluation.summary import summary, write_images
from oat_dist.models.network import ConditionalNetwork
from oat_dist.report import describe
from tests.oat_dist.evaluation.networks import perturbed_network

LAMBDAS = (0.0, 0.3, 1.0)
NUM_IMAGES = 60
HOSTILE = "<script>alert(1)</script>"


def make_runs(digits: PreparedData, root: pathlib.Path) -> list[pathlib.Path]:
    """Three runs: with a matrix and a dedicated frontier; of another seed; in a folder called `HOSTILE`, without
    outcomes of single images and without metrics."""
    data = _answered(digits, root)
    config = Config(
        name="first",
        data=DataConfig(loader="memory", root=str(root)),
        attack=AttackConfig(eps_255=5.1),
        evaluation=EvaluationConfig(lambdas=LAMBDAS, steps=2, restarts=2),
        output_dir=str(root / "runs"),
    )
    first = runs.create_run(config, data, {}, 1)
    network, attack = perturbed_network(), EvaluationAttack.of(config)
    runs.save_model(network, data, first / "model.safetensors")
    for stem, plan in (
        ("frontier", Plan(lambdas=LAMBDAS, attack=attack)),
        ("eval/other", Plan(lambdas=(0.3, 0.6), attack=attack, attack_lambdas=LAMBDAS)),
    ):
        _measure(network, data, plan, config, first / stem)
    lines = [{"step": s, "epoch": 0, "lr": 0.1, "loss": 1 / s, "loss_clean": 0.5 / s, "loss_robust": 2 / s,
              "accuracy_clean": 1 - 0.5 / s, "accuracy_robust": 0.5 - 0.4 / s} for s in range(1, 9)]  # fmt: skip
    (first / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    networks = [
        {"lam": lam, "seed": 0, "sa": 0.9 - 0.2 * lam, "ra": 0.1 + 0.5 * lam, "run": "there"} for lam in LAMBDAS
    ]
    about = frontier_file(config, networks, data=data, split="test", attack=attack)
    (root / "runs/first_frontier").mkdir()
    curve = json.loads((first / "frontier.json").read_text())["points"]
    comparison = {**about, "runs": [str(first)], **compare(about["points"], [curve])}
    (root / "runs/first_frontier/test.json").write_text(json.dumps(comparison))
    second = _copied(first, root / "runs/second", dataclasses.replace(config, name="second", seed=1))
    third = _copied(first, root / "others" / HOSTILE, config)
    (third / "frontier.images.safetensors").unlink()
    (third / "metrics.jsonl").write_text("")
    return [first, second, third]


def _measure(network: ConditionalNetwork, data: PreparedData, plan: Plan, config: Config, stem: pathlib.Path) -> None:
    """Report and outcomes as `oat_dist.report.measure` writes them, without figures; a check is flagged."""
    cpu = torch.device("cpu")
    batches = evaluation_batches(data, "test", config.data, 512, device=cpu, num_images=NUM_IMAGES)
    outcome = run_plan(network, batches, plan)
    found = summary(outcome)
    about = describe(config, data, "test", plan.attack, found.pop("points"))
    check = {"check": "zero gradients", "flagged": True, "worst": 0.5, "lambdas": [1.0], "detail": "of images & <more>"}
    stem.parent.mkdir(exist_ok=True)
    write_images(outcome, stem.with_name(stem.name + ".images.safetensors"))
    stem.with_suffix(".json").write_text(json.dumps(about | found | {"num_examples": NUM_IMAGES, "checks": [check]}))


def _copied(run: pathlib.Path, target: pathlib.Path, config: Config) -> pathlib.Path:
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("eval"))
    write_config(config, target / "config.yaml")
    return target


def _answered(digits: PreparedData, root: pathlib.Path) -> PreparedData:
    """The digits with labels that the network mostly gives at lambda 0.3."""
    shutil.copytree(digits.folder, root / "digits")
    network, sums = perturbed_network(), {}
    for split in ("train", "val", "test"):
        path = root / f"digits/{split}.safetensors"
        tensors = safetensors.torch.load_file(path)
        with torch.no_grad():
            tensors["label"] = network.predict(tensors["image"].permute(0, 3, 1, 2) / 255, 0.3).argmax(1)
        tensors["label"][::10] = 0
        safetensors.torch.save_file(tensors, path)
        sums[path.name] = file_sha256(path)
    about = root / "digits/dataset.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"sha256": sums}))
    return open_prepared(str(root), "digits")
