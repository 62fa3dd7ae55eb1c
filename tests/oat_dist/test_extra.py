"""Extra images: their stream and positions, batches that do not depend on reader, ranks or a resume, their weight."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from oat_dist import runs
from oat_dist.conditioning import LambdaSampler
from oat_dist.config import AttackConfig, Config, DataConfig, EngineConfig, LossConfig, OptimConfig, fingerprint
from oat_dist.cost import training_cost
from oat_dist.data import TrainLoader, evaluation_batches, open_extra, prepare
from oat_dist.data.extra import EXTRA_INDEX, extra_positions, extra_rows
from oat_dist.data.ffcv_io import is_installed
from oat_dist.dedicated import find_trained
from oat_dist.distributed import World
from oat_dist.errors import UserError
from oat_dist.models import build_model
from oat_dist.resume import RunLock, open_run, require_same_data
from oat_dist.step import training_losses
from oat_dist.trainer import open_data
from tests.archives import pixels
from tests.oat_dist.test_step import _NoWaiting, disturbed, make, make_batch
from tests.ranks import run_ranks

CPU = torch.device("cpu")
CLASSES = np.array(list("abcde"))


def write(root, name, num_train, *, first=0, size=6, classes=CLASSES, test=5):
    """A prepared data set of random images, five of them held out for validation."""
    x = pixels(500, size)[first : first + num_train + test]
    y = np.arange(len(x)) % len(classes)
    path = root / f"{name}.npz"
    np.savez(path, x_train=x[:-test], y_train=y[:-test], x_test=x[-test:], y_test=y[-test:], classes=classes)
    return prepare(str(root), f"npz:{path}")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with the data sets `main`, of 50 training images, and `more`, of 30."""
    folder = tmp_path_factory.mktemp("extra")
    write(folder, "main", 55)
    write(folder, "more", 33, first=100)
    return folder


@pytest.fixture(scope="module")
def main(root):
    return open_data(settings(root))


def settings(root, loader="memory", *, extra="more", share=0.4, batch_size=12, accumulation=1, **data) -> Config:
    return Config(
        data=DataConfig(root=str(root), dataset="main", loader=loader, extra=extra, extra_share=share, **data),
        optim=OptimConfig(batch_size=batch_size),
        engine=EngineConfig(accumulation=accumulation),
    )


def make_loader(main, config, rank=0, ranks=1):
    return TrainLoader(main, config, rank=rank, ranks=ranks, device=CPU)


def same(ours, theirs) -> bool:
    return all(torch.equal(getattr(ours, f.name), getattr(theirs, f.name)) for f in dataclasses.fields(ours))


def test_the_stream_is_one_keyed_permutation_after_the_other():
    rows, offset = extra_rows(7, 3, step=0, num_steps=9, per_step=4)
    places = rows.flatten()
    passes = [places[at : at + 7] for at in range(0, 35, 7)]
    assert all(torch.equal(p.sort().values, torch.arange(7)) for p in passes)
    assert not torch.equal(passes[0], passes[1])
    assert not torch.equal(places, extra_rows(7, 4, step=0, num_steps=9, per_step=4)[0].flatten())
    assert torch.equal(offset.flatten(), EXTRA_INDEX * (1 + torch.arange(36) // 7))


@pytest.mark.parametrize("num_images", [1, 3, 40, 1000])
def test_the_stream_does_not_depend_on_where_reading_begins(num_images):
    whole = extra_rows(num_images, 0, step=0, num_steps=20, per_step=5)
    later = extra_rows(num_images, 0, step=13, num_steps=7, per_step=5)
    for all_steps, last_steps in zip(whole, later, strict=True):
        assert torch.equal(all_steps[13:], last_steps)


@pytest.mark.parametrize(("share", "batch_size", "num"), [(0.1, 30, 3), (0.5, 7, 4), (0.01, 5, 1), (0.9, 10, 9)])
def test_every_batch_has_the_share_rounded_up_at_positions_of_the_run(share, batch_size, num):
    config = Config(data=DataConfig(extra="x", extra_share=share), optim=OptimConfig(batch_size=batch_size))
    assert config.num_extra == num
    assert config.steps_per_epoch(100) == 100 // (batch_size - num)
    assert int(extra_positions(num, batch_size, 0).sum()) == num
    assert Config(data=DataConfig(extra_share=share)).num_extra == 0


def test_positions_follow_the_seed_and_have_nothing_to_do_with_lambda_zero():
    masks = torch.stack([extra_positions(10, 40, seed) for seed in range(400)])
    assert not torch.equal(masks[0], masks[1])
    assert (masks.float().mean(0) - 0.25).abs().max() < 0.1, "every position is as likely"


def test_batches_hold_stored_pixels_and_labels_of_both_sets(main, root):
    config = settings(root, shift_pixels=0, flip=False)
    loader = make_loader(main, config)
    stored = {name: load_file(root / name / "train.safetensors") for name in ("main", "more")}
    is_extra = extra_positions(5, 12, config.seed)
    assert loader.steps_per_epoch == 50 // 7
    seen = []
    for (batch,) in loader.epoch(0):
        assert torch.equal(batch.is_extra_N, is_extra[batch.position_N])
        for name, rows in (("main", ~batch.is_extra_N), ("more", batch.is_extra_N)):
            index, tensors = batch.index_N[rows] % EXTRA_INDEX, stored[name]
            at = torch.tensor([tensors["index"].tolist().index(i) for i in index.tolist()])
            assert torch.equal(batch.label_N[rows], tensors["label"][at])
            assert torch.equal((batch.image_NCHW[rows] * 255).byte().permute(0, 2, 3, 1), tensors["image"][at])
        seen += batch.index_N.tolist()
    assert len(seen) == len(set(seen)) == 7 * 12, "an image that comes again has another key"
    assert sum(i >= 2 * EXTRA_INDEX for i in seen) == 35 - 30


def test_the_stream_goes_on_from_epoch_to_epoch(main, root):
    loader = make_loader(main, settings(root))
    batches = [batch for epoch in (0, 1) for (batch,) in loader.epoch(epoch)]
    places = torch.cat([batch.index_N[batch.is_extra_N] for batch in batches]).tolist()
    for number in (0, 1):
        of_pass = places[30 * number : 30 * (number + 1)]
        assert len(set(of_pass)) == 30 and {place // EXTRA_INDEX for place in of_pass} == {1 + number}


@pytest.mark.skipif(not is_installed(), reason="FFCV was left out of this installation (FFCV=0)")
def test_readers_and_their_mixtures_give_bit_equal_batches(main, root):
    memory, ffcv = (make_loader(main, settings(root, name)) for name in ("memory", "ffcv"))
    expected = [list(memory.epoch(epoch)) for epoch in (0, 1)]
    both = [list(ffcv.epoch(epoch)) for epoch in (0, 1)]
    memory._extra_reader, ffcv._extra_reader = ffcv._extra_reader, memory._extra_reader
    for name, epochs in {"both": both, "extra": [memory.epoch(0)], "main": [ffcv.epoch(0)]}.items():
        for theirs, ours in zip(expected, epochs, strict=False):
            assert all(same(a, b) for (a,), (b,) in zip(theirs, ours, strict=True)), name


@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 1), (3, 1), (1, 2), (2, 3), (12, 1)])
def test_batches_do_not_depend_on_ranks_and_every_rank_has_its_share_at_every_step(main, root, ranks, accumulation):
    alone = {}
    for step, (batch,) in enumerate(make_loader(main, settings(root)).epoch(2)):
        for i, position in enumerate(batch.position_N.tolist()):
            alone[step, position] = (batch.index_N[i], batch.label_N[i], batch.image_NCHW[i])
    config, seen = settings(root, accumulation=accumulation), 0
    for rank in range(ranks):
        shares = set()
        for step, batches in enumerate(make_loader(main, config, rank, ranks).epoch(2)):
            shares.add(tuple(int(batch.is_extra_N.sum()) for batch in batches))
            for batch in batches:
                for i, position in enumerate(batch.position_N.tolist()):
                    got = (batch.index_N[i], batch.label_N[i], batch.image_NCHW[i])
                    assert all(torch.equal(a, b) for a, b in zip(alone[step, position], got, strict=True))
                    seen += 1
        assert len(shares) == 1
    assert seen == len(alone) == 7 * 12


def test_an_epoch_that_is_gone_on_with_has_the_batches_of_an_undisturbed_one(main, root):
    loader = make_loader(main, settings(root, accumulation=2))
    for first_step in (1, 6):
        later, whole = (list(loader.epoch(3, step)) for step in (first_step, 0))
        pairs = zip(later, whole[first_step:], strict=True)
        assert all(same(a, b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


def test_measurements_never_have_extra_images(main, root):
    batches = evaluation_batches(main, "train", settings(root).data, 64, device=CPU)
    assert sum(len(batch.label_N) for batch in batches) == 50
    assert not any(batch.is_extra_N.any() for batch in batches)


def weights_after(world, root):
    """Weights after two steps of SGD in float64, with gradients summed over ranks."""
    config = dataclasses.replace(
        settings(root, batch_size=9, extra_weight=0.5), attack=AttackConfig(steps=1),
        loss=LossConfig(robust="rst_adv"), engine=EngineConfig(sync_statistics=True),
    )  # fmt: skip
    loader = make_loader(open_data(config), config, world.rank, world.ranks)
    sampler = LambdaSampler(config.conditioning, seed=0, batch_size=9, steps_per_epoch=loader.steps_per_epoch)
    network = build_model(config, in_channels=3, num_classes=5).double()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for step, (batch,) in zip(range(2), loader.epoch(0), strict=False):
        lam = sampler.draw(0, step, batch.position_N, batch.index_N)
        batch = dataclasses.replace(batch, image_NCHW=batch.image_NCHW.double())
        losses = training_losses(network, batch, lam, config=config, epoch=0, forward=network)
        (losses.loss_N.sum() / 9).backward()
        for parameter in network.parameters():
            parameter.grad = world.sum(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
    return network.state_dict()


@pytest.mark.dist
def test_two_ranks_train_as_one_does(root):
    alone = weights_after(World(), str(root))
    for weights in run_ranks(weights_after, 2, str(root)):
        for name, value in weights.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-9, atol=1e-9, msg=name)


def losses_of(weight, robust="pgd_at", condition_on=None, watch=None):
    """Losses of a batch in which the images 1, 3 and 6 are extra ones, with their graph."""
    config = dataclasses.replace(
        make(), data=DataConfig(extra="more", extra_weight=weight), attack=AttackConfig(),
        loss=LossConfig(robust=robust, condition_on=condition_on),
    )  # fmt: skip
    network, batch = disturbed(config), make_batch(8)
    index = batch.index_N + EXTRA_INDEX * torch.tensor([0, 1, 0, 1, 0, 0, 2, 0])
    lam = torch.tensor([0, 0, 0, 0.1, 0.4, 1, 1, 0.2], dtype=torch.float64)

    def forward(x, cond):
        logits = network(x, cond)
        logits.retain_grad()
        if watch is not None:
            watch.append(logits)
        return logits

    batch = dataclasses.replace(batch, index_N=index)
    return network, training_losses(network, batch, lam, config=config, epoch=0, forward=forward)


@pytest.mark.parametrize(("robust", "condition_on"), [("pgd_at", None), ("rst_adv", None), ("rst_stab", "beta")])
def test_the_loss_is_the_sum_over_images_with_those_of_the_extra_set_weighted(robust, condition_on):
    plain, weighted = (losses_of(weight, robust, condition_on)[1] for weight in (1.0, 0.3))
    factor = torch.tensor([1, 0.3, 1, 0.3, 1, 1, 0.3, 1], dtype=torch.float64)
    torch.testing.assert_close(weighted.loss_N, plain.loss_N * factor, rtol=1e-12, atol=0)
    torch.testing.assert_close(weighted.counts["loss"], (plain.loss_N * factor).sum().detach(), rtol=1e-12, atol=0)
    assert torch.equal(weighted.counts["loss_clean"], plain.counts["loss_clean"])


def test_without_weight_extra_images_give_no_gradient_but_through_the_batch_statistics():
    logits = []
    network, losses = losses_of(0.0, "rst_adv", watch=logits)
    losses.loss_N.sum().backward()
    reached = logits[0].grad.abs().sum(1) > 0
    # Eight clean images, then the partners of the last five.
    assert reached.tolist() == [i not in (1, 3, 6) for i in range(8)] + [i not in (3, 6) for i in range(3, 8)]
    assert all(p.grad is not None for p in network.parameters())


def test_the_weights_make_nobody_wait_for_the_device(monkeypatch):
    config = dataclasses.replace(make(), data=DataConfig(extra="more", extra_weight=0.5))
    network, lam = disturbed(config), torch.tensor([0, 0.1, 1, 1], dtype=torch.float64)
    batch, cond = make_batch(4), network.condition(lam)
    monkeypatch.setattr(type(network), "condition", lambda self, lam_N, **kwargs: cond)
    monkeypatch.setattr("kernels.checks._check_index", lambda *a: None)
    with _NoWaiting():
        training_losses(network, batch, lam, config=config, epoch=0, forward=network).loss_N.sum().backward()


def test_a_run_records_the_extra_images_and_goes_on_with_them_alone(main, root, tmp_path):
    config = dataclasses.replace(settings(root), output_dir=str(tmp_path))
    extra = open_extra(main, config.data)
    run = runs.create_run(config, main, {}, 1, extra=extra)
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["extra_data"]["sha256"] == extra.sha256 and provenance["extra_data"]["name"] == "more"
    require_same_data(run, main, extra)
    changed = dataclasses.replace(extra, sha256={"train.safetensors": "0" * 64})
    for key, args in {"data.extra='more'": (main, changed), "data.dataset='main'": (changed, extra)}.items():
        args = (dataclasses.replace(args[0], name="main"), args[1])
        with pytest.raises(UserError, match=rf"^{key}: its training images are not those that .* has the sha256 of"):
            require_same_data(run, *args)
        with pytest.raises(UserError, match=rf"^{key}: "):
            open_run(config, args[0], 1, RunLock(), extra=args[1])
    (run / "frontier.json").write_text("{}")
    (run / "model.safetensors").write_text("")
    assert find_trained(config, main) == run
    (run / "provenance.json").write_text(json.dumps(provenance).replace(extra.sha256["train.safetensors"], "0" * 64))
    assert find_trained(config, main) is None


def test_a_run_without_extra_images_records_none_and_another_fingerprint(main, root, tmp_path):
    config = dataclasses.replace(settings(root, extra=None), output_dir=str(tmp_path))
    run = runs.create_run(config, main, {}, 1)
    assert "extra_data" not in json.loads((run / "provenance.json").read_text())
    require_same_data(run, main, None)
    variants = [config, settings(root), settings(root, share=0.3), settings(root, extra_weight=0.5)]
    assert len({fingerprint(variant) for variant in variants}) == 4


def test_the_cost_counts_the_extra_images_of_every_batch(root):
    def images(**kwargs):
        config = dataclasses.replace(settings(root, **kwargs), optim=OptimConfig(batch_size=12, epochs=3))
        cost = training_cost(config, in_channels=3, image_size=(6, 6), num_classes=5, num_train_images=50)
        return cost.images

    assert images() == 3 * (50 // 7) * 12
    assert images(extra=None) == 3 * (50 // 12) * 12


@pytest.mark.parametrize(
    ("change", "message"),
    [({"extra_share": 0.0}, "data.extra_share=0.0: must lie in (0, 1)"),
     ({"extra_share": 1.0}, "data.extra_share=1.0: must lie in (0, 1)"),
     ({"extra_share": 0.95}, "data.extra_share=0.95: must leave data.dataset at least one of the optim.batch_size=12"),
     ({"extra_weight": -1.0}, "data.extra_weight=-1.0: must be at least 0 and finite"),
     ({"extra_weight": float("inf")}, "data.extra_weight=inf: must be at least 0 and finite"),
     ({"batch_size": 1}, "data.extra_share=0.4: must leave data.dataset at least one of the optim.batch_size=1 im"),
     ({"batch_size": 150}, "optim.batch_size=150: must be at most the 50 training images of main and 60 of data.extra"),
     ({"extra": "nowhere"}, "data.extra='nowhere': no prepared data set at "),
     ({"extra": "larger"}, "data.extra='larger': its images are 7x7x3, must be 6x6x3 as those of main"),
     ({"extra": "other"}, "data.extra='other': its classes are 4 (a, b, c, ...), must be the 5 (a, b, c, ...) of")],
)  # fmt: skip
def test_extra_settings_that_cannot_be_are_named(main, root, change, message):
    if change.get("extra") == "larger":
        write(root, "larger", 11, size=7)
    elif change.get("extra") == "other":
        write(root, "other", 11, classes=CLASSES[:4])
    share, kwargs = change.pop("extra_share", 0.4), change
    with pytest.raises(UserError) as error:
        make_loader(main, settings(root, share=share, **kwargs))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_an_extra_set_that_is_not_there_says_how_it_is_made(main, root):
    with pytest.raises(UserError, match=r"launch/pseudo_label.py --run RUN --images SOURCE --name nowhere --out "):
        open_extra(main, settings(root, extra="nowhere").data)
