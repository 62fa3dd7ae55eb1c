"""SA and RA of a conditional network at any lambda, under any attacks, to the standard of the field.

specs.py       attacks and their names             surface.py     what an attacker sees of the network
iterated.py    our gradient attacks                autoattack.py  AutoAttack's, from its authors' package
loop.py        cells x shards over ranks           unit_log.py    what is finished, for after a kill
summary.py     points with intervals, files        checks.py      whether the numbers can be believed
choice.py      lambda for a wanted SA or RA
"""

from oat_dist.evaluation.loop import Outcome, Plan, evaluate, run_plan
from oat_dist.evaluation.specs import AttackList, EvaluationAttack, parse_attacks

__all__ = ["AttackList", "EvaluationAttack", "Outcome", "Plan", "evaluate", "parse_attacks", "run_plan"]
