"""Frontier metrics against values worked out by hand."""

import pytest

from oat_dist.errors import UserError
from oat_dist.frontier import (
    Frame,
    area_between,
    best_constant,
    controls,
    dedicated_frame,
    frontier_ratio,
    frontier_score,
    gaps,
    loose_frame,
    mean_points,
    monotonicity,
    pareto_front,
)

UNIT = Frame(sa_low=0.0, sa_high=1.0, ra_low=0.0, ra_high=1.0)
# SA and RA of the ends and the knee as CIFAR-10 networks have them: (93, 0), (88, 40), (85, 45), (80, 50) percent.
REALISTIC = [
    {"lam": 0.0, "sa": 0.93, "ra": 0.00},
    {"lam": 0.1, "sa": 0.88, "ra": 0.40},
    {"lam": 0.3, "sa": 0.85, "ra": 0.45},
    {"lam": 1.0, "sa": 0.80, "ra": 0.50},
]


def points(*pairs):
    return [{"lam": at / max(1, len(pairs) - 1), "sa": sa, "ra": ra} for at, (sa, ra) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("pairs", "score"),
    [
        ([(1, 1)], 1.1 * 1.1),
        ([(1, 0)], 1.1 * 0.1),
        # Two strips: RA up to 0 reaches SA 1; from there to RA 1 it reaches SA 0.
        ([(1, 0), (0, 1)], 1.1 * 0.1 + 0.1 * 1.0),
        # A knee between: RA -0.1..0 at SA 1, 0..0.6 at SA 0.5, 0.6..1 at SA 0.
        ([(1, 0), (0.5, 0.6), (0, 1)], 1.1 * 0.1 + 0.6 * 0.6 + 0.1 * 0.4),
        # A dominated point adds nothing, nor does one below the reference.
        ([(1, 0), (0.5, 0.6), (0, 1), (0.4, 0.5), (2, -0.2)], 1.1 * 0.1 + 0.6 * 0.6 + 0.1 * 0.4),
        ([(-0.2, -0.2)], 0.0),
    ],
)
def test_the_score_is_the_hypervolume_worked_out_by_hand(pairs, score):
    assert frontier_score(points(*pairs), UNIT) == pytest.approx(score)


def test_a_frame_scales_both_axes():
    frame = Frame(sa_low=0.8, sa_high=0.9, ra_low=0.1, ra_high=0.5)
    # (0.85, 0.3) is the middle of the frame.
    assert frontier_score(points((0.85, 0.3)), frame) == pytest.approx(0.6 * 0.6)
    assert frontier_score(points((1.0, 1.0)), loose_frame(10)) == pytest.approx(1.21)


def test_the_ratio_uses_the_frame_of_the_dedicated_ends_and_their_lambdas_alone():
    assert dedicated_frame(REALISTIC) == Frame(sa_low=0.80, sa_high=0.93, ra_low=0.00, ra_high=0.50)
    assert frontier_ratio(REALISTIC, REALISTIC) == pytest.approx(1.0)
    # In that frame (0.865, 0.25) is (0.5, 0.5).
    dedicated = [REALISTIC[0], {"lam": 0.5, "sa": 0.865, "ra": 0.25}, REALISTIC[-1]]
    reached = [{"lam": lam, "sa": 0.865, "ra": 0.25} for lam in (0.0, 0.5, 1.0)]
    extra = {"lam": 0.7, "sa": 0.99, "ra": 0.99}
    assert frontier_ratio([*reached, extra], dedicated) == pytest.approx(0.36 / (0.11 + 0.6 * 0.5 + 0.1 * 0.5))


def test_a_constant_network_scores_under_0_35_on_a_realistic_front():
    frame = dedicated_frame(REALISTIC)
    both = controls(REALISTIC)
    assert list(both) == ["dedicated lambda = 0 at every lambda", "dedicated lambda = 1 at every lambda"]
    for constant in both.values():
        assert [p["lam"] for p in constant] == [0.0, 0.1, 0.3, 1.0]
        assert frontier_score(constant, frame) == pytest.approx(0.11)
        assert frontier_ratio(constant, REALISTIC) < 0.35
    # The front itself: strips of RA at -0.1..0, ..0.8, ..0.9, ..1.0 of the frame, as wide as the SA reached.
    widths = [(sa - 0.80) / 0.13 + 0.1 for sa in (0.93, 0.88, 0.85, 0.80)]
    expected = sum(w * h for w, h in zip(widths, (0.1, 0.8, 0.1, 0.1), strict=True))
    assert frontier_score(REALISTIC, frame) == pytest.approx(expected)


def test_the_best_network_that_ignores_lambda_is_the_knee():
    # In the frame (0.88, 0.40) is (8/13, 0.8) and (0.85, 0.45) is (5/13, 0.9).
    assert best_constant(REALISTIC) == (0.1, pytest.approx((8 / 13 + 0.1) * 0.9))


@pytest.mark.parametrize(
    ("dedicated", "message"),
    [
        (REALISTIC[:-1], "needs dedicated networks at lambda 0 and 1, got 0, 0.1, 0.3"),
        (points((0.9, 0.1), (0.9, 0.5)), "no trade-off in SA: .* 90.0% at lambda 0 and 90.0% at lambda 1"),
        (points((0.9, 0.5), (0.8, 0.4)), "no trade-off in RA: .* 50.0% at lambda 0 and 40.0% at lambda 1"),
    ],
)
def test_ends_that_make_no_frame_are_named(dedicated, message):
    with pytest.raises(UserError, match=message):
        dedicated_frame(dedicated)


def test_a_lambda_that_was_not_measured_is_named():
    with pytest.raises(UserError, match=r"lambda 0.3 was not measured; .* 0, 0.1, 0.3, 1"):
        frontier_ratio([p for p in REALISTIC if p["lam"] != 0.3], REALISTIC)


def test_the_pareto_front_keeps_what_nothing_beats_by_increasing_sa():
    front = pareto_front(points((1, 0), (0.5, 0.6), (0.4, 0.6), (0, 1), (0.2, 0.2)))
    assert [(p["sa"], p["ra"]) for p in front] == [(0, 1), (0.5, 0.6), (1, 0)]


def test_the_area_between_two_curves_is_what_one_alone_dominates():
    # [-0.1, 1] x [-0.1, 0.5] against [-0.1, 0.5] x [-0.1, 1]: 0.5 x 0.6 on either side.
    one, two = points((1, 0.5)), points((0.5, 1))
    assert area_between(one, two, UNIT) == pytest.approx(2 * 0.5 * 0.6)
    assert area_between(one, [*one, {"sa": 0.4, "ra": 0.4}], UNIT) == pytest.approx(0.0)


def test_monotonicity_counts_the_steps_that_go_the_right_way():
    assert monotonicity(REALISTIC) == {"sa": 1.0, "ra": 1.0}
    # By lambda: SA 0.9, 0.8, 0.85, 0.7 rises once in three; RA 0.1, 0.4, 0.4, 0.3 falls once.
    mixed = points((0.9, 0.1), (0.8, 0.4), (0.85, 0.4), (0.7, 0.3))
    assert monotonicity(mixed[::-1]) == {"sa": pytest.approx(2 / 3), "ra": pytest.approx(2 / 3)}


def test_means_and_gaps_over_seeds():
    ours = mean_points([points((0.9, 0.1), (0.7, 0.5)), points((0.8, 0.1), (0.7, 0.3))])
    assert ours[0] == {"lam": 0.0, "sa": pytest.approx(0.85), "sa_std": pytest.approx(0.5**0.5 / 10), "ra": 0.1,
                       "ra_std": 0.0, "seeds": 2}  # fmt: skip
    theirs = mean_points([points((0.9, 0.1), (0.8, 0.6))] * 3)
    first, last = gaps(ours, theirs)
    assert first == {"lam": 0.0, "sa_gap": pytest.approx(0.05), "sa_gap_se": pytest.approx(0.05),
                     "ra_gap": pytest.approx(0.0), "ra_gap_se": pytest.approx(0.0)}  # fmt: skip
    assert (last["sa_gap"], last["ra_gap"]) == (pytest.approx(0.1), pytest.approx(0.2))
    alone = gaps(ours, mean_points([points((0.9, 0.1), (0.8, 0.6))]))
    assert alone[0]["sa_gap_se"] is None
