"""Every objective against numbers worked out by hand, its gradients against finite differences, and special cases."""

import math

import pytest
import torch
import torch.nn.functional as F

from oat_dist.errors import UserError
from oat_dist.losses import METHODS, ROBUST, Examples, Objective
from oat_dist.losses.objective import direction

LN2 = math.log(2)
# One image of class 0: probabilities (1/2, 3/10, 1/5) clean and (1/4, 3/5, 3/20) adversarial.
CLEAN, ADVERSARIAL = (0.5, 0.3, 0.2), (0.25, 0.6, 0.15)
KL = 0.5 * math.log(0.5 / 0.25) + 0.3 * math.log(0.3 / 0.6) + 0.2 * math.log(0.2 / 0.15)
MINMAX = ("pgd_at", "min_max", "fgsm_rs", "n_fgsm")


def double(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def loss(name: str, *, settings=None, **fields) -> torch.Tensor:
    objective = ROBUST[name]
    return objective.loss(Examples(settings={**objective.settings, **(settings or {})}, **fields))


def one_image(name: str, label=0, shift=0.0, settings=None, **fields) -> float:
    """The loss of the image above; a shift of the clean logits leaves its probabilities as they are."""
    logits = {"clean_logits_AK": double(CLEAN).log() + shift, "adversarial_logits_AK": double(ADVERSARIAL).log()}
    return loss(name, label_A=torch.tensor([label]), settings=settings, **logits, **fields).item()


@pytest.mark.parametrize("name", MINMAX)
def test_cross_entropy_on_the_adversarial_image(name):
    assert one_image(name) == pytest.approx(2 * LN2, rel=1e-12)


def test_fgsm_weighs_clean_and_adversarial_cross_entropy_by_alpha():
    assert one_image("fgsm") == pytest.approx(0.5 * LN2 + 0.5 * 2 * LN2, rel=1e-12)
    assert one_image("fgsm", settings={"alpha": 0.25}) == pytest.approx(1.75 * LN2, rel=1e-12)


def test_trades_is_clean_cross_entropy_and_divergence():
    assert pytest.approx(0.196166, abs=1e-6) == KL
    assert one_image("trades", shift=3.0) == pytest.approx(LN2 + 6 * KL, rel=1e-12)


def test_logit_pairing_is_the_mean_cross_entropy_and_the_squared_distance_of_logits():
    # Logits ln(1/2) + 3 and ln(1/4) differ by ln 2 + 3, and so on.
    squared = (LN2 + 3) ** 2 + (3 - LN2) ** 2 + (3 + math.log(4 / 3)) ** 2
    assert one_image("alp", shift=3.0) == pytest.approx(1.5 * LN2 + 0.5 * squared, rel=1e-12)
    assert one_image("alp", shift=3.0, settings={"weight": 0.0}) == pytest.approx(1.5 * LN2, rel=1e-12)


@pytest.mark.parametrize(
    ("label", "bce", "wrong"),
    [(0, -math.log(0.25) - math.log(1 - 0.6), 0.5), (1, -math.log(0.6) - math.log(1 - 0.25), 0.7),
     (2, -math.log(0.15) - math.log(1 - 0.6), 0.8)],
)  # fmt: skip
def test_mart_is_its_boosted_cross_entropy_and_a_weighted_divergence(label, bce, wrong):
    assert one_image("mart", label, shift=-2.0) == pytest.approx(bce + 5 * KL * wrong, rel=1e-12)


def test_mart_without_its_weights_is_boosted_cross_entropy_and_divergence():
    # The clean probability of the label is e^-60: the weight 1 - p is 1.
    clean, adversarial = double((-60.0, 0.0, LN2)), double(ADVERSARIAL).log()
    divergence = math.log(1 / 3 / 0.6) / 3 + math.log(2 / 3 / 0.15) * 2 / 3
    got = loss("mart", label_A=torch.tensor([0]), clean_logits_AK=clean, adversarial_logits_AK=adversarial)
    assert got.item() == pytest.approx(-math.log(0.25) - math.log(0.4) + 5 * divergence, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mart_is_exact_where_a_wrong_class_is_certain(dtype):
    # log(1 - p) of the rival with logit 90 is that of the others, log(e^0 + e^0) - 90.
    logits = torch.tensor([[0.0, 90.0, 0.0]], dtype=dtype, requires_grad=True)
    fields = {"label_A": torch.tensor([0]), "adversarial_logits_AK": logits}
    got = loss("mart", clean_logits_AK=torch.zeros_like(logits), settings={"beta": 0.0}, **fields)
    assert got.item() == pytest.approx(90 + (90 - LN2), rel=1e-6)
    got.backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.5, 2.0, -0.5]], dtype=dtype))


def softplus(z: float) -> float:
    return math.log(1 + math.exp(z))


def local_linearity(settings=None) -> tuple[float, float, float, float]:
    """(loss, l, d' grad l, g) of one pixel x = 1, x' = 1.5 under logits (x^2, 0): l(x) = log(1 + e^(-x^2))."""
    x, x_adv = (torch.full((1, 1, 1, 1), v, dtype=torch.float64) for v in (1.0, 1.5))
    clean, adversarial = (torch.stack(((i**2).flatten(), torch.zeros(1).double()), 1) for i in (x, x_adv))
    gradient = -2 / (1 + math.e)
    got = loss(
        "llr", label_A=torch.tensor([0]), clean_logits_AK=clean, adversarial_logits_AK=adversarial, settings=settings,
        clean_image_ACHW=x, adversarial_image_ACHW=x_adv, clean_gradient_ACHW=torch.full_like(x, gradient),
    )  # fmt: skip
    slope = 0.5 * gradient
    return got.item(), softplus(-1), slope, abs(softplus(-2.25) - softplus(-1) - slope)


def test_local_linearity_is_clean_loss_distance_from_linear_and_slope():
    got, clean, slope, distance = local_linearity()
    assert got == pytest.approx(clean + 4 * distance + 3 * abs(slope), rel=1e-12)
    got, *_ = local_linearity({"weight": 0.5})
    assert got == pytest.approx(clean + 0.5 * (4 * distance + 3 * abs(slope)), rel=1e-12)


def test_local_linearity_without_its_first_term_is_clean_loss_and_slope():
    got, clean, slope, _ = local_linearity({"linearity": 0.0})
    assert got == pytest.approx(clean + 3 * abs(slope), rel=1e-12)
    assert local_linearity({"weight": 0.0})[0] == pytest.approx(clean, rel=1e-14)


def aligned(at_clean, at_noisy, settings=None) -> float:
    """Gradient alignment for two pixels, from the gradients there."""
    gradients = [double(v).view(1, 2, 1, 1) for v in (at_clean, at_noisy)]
    return loss(
        "grad_align", label_A=torch.tensor([0]), adversarial_logits_AK=double((0.0, LN2)), settings=settings,
        clean_gradient_ACHW=gradients[0], noisy_gradient_ACHW=gradients[1],
    ).item()  # fmt: skip


def test_gradient_alignment_is_adversarial_loss_and_one_minus_the_cosine():
    cosine = (2 * 2 + 1 * 2) / (math.sqrt(5) * math.sqrt(8))
    assert aligned((2.0, 1.0), (2.0, 2.0)) == pytest.approx(math.log(3) + 0.2 * (1 - cosine), rel=1e-12)
    assert aligned((2.0, 1.0), (-1.0, 2.0), {"weight": 0.5}) == pytest.approx(math.log(3) + 0.5, rel=1e-12)


def test_gradient_alignment_leaves_out_images_whose_gradient_is_zero():
    assert aligned((0.0, 0.0), (2.0, 2.0)) == pytest.approx(math.log(3), rel=1e-12)


# Adversarial and clean features of five images; classes 0, 0, 1, 1, 0.
FEATURES = double((3.0, 4.0), (1.0, 0.0), (0.0, 2.0), (4.0, 3.0), (0.0, 0.0))
CLEAN_FEATURES = double((1.0, 0.0), (0.0, 2.0), (3.0, 4.0), (5.0, 0.0), (0.0, 1.0))
CLASSES = torch.tensor([0, 0, 1, 1, 0])


def triplets(settings=None, features=FEATURES, clean=CLEAN_FEATURES, label=CLASSES) -> torch.Tensor:
    logits = torch.zeros(len(label), 2, dtype=torch.float64)
    return loss(
        "tla", label_A=label, adversarial_logits_AK=logits, settings=settings,
        adversarial_features_AF=features, clean_features_AF=clean,
    )  # fmt: skip


def test_triplets_take_the_next_of_the_class_and_the_nearest_of_another():
    # (cosine to the positive, cosine to the negative, mean square of the three):
    rows = [
        (0.8, 1.0, 25 + 4 + 25),  # (3, 4): positive (0, 2), negatives (3, 4) with 1 and (5, 0) with 0.6
        (0.0, 1.0, 1 + 1 + 25),  # (1, 0): positive (0, 1), negatives 0.6 and 1
        (0.0, 1.0, 4 + 25 + 4),  # (0, 2): positive (5, 0); negatives (1, 0), (0, 2), (0, 1): the first of the two
        (0.96, 0.8, 25 + 25 + 1),  # (4, 3): positive (3, 4) with 24/25; negatives 0.8, 0.6, 0.6
        (0.0, 0.0, 0 + 1 + 25),  # no direction: at distance 1 from all, the first of another class
    ]
    expected = [LN2 + 2 * max(n - p + 0.03, 0) + 0.002 * square / 2 for p, n, square in rows]
    assert triplets().tolist() == pytest.approx(expected, rel=1e-12)


def test_an_image_alone_in_its_class_is_its_own_positive():
    got = triplets({"norm": 0.0}, FEATURES[:3], CLEAN_FEATURES[:3], torch.tensor([0, 0, 1]))
    assert got[2].item() == pytest.approx(LN2 + 2 * (1.0 - 0.8 + 0.03), rel=1e-12)


def test_triplets_without_weights_leave_adversarial_cross_entropy():
    assert triplets({"triplet": 0.0, "norm": 0.0}).tolist() == pytest.approx([LN2] * 5, rel=1e-14)


def test_triplets_of_one_class_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"^optim.batch_size: all 5 attacked images of a micro-batch are of one cla.*$"):
        triplets(label=torch.zeros(5, dtype=torch.int64))


def test_a_feature_vector_without_a_direction_gets_no_gradient():
    v = double((0.0, 0.0), (3.0, 4.0)).requires_grad_(True)
    assert direction(v)[0].tolist() == [0, 0] and direction(v)[1].tolist() == pytest.approx([0.6, 0.8])
    (grad,) = torch.autograd.grad(direction(v)[:, 0].sum(), v)
    assert grad[0].tolist() == [0, 0] and grad[1].tolist() == pytest.approx([16 / 125, -12 / 125])


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("name", sorted({*ROBUST} - {"llr", "grad_align"}))
def test_gradients_to_logits_and_features_are_those_of_finite_differences(name, smoothing):
    gen = torch.Generator().manual_seed(5)
    label = torch.tensor([0, 2, 1, 2, 0])

    def draw(width):
        return torch.randn(5, width, generator=gen, dtype=torch.float64, requires_grad=True)

    def fn(clean, adversarial, clean_features, features):
        return loss(
            name, label_A=label, label_smoothing=smoothing, clean_logits_AK=clean, adversarial_logits_AK=adversarial,
            clean_features_AF=clean_features, adversarial_features_AF=features,
        )  # fmt: skip

    assert torch.autograd.gradcheck(fn, (draw(4), draw(4), draw(6), draw(6)))


@pytest.mark.parametrize("name", ["llr", "grad_align"])
def test_gradients_to_weights_through_input_gradients_are_those_of_finite_differences(name):
    gen = torch.Generator().manual_seed(6)
    x, x_adv, noisy = torch.rand(3, 3, 1, 2, 2, generator=gen, dtype=torch.float64)
    first, second = (torch.randn(*s, generator=gen, dtype=torch.float64) for s in ((5, 4), (3, 5)))

    def fn(first, second):
        images, label = [image.clone().requires_grad_(True) for image in (x, noisy)], torch.tensor([0, 2, 1])
        clean, other, adversarial = (torch.tanh(i.flatten(1) @ first.T) @ second.T for i in (*images, x_adv))
        total = F.cross_entropy(clean, label, reduction="sum") + F.cross_entropy(other, label, reduction="sum")
        at_clean, at_noisy = torch.autograd.grad(total, images, create_graph=True)
        return loss(
            name, label_A=label, clean_logits_AK=clean, adversarial_logits_AK=adversarial, noisy_logits_AK=other,
            clean_image_ACHW=x, noisy_image_ACHW=noisy, adversarial_image_ACHW=x_adv,
            clean_gradient_ACHW=at_clean, noisy_gradient_ACHW=at_noisy,
        )  # fmt: skip

    assert torch.autograd.gradcheck(fn, (first.requires_grad_(True), second.requires_grad_(True)))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__.rpartition(".")[2])
def test_every_file_registers_the_objectives_of_its_name(method):
    stem = method.__name__.rpartition(".")[2]
    registered = [o for o in vars(method).values() if isinstance(o, Objective) and ROBUST[o.name] is o]
    own = [objective for objective in registered if objective.name.startswith(stem)]
    assert own and (stem == "rst" or [objective.name for objective in own] == [stem])
    for objective in own:
        assert objective.attack.single_step == (objective.attack.steps == 1)
        author = objective.source.partition(" et al.")[0].partition(" and ")[0]
        assert author.lower() in method.__doc__.lower()
