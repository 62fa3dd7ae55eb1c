"""Names of attacks, and what they stand for."""

import pytest

from oat_dist.errors import UserError
from oat_dist.evaluation import AttackList, parse_attacks
from oat_dist.evaluation.specs import EXTERNAL


def parse(*names, norm="linf", **settings):
    return parse_attacks(names, eps=0.1, norm=norm, **settings)


@pytest.mark.parametrize(
    ("name", "kind", "steps", "restarts"),
    [("pgd-50", "pgd", 50, 1), ("cw-20x5", "cw", 20, 5), ("mim-10", "mim", 10, 1), ("pgd-t-7x2", "pgd-t", 7, 2),
     ("square-1000", "square", 1000, 1), ("apgd-ce", "apgd-ce", 100, 1), ("square", "square", 5000, 1)],
)  # fmt: skip
def test_a_name_is_read_and_written_the_same(name, kind, steps, restarts):
    attack = parse(name)
    assert (attack.kind, attack.steps, attack.restarts, attack.name) == (kind, steps, restarts, name)
    assert attack.to_dict()["name"] == name and attack.to_dict()["success"] == "any iterate"


def test_a_name_without_steps_takes_those_of_the_command_line():
    assert parse("pgd", steps=7, restarts=3).name == "pgd-7x3"
    assert parse("pgd-5", steps=7, restarts=3).name == "pgd-5x3"
    assert parse("mim-10").length == pytest.approx(0.01) and parse("mim-10", step_size=0.03).length == 0.03
    assert parse("pgd-t-10", targets=3).to_dict()["targets"] == 3


def test_autoattack_is_its_four_attacks_in_order_and_goes_with_others():
    several = parse("autoattack", "pgd-50")
    assert isinstance(several, AttackList) and several.name == "autoattack+pgd-50"
    assert [part.name for part in several.parts] == ["apgd-ce", "apgd-t", "fab-t", "square", "pgd-50"]
    assert [part["name"] for part in several.to_dict()["attacks"]] == [*EXTERNAL, "pgd-50"]
    in_l1 = parse("autoattack", norm="l1").parts
    assert [(part.name, part.restarts) for part in in_l1][:2] == [("apgd-ce", 5), ("apgd-t", 1)]


@pytest.mark.parametrize(
    ("names", "norm", "message"),
    [(["fgsm-1"], "linf", "--attack=fgsm-1: unknown; expected pgd-STEPS"), (["pgd-"], "linf", "--attack=pgd-: unknown"),
     (["pgd-20x"], "linf", "unknown"), (["autoattack-5"], "linf", "unknown"),
     (["pgd-0"], "linf", "--attack=pgd-0: steps and restarts must be at least 1"),
     (["autoattack", "cw-20"], "l1", "--attack=cw-20: is not defined in l1; l1 is offered by autoattack, apgd-ce"),
     (["pgd-20"], "l7", "--norm=l7: unknown; expected one of linf, l2, l1")],
)  # fmt: skip
def test_a_mistake_is_named(names, norm, message):
    with pytest.raises(UserError, match=message):
        parse(*names, norm=norm)
