"""Which parameter learns how: groups, weight decay, TensorFlow's Adagrad, and schedules, by hand-worked numbers."""

import math
from typing import Any

import pydantic
import pytest
import torch

from concentration.errors import ConfigError
from concentration.networks.student import NetworkConfig, Student
from concentration.schema import Config, parse_config
from concentration.training.optimizers import (
    OptimizerConfig,
    RunLength,
    build_optimizer,
    build_schedule,
    compute_lr_factor,
)


class Verb(Config):
    """Stands for a verb's config, in which an optimizer is one component."""

    optimizer: OptimizerConfig


def parse(kind: str = "sgd", lr: float = 0.5, **options: Any):
    return parse_config(Verb, {"optimizer": {"kind": kind, "lr": lr, **options}}).optimizer


def build_student(pace: dict | None = None, top: str = "fc_sc", norm: str = "layer") -> Student:
    torch.manual_seed(0)
    values = {
        "base": {"kind": "small", "channels": [4], "norm": "group"},
        "top": {"kind": top, "top1": 6, "top2": 5, "norm": norm},
        "pace": pace or {"kind": "vertical", "offset": "class"},
        "image_size": 8,
        "verticals": {"birds": 3, "cars": 2},
    }
    return Student(parse_config(NetworkConfig, values))


def describe_groups(optimizer: torch.optim.Optimizer, student: Student) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay by parameter name."""
    settings = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return {name: settings[id(parameter)] for name, parameter in student.named_parameters()}


@pytest.mark.parametrize("kind", ["adagrad", "adamw", "sgd"])
@pytest.mark.parametrize("log", [False, True])
def test_gamma_alone_has_the_learning_rate_of_the_pace(kind, log):
    student = build_student({"kind": "vertical", "lr": 0.03, "log": log, "offset": "vertical"})
    groups = describe_groups(build_optimizer(parse(kind, lr=0.5), student), student)
    gamma = "pace.rho" if log else "pace.gamma"
    assert groups.pop(gamma) == (0.03, 0.0)
    assert {lr for lr, _ in groups.values()} == {0.5}


def test_gamma_takes_the_optimizers_learning_rate_where_it_has_none_of_its_own():
    for pace in ({"kind": "class"}, {"kind": "fixed"}, {"kind": "none"}):
        student = build_student(pace)
        groups = describe_groups(build_optimizer(parse(lr=0.25), student), student)
        assert {lr for lr, _ in groups.values()} == {0.25}


@pytest.mark.parametrize("top", ["fc_fc", "fc_sc", "sc_sc"])
@pytest.mark.parametrize("kind", ["adagrad", "adamw", "sgd"])
def test_weights_decay_and_biases_norms_gammas_and_offsets_do_not(kind, top):
    student = build_student({"kind": "class", "offset": "class"}, top)
    groups = describe_groups(build_optimizer(parse(kind, weight_decay=0.1), student), student)
    decayed = {name for name, (_, decay) in groups.items() if decay == 0.1}
    assert {decay for _, decay in groups.values()} == {0.0, 0.1}
    assert decayed == {
        "base.blocks.0.0.weight",
        "top.top1.weight",
        "top.top2.weight",
        "top.classifiers.0.weight",
        "top.classifiers.1.weight",
    }


def test_every_parameter_is_in_one_group_once():
    for pace in ({"kind": "none"}, {"kind": "fixed"}, {"kind": "vertical", "lr": 1.0}):
        student = build_student(pace)
        optimizer = build_optimizer(parse(), student)
        listed = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        assert sorted(listed) == sorted(id(parameter) for parameter in student.parameters())
        assert all(group["params"] for group in optimizer.param_groups)


def test_decoupled_decay_shrinks_weights_by_its_share_of_the_learning_rate():
    student = build_student()
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    optimizer = build_optimizer(parse("adamw", lr=0.5, weight_decay=0.1), student)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in student.named_parameters():
        share = 1 - 0.5 * 0.1 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * share, msg=name)


def test_adagrad_takes_tensorflows_steps():
    # TensorFlow: accumulator = 0.1 at first; accumulator += g^2; w -= lr * g / sqrt(accumulator).
    weight = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = parse("adagrad", lr=0.5).build([{"params": [weight], "weight_decay": 0.0}])
    by_hand = [
        (0.3, 1 - 0.5 * 0.3 / math.sqrt(0.19)),  # 0.1 + 0.09
        (-0.9, 1 - 0.5 * 0.3 / math.sqrt(0.19) + 0.5 * 0.9 / math.sqrt(1.0)),  # 0.19 + 0.81
    ]
    for gradient, expected in by_hand:
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        assert float(weight.detach()) == pytest.approx(expected, rel=1e-8)
    assert by_hand[0][1] == pytest.approx(0.655876, abs=1e-6)


def test_adagrads_first_step_from_zero_is_the_learning_rate_whatever_the_gradient():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = parse("adagrad", lr=0.5, initial_accumulator=0).build([{"params": [weight], "weight_decay": 0.0}])
    weight.grad = torch.tensor([1e-3, -7.0])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.5, 0.5]))


def test_the_options_of_each_optimizer_reach_torch():
    student = build_student()
    (first, *_) = build_optimizer(parse("adamw", beta1=0.8, beta2=0.99), student).param_groups
    assert first["betas"] == (0.8, 0.99)
    (first, *_) = build_optimizer(parse("sgd", momentum=0.7, nesterov=True), student).param_groups
    assert (first["momentum"], first["nesterov"]) == (0.7, True)


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({}, {0: 1.0, 7: 1.0, 1000: 1.0}),
        ({"warmup_steps": 4}, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0, 99: 1.0}),
        # Half a cosine over all ten steps: (1 + cos(pi * step / 10)) / 2.
        ({"schedule": "cosine"}, {0: 1.0, 2: 0.9045085, 5: 0.5, 8: 0.0954915, 10: 0.0, 12: 0.0}),
        # Two steps up, and the half cosine over the other eight.
        (
            {"schedule": "cosine", "warmup_steps": 2},
            {0: 0.5, 1: 1.0, 2: 1.0, 4: 0.8535534, 6: 0.5, 8: 0.1464466, 10: 0.0},
        ),
        ({"schedule": "cosine", "warmup_steps": 10}, {0: 0.1, 9: 1.0, 10: 1.0}),
    ],
)
def test_the_learning_rate_rises_over_the_warm_up_and_falls_by_a_cosine(options, factors):
    config = parse(**options)
    found = {step: compute_lr_factor(config, step, RunLength(10, 10)) for step in factors}
    assert found == pytest.approx(factors, abs=1e-7)


def test_the_learning_rate_falls_by_4_percent_every_8_epochs():
    config = parse(schedule="steps", decay=0.96, decay_epochs=8)
    length = RunLength(total_steps=170, steps_per_epoch=10)
    found = {step: compute_lr_factor(config, step, length) for step in (0, 79, 80, 159, 160, 169)}
    assert found == pytest.approx({0: 1.0, 79: 1.0, 80: 0.96, 159: 0.96, 160: 0.9216, 169: 0.9216})
    after_half_an_epoch = parse(schedule="steps", decay=0.5, decay_epochs=0.5)
    assert [compute_lr_factor(after_half_an_epoch, step, length) for step in (4, 5, 10)] == [1, 0.5, 0.25]


def test_a_schedule_scales_every_groups_own_learning_rate_step_by_step():
    student = build_student({"kind": "vertical", "lr": 0.2})
    config = parse(lr=0.5, warmup_steps=2, schedule="cosine")
    optimizer = build_optimizer(config, student)
    schedule = build_schedule(config, optimizer, RunLength(4, 4))
    for step in range(4):
        factor = compute_lr_factor(config, step, RunLength(4, 4))
        assert {group["lr"] for group in optimizer.param_groups} == {0.5 * factor, 0.2 * factor}
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0}, "optimizer.lr=0: "),
        ({"kind": "adam"}, "optimizer.kind=adam: expected 'adagrad', 'adamw', 'sgd'; did you mean 'adam"),
        ({"kind": "adagrad", "momentum": 0.9}, "unknown key 'optimizer.momentum'"),
        ({"warmup_steps": -1}, "optimizer.warmup_steps=-1: "),
        ({"schedule": "linear"}, "optimizer.schedule=linear: expected 'constant', 'cosine' or 'steps'"),
        (
            {"schedule": "steps", "decay": 0.5},
            "optimizer.decay_epochs=None with optimizer.schedule=steps: give it with",
        ),
        (
            {"decay": 0.5},
            "optimizer.decay=0.5 with optimizer.schedule=constant: give it with schedule=steps, only and always",
        ),
        ({"schedule": "steps", "decay": 1, "decay_epochs": 8}, "optimizer.decay=1: "),
        ({"kind": "adamw", "beta2": 1}, "optimizer.beta2=1: "),
        ({"kind": "sgd", "momentum": 0, "nesterov": True}, "optimizer.nesterov=true with optimizer.momentum=0.0: "),
    ],
)
def test_options_without_sense_are_refused(options, message):
    with pytest.raises(ConfigError) as caught:
        parse(**options)
    assert str(caught.value).startswith(message)


def test_a_config_is_frozen():
    with pytest.raises(pydantic.ValidationError):
        parse().lr = 1.0
