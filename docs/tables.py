"""The papers' tables as they came out here: results of finished runs as JSON, and JSON as a page.

python docs/tables.py collect TABLE WORKDIR [KEY=VALUE ...]     WORKDIR/seed-*/ -> docs/results/TABLE.json, then the page;
                                                                with data=NAME docs/results/TABLE-NAME.json; rows and
                                                                seeds that are in the file and not here are kept
python docs/tables.py                                           docs/results/*.json -> docs/tables.md and docs/results/*.png
"""

import io
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import hydra
import numpy as np
import yaml
from matplotlib.figure import Figure
from PIL import Image

from concentration.config import check_config, find_config_directory
from concentration.errors import ConcentrationError, ConfigError
from concentration.pipeline.graph import RunConfig

DOCS = Path(__file__).parent
RESULTS, PAGE = DOCS / "results", DOCS / "tables.md"

#: Of a row, in percent: what an evaluation calls it, and the page.
QUANTITIES = {"mpvap": "mpvap", "mpvap_log_softmax": "after log-softmax", "top1": "top-1"}
#: Rows that are part of every run, whatever its student.
REFERENCES = ("generalist", "specialists")
#: Points of mpvap by which specialists must lead, for a share of their lead to say something.
LEAST_LEAD = 0.05
#: Points of a loss curve that are kept.
NUM_CURVE_POINTS = 12
#: The papers' tables by vertical, which are written and drawn so, and their figure of losses.
BY_VERTICAL, LOSSES = ("table4", "table6"), ("fig5",)

HEAD = """# The papers' tables, as they came out here

Written by `python docs/tables.py` from `docs/results/`, which `launch/tables/run.sh TABLE` fills. Percent of the test
images, mean over the row's seeds and, where there are several, plus or minus half the range; no checkpoint is chosen by them.
`val` is mpvap on the validation images, by which settings are chosen; `closed` the share of the way from the generalist's mpvap
to the specialists', left out where they lead by less than five points. `the paper` is mpvap on EFT, which is private, in
table6 on Open Images: orders may be compared, values may not. On one GPU `launch/tables/at_once.py` trains the rows side by side.
"""

#: mpvap in the papers, by experiment and row.
PRINTED = {
    "table1": {"fc_fc_hard": 27.7, "fc_fc_d": 31.5, "sc_sc_hard": 27.6, "sc_sc_d": 31.9},
    "table2": {"fc_fc_d": 31.5, "fc_sc_d": 32.9, "sc_sc_d": 31.9},
    "table4": {"generalist": 27.7, "fc_fc_d": 31.5, "fc_sc_d": 32.9, "fc_sc_d_s": 37.9, "specialists": 68.0},
    "table5": {"fc_sc_d": 32.9, "fc_sc_d_class": 32.8, "fc_sc_d_s": 37.9},
    "table6": {"generalist": 62.0, "fc_fc_d": 63.2, "fc_sc_d": 64.0, "fc_sc_d_s": 65.8, "specialists": 68.4},
}


def list_rows(table: str, overrides: Sequence[str] = ()) -> Iterator[str]:
    """The names of the students in the table's multirun."""
    return (config.name for config in list_runs(table, overrides))


def list_runs(table: str, overrides: Sequence[str] = ()) -> Iterator[RunConfig]:
    """The runs of the table's multirun; `glyphs_gpu,table4` is table4 at the sizes of glyphs_gpu."""
    path = find_config_directory() / "experiment" / f"{table.rpartition(',')[2]}.yaml"
    content = yaml.safe_load(path.read_text())
    sweep = {key: str(values).split(",") for key, values in content["hydra"]["sweeper"]["params"].items()}
    sweep |= {key: values.split(",") for key, _, values in (o.partition("=") for o in overrides) if key in sweep}
    others = [override for override in overrides if override.partition("=")[0] not in sweep]
    with hydra.initialize_config_dir(str(find_config_directory()), version_base="1.3"):
        for values in itertools.product(*sweep.values()):
            chosen = [f"{key}={value}" for key, value in zip(sweep, values, strict=True)]
            yield check_config("run", hydra.compose("run", [f"experiment=[{table}]", *others, *chosen]))


def collect(table: str, workdir: Path, overrides: Sequence[str]) -> dict:
    """What is finished of a table: by row and seed the quantities, parameters, the training loss, and this commit.

    Raises: ConfigError where nothing is.
    """
    rows: dict[str, dict] = {}
    commit = _find_commit()
    students = list(list_rows(table, overrides))
    seeds = sorted(workdir.glob("seed-*"), key=lambda path: int(path.name.removeprefix("seed-")))
    seeds = [seed for seed in seeds if any((seed / "evaluations" / f"{name}.json").exists() for name in students)]
    for name, seed in itertools.product([*students, *REFERENCES], seeds):
        path = seed / "evaluations" / f"{name}.json"
        if path.exists():
            values = json.loads(path.read_text())
            row = rows.setdefault(name, {"num_parameters": values["num_parameters"]["total"], "seeds": {}})
            row["seeds"][seed.name.removeprefix("seed-")] = {
                **{quantity: round(values[quantity], 5) for quantity in QUANTITIES},
                "pvap": {vertical: round(ap, 4) for vertical, ap in values["pvap"].items()},
                **_read_metrics(seed / "students" / name / "metrics.jsonl"),
                "commit": commit,
            }
    if not rows:
        raise ConfigError(f"{workdir}: no finished row of {table}; run launch/tables/run.sh {table} first")
    return {"table": table, "overrides": list(overrides), "rows": rows}


def _write_json(found: Mapping) -> str:
    """As JSON with a line for each number that may change, but a point of a curve on one line."""
    return re.sub(r"\[\s+([^\s,\[]+),\s+([^\s,\]]+)\s+\]", r"[\1, \2]", json.dumps(found, indent=1)) + "\n"


def merge(earlier: Mapping, found: Mapping) -> dict:
    """Both results of a table, each row and seed of `found` where it is there: a table may come in pieces, from several machines.

    Raises: ConfigError where they were not trained alike, but for `method=`, which says what rows there are.
    """
    (recipe, methods), (recipe_found, methods_found) = (
        _split_methods(result["overrides"]) for result in (earlier, found)
    )
    if recipe != recipe_found or bool(methods) != bool(methods_found):
        raise ConfigError(
            f"{_name_result(found)}: the rows that are there were trained with {earlier['overrides']}, these with "
            f"{found['overrides']}; move docs/results/{_name_result(found)}.json away, or collect with the same"
        )
    methods = list(dict.fromkeys([*methods, *methods_found]))
    overrides = [*recipe, *([f"method={','.join(methods)}"] if methods else [])]
    names = [*list_rows(found["table"], overrides), *REFERENCES]
    rows = {}
    for name in names:
        pieces = [result["rows"][name] for result in (earlier, found) if name in result["rows"]]
        if pieces:
            seeds = {seed: values for piece in pieces for seed, values in piece["seeds"].items()}
            rows[name] = {**pieces[-1], "seeds": dict(sorted(seeds.items(), key=lambda seed: int(seed[0])))}
    return {**found, "overrides": overrides, "rows": rows}


def _split_methods(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    recipe = [override for override in overrides if not override.startswith("method=")]
    swept = [override.removeprefix("method=") for override in overrides if override.startswith("method=")]
    return recipe, [method for methods in swept for method in methods.split(",")]


def write_page() -> str:
    pages = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return "\n".join([HEAD, *map(_write_table, pages)])


def draw_pictures() -> None:
    """Beside the results: AP by vertical of a table by vertical, losses of Figure 5."""
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        experiment = _name_experiment(result)
        if experiment in BY_VERTICAL:
            _draw_verticals(result, path.with_suffix(".png"))
        elif experiment in LOSSES:
            _draw_losses(result, path.with_suffix(".png"))


def _find_commit() -> str:
    """Of this checkout; nothing where it is a copy, or git is not installed."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, cwd=DOCS, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def _name_experiment(result: Mapping) -> str:
    return result["table"].rpartition(",")[2]


def _name_result(result: Mapping) -> str:
    data = [override.removeprefix("data=") for override in result["overrides"] if override.startswith("data=")]
    return "-".join([_name_experiment(result), *data])


def _read_metrics(path: Path) -> dict:
    """`val`: the last mpvap; `loss`: [step, training loss] at even distances, each the mean since the point before."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    points = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
    parts = np.array_split(np.array(points).reshape(-1, 2), min(NUM_CURVE_POINTS, len(points)) or 1)
    validations = [line["val/mpvap"] for line in lines if "val/mpvap" in line]
    return {
        "loss": [[int(part[-1, 0]), round(float(part[:, 1].mean()), 4)] for part in parts if len(part)],
        "val": round(validations[-1], 5) if validations else None,
    }


def _write_table(result: Mapping) -> str:
    table, rows = result["table"], result["rows"]
    words = " ".join(["launch/tables/run.sh", table, *result["overrides"]])
    lines = [
        f"## {_name_result(result)}",
        "",
        f"`{words}`, {_write_seeds(rows)}.",
        "",
        "| row | seeds | parameters | val | " + " | ".join(QUANTITIES.values()) + " | closed | last loss | the paper |",
        "|---" * (len(QUANTITIES) + 7) + "|",
    ]
    for name, row in rows.items():
        cells = [name, ", ".join(row["seeds"]), f"{row['num_parameters']:,}"]
        validations = [seed["val"] for seed in row["seeds"].values()]
        cells.append(_write_spread([100 * val for val in validations if val is not None], 1))
        cells += [_write_spread([100 * seed[quantity] for seed in row["seeds"].values()], 1) for quantity in QUANTITIES]
        cells.append(_write_spread(_close_gap(name, rows), 0))
        cells.append(_write_spread([seed["loss"][-1][1] for seed in row["seeds"].values() if seed["loss"]], 2))
        cells.append(str(PRINTED.get(_name_experiment(result), {}).get(name, "")))
        lines.append("| " + " | ".join(cells) + " |")
    if _name_experiment(result) in BY_VERTICAL:
        lines += ["", *_write_verticals(result)]
    if _name_experiment(result) in (*BY_VERTICAL, *LOSSES):
        lines += ["", f"![{_name_result(result)}](results/{_name_result(result)}.png)"]
    return "\n".join(lines) + "\n"


def _write_seeds(rows: Mapping[str, Mapping]) -> str:
    """Which commit trained which seeds."""
    seeds_of: dict[str, set[str]] = {}
    for row in rows.values():
        for seed, values in row["seeds"].items():
            seeds_of.setdefault(values["commit"], set()).add(seed)
    return "; ".join(f"commit {commit}, seeds {', '.join(sorted(seeds_of[commit], key=int))}" for commit in seeds_of)


def _write_verticals(result: Mapping) -> list[str]:
    """mpvap's parts, means over the seeds."""
    rows = {name: _average_pvap(row) for name, row in result["rows"].items()}
    verticals = list(dict.fromkeys(vertical for pvap in rows.values() for vertical in pvap))
    lines = ["| vertical | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for vertical in verticals:
        cells = [f"{100 * pvap[vertical]:.1f}" if vertical in pvap else "" for pvap in rows.values()]
        lines.append(f"| {vertical} | " + " | ".join(cells) + " |")
    return lines


def _average_pvap(row: Mapping) -> dict[str, float]:
    """Over the seeds that have a vertical: one without a test image has none."""
    of_seeds = [values["pvap"] for values in row["seeds"].values()]
    verticals = dict.fromkeys(vertical for pvap in of_seeds for vertical in pvap)
    return {v: float(np.mean([pvap[v] for pvap in of_seeds if v in pvap])) for v in verticals}


def _draw_verticals(result: Mapping, path: Path) -> None:
    """A row a vertical, in the order of the generalist's AP or the last row's, and a dot a network."""
    rows = {name: _average_pvap(row) for name, row in result["rows"].items()}
    first = rows.get("generalist", [*rows.values()][-1])
    order = sorted(first, key=lambda vertical: first[vertical])
    figure = Figure(figsize=(8, 1 + 0.3 * len(order)), layout="constrained")
    axes = figure.subplots()
    styles = {"generalist": ("#777777", "s"), "specialists": ("black", "D")}
    students = [name for name in rows if name not in styles]
    # Without C7, which is the generalist's grey; from the sixth on with another mark, too.
    colours = [f"C{number}" for number in (0, 1, 2, 3, 4, 5, 6, 8, 9)]
    styles |= {name: (colours[n % len(colours)], "o^v"[n // 5 % 3]) for n, name in enumerate(students)}
    for name, pvap in rows.items():
        colour, marker = styles[name]
        values = [100 * pvap.get(vertical, np.nan) for vertical in order]
        axes.scatter(values, order, s=26, color=colour, marker=marker, label=name, zorder=3, alpha=0.85, linewidths=0)
    axes.grid(axis="y", color="#dddddd")
    axes.set_xlabel("AP on the vertical's test images, percent")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    _save(figure, path)


def _draw_losses(result: Mapping, path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    students = [name for name in result["rows"] if name not in REFERENCES]
    for number, name in enumerate(students):
        curves = [values["loss"] for values in result["rows"][name]["seeds"].values() if values["loss"]]
        for curve in curves:
            axes.plot(*np.array(curve).T, color=f"C{number}", linewidth=1)
        if not curves:
            continue
        axes.annotate(
            name, curves[0][-1], xytext=(4, 0), textcoords="offset points", color=f"C{number}", fontsize=8, va="center"
        )
    axes.set(yscale="log", xlabel="step", ylabel="training loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """In 64 colours, a fourth of the bytes; chosen for the range of colours, for by frequency a rare red became orange."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    Image.open(picture).convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


def _close_gap(name: str, rows: Mapping[str, Mapping]) -> list[float]:
    """In percent, of each seed whose generalist and specialists are known, too."""
    if name in REFERENCES or not rows.keys() >= set(REFERENCES):
        return []
    low, high = (rows[reference]["seeds"] for reference in REFERENCES)
    return [
        100 * (values["mpvap"] - low[seed]["mpvap"]) / (high[seed]["mpvap"] - low[seed]["mpvap"])
        for seed, values in rows[name]["seeds"].items()
        if seed in low and seed in high and high[seed]["mpvap"] - low[seed]["mpvap"] >= LEAST_LEAD
    ]


def _write_spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    mean, half = np.mean(values), (max(values) - min(values)) / 2
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def _collect_into_results(table: str, workdir: str, *overrides: str) -> None:
    found = collect(table, Path(workdir), overrides)
    path = RESULTS / f"{_name_result(found)}.json"
    if path.exists():
        found = merge(json.loads(path.read_text()), found)
    path.write_text(_write_json(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["collect"]:
        try:
            _collect_into_results(*sys.argv[2:])
        except ConcentrationError as error:
            sys.exit(f"tables: {error}")
    PAGE.write_text(write_page(), encoding="utf-8")
    draw_pictures()
