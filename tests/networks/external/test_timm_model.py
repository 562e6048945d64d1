"""Classifiers of timm against timm's own transform and its own answers."""

import io

import numpy as np
import pytest
import safetensors.torch
import timm
import timm.data
import torch
from PIL import Image

from concentration.data.views import CentreView, decode_view
from concentration.errors import ConfigError, DataError
from concentration.networks.external import TimmModelConfig
from concentration.networks.external.teacher import ExternalTeacher, load_external_teacher, take_over

NAME = "test_resnet"  # of timm's networks for tests: 0.5M parameters, images of 160 pixels, 95% of which are seen


@pytest.fixture(scope="module")
def network(photographs) -> torch.nn.Module:
    """Random weights, but with the statistics of these photographs, so that its answers to them differ."""
    torch.manual_seed(3)
    network = timm.create_model(NAME, num_classes=5)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    images = torch.stack([transform(photograph) for photograph in photographs])
    with torch.no_grad():
        for _ in range(30):
            network(images)
    network.get_classifier().weight.data.mul_(10)
    return network.eval()


@pytest.fixture(scope="module")
def checkpoint(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("timm") / "birds.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    noise = np.random.default_rng(4).integers(0, 256, (6, 16, 20, 3), dtype=np.uint8)
    sizes = [(300, 300), (200, 320), (640, 333), (170, 400), (1000, 700), (211, 199)]
    return [Image.fromarray(n).resize(size, Image.Resampling.BICUBIC) for n, size in zip(noise, sizes, strict=True)]


def make(taxonomy, **values) -> ExternalTeacher:
    return take_over(TimmModelConfig(name=NAME, classes="identity", **values), taxonomy, "birds")


def look(teacher: ExternalTeacher, photographs) -> torch.Tensor:
    """Probabilities of images that are decoded as `targets` and `evaluate` do it."""
    views = []
    for photograph in photographs:
        buffer = io.BytesIO()
        photograph.save(buffer, "png")
        views.append(decode_view(buffer.getvalue(), CentreView(), 0, teacher.image_size)[0])
    return teacher(torch.from_numpy(np.stack(views))).sigmoid()


def test_it_says_what_timm_says_by_timms_own_transform(taxonomy, network, checkpoint, photographs):
    teacher = make(taxonomy, checkpoint=checkpoint)
    data = timm.data.resolve_model_data_config(network)
    assert teacher.image_size == int(160 / data["crop_pct"]) > 160, "the middle is cut out"
    found = look(teacher, photographs)
    distance = {}
    for interpolation in ("bilinear", "bicubic"):
        transform = timm.data.create_transform(**{**data, "interpolation": interpolation})
        with torch.no_grad():
            expected = network(torch.stack([transform(photograph) for photograph in photographs])).softmax(1)
        distance[interpolation] = (found - expected).abs().max().item()
    assert expected.max(1).values.std() > 0.01, "answers that could be wrong"
    assert distance["bilinear"] < 0.02
    assert distance["bicubic"] < 0.1, "this network's own; ours are always made smaller bilinearly"
    assert (found.argmax(1) == expected.argmax(1)).all()


def test_its_file_says_the_same_as_the_model_that_was_taken_over(taxonomy, checkpoint, photographs, tmp_path):
    teacher = make(taxonomy, checkpoint=checkpoint, image_size=64, crop=0.5)
    assert teacher.image_size == 128
    files = teacher.save(tmp_path)
    assert files == ["external.json", "model/weights.safetensors"]
    checkpoint.rename(checkpoint.with_suffix(".away"))
    try:
        again = load_external_teacher(tmp_path, taxonomy.restrict("birds"))
    finally:
        checkpoint.with_suffix(".away").rename(checkpoint)
    assert torch.equal(look(again, photographs), look(teacher, photographs))
    assert (again.num_outputs, again.image_size, again.device) == (5, 128, torch.device("cpu"))


@pytest.mark.parametrize("form", ["plain", "wrapped"])
def test_a_state_dict_of_torch_is_a_checkpoint_as_well(taxonomy, network, checkpoint, photographs, tmp_path, form):
    state = network.state_dict()
    torch.save(state if form == "plain" else {"epoch": 3, "state_dict": state}, tmp_path / "birds.pth")
    found, expected = (make(taxonomy, checkpoint=path) for path in (tmp_path / "birds.pth", checkpoint))
    assert torch.equal(look(found, photographs), look(expected, photographs))


class Trap:
    """Would make a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_checkpoint_is_executed(taxonomy, tmp_path):
    torch.save({"state_dict": {"fc.weight": Trap(tmp_path / "trapped")}}, tmp_path / "trap.pth")
    with pytest.raises(DataError, match=r"trap\.pth: damaged, or no file of weights"):
        make(taxonomy, checkpoint=tmp_path / "trap.pth")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("ending", ["safetensors", "pth", "npz"])
@pytest.mark.parametrize("content", [b"", b"no weights\n" * 30, b"PK\x03\x04" + bytes(50)])
def test_a_damaged_checkpoint_is_one_clear_error(taxonomy, tmp_path, ending, content):
    path = tmp_path / f"birds.{ending}"
    path.write_bytes(content)
    with pytest.raises((DataError, ConfigError), match=str(path)) as caught:
        make(taxonomy, checkpoint=path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_network_is_one_clear_error(taxonomy, network, tmp_path):
    other = timm.create_model("test_vit", num_classes=5)
    torch.save(other.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(DataError, match=r"vit\.pth: has no fc\.weight, the classifier of timm's test_resnet"):
        make(taxonomy, checkpoint=tmp_path / "vit.pth")
    state = network.state_dict()
    del state["conv1.0.weight"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(
        ConfigError, match=r"part\.pth: cannot be loaded into timm's test_resnet.*conv1\.0\.weight"
    ) as caught:
        make(taxonomy, checkpoint=tmp_path / "part.pth")
    assert "\n" not in str(caught.value)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(DataError, match=r"list\.pth"):
        make(taxonomy, checkpoint=tmp_path / "list.pth")


def test_a_network_that_timm_has_not_got_is_one_clear_error(taxonomy, checkpoint):
    config = TimmModelConfig(name="test_resnt", classes="identity", checkpoint=checkpoint)
    with pytest.raises(
        ConfigError, match=r"external\.name=test_resnt: timm has no such network; did you mean 'test_resnet'"
    ):
        take_over(config, taxonomy, "birds")
    config = TimmModelConfig(name="test_resnet.nothing", classes="identity", checkpoint=checkpoint)
    with pytest.raises(ConfigError, match=r"external\.name=test_resnet\.nothing: timm has no such weights"):
        take_over(config, taxonomy, "birds")


def test_weights_come_from_one_source(checkpoint):
    with pytest.raises(ValueError, match="two sources of weights"):
        TimmModelConfig(name=NAME, classes="identity", pretrained=True, checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"'external\.checkpoint' is missing"):
        TimmModelConfig(name=NAME, classes="identity")


def test_weights_that_cannot_be_downloaded_are_one_clear_error(taxonomy, monkeypatch):
    import timm.models._builder

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(timm.models._builder, "load_pretrained", fail)
    with pytest.raises(ConfigError, match=r"external\.pretrained=true: cannot be loaded into timm's test_resnet"):
        make(taxonomy, pretrained=True)


def test_outputs_of_imagenet_have_the_names_of_imagenet(taxonomy, tmp_path):
    torch.save(timm.create_model(NAME, num_classes=1000).state_dict(), tmp_path / "imagenet.pth")
    (tmp_path / "map.json").write_text('{"n01614925": "osprey", "n01608432": "raptor", "n02112018": null}')
    config = TimmModelConfig(name=NAME, classes=str(tmp_path / "map.json"), checkpoint=tmp_path / "imagenet.pth")
    teacher = take_over(config, taxonomy, "birds")
    assert {number: c for number, c in enumerate(teacher.class_ids) if c} == {21: "raptor", 22: "osprey"}
