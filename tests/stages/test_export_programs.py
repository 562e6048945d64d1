"""Every kind of network becomes a program that answers as it does, for any batch size; and a head of 100,000 classes does."""

import cProfile
import subprocess
import sys
import time

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from concentration.networks.augmented import augment
from concentration.networks.auxiliary_heads import HeadConfig, HeadsConfig
from concentration.networks.bases import SmallBaseConfig
from concentration.networks.gater import CentroidRuleConfig, GaterConfig, RouterRuleConfig, TrunkConfig
from concentration.networks.mixture import Mixture, MixtureNetworkConfig
from concentration.networks.pace import PaceConfig
from concentration.networks.routed_base import RoutedConfig
from concentration.networks.student import NetworkConfig, Student
from concentration.networks.top_layers import TopConfig
from concentration.stages.export_programs import quantise_classifiers, save_onnx, trace_program, translate_to_onnx

SIZE = 16
BASE = SmallBaseConfig(channels=(4, 8), norm="group")
TOP = TopConfig(kind="fc_sc", top1=12, top2=8, norm="layer")
PACE = PaceConfig(kind="vertical", log=True, offset="class")


def describe(**changes) -> NetworkConfig:
    values = {"base": BASE, "top": TOP, "pace": PACE, "image_size": SIZE, "verticals": {"a": 3, "b": 5}}
    return NetworkConfig(**values | changes)


def build_gater(rule, top_experts: int) -> GaterConfig:
    trunk = TrunkConfig(base=BASE, image_size=SIZE, num_verticals=2)
    return GaterConfig(trunk=trunk, rule=rule, num_experts=3, normalise=True, top_experts=top_experts)


def build_routed() -> Student:
    expert = TrunkConfig(base=BASE, image_size=SIZE, num_verticals=2)
    return Student(describe(base=RoutedConfig(gater=build_gater(CentroidRuleConfig(), 1), expert=expert)))


def build_augmented() -> Student:
    heads = HeadsConfig(
        heads={"x": HeadConfig(num_classes=4, hidden=(6,)), "y": HeadConfig(num_classes=4, hidden=(5, 3))}
    )
    return augment(Student(describe()), heads, torch.tensor([0, 1, 1, 0, 1, 0, 0, 1]))


NETWORKS = {
    "sc_sc without pace": lambda: Student(
        describe(top=TopConfig(kind="sc_sc", top1=6, top2=4), pace=PaceConfig(kind="none"))
    ),
    "generic part, gamma a class": lambda: Student(
        describe(top=TopConfig(kind="fc_sc_generic", top1=12, top2=8, generic=3), pace=PaceConfig(kind="class"))
    ),
    "softmax over the features": lambda: Student(
        describe(top=TopConfig(kind="linear"), pace=PaceConfig(kind="none"), loss="softmax")
    ),
    "a vertical that was merged of two": lambda: Student(describe(num_blocks={"b": 2})),
    "grown by auxiliary heads": build_augmented,
    "mixture": lambda: Mixture(
        MixtureNetworkConfig(gater=build_gater(RouterRuleConfig(), 2), experts=tuple(describe() for _ in range(3)))
    ),
    "mixture with one decoder": build_routed,
}


def test_a_job_that_translates_leaves_no_lock_behind():
    """Jobs of a run end at once, and the run would end with a warning of leaked semaphores."""
    text = f"""
import multiprocessing, os
multiprocessing.set_start_method("forkserver")  # as in a run's jobs
from concentration.networks.bases import SmallBaseConfig
from concentration.networks.pace import PaceConfig
from concentration.networks.student import NetworkConfig, Student
from concentration.networks.top_layers import TopConfig
from concentration.stages.export_programs import trace_program, translate_to_onnx
translate_to_onnx(trace_program(Student({describe()!r}), {SIZE}))
os._exit(0)
"""
    finished = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert "leaked" not in finished.stderr


def scatter(network: torch.nn.Module) -> torch.nn.Module:
    """Every parameter and centroid somewhere else than it starts, so that none may be left out."""
    generator = torch.Generator().manual_seed(5)
    state = {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in network.state_dict().items()
    }
    network.load_state_dict(state)
    return network.eval()


def random_images(count: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_traced_program_answers_as_the_network(name):
    network = scatter(NETWORKS[name]())
    program = trace_program(network, SIZE).module()
    assert all(key in dict(network.named_parameters()) for key in network.classifier_weights)
    with torch.no_grad():
        for count in (1, 2, 17):
            images = torch.from_numpy(random_images(count))
            logits_BC, features_BT = program(images)
            torch.testing.assert_close(logits_BC, network(images), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(features_BT, network.answer(images)[1], atol=1e-5, rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS)
def test_its_onnx_form_does_too_also_with_int8_classifiers(name, tmp_path):
    network = scatter(NETWORKS[name]())
    model = translate_to_onnx(trace_program(network, SIZE))
    save_onnx(model, tmp_path / "model.onnx")
    quantise_classifiers(model, [f"network.{key}" for key in network.classifier_weights])
    save_onnx(model, tmp_path / "model.int8.onnx")
    images = random_images(17)
    with torch.no_grad():
        expected_BC = network(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(run(tmp_path / "model.onnx", images), expected_BC, atol=1e-4, rtol=1e-3)
    assert np.abs(run(tmp_path / "model.int8.onnx", images) - expected_BC).max() < 0.1 * np.abs(expected_BC).max()


@pytest.mark.long
def test_a_head_of_100_000_classes_is_exported_and_agrees(tmp_path):
    """20 verticals of 5,000 classes with 512 features each: 51 million numbers in the classifiers."""
    network = scatter(
        Student(
            describe(
                top=TopConfig(kind="fc_sc", top1=256, top2=512, norm="layer"),
                verticals={f"v{number}": 5000 for number in range(20)},
            )
        )
    )
    model = translate_to_onnx(trace_program(network, SIZE))
    save_onnx(model, tmp_path / "model.onnx")
    quantise_classifiers(model, [f"network.{key}" for key in network.classifier_weights])
    save_onnx(model, tmp_path / "model.int8.onnx")
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes["model.int8.onnx"] < sizes["model.onnx"] - 2.9 * 51_200_000
    images = random_images(4)
    with torch.no_grad():
        expected_BC = network(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(run(tmp_path / "model.onnx", images), expected_BC, atol=1e-3)
    exact_BC = torch.from_numpy(expected_BC).sigmoid()
    int8_BC = torch.from_numpy(run(tmp_path / "model.int8.onnx", images)).sigmoid()
    assert (int8_BC - exact_BC).abs().max() < 0.02
    for file in sizes:
        print(
            f"{file}: {sizes[file] / 1e6:.0f} MB, {1000 * time_one(tmp_path / file, images[:1]):.1f} ms for one image"
        )


def test_translating_takes_no_more_for_a_vertical_where_there_are_many():
    translate_to_onnx(trace_program(Student(describe()), SIZE))  # what comes once

    def count_calls(num_verticals: int) -> int:
        network = Student(describe(verticals={f"v{number}": 2 for number in range(num_verticals)}))
        program = trace_program(network, SIZE)
        profile = cProfile.Profile()
        profile.runcall(translate_to_onnx, program)
        return sum(entry.callcount for entry in profile.getstats())

    few, more, many = map(count_calls, (10, 20, 40))
    assert many - more < 2.1 * (more - few), "twice the verticals, more than twice the work"


def open_session(path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path, images: np.ndarray) -> np.ndarray:
    return open_session(path).run(["logits"], {"images": images})[0]


def time_one(path, images: np.ndarray) -> float:
    session, seconds = open_session(path), []
    for _ in range(20):
        started = time.perf_counter()
        session.run(["logits"], {"images": images})
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def test_weights_beside_the_file_are_found_again(tmp_path, monkeypatch):
    """What a network of more than 1.5 GiB needs, with a limit of one byte."""
    from concentration.stages import export_programs

    monkeypatch.setattr(export_programs, "_MOST_INSIDE_BYTES", 1)
    weight = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    node = onnx.helper.make_node("Gemm", ["x", "weight"], ["logits"], transB=1)
    shapes = {"x": ["batch", 8], "logits": ["batch", 300]}
    x, logits = (onnx.helper.make_tensor_value_info(k, onnx.TensorProto.FLOAT, s) for k, s in shapes.items())
    graph = onnx.helper.make_graph([node], "g", [x], [logits], [onnx.numpy_helper.from_array(weight, "weight")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    for _ in range(2):  # written again, it takes the place of the old file
        save_onnx(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").stat().st_size < 2 * weight.nbytes
    given = np.ones((2, 8), dtype=np.float32)
    found = open_session(tmp_path / "model.onnx").run(["logits"], {"x": given})[0]
    np.testing.assert_allclose(found, given @ weight.T, rtol=1e-5)
