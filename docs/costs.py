"""Writes docs/costs.md: what every row of the papers' tables costs. `make costs`, or: python docs/costs.py"""

import functools
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import hydra
import yaml

from concentration.config import check_config, find_config_directory
from concentration.networks.cost import build_without_weights, count_multiply_adds, count_parameters
from concentration.networks.student import NetworkConfig
from concentration.networks.top_layers import count_top_parameters
from concentration.pipeline.graph import NetworkParts, RunConfig
from concentration.schema import parse_config

PAGE = Path(__file__).with_name("costs.md")

#: By the file with the sizes: classes of each vertical. EFT is 100K classes in 20 verticals, Open Images about 6,000 in 5.
VERTICALS = {"eft": [5000] * 20, "open_images": [1200] * 5}

#: The totals that the paper prints, in millions, by experiment, method and `top.generic` (Tables 2 and 3).
PRINTED = {
    ("table2", "fc_fc_d", None): 98,
    ("table2", "fc_sc_d", None): 135,
    ("table2", "sc_sc_d", None): 155,
    ("table3", "fc_sc_generic_d", 0): 135,
    ("table3", "fc_sc_generic_d", 128): 127,
    ("table3", "fc_sc_generic_d", 256): 117,
    ("table3", "fc_sc_generic_d", 384): 108,
    ("table3", "fc_sc_generic_d", 512): 98,
}

HEAD = """# What the papers' experiments cost

Written by `make costs` from `conf/experiment/` and `conf/method/`; `tests/test_costs.py` holds it to them. Every row is a
network of the paper's sizes: EFT's 100,000 classes in 20 verticals and Open Images' 6,000 in 5 (taken as equally large), images
of 224 pixels. Nothing is allocated for it: the networks are built without weights. Parameters are in millions, multiply-adds in
billions an image.

`formula` is section 3.2's count of the top layers' weights, without biases. The paper's totals leave less for its base network
than the convolutions of Inception-V2 hold; how it counted is not known.
"""


class Row(NamedTuple):
    experiment: str
    method: str
    config: RunConfig


def list_experiments() -> list[str]:
    """Those that are a table or figure of the paper's: their multirun is its rows."""
    paths = (find_config_directory() / "experiment").glob("*.yaml")
    return sorted(path.stem for path in paths if path.stem.startswith(("table", "fig")))


def find_sizes(experiment: str) -> tuple[str, list[str]]:
    """The file of the paper's sizes and the further overrides, from the command in the experiment's comment."""
    text = (find_config_directory() / "experiment" / f"{experiment}.yaml").read_text()
    [(sizes, overrides)] = re.findall(rf"'experiment=\[(\w+),{experiment}\]'(.*)$", text, re.MULTILINE)
    given = shlex.split(overrides.split("(")[0])
    return sizes, [override for override in given if not override.startswith(("data=", "data.path=", "workdir="))]


def list_rows(experiment: str) -> Iterator[Row]:
    """The jobs of the experiment's multirun at the paper's sizes."""
    sizes, overrides = find_sizes(experiment)
    content = yaml.safe_load((find_config_directory() / "experiment" / f"{experiment}.yaml").read_text())
    sweep = {key: str(values).split(",") for key, values in content["hydra"]["sweeper"]["params"].items()}
    sweep |= {key: values.split(",") for key, _, values in (override.partition("=") for override in overrides)}
    words = [f"experiment=[{sizes},{experiment}]", "data=shards", "data.path=there"]
    with hydra.initialize_config_dir(str(find_config_directory()), version_base="1.3"):
        for values in itertools.product(*sweep.values()):
            chosen = dict(zip(sweep, values, strict=True))
            composed = hydra.compose("run", [*words, *(f"{key}={value}" for key, value in chosen.items())])
            yield Row(experiment, chosen["method"], check_config("run", composed))


def describe_network(parts: NetworkParts | RunConfig, image_size: int, sizes: list[int]) -> NetworkConfig:
    verticals = {f"v{number}": size for number, size in enumerate(sizes)}
    return NetworkConfig(base=parts.base, top=parts.top, pace=parts.pace, image_size=image_size, verticals=verticals)


def write_cells(name: str, network: NetworkConfig, printed: int | None, num_networks: int = 1) -> str:
    *parameters, multiply_adds = count(network.model_dump_json())
    millions = [number * num_networks / 1e6 for number in parameters]
    cells = [name, *(f"{number:,.1f}" for number in millions), "" if printed is None else str(printed)]
    return "| " + " | ".join([*cells, f"{num_networks * multiply_adds / 1e9:.2f}"]) + " |"


@functools.cache  # rows that differ in their targets alone are one network
def count(network_json: str) -> tuple[int, int, int, int, int]:
    """Parameters of the base, of the top layers, by the formula and in total, and multiply-adds."""
    network = parse_config(NetworkConfig, json.loads(network_json))
    student = build_without_weights(network)
    counts, sizes = count_parameters(student), list(network.verticals.values())
    formula = count_top_parameters(network.top, student.base.num_features, sum(sizes), len(sizes))
    return counts["base"], counts["top"], formula, counts["total"], count_multiply_adds(student)


def write_table(experiment: str) -> str:
    rows, (sizes, _) = list(list_rows(experiment)), find_sizes(experiment)
    verticals, first = VERTICALS[sizes], rows[0].config
    lines = [
        f"## {experiment} ({sizes})",
        "",
        "| row | base | top | formula | total | the paper | multiply-adds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        generic = row.config.top.generic
        name = row.method if generic is None else f"{row.method}, x = {generic}"
        network = describe_network(row.config, row.config.data.image_size, verticals)
        lines.append(write_cells(name, network, PRINTED.get((experiment, row.method, generic))))
    generalist = describe_network(first.generalist, first.data.image_size, verticals)
    lines.append(write_cells("generalist", generalist, None))
    specialist = describe_network(first.teacher, first.data.image_size, verticals[:1])
    lines.append(write_cells(f"specialists, {len(verticals)} together", specialist, None, len(verticals)))
    return "\n".join(lines) + "\n"


def write_page() -> str:
    return "\n".join([HEAD, *(write_table(experiment) for experiment in list_experiments())])


if __name__ == "__main__":
    PAGE.write_text(write_page(), encoding="utf-8")
