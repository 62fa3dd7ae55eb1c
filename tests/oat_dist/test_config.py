"""Configuration: precedence, one validator for all sources, errors that name the dotted key."""

import ast
import dataclasses
import pathlib
import typing

import pytest

from oat_dist.config import ConditioningConfig, Config, ModelConfig, OptimConfig, fingerprint, to_dict
from oat_dist.config_io import from_dict, load_config, read_config, write_config
from oat_dist.errors import UserError
from oat_dist.models import MODELS

WRONG = {
    "--optim.lrr=1": "optim.lrr: unknown key; did you mean optim.lr?",
    "--optim.lr=abc": "optim.lr=abc: expected a number",
    "--optim.lr=-1": "optim.lr=-1.0: must be positive",
    "--optim.lr=.nan": "optim.lr=nan: must be positive",
    "--optim.epochs=1.5": "optim.epochs=1.5: expected an integer",
    "--optim.batch_size=0": "optim.batch_size=0: must be at least 1",
    "--model.name=resnet9": "model.name=resnet9: expected one of resnet8, wrn10_2",
    "--model.dropout=1": "model.dropout=1.0: must lie in [0, 1)",
    "--model.dropout=0.3": "model.dropout=0.3: must be 0 for model.name=resnet8; only the wide",
    "--model.init=xavier": "model.init=xavier: expected one of pytorch, kaiming",
    "--engine.zero_stage=3": "engine.zero_stage=3: expected one of 0, 1, 2",
    "--optim.nesterov=3": "optim.nesterov=3: expected true or false",
    "--conditioning.knots=abc": "conditioning.knots=abc: expected a list of numbers, e.g. [0, 0.5, 1] or null",
    "--attack.steps=0": "attack.steps=0: ",
    "--attack.eps_255=-1": "attack.eps_255=-1.0: ",
    "--conditioning.lambdas=[0,1.5]": "conditioning.lambdas=(0.0, 1.5): every lambda must lie in [0, 1]",
    "--conditioning.lambdas=[0.2,1]": "conditioning.lambdas=(0.2, 1.0): conditioning.norm=dual needs mass at",
    "--conditioning.lambdas=[0]": "conditioning.lambdas=(0.0,): conditioning.norm=dual needs lambdas > 0",
    "--conditioning.lambdas=[0,1,0.5]": "conditioning.lambdas=(0.0, 1.0, 0.5): lambdas must increase",
    "--conditioning.weights=[1,2]": "conditioning.weights=(1.0, 2.0): must be 6 positive numbers",
    "--conditioning.distribution=uniform": "conditioning.knots=None: must be given",
    "--conditioning.encoding_width=3": "conditioning.encoding_width=3: must be at least the number of codes, 6",
    "--evaluation.lambdas=[-0.1]": "evaluation.lambdas=(-0.1,): every lambda must lie in [0, 1]",
    "--model.widths=[0.5,0.25,1]": "model.widths=(0.5, 0.25, 1.0): must increase and lie in (0, 1]",
    "--model.widths=[0,1]": "model.widths=(0.0, 1.0): must increase and lie in (0, 1]",
    "--model.widths=[0.5]": "model.widths=(0.5,): must end with 1, the whole network",
    "--model.widths=[]": "model.widths=(): must end with 1",
    "--model.channels=[0]": "model.channels=(0,): must be positive",
    "--model.width_rule=sandwich": "model.width_rule='sandwich': needs three model.widths or more, there are 1",
    "--model.width_heads=true": "model.width_heads=True: needs several model.widths",
    "--loss.distill_widths=true": "loss.distill_widths=True: needs several model.widths",
    "--loss.width_weights=[0.5,1]": "loss.width_weights=(0.5, 1.0): must be one number for each of the 1 model.widths",
    "--loss.width_weights=[0]": "loss.width_weights=(0.0,): must be positive",
    "--evaluation.noise_draws=3": "evaluation.noise_draws=3: needs conditioning.kind=float",
    "--conditioning.noise_start=0.1": "conditioning.noise_start=0.1: does not go with conditioning.kind=film; leave it",
    "--conditioning.kind=float": "conditioning.film='mlp': must be none with conditioning.kind=float",
    "--conditioning.film_rank=0": "conditioning.film_rank=0: must be at least 1",
    "--optim.schedule=onecycle": "optim.warmup_share=0.0: ",
    "--optim.momentum=0": "optim.nesterov=True: ",
    "--loss.settings.beta=x": "loss.settings.beta=x: expected a number",
    "--loss.settings.beta=true": "loss.settings.beta=true: expected a number",
    "--loss.settings.beta=null": "loss.settings.beta=null: expected a number",
    "--loss.settings={beta: x}": "loss.settings=x: expected numbers by name, e.g. {beta: 6}",
    "--loss.settings=3": "loss.settings=3: expected numbers by name",
    "--loss.sttings=3": "loss.sttings: unknown key; did you mean loss.settings?",
    "--name=a/b": "name='a/b': ",
    "--engine.accumulation=200": "optim.batch_size=128: must be at least engine.accumulation=200",
}


@pytest.mark.parametrize("argument", WRONG)
def test_a_wrong_setting_is_one_line_that_names_the_key(argument):
    with pytest.raises(UserError) as error:
        load_config([argument])
    assert str(error.value).startswith(WRONG[argument])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings, message",
    [({"film_start": "paper"}, "conditioning.film_start='paper': does not go with conditioning.kind=float"),
     ({"encoding": "fourier"}, "conditioning.encoding='fourier': does not go with conditioning.kind=float"),
     ({"lambdas": (0.0, 0.5, 1.0)}, r"conditioning.lambdas=\(0.0, 0.5, 1.0\): must be discrete, \[0, 1\], with"),
     ({"distribution": "uniform"}, "conditioning.distribution='uniform': must be discrete"),
     ({"norm": "shared_statistics"}, "conditioning.norm='shared_statistics': must be dual or single with"),
     ({"kind": "film", "film": "table", "encoding": "fourier"}, "conditioning.encoding='fourier': must be onehot, dct"),
     ({"kind": "film", "film": "table", "film_start": "paper"}, "conditioning.film_start='paper': must be identity"),
     ({"kind": "film", "norm": "shared_statistics", "lambdas": (0.2, 1.0)}, "norm=shared_statistics needs mass at")],
)  # fmt: skip
def test_settings_of_another_kind_of_conditioning_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        ConditioningConfig(**{"kind": "float", "film": "none", "lambdas": (0.0, 1.0)} | settings)


def test_a_point_mass_of_zero_with_dual_norm_names_the_zero_share():
    with pytest.raises(UserError, match=r"conditioning.zero_share=0.0: conditioning.norm=dual needs mass"):
        ConditioningConfig(distribution="uniform", encoding="fourier", zero_share=0.0)


FILES = {
    "optim:\n  lrr: 3\n": "optim.lrr: unknown key in .*; did you mean optim.lr?",
    "optm:\n  lr: 3\n": "optm: unknown key in .*; did you mean optim?",
    "optim: 3\n": "optim=3: in .* this is a section with keys optimizer, lr",
    "optim: [\n": "--config .*: not valid YAML",
    "- 1\n": "--config .*: expected sections and keys, got list",
    "optim:\n  lr: fast\n": "optim.lr=fast: expected a number",
    "loss:\n  settings: {beta: x}\n": "loss.settings.beta=x: expected a number",
    "loss:\n  settings: {beta: {a: 1}}\n": "loss.settings.beta={'a': 1}: expected a number",
    "loss:\n  settings: 3\n": "loss.settings=3: in .* this is a section of names and values",
}


@pytest.mark.parametrize("text", FILES)
def test_a_wrong_configuration_file_is_one_line_that_names_the_key(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=FILES[text]) as error:
        load_config(["--config", str(path)])
    assert "\n" not in str(error.value)


def test_a_missing_configuration_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--config .*nothing.yaml: No such file"):
        load_config([f"--config={tmp_path}/nothing.yaml"])


def test_defaults_give_way_to_the_file_it_to_the_command_line_and_that_to_the_sample(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("seed: 1\nname: file\noptim: {lr: 0.2, epochs: 3, batch_size: 64}\n")
    config = load_config(
        ["--config", str(path), "--optim.epochs=4", "--optim.batch_size=32"],
        overrides={"optim.batch_size": 16, "conditioning.lambdas": [0.0, 0.5]},
    )
    assert config.optim == OptimConfig(lr=0.2, epochs=4, batch_size=16)
    assert (config.seed, config.name, config.conditioning.lambdas) == (1, "file", (0.0, 0.5))


def test_a_sample_out_of_range_is_refused_like_any_other_setting():
    with pytest.raises(UserError, match=r"optim.lr=-1.0: must be positive"):
        load_config([], overrides={"optim.lr": -1})


def test_settings_of_an_objective_come_from_the_file_the_command_line_and_the_sample(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("loss: {robust: llr, settings: {linearity: 3, gradient: 2.5}}\n")
    config = load_config(
        ["--config", str(path), "--loss.settings.gradient", "1e-3"], overrides={"loss.settings.weight": 2}
    )
    assert config.loss.settings == {"linearity": 3.0, "gradient": 0.001, "weight": 2.0}
    write_config(config, path)
    assert read_config(path) == config
    assert fingerprint(config) != fingerprint(load_config(["--loss.robust=llr"]))


def test_a_written_configuration_reads_back_equal(tmp_path):
    config = load_config(["--conditioning.weights=[1,1,1,1,1,2]", "--attack.step_size_255=2.5", "--seed=7"])
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config
    assert from_dict(to_dict(config)) == config


def test_print_config_shows_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        load_config(["--optim.lr=0.3", "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "lr: 0.3" in printed and "zero_stage: 0" in printed


def test_the_fingerprint_follows_what_is_computed_and_nothing_else():
    base = Config()
    assert fingerprint(base) == fingerprint(dataclasses.replace(base, name="other", output_dir="elsewhere"))
    assert fingerprint(base) != fingerprint(dataclasses.replace(base, seed=1))
    assert fingerprint(base) != fingerprint(dataclasses.replace(base, optim=OptimConfig(lr=0.2)))


def test_every_named_network_can_be_built():
    assert set(typing.get_args(typing.get_type_hints(ModelConfig)["name"])) == set(MODELS)


def test_every_field_says_what_it_is():
    folder = pathlib.Path(load_config.__code__.co_filename).parent
    body = [node for name in ("config", "settings") for node in ast.parse((folder / f"{name}.py").read_text()).body]
    for cls in (node for node in body if isinstance(node, ast.ClassDef)):
        for field, after in zip(cls.body, cls.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{cls.name}.{field.target.id} has no docstring"
