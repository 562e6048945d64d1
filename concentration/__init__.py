"""Trains one teacher per vertical of a huge taxonomy and concentrates them into one student.

The core is a library: `from concentration import Taxonomy, SoftTargets, TopLayers` needs torch, numpy, pydantic and
safetensors, and imports neither Lightning, Hydra nor WebDataset. docs/library.md says what may be relied on.
"""

import importlib

__version__ = "0.1.0"

#: Where the names of the library come from; `__init__.pyi` tells the same to type checkers and editors.
_PUBLIC = {
    "ConfigError": "errors",
    "DataError": "errors",
    "Taxonomy": "taxonomy",
    "TaxonomyClass": "taxonomy",
    "SoftTargets": "targets",
    "TopLayers": "networks.top_layers",
    "TopConfig": "networks.top_layers",
    "Pace": "networks.pace",
    "PaceConfig": "networks.pace",
    "NetworkConfig": "networks.student",
    "Student": "networks.student",
    "load_student": "networks.student",
    "sigmoid_cross_entropy": "objectives.sigmoid_cross_entropy",
    "HeadParameters": "objectives.fused_block",
    "fused_loss_by_vertical": "objectives.fused_head",
    "average_precision": "metrics.average_precision",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    # Imported at first use: `concentrate --help` should not wait for torch.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'concentration' has no attribute '{name}'")
    return getattr(importlib.import_module(f"concentration.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
