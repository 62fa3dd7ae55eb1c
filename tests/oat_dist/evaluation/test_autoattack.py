"""AutoAttack through our adapter is AutoAttack."""

import pytest
import torch
from pyautoattack import AutoAttack

from oat_dist.evaluation import autoattack, parse_attacks
from oat_dist.evaluation.ball import Ball
from oat_dist.evaluation.surface import Surfaces
from oat_dist.robustbench import FixedLambda
from tests.oat_dist.evaluation.networks import Linear, linear_images

# Long enough for every attack to break something; the package's own settings otherwise.
STEPS = {"apgd-ce": 4, "apgd-t": 4, "fab-t": 4, "square": 30}
EPS = {"linf": 0.03, "l2": 0.15, "l1": 0.6}


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_every_attack_breaks_the_images_that_the_package_breaks_in_its_standard_version(norm):
    network = Linear(5).eval()
    batch = linear_images(network, 60)
    x, label = batch.image_NCHW, batch.label_N
    model = FixedLambda(network, 0.5)
    package = AutoAttack(model, norm={"linf": "Linf"}.get(norm, norm.upper()), eps=EPS[norm], seed=7)
    # As `apgd-ce-4` differs from `apgd-ce`.
    for attack in (package.apgd, package.apgd_targeted):
        steps = STEPS["apgd-ce"]
        attack.n_iter = attack.n_iter_orig = steps
        attack.n_iter_2, attack.n_iter_min, attack.size_decr = max(int(0.22 * steps), 1), 1, 1
    # Five classes have four wrong ones; the package would ask for more and fail.
    package.apgd_targeted.n_target_classes = package.fab.n_target_classes = 4
    package.fab.n_iter, package.square.n_queries = STEPS["fab-t"], STEPS["square"]
    for kind, steps in STEPS.items():
        torch.manual_seed(0)
        package.attacks_to_run = [kind]
        x_adv, _ = package.run_standard_evaluation(x, label, batch_size=len(x))
        theirs = model(x_adv).argmax(1) != label
        (ours,) = parse_attacks([f"{kind}-{steps}"], eps=EPS[norm], norm=norm).parts
        ours = type(ours)(**{**vars(ours), "restarts": 5 if (kind, norm) == ("apgd-ce", "l1") else 1})
        clean = model(x).argmax(1) == label
        state = torch.random.get_rng_state()
        broken = autoattack.break_images(
            Surfaces(network, (0.5,)).fixed(0.5), x[clean], label[clean], ours, seed=7, ball=Ball(norm, EPS[norm])
        )
        assert torch.equal(broken, theirs[clean]) and broken.any(), kind
        assert torch.equal(torch.random.get_rng_state(), state)


def test_the_standard_settings_are_those_of_the_package():
    package = AutoAttack(torch.nn.Identity(), norm="Linf", eps=0.1, version="standard")
    attacks = parse_attacks(["autoattack"], eps=0.1, norm="linf").parts
    assert [attack.kind for attack in attacks] == package.attacks_to_run
    steps = [package.apgd.n_iter, package.apgd_targeted.n_iter, package.fab.n_iter, package.square.n_queries]
    assert [attack.steps for attack in attacks] == steps
    in_l1 = AutoAttack(torch.nn.Identity(), norm="L1", eps=0.1, version="standard")
    assert in_l1.apgd.n_restarts == parse_attacks(["apgd-ce"], eps=0.1, norm="l1").restarts
    assert in_l1.apgd_targeted.n_target_classes == autoattack._TARGETS["l1"]
    assert package.apgd_targeted.n_target_classes == autoattack._TARGETS["linf"]
    assert package.fab.n_target_classes == in_l1.fab.n_target_classes == autoattack._FAB_TARGETS
