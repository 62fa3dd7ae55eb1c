"""With `sync`, two processes compute what one computes on the joined batch."""

import pytest
import torch

from kernels import film_dual_bn
from tests.numerics import leaves, site_inputs
from tests.ranks import run_ranks

SEGMENTS = [0, 0, 1, 1, 1, 2, 2]
IMAGES = ("x", "residual", "segment", "film_row")
SHARES = {"even": [[0, 2, 4, 6], [1, 3, 5]], "a segment only on one rank": [[0, 1, 2, 3], [4, 5, 6]]}


def arguments(images: list[int]) -> dict:
    args = site_inputs(segments=SEGMENTS, height=4, width=3)
    for name in IMAGES:
        part = args[name].detach()[images].clone()
        args[name] = part.requires_grad_(args[name].requires_grad)
    return args


def compute(world, images: list[int], sync: bool) -> dict:
    args = arguments(images)
    y = film_dual_bn(**args, sync=sync)
    upstream = torch.randn(len(SEGMENTS), *y.shape[1:], generator=torch.Generator().manual_seed(5), dtype=y.dtype)
    (y * upstream[images]).sum().backward()
    result = {"y": y.detach(), "running_mean": args["running_mean"], "running_var": args["running_var"]}
    return result | {f"grad {name}": leaf.grad for name, leaf in leaves(args).items()}


def both(world, shares: list[list[int]]) -> dict:
    return compute(world, shares[world.rank], True)


def compute_penalty(world, images: list[int], sync: bool) -> dict:
    """Gradients of a squared input gradient, as local linearity and gradient alignment need them."""
    args = arguments(images)
    y = film_dual_bn(**args, sync=sync)
    upstream = torch.randn(len(SEGMENTS), *y.shape[1:], generator=torch.Generator().manual_seed(5), dtype=y.dtype)
    (slope,) = torch.autograd.grad((y.square() * upstream[images]).sum(), args["x"], create_graph=True)
    slope.square().sum().backward()
    return {f"grad {name}": leaf.grad for name, leaf in leaves(args).items()}


def both_penalties(world, shares: list[list[int]]) -> dict:
    return compute_penalty(world, shares[world.rank], True)


@pytest.mark.dist
@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_two_processes_equal_one_with_the_joined_batch(shares):
    joined = compute(None, list(range(len(SEGMENTS))), False)
    assert_parts_make_whole(joined, run_ranks(both, 2, shares), shares)


@pytest.mark.dist
def test_gradients_of_gradients_over_two_processes_equal_one_with_the_joined_batch():
    shares = SHARES["a segment only on one rank"]
    joined = compute_penalty(None, list(range(len(SEGMENTS))), False)
    assert joined["grad weight"].abs().max() > 0
    assert_parts_make_whole(joined, run_ranks(both_penalties, 2, shares), shares)


def assert_parts_make_whole(joined: dict, parts: list[dict], shares: list[list[int]]) -> None:
    for name, expected in joined.items():
        if name in ("y", "grad x", "grad residual"):
            got = torch.empty_like(expected)
            for images, part in zip(shares, parts, strict=True):
                got[images] = part[name]
        elif name.startswith("grad"):
            got = parts[0][name] + parts[1][name]
        else:
            got = parts[0][name]
            assert torch.equal(got, parts[1][name]), f"{name} differs between ranks"
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10, msg=name)
