"""Losses of a few float64 steps, as recorded: a change that should not alter results must give the same ones.

python -m tests.golden.record        writes tests/golden/step_losses.json anew; say in the commit why they changed

and the defaults of all settings, written anew too: new settings may join them, but a default that changes makes another
run of the same file, and needs another `oat_dist.config.DEFAULTS_VERSION`.
"""

import json
import pathlib

import torch

from oat_dist.config import (
    DEFAULTS_VERSION,
    AttackConfig,
    ConditioningConfig,
    Config,
    ModelConfig,
    computed_settings,
)
from oat_dist.data import Batch
from oat_dist.models import build_model
from oat_dist.step import training_losses

PATH = pathlib.Path(__file__).with_name("step_losses.json")
DEFAULTS = pathlib.Path(__file__).with_name("defaults.json")
CASES = {
    "resnet8, dual": ("resnet8", ConditioningConfig()),
    "wrn10_2, dual, paper start": ("wrn10_2", ConditioningConfig(film_start="paper")),
    "resnet8, single, fourier": ("resnet8", ConditioningConfig(norm="single", encoding="fourier")),
}
STEPS = 4


def losses(name: str) -> list[float]:
    """Mean losses of the first steps of a case, on random images."""
    model, conditioning = CASES[name]
    config = Config(
        model=ModelConfig(name=model), conditioning=conditioning, attack=AttackConfig(eps_255=16.0, steps=3)
    )
    network = build_model(config, in_channels=3, num_classes=10).double()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    gen = torch.Generator().manual_seed(0)
    lam = torch.tensor([0, 0, 0.1, 0.25, 0.3, 0.4, 1, 1], dtype=torch.float64)
    out = []
    for step in range(STEPS):
        batch = Batch(
            image_NCHW=torch.rand(8, 3, 8, 8, generator=gen, dtype=torch.float64),
            label_N=torch.randint(10, (8,), generator=gen),
            index_N=torch.arange(8) + 8 * step,
            position_N=torch.arange(8),
        )
        loss = training_losses(network, batch, lam, config=config, epoch=0, forward=network).loss_N.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return out


if __name__ == "__main__":
    PATH.write_text(json.dumps({name: losses(name) for name in CASES}, indent=1) + "\n")
    recorded = {"version": DEFAULTS_VERSION, "defaults": computed_settings(Config())}
    DEFAULTS.write_text(json.dumps(recorded, indent=1) + "\n")
