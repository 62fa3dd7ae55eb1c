"""Distributions of lambda, their exact shares, encodings and interpolation."""

import pytest
import scipy.stats
import torch

from oat_dist.conditioning import LambdaEncoder, LambdaSampler, positive_lambdas
from oat_dist.config import ConditioningConfig, Config
from oat_dist.data.loader import deal
from oat_dist.models import build_model
from oat_dist.random import draw_keys, uniform

U = uniform(draw_keys(0, "test", torch.arange(20000)))


def test_discrete_draws_follow_the_weights():
    cfg = ConditioningConfig(lambdas=(0.0, 0.2, 0.7, 1.0), weights=(4.0, 1.0, 2.0, 1.0))
    lam = positive_lambdas(cfg, U)
    shares = [float((lam == value).double().mean()) for value in (0.0, 0.2, 0.7, 1.0)]
    assert shares == pytest.approx([0, 0.25, 0.5, 0.25], abs=0.015)


@pytest.mark.parametrize(
    ("settings", "reference"),
    [({"distribution": "uniform", "low": 0.2, "high": 0.8}, scipy.stats.uniform(0.2, 0.6)),
     ({"distribution": "beta", "alpha": 0.5, "beta": 2.0}, scipy.stats.beta(0.5, 2.0))],
    ids=["uniform", "beta"],
)  # fmt: skip
def test_continuous_draws_follow_their_distribution(settings, reference):
    cfg = ConditioningConfig(**settings, encoding="fourier")
    lam = positive_lambdas(cfg, U)
    assert lam.min() > 0 and lam.max() <= 1
    assert scipy.stats.kstest(lam.numpy(), reference.cdf).pvalue > 0.001


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("share", [0.1, 1 / 6, 0.5])
def test_the_share_of_zeros_is_exact_and_even_over_ranks(ranks, accumulation, share):
    batch_size, steps = 50, 3
    cfg = ConditioningConfig(distribution="uniform", zero_share=share, encoding="fourier")
    index = torch.randperm(500, generator=torch.Generator().manual_seed(0))[: batch_size * steps].view(
        steps, batch_size
    )
    alone = LambdaSampler(cfg, seed=3, batch_size=batch_size, steps_per_epoch=steps)
    for step in range(steps):
        expected = alone.draw(1, step, torch.arange(batch_size), index[step])
        assert int((expected == 0).sum()) == -int(-share * batch_size // 1)
        seen = torch.full((batch_size,), -1.0, dtype=torch.float64)
        zeros = []
        for rank in range(ranks):
            for position in deal(batch_size, rank=rank, ranks=ranks, accumulation=accumulation):
                lam = alone.draw(1, step, position, index[step][position])
                zeros.append(int((lam == 0).sum()))
                assert (lam[: zeros[-1]] == 0).all(), "images with lambda 0 come first"
                seen[position] = lam
        assert torch.equal(seen, expected), "lambda of an image depends on the number of ranks"
        assert max(zeros) - min(zeros) <= 1


def test_one_lambda_per_batch_has_an_exact_share_of_zero_batches_per_epoch():
    cfg = ConditioningConfig(sampling="batch", lambdas=(0.0, 0.5, 1.0))
    sampler = LambdaSampler(cfg, seed=0, batch_size=8, steps_per_epoch=30)
    position, zeros = torch.arange(8), []
    for epoch in range(3):
        lams = [sampler.draw(epoch, step, position, 100 * step + position) for step in range(30)]
        assert all(len(lam.unique()) == 1 for lam in lams)
        zeros.append([step for step, lam in enumerate(lams) if lam[0] == 0])
        assert len(zeros[-1]) == 10
        assert {float(lam[0]) for lam in lams} == {0.0, 0.5, 1.0}
    assert zeros[0] != zeros[1]


@pytest.mark.parametrize("encoding", ["onehot", "dct", "orthogonal"])
def test_codes_are_orthonormal(encoding):
    encoder = LambdaEncoder(ConditioningConfig(encoding=encoding), seed=0)
    codes = encoder(torch.tensor([0.3]))
    assert codes.shape == (6, 6 if encoding == "onehot" else 128)
    torch.testing.assert_close(codes @ codes.T, torch.eye(6), rtol=1e-5, atol=1e-6)


def test_orthogonal_codes_follow_the_seed():
    cfg = ConditioningConfig()
    same = [LambdaEncoder(cfg, seed=seed).codes_KE for seed in (1, 1, 2)]
    assert torch.equal(same[0], same[1])
    assert not torch.allclose(same[0], same[2], atol=0.01)


def test_encodings_without_codes_are_functions_of_lambda():
    lam = torch.tensor([0.0, 0.3, 1.0])
    assert torch.equal(LambdaEncoder(ConditioningConfig(encoding="none"), seed=0)(lam), lam[:, None])
    code = LambdaEncoder(ConditioningConfig(encoding="fourier", encoding_width=16), seed=0)(lam)
    assert code.shape == (3, 16)
    torch.testing.assert_close(code.norm(dim=1), torch.ones(3))
    frequency = torch.tensor([2.0**-2 * 2.0 ** (5 * i / 7) for i in range(8)])
    torch.testing.assert_close(code[1, :8], torch.cos(2 * torch.pi * 0.3 * frequency) / 8**0.5, rtol=1e-4, atol=1e-5)


def test_unseen_lambdas_interpolate_between_positive_knots():
    encoder = LambdaEncoder(ConditioningConfig(lambdas=(0.0, 0.2, 0.6, 1.0)), seed=0)
    lam_L, row_N = encoder.rows(torch.tensor([0.6, 0.0, 0.6], dtype=torch.float64))
    assert lam_L.tolist() == [0.0, 0.2, 0.6, 1.0] and row_N.tolist() == [2, 0, 2]
    assert encoder.plan(lam_L) is None
    lam_L, _ = encoder.rows(torch.tensor([0.0, 0.1, 0.2, 0.3, 0.8, 1.0], dtype=torch.float64))
    expected = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0.75, 0.25, 0], [0, 0, 0.5, 0.5], [0, 0, 0, 1]]
    torch.testing.assert_close(encoder.plan(lam_L), torch.tensor(expected, dtype=torch.float64))


def test_lambdas_outside_the_knots_answer_as_the_nearest_one():
    encoder = LambdaEncoder(ConditioningConfig(lambdas=(0.3, 0.5), norm="single"), seed=0)
    lam_L, _ = encoder.rows(torch.tensor([0.0, 0.4, 0.9], dtype=torch.float64))
    torch.testing.assert_close(encoder.plan(lam_L), torch.tensor([[1, 0], [0.5, 0.5], [0, 1]], dtype=torch.float64))


def test_interpolation_is_of_the_film_outputs():
    config = Config(conditioning=ConditioningConfig(lambdas=(0.0, 0.2, 1.0), film_start="paper"))
    network = build_model(config, in_channels=1, num_classes=10)
    knots, between = (network.condition(torch.tensor(lams)) for lams in ([0.0, 0.2, 1.0], [0.0, 0.4, 1.0]))
    for at_knots, at_between in zip(knots.films, between.films, strict=True):
        if at_knots is None:
            continue
        for knot, mixed in zip(at_knots, at_between, strict=True):
            torch.testing.assert_close(mixed[1], 0.75 * knot[1] + 0.25 * knot[2], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(mixed[[0, 2]], knot[[0, 2]], rtol=1e-5, atol=1e-7)
