"""The whole network: its two calls, its images, its files, and where its outputs start.

Shapes: B batch, C all classes.
"""

import json
import math
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import concentration.networks.student
from concentration.array_files import load_metadata
from concentration.errors import ConfigError, DataError
from concentration.networks.bases import TimmConfig
from concentration.networks.bases.small import SmallBase, SmallBaseConfig
from concentration.networks.network_file import save_tensors
from concentration.networks.student import NetworkConfig, Student, load_student
from concentration.objectives.sigmoid_cross_entropy import sigmoid_cross_entropy
from concentration.schema import parse_config
from concentration.targets import SoftTargets

VERTICALS = {"birds": 5, "cars": 3, "dishes": 4}
C = 12


def describe(**changes: object) -> dict:
    values = {
        "base": {"kind": "small", "channels": [4, 8], "norm": "batch"},
        "top": {"kind": "fc_sc", "top1": 6, "top2": 5},
        "pace": {"kind": "vertical", "offset": "class"},
        "image_size": 8,
        "verticals": VERTICALS,
    }
    return {**values, **changes}


def build(seed: int = 0, **changes: object) -> Student:
    torch.manual_seed(seed)
    return Student(parse_config(NetworkConfig, describe(**changes)))


def draw_images(num_images: int = 6) -> Tensor:
    return torch.randint(256, (num_images, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def draw_targets(num_samples: int = 6) -> SoftTargets:
    generator = torch.Generator().manual_seed(1)
    index_BK = torch.randint(C, (num_samples, 4), generator=generator)
    return SoftTargets(index_BK, torch.rand(num_samples, 4, generator=generator) / 4)


PACES = ({"kind": "none"}, {"kind": "vertical", "offset": "class"}, {"kind": "class", "log": True})
TOPS = (
    {"kind": "fc_fc", "top1": 6, "top2": 5},
    {"kind": "fc_sc", "top1": 6, "top2": 5, "norm": "batch"},
    {"kind": "sc_sc", "top1": 6, "top2": 5, "norm": "layer"},
    {"kind": "fc_sc_generic", "top1": 6, "top2": 5, "generic": 2},
)


@pytest.mark.parametrize("top", TOPS)
@pytest.mark.parametrize("pace", PACES)
def test_images_give_logits_and_images_with_targets_their_loss(pace, top):
    student = build(pace=pace, top=top).eval()
    images, targets = draw_images(), draw_targets()
    logits_BC = student(images)
    assert (logits_BC.shape, logits_BC.dtype) == ((6, C), torch.float32)
    loss_B = student(images, targets)
    assert loss_B.shape == (6,)
    torch.testing.assert_close(loss_B, sigmoid_cross_entropy([logits_BC], targets))
    split = torch.cat(student.compute_logits(images), dim=1)
    assert torch.equal(split, logits_BC)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("pace", PACES)
def test_many_logits_take_the_fused_form_and_give_the_same(pace, precision, monkeypatch):
    def compute(few_logits: int) -> dict[str, Tensor]:
        monkeypatch.setattr(concentration.networks.student, "FEW_LOGITS", few_logits)
        student = build(pace=pace)
        with torch.autocast("cpu", precision, enabled=precision is not None):
            loss_B = student(draw_images(), draw_targets())
        loss_B.mean().backward()
        return {
            "loss": loss_B.detach(),
            **{name: p.grad for name, p in student.named_parameters() if p.grad is not None},
        }

    few, exactly, many = compute(6 * C), compute(6 * C // len(VERTICALS)), compute(6 * C // len(VERTICALS) - 1)
    assert all(torch.equal(few[name], value) for name, value in exactly.items())
    assert any(not torch.equal(few[name], value) for name, value in many.items())  # it is another way to compute it
    allowed = 1e-5 if precision is None else 0.03
    assert all((many[name] - value).norm() <= allowed * value.norm() for name, value in few.items())


def test_the_loss_reaches_every_parameter():
    student = build()
    student(draw_images(), draw_targets()).mean().backward()
    assert [name for name, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_the_latest_loss_by_vertical_is_kept_and_adds_up():
    student = build()
    loss_B = student(draw_images(), draw_targets())
    assert student.vertical_loss_M.shape == (3,)
    assert not student.vertical_loss_M.requires_grad
    torch.testing.assert_close(student.vertical_loss_M.sum(), loss_B.detach().sum())


def test_weights_of_samples_weigh_the_loss():
    student = build().eval()
    images, targets = draw_images(), draw_targets()
    weight_B = torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0, 0.0])
    weighted_B = student(images, targets, weight_B)
    torch.testing.assert_close(weighted_B, student(images, targets) * weight_B)


def test_class_weights_weigh_the_loss():
    student = build().eval()
    images, targets = draw_images(), draw_targets()
    weight_C = torch.linspace(0.1, 2, C)
    student.class_weight_C = weight_C
    torch.testing.assert_close(student(images, targets), sigmoid_cross_entropy([student(images)], targets, weight_C))


def test_bytes_and_fractions_are_the_same_images():
    student = build().eval()
    images = draw_images()
    torch.testing.assert_close(student(images), student(images.float() / 255))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.bool])
def test_images_of_another_integer_type_are_refused(dtype):
    """They would be taken for fractions, 255 times too large."""
    with pytest.raises(DataError, match=rf"images are {dtype}, expected torch\.uint8, or floats in \[0, 1\]"):
        build()(draw_images().to(dtype))


def test_features_of_a_layer_that_there_is_not_are_refused():
    with pytest.raises(ConfigError, match="layer=top2: expected 'base' or 'top1'"):
        build().compute_features(draw_images(), "top2")


def test_a_path_may_be_a_text(tmp_path):
    student = build().eval()
    student.save(f"{tmp_path}/network.safetensors", {})
    assert torch.equal(load_student(f"{tmp_path}/network.safetensors")(draw_images()), student(draw_images()))


def test_images_are_normalised_by_the_bases_mean_and_deviation():
    student = build(base={"kind": "small", "channels": [4], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.25, 2]})
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    expected = torch.tensor([(1 - 0.1) / 0.5, (1 - 0.2) / 0.25, (1 - 0.3) / 2]).view(1, 3, 1, 1)
    torch.testing.assert_close(student.normalise_images(white), expected.expand(1, 3, 2, 2))


def test_the_base_is_given_contiguous_images_however_the_loader_lays_them_out():
    """Else the loader would choose the kernels of the base's convolutions, and with them the last bits of every gradient."""
    student = build()
    images = draw_images(3)
    found = student.normalise_images(images.contiguous(memory_format=torch.channels_last))
    assert found.is_contiguous()
    assert torch.equal(found, student.normalise_images(images))


@pytest.mark.parametrize("top", TOPS)
@pytest.mark.parametrize("pace", [*PACES, {"kind": "fixed", "init": 4}])
def test_a_saved_network_gives_the_same_logits(tmp_path, pace, top):
    student = build(pace=pace, top=top)
    student(draw_images())  # moves the running statistics of the batch norms
    student.save(tmp_path / "model.safetensors", {"taxonomy": "abc"})
    torch.manual_seed(9)
    loaded = load_student(tmp_path / "model.safetensors")
    assert not loaded.training
    assert loaded.config == student.config
    assert torch.equal(loaded(draw_images()), student.eval()(draw_images()))
    assert load_metadata(tmp_path / "model.safetensors")["taxonomy"] == "abc"


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_a_saved_network_may_be_read_by_whom_the_umask_lets(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "model.safetensors", {"weight": torch.ones(2)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == mode


def test_the_order_of_the_verticals_survives_the_file(tmp_path):
    student = build(verticals={"zebras": 2, "ants": 3})
    student.save(tmp_path / "model.safetensors", {})
    assert list(load_student(tmp_path / "model.safetensors").config.verticals.items()) == [("zebras", 2), ("ants", 3)]


def test_a_pretrained_base_is_not_fetched_again(tmp_path, monkeypatch):
    student = build()
    student.config = student.config.model_copy(update={"base": TimmConfig(name="resnet18", pretrained=True)})
    student.save(tmp_path / "model.safetensors", {})
    asked = []

    def build_base(config, image_size):
        asked.append(config)
        return SmallBase(SmallBaseConfig(channels=(4, 8)), image_size)

    monkeypatch.setattr(concentration.networks.student, "build_served_base", build_base)
    load_student(tmp_path / "model.safetensors")
    assert {(config.name, config.pretrained) for config in asked} == {("resnet18", False)}


def test_a_damaged_file_is_refused_by_name(tmp_path):
    path = tmp_path / "model.safetensors"
    build().save(path, {})
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1], whole[:5], b"", b"PK\x03\x04" + whole):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"model\.safetensors: damaged"):
            load_student(path)
        with pytest.raises(DataError, match=r"model\.safetensors: damaged"):
            build().load_base(path)
    path.unlink()
    with pytest.raises(DataError, match=r"model\.safetensors: no such file"):
        load_student(path)
    with pytest.raises(DataError, match=r"model\.safetensors: no such file"):
        build().load_base(path)


def rewrite_header(path: Path, header: dict[str, str]) -> None:
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, header)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top": {"kind": "fc_sc", "top1": 7, "top2": 5}}, "weights do not fit its architecture: .*top1"),
        ({"top": {"kind": "sc_sc", "top1": 6, "top2": 5}}, "weights do not fit its architecture: .*"),
        ({"pace": {"kind": "none"}}, r"weights do not fit its architecture: .*pace\.(gamma|offset)"),
        (
            {"verticals": {"birds": 5, "cars": 4, "dishes": 4}},
            r"weights do not fit its architecture: .* is \(12,\), expected \(13,\)",
        ),
        ({"top": {"kind": "fc_fc", "top1": 2**31 - 1, "top2": 5}}, "weights do not fit its architecture: .*top1"),
        (
            {"verticals": {"birds": 10**12, "cars": 3, "dishes": 4}},
            r"weights do not fit its architecture: .*expected \(1000000000007,\)",
        ),
        ({"verticals": {"birds": 10**30, "cars": 3, "dishes": 4}}, "describes no network that can be built"),
        (
            {"top": {"kind": "fc_sc", "top1": 10**30, "top2": 5}},
            r"describes no network of this version .*top\.top1=10{30}",
        ),
        (
            {"verticals": {"birds": -5, "cars": 3, "dishes": 4}},
            "describes no network of this version .*verticals.birds=-5",
        ),
        ({"image_size": -16}, "describes no network of this version .*image_size=-16"),
        ({"top": {"kind": "fc_sc", "top1": 6, "top3": 5}}, "describes no network of this version .*'top.top3'"),
    ],
)
def test_a_header_that_describes_another_network_is_refused(tmp_path, changes, message):
    path = tmp_path / "model.safetensors"
    build().save(path, {})
    rewrite_header(path, {"network": json.dumps(describe(**changes))})
    with pytest.raises(DataError, match=rf"model\.safetensors: .*{message}"):
        load_student(path)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    build().save(path, {})
    rewrite_header(path, {"format": "pt"})
    with pytest.raises(DataError, match=r"model\.safetensors: no network description in its header"):
        load_student(path)
    rewrite_header(path, {"network": "{"})
    with pytest.raises(DataError, match=r"model\.safetensors: its header describes no network"):
        load_student(path)


def test_a_base_is_taken_from_a_network_with_other_top_layers(tmp_path):
    teacher = build(seed=1, verticals={"birds": 5}, pace={"kind": "none"}, top={"kind": "fc_fc", "top1": 9, "top2": 9})
    teacher(draw_images())
    teacher.save(tmp_path / "teacher.safetensors", {})
    student = build(seed=2)
    top_before = [parameter.clone() for parameter in student.top.parameters()]
    student.load_base(tmp_path / "teacher.safetensors")
    features = [network.eval().base(draw_images().float()) for network in (teacher, student)]
    assert torch.equal(*features)
    assert all(torch.equal(a, b) for a, b in zip(top_before, student.top.parameters(), strict=True))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"channels": [4, 16]}, r"blocks\.1\.0\.weight' is \(8, 4, 3, 3\), expected \(16, 4, 3, 3\)"),
        ({"channels": [4, 8, 8]}, r"blocks\.2\.0\.weight' is nothing, expected \(8, 8, 3, 3\)"),
        ({"channels": [4]}, r"blocks\.1\.0\.weight' is \(8, 4, 3, 3\), expected nothing"),
        ({"channels": [4, 8], "norm": "none"}, r"blocks\.0\.0\.bias' is nothing, expected \(4,\)"),
    ],
)
def test_a_base_of_another_shape_is_an_error_that_names_the_first_difference(tmp_path, base, message):
    path = tmp_path / "model.safetensors"
    build().save(path, {})
    student = build(base={"kind": "small", **base})
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(ConfigError, match=rf"base\.checkpoint=.*model\.safetensors: another base network: '{message}"):
        student.load_base(path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize("pace", [{"kind": "none"}, {"kind": "vertical", "offset": "class"}])
def test_a_prior_starts_the_mean_probabilities_near_the_frequencies(pace):
    student = build(pace=pace, top={"kind": "fc_sc", "top1": 32, "top2": 32}, verticals={"birds": 200, "cars": 100})
    frequency_C = torch.empty(300).uniform_(math.log(1e-3), math.log(0.4)).exp()

    def probability_C() -> Tensor:
        with torch.no_grad():
            return student(draw_images(100)).sigmoid().mean(0)

    assert probability_C().mean().item() == pytest.approx(0.5, abs=0.05)
    student.set_prior(frequency_C)
    # Each class keeps the logit that the random weights give it, of the order of 1 with pace; over classes it is 0.
    log_ratio_C = (probability_C() / frequency_C).log()
    assert log_ratio_C.mean().item() == pytest.approx(0, abs=0.1)
    assert log_ratio_C.std().item() < 1
    assert probability_C().sum().item() == pytest.approx(frequency_C.sum().item(), rel=0.4)
    for classify in student.top.classifiers:
        nn.init.zeros_(classify.weight)
        if pace["kind"] != "none":
            assert classify.bias.abs().sum() == 0
    torch.testing.assert_close(probability_C(), frequency_C)  # and nothing but the prior is left


def test_a_prior_before_a_norm_leaves_the_output_biases_alone():
    student = build(pace={"kind": "vertical", "offset": "vertical"})
    frequency_C = torch.linspace(0.01, 0.3, C)
    student.set_prior(frequency_C)
    assert all(classify.bias.abs().sum() == 0 for classify in student.top.classifiers)
    expected = [part.mean() for part in frequency_C.split(list(VERTICALS.values()))]
    torch.testing.assert_close(student.pace.offset.detach().sigmoid(), torch.stack(expected))


def test_classes_that_are_never_or_always_there_have_a_finite_prior():
    student = build(pace={"kind": "none"})
    student.set_prior(torch.cat([torch.zeros(6), torch.ones(6)]))
    biases_C = torch.cat([classify.bias for classify in student.top.classifiers]).detach()
    torch.testing.assert_close(biases_C.sigmoid()[:6], torch.full((6,), 1e-6))
    assert bool(biases_C.isfinite().all())
