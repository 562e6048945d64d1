"""Trains one teacher per vertical of a huge taxonomy and concentrates them into one student.

The core is a library: `from concentration import Taxonomy, SoftTargets, TopLayers` needs torch, numpy, pydantic and
safetensors, and imports neither Lightning, Hydra nor WebDataset.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "Taxonomy": "taxonomy",
    "TaxonomyClass": "taxonomy",
    "SoftTargets": "targets",
    "TopLayers": "networks.top_layers",
    "TopConfig": "networks.top_layers",
    "Pace": "networks.pace",
    "PaceConfig": "networks.pace",
    "Student": "networks.student",
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
