"""The sites that are measured are those of the networks, and all arrangements compute the same there."""

import csv
import sys
from collections import Counter

import film_dual_bn as benchmark
import pytest
import torch
from sites import Site, bytes_to_move, sites_of

from oat_dist.config import Config, ModelConfig
from oat_dist.models import build_model

CPU = torch.device("cpu")


def site(**changes) -> Site:
    usual = {"channels": 6, "height": 3, "width": 5, "has_film": True, "has_residual": True, "relu": True}
    return Site(**usual | changes)


def sites(name, size):
    network = build_model(Config(model=ModelConfig(name=name)), in_channels=3, num_classes=10)
    return sites_of(network.to("meta"), (3, size, size)), network


def test_the_sites_of_resnet34_are_found_on_shapes_alone():
    found, network = sites("resnet34", 32)
    assert sum(found.values()) == len(network.sites) == 36
    assert sum(count for s, count in found.items() if not s.has_film) == 3, "the norms of shortcuts"
    assert sum(count for s, count in found.items() if not s.relu) == 3, "these too"
    assert sum(count for s, count in found.items() if s.has_residual) == 16, "one per block"
    resolutions = Counter({(s.channels, s.height): 0 for s in found})
    for s, count in found.items():
        resolutions[s.channels, s.height] += count
    assert resolutions == {(64, 32): 7, (128, 16): 9, (256, 8): 13, (512, 4): 7}


def test_the_sites_of_wide_networks_have_no_residual():
    found, network = sites("wrn40_2", 96)
    assert sum(found.values()) == len(network.sites) and not any(s.has_residual for s in found)
    assert {(s.channels, s.height) for s in found} >= {(16, 96), (32, 96), (64, 48), (128, 24)}


def test_bytes_are_counted_as_the_design_says():
    image = 6 * 3 * 5 * 2
    assert bytes_to_move(site(), "film_dual_bn", "forward", 10, 2) == 10 * image * 4
    assert bytes_to_move(site(), "film_dual_bn", "backward", 10, 2) == 10 * image * 8
    assert bytes_to_move(site(), "modulate", "both", 10, 2) == 10 * image * (3 + 4)
    plain = site(has_residual=False, relu=False)
    assert bytes_to_move(plain, "film_dual_bn", "both", 10, 2) == 10 * image * (3 + 5)
    assert bytes_to_move(plain, "modulate", "both", 10, 2) == 10 * image * (2 + 2)


@pytest.mark.parametrize("operator", benchmark.OPERATORS)
@pytest.mark.parametrize("changes", [{}, {"has_film": False}, {"has_residual": False, "relu": False}])
def test_all_arrangements_compute_the_same(operator, changes):
    calls = benchmark.make_calls(site(**changes), operator, 12, torch.float32, CPU)
    outputs = {name: call.forward() for name, call in calls.items()}
    torch.testing.assert_close(outputs["ours"], outputs["eager"], rtol=1e-4, atol=1e-4)
    dy = torch.randn(outputs["ours"].shape, generator=torch.Generator().manual_seed(1))
    ours, eager = (torch.autograd.grad(outputs[name], calls[name].inputs, dy) for name in ("ours", "eager"))
    shared = len(ours) - 2 if operator == "film_dual_bn" else len(ours)
    assert shared >= 1
    for a, b in zip(ours[:shared], eager[:shared], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_every_site_and_the_totals_are_written(tmp_path, monkeypatch, capsys):
    out = tmp_path / "x.csv"
    arguments = ["--networks=resnet8", "--batch-size=6", "--rounds=1", "--without=compile", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", ["film_dual_bn.py", *arguments, f"--out={out}"])
    benchmark.main()
    rows = list(csv.DictReader(out.open(newline="")))
    totals = [row for row in rows if not row["channels"]]
    assert [(row["operator"], row["way"]) for row in totals] == [
        (operator, way) for operator in benchmark.OPERATORS for way in benchmark.WAYS
    ]
    for row in totals:
        parts = [r for r in rows if r["channels"] and (r["operator"], r["way"]) == (row["operator"], row["way"])]
        assert int(row["sites"]) == sum(int(r["sites"]) for r in parts) == 9
        assert float(row["ours_ms"]) == pytest.approx(
            sum(int(r["sites"]) * float(r["ours_ms"]) for r in parts), abs=1e-3
        )
        assert float(row["share_of_copy"]) > 0 and row["compile_ms"] == ""
    assert "| resnet8 | 6 | film_dual_bn | forward | 9 |" in capsys.readouterr().out
