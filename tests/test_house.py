"""The floors of the house: what may import what, read from the source, and what users of the library and of verbs wait for."""

import ast
import graphlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import concentration

PACKAGE = Path(concentration.__file__).parent

FLOORS = {
    "": 0,  # concentration/__init__.py
    "errors": 0,
    "array_files": 1,
    "distributed": 1,
    "files": 1,
    "label_mix": 1,
    "packed_targets": 1,
    "preemption": 1,
    "processes": 1,
    "progress": 1,
    "schema": 1,
    "streams": 1,
    "targets": 1,
    "taxonomy": 1,
    "temporaries": 1,
    "data": 2,
    "grouping": 2,
    "metrics": 2,
    "objectives": 2,
    "networks": 3,
    "serving": 3,
    "training": 4,
    "stages": 5,
    "pipeline": 6,
    "cli": 7,
    "completion": 7,
    "config": 7,
    "entry": 7,
    "verb_help": 7,
}

# Where alone a library is imported.
PLACES = {
    "hydra": {"cli", "config"},
    "omegaconf": {"cli", "config"},
    "lightning": {"training"},
    "pytorch_lightning": set(),
    "wandb": {"training"},
    "webdataset": {"data"},
    "fsspec": {"data"},
    "aiohttp": {"data"},
    "triton": {"objectives"},
    "scipy": {"grouping"},
    "faiss": {"serving"},
    "starlette": {"serving"},
    "uvicorn": {"stages"},
}

CORE = {
    "errors",
    "files",
    "array_files",
    "schema",
    "taxonomy",
    "targets",
    "packed_targets",
    "label_mix",
    "distributed",
    "objectives",
    "networks",
    "metrics",
    "grouping",
}
CORE_LIBRARIES = {"numpy", "pydantic", "safetensors", "scipy", "timm", "torch", "triton"}  # triton comes with torch


class Import(NamedTuple):
    importer: str
    line: int
    imported: str

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def name_module(path: Path) -> str:
    """`concentration.networks.pace`; a package has the name of its folder."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_module(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def walk_imports() -> Iterator[Import]:
    """Every import statement, also those inside functions; `from package import module` counts as the module."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (Import(module, node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}:{node.lineno}: a relative import; write the whole name"
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield Import(module, node.lineno, inner if inner in MODULES else node.module)


IMPORTS = list(walk_imports())
INTERNAL = [found for found in IMPORTS if found.imported.split(".")[0] == "concentration"]
EXTERNAL = [
    found for found in IMPORTS if found.imported.split(".")[0] not in {"concentration", *sys.stdlib_module_names}
]


def part_of(module: str) -> str:
    """What stands in `FLOORS`: `networks` of `concentration.networks.pace`."""
    return [*module.split("."), ""][1]


def test_every_module_has_a_floor():
    assert {part_of(module) for module in MODULES} <= set(FLOORS), (
        "name the new part and its floor here and in the README's list of files"
    )


def test_imports_point_down():
    def is_down(found: Import) -> bool:
        here, there = part_of(found.importer), part_of(found.imported)
        if here == there:
            return True
        # Single modules may use others of their floor, folders may not: metrics and data do not know each other.
        are_modules = all((PACKAGE / f"{part}.py").exists() for part in (here, there))
        return FLOORS[there] < FLOORS[here] or (are_modules and FLOORS[there] == FLOORS[here])

    assert len(INTERNAL) > 100, "the walk has lost its way"
    assert [str(found) for found in INTERNAL if not is_down(found)] == []


def test_no_module_imports_itself_through_others():
    graph = {module: {found.imported for found in INTERNAL if found.importer == module} for module in MODULES}
    assert graph["concentration"] == set()
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the cycle


@pytest.mark.parametrize("library", PLACES)
def test_a_library_is_imported_in_its_place_alone(library):
    users = [found for found in EXTERNAL if found.imported.split(".")[0] == library]
    assert [str(found) for found in users if part_of(found.importer) not in PLACES[library]] == []
    assert {part_of(found.importer) for found in users} == PLACES[library], "nothing imports it there any more"


def test_the_core_needs_torch_and_numpy_and_little_else():
    others = [
        str(found)
        for found in EXTERNAL
        if part_of(found.importer) in CORE and found.imported.split(".")[0] not in CORE_LIBRARIES
    ]
    assert others == []


def test_the_library_is_imported_without_what_only_the_command_line_needs():
    heavy = [
        "lightning",
        "hydra",
        "webdataset",
        "wandb",
        "timm",
        "torchvision",
        "matplotlib",
        "sklearn",
        "scipy",
        "onnx",
        "onnxruntime",
    ]
    code = f"""
import sys
import concentration
assert "torch" not in sys.modules, "`concentrate --help` would wait for torch"
for name in concentration.__all__:
    assert getattr(concentration, name).__name__ == name
found = [name for name in {heavy} if name in sys.modules]
assert not found, found
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr


def test_type_checkers_and_editors_see_the_names_of_the_library():
    assert (PACKAGE / "py.typed").exists()
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    # `import X as X` is what tells them that X is public.
    declared = {alias.asname: f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    assert declared == {name: f"concentration.{part}.{name}" for name, part in concentration._PUBLIC.items()}
    assert set(declared) <= set(dir(concentration))


def test_verbs_that_train_nothing_do_not_wait_for_lightning():
    verbs = ["prepare", "targets", "evaluate", "calibrate", "report", "group", "export", "predict"]
    code = "; ".join(["import sys", *(f"import concentration.stages.{verb}" for verb in verbs)])
    code += "; assert 'lightning' not in sys.modules"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr


def test_a_name_that_is_not_public_is_no_attribute():
    assert "Student" in concentration.__all__
    with pytest.raises(AttributeError, match="no attribute 'Studnet'"):
        _ = concentration.Studnet


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_short_and_says_what_it_is(module):
    source = MODULES[module].read_text()
    assert source.count("\n") <= 400
    assert ast.get_docstring(ast.parse(source)) or not source.strip()
    assert not {"utils", "util", "common", "helpers", "misc"} & set(module.split("."))


def test_the_wheel_holds_every_package_and_the_configs():
    root = Path(__file__).parent.parent
    setuptools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {".".join(path.parent.relative_to(root).parts) for path in (root / "concentration").rglob("__init__.py")}
    assert set(setuptools["packages"]) == found | {"concentration.conf"}
    assert setuptools["package-dir"] == {"concentration.conf": "conf"}
    assert {"py.typed", "*.pyi"} <= set(setuptools["package-data"]["concentration"])
