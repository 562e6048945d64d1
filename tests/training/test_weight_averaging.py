"""Averages of the weights: the exact mean after every step, validated, and kind to what is frozen."""

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fit_runs import FEW, LABELS, curve, train
from real_runs import (
    TINY,
    TINY_NETWORK,
    load_weights,
    one_line,
    prepare_shards,
)

from concentration.data.resident import ResidentImages
from concentration.networks.routed_teachers import RoutedTeachers
from concentration.training.weight_averaging import build_weight_averaging


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return prepare_shards(tmp_path_factory.mktemp("fit"))


AVERAGED = (
    *TINY_NETWORK,
    *LABELS,
    "trainer.num_workers=0",
    "trainer.batch_size=16",
    "trainer.validate_every_epochs=1000",
)


@pytest.fixture(scope="module")
def weights_after_steps(prepared) -> list[dict[str, np.ndarray]]:
    """Of runs of one to four steps."""
    return [load_weights(train(prepared, f"steps{n}", *AVERAGED, f"trainer.max_steps={n}")) for n in range(1, 5)]


def test_the_moving_average_is_that_of_the_weights_after_every_step(prepared, weights_after_steps):
    decay = 0.7
    found = load_weights(train(prepared, "averaged", *AVERAGED, "trainer.max_steps=4", f"trainer.ema_decay={decay}"))
    for name in found:
        expected = weights_after_steps[0][name].astype(np.float64)
        for weights in weights_after_steps[1:]:
            expected = decay * expected + (1 - decay) * weights[name]
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("start", "first"), [(0, 0), (0.5, 2), (0.99, 3)])
def test_polyaks_average_is_the_mean_of_the_weights_from_its_first_step_on(prepared, weights_after_steps, start, first):
    name = f"polyak{first}"
    found = load_weights(train(prepared, name, *AVERAGED, "trainer.max_steps=4", f"trainer.polyak_start={start}"))
    for name in found:
        expected = np.mean([weights[name].astype(np.float64) for weights in weights_after_steps[min(first, 3) :]], 0)
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_polyaks_average_is_validated_and_begins_with_the_newest_weights(prepared):
    options = (*TINY, *LABELS, "optimizer.lr=0.05", "trainer.max_epochs=2")
    plain, late, early = (
        curve(train(prepared, f"validated{n}", *options, *more), "val/mpvap")
        for n, more in enumerate([(), ("trainer.polyak_start=0.9",), ("trainer.polyak_start=0",)])
    )
    assert late[0] == plain[0], "before its start the average is the newest weights"
    assert early[0] != plain[0]
    assert len(early) == len(plain) == 2


@pytest.mark.parametrize("average", [("ema_decay", 0.999, None), ("polyak_start", None, 0.0)], ids=lambda each: each[0])
def test_an_average_leaves_frozen_weights_as_they_are_and_copies_no_images_or_teachers(average):
    """What a student keeps from an older one stays bit by bit."""
    callback = build_weight_averaging(*average[1:], total_steps=300)[0]
    module = pl.LightningModule()
    module.frozen = torch.nn.Linear(64, 64).requires_grad_(False)
    module.images = ResidentImages(
        torch.arange(3), torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(3) > 0, torch.ones(3) > 0
    )
    module.teachers = RoutedTeachers([], top_k=1, tail="zero")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    callback.setup(None, module, "fit")
    for _ in range(300):
        callback._average_model.update_parameters(module)
    copied = callback._average_model.module
    assert all(torch.equal(tensor, before[name]) for name, tensor in copied.state_dict().items())
    assert copied.frozen.weight is not module.frozen.weight
    assert copied.images is module.images
    assert copied.teachers is module.teachers


def test_two_averages_are_refused(prepared):
    options = ("trainer.ema_decay=0.9", "trainer.polyak_start=0.5")
    assert "one average can be the network; remove one" in one_line(train(prepared, "two", *FEW, *options, code=2))
