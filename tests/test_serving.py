"""The example of docs/serving.md works as it stands there."""

import json
import pathlib
import re

import pytest
import torch

import oat_dist
from tests.oat_dist.test_deployment import assert_close, images, make, make_run

DOCUMENT = pathlib.Path(__file__).parents[1] / "docs/serving.md"


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """A run whose curve was measured."""
    run = make_run(digits, tmp_path_factory.mktemp("runs"), make("resnet8"))
    points = [
        {"lam": 0.0, "sa": 0.9, "ra": 0.1},
        {"lam": 0.2, "sa": 0.8, "ra": 0.4},
        {"lam": 1.0, "sa": 0.6, "ra": 0.5},
    ]
    (run / "frontier.json").write_text(json.dumps({"points": points}))
    return run


def test_the_example_answers_every_request_at_the_lambda_of_its_own_threat(run):
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    example = {}
    exec(code.replace("runs/<run>", str(run)), example)
    assert [example["choose_lambda"](threat) for threat in (0, 0.1, 0.5, 0.9)] == [0.0, 0.0, 0.2, 1.0]
    x, threats = images(4, torch.float32, channels=1), [0.0, 0.5, 1.0, 0.1]
    found = example["answer"](x, threats)
    assert [answer["lam"] for answer in found] == [0.0, 0.2, 1.0, 0.0]
    network = oat_dist.load_run(run)[1]
    for at, answer in enumerate(found):
        confidence, label = network.predict(x[at : at + 1], answer["lam"]).softmax(1).max(1)
        assert answer["class"] == example["model"].classes[label.item()]
        assert_close(torch.tensor(answer["confidence"]), confidence[0], 1e-5)
