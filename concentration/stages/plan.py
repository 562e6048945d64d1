"""`plan=true` of the verbs that train: what a network has and what a step of it needs, before any of it is allocated."""

import os
import resource
import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from concentration.networks.cost import LayerCost, build_without_weights, count_by_layer
from concentration.stages.train_network import NetworkStageConfig, describe_network
from concentration.taxonomy import Taxonomy
from concentration.training.memory import MOMENTS, PARTS, MemoryPlan, Moment, StepShape, plan_memory

MIB = 2**20

_MOMENT_NAMES: dict[Moment, str] = {
    "forward": "at the end of the forward pass",
    "backward": "in the backward pass",
    "optimizer": "in the optimizer's step",
}


def print_training_plan(
    config: NetworkStageConfig,
    title: str,
    taxonomy: Taxonomy,
    image_size: int,
    shape: StepShape,
    teachers_bytes: int = 0,
) -> None:
    """Prints the layers of the network, and the memory that a step of its training needs; nothing is read or written.

    Args:
        teachers_bytes: of the files of teachers that stand in memory beside the student.

    Raises:
        ConfigError: the base network cannot be built, or the batch is too small for the processes.
    """
    network = describe_network(config, taxonomy, image_size)
    layers = count_by_layer(build_without_weights(network))
    memory = plan_memory(network, config.optimizer, config.trainer, shape)
    if int(os.environ.get("RANK", "0")):
        return
    console = Console(soft_wrap=True, highlight=False)
    console.print(_tabulate_layers(title, taxonomy, layers))
    console.print(_tabulate_memory(config, image_size, memory))
    for line in _describe_peak(config, image_size, memory, teachers_bytes):
        console.print(line)


def count_most_labels(taxonomy: Taxonomy, smear: bool) -> int:
    """The most outputs that the label of one class stands for: itself, and where it is smeared its ancestors."""
    return 1 + (max(len(ancestors) for ancestors in taxonomy.ancestors) if smear else 0)


def _tabulate_layers(title: str, taxonomy: Taxonomy, layers: Sequence[LayerCost]) -> Table:
    head = f"{title}: {taxonomy.num_classes:,} classes in {taxonomy.num_verticals} verticals"
    table = Table(title=head, title_justify="left", show_footer=True)
    table.add_column("layer", "all")
    for name, total in (
        ("parameters", sum(layer.parameters for layer in layers)),
        ("multiply-adds an image", sum(layer.multiply_adds for layer in layers)),
    ):
        table.add_column(name, f"{total:,}", justify="right")
    for layer in layers:
        table.add_row(layer.name, f"{layer.parameters:,}", f"{layer.multiply_adds:,}")
    return table


def _tabulate_memory(config: NetworkStageConfig, image_size: int, memory: MemoryPlan) -> Table:
    trainer = config.trainer
    batch = f"{memory.local_batch} images of {image_size} pixels at a time"
    kind = f"{trainer.precision}, {config.optimizer.kind}"
    head = f"memory of one process on a {trainer.accelerator}, in MiB: {batch}, {kind}"
    table = Table(title=head, title_justify="left", show_footer=True)
    table.add_column("at the peak of", "all")
    for moment in MOMENTS:
        table.add_column(moment, f"{memory.total(moment) / MIB:,.1f}", justify="right")
    for part in PARTS:
        numbers = [memory.at_peak[moment][part] for moment in MOMENTS]
        if any(numbers):
            table.add_row(part, *(f"{number / MIB:,.1f}" for number in numbers))
    return table


def _describe_peak(config: NetworkStageConfig, image_size: int, memory: MemoryPlan, teachers_bytes: int) -> list[str]:
    total = memory.peak_bytes + teachers_bytes
    lines = []
    if teachers_bytes:
        lines.append(f"teachers in the loop: {teachers_bytes / MIB:,.1f} MiB of weights beside it")
    lines.append(f"expected peak: {total / MIB:,.1f} MiB of tensors, {_MOMENT_NAMES[memory.moment]}")
    if config.trainer.resident:
        lines.append(
            f"  and the training images, {image_size**2:,} bytes each, or {3 * image_size**2:,} where any has colours (in the "
            "machine's memory twice while they are decoded)"
        )
    if config.trainer.accelerator == "cpu":
        lines.append(
            f"  and {_measure_process() / MIB:,.0f} MiB of the process itself (Python and its libraries, measured in this one)"
        )
        lines.append(
            "  and what the C library keeps of freed blocks: 13 to 45 % of the peak were seen, 1 to 11 % with "
            "MALLOC_MMAP_THRESHOLD_=65536 in the environment"
        )
    else:
        lines.append(
            "  and what is not a tensor: the CUDA context, and the work space of convolutions; nothing of this was measured"
        )
        if torch.cuda.is_available():
            free, _ = torch.cuda.mem_get_info()
            lines.append(f"  free on this GPU: {free / MIB:,.0f} MiB")
    return lines


def _measure_process() -> int:
    """The most memory that this process has had so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
