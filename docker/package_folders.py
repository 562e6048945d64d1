"""Makes the folders of the packages that pyproject.toml names, so that pip can install before their code is copied."""

import tomllib
from pathlib import Path

for package in tomllib.loads(Path("pyproject.toml").read_text())["tool"]["setuptools"]["packages"]:
    folder = Path("conf") if package == "concentration.conf" else Path(*package.split("."))
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
