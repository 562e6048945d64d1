"""Read by every Python whose PYTHONPATH names this folder, a job's of SLURM say: training then records its samples."""

import importlib.abc
import importlib.util
import os
import sys


class _Recording(importlib.abc.MetaPathFinder):
    """Has `record_samples` called as soon as the module is there that it changes; until then nothing is imported."""

    def find_spec(self, name, path, target=None):
        if name != "concentration.training.module":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_record(module) -> None:
            execute(module)
            from real_runs import record_samples

            record_samples()

        spec.loader.exec_module = execute_and_record
        return spec


if os.environ.get("RECORD_SAMPLES_OF_STEPS"):
    sys.meta_path.insert(0, _Recording())
