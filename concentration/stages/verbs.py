"""The verbs of single stages by name: what the command line offers and a pipeline's jobs run."""

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from concentration.schema import write_override


@dataclass(frozen=True)
class Verb:
    """A word of the command line: what it does, and where its function and config class are."""

    summary: str
    module: str
    function: str
    config: str
    #: The key that words without KEY= are for.
    positional: str | None = None

    def load(self):
        """The function and the config class; imports what they need, which takes seconds for torch."""
        module = importlib.import_module(self.module)
        return getattr(module, self.function), getattr(module, self.config)


def _stage(name: str, summary: str) -> Verb:
    return Verb(summary, f"concentration.stages.{name}", name, f"{name.capitalize()}Config")


STAGE_VERBS: Mapping[str, Verb] = {
    "prepare": _stage("prepare", "images and a taxonomy become shards and their index"),
    "group": _stage("group", "find groups of classes or samples by what a trained network says of them"),
    "teacher": _stage("teacher", "train the specialist of one vertical, or take over your own (external=onnx)"),
    "targets": _stage("targets", "store what the teachers say of every training image"),
    "student": _stage(
        "student", "train one network over all verticals (targets=labels: a generalist; online: teachers in the loop)"
    ),
    "mixture": _stage(
        "mixture", "put the experts of a grouping behind a gater: one network, of which each image sees a part"
    ),
    "augment": _stage("augment", "grow a trained network by heads for groups of its classes"),
    "add": _stage("add", "extend a student by a vertical, by classes, or by a better teacher"),
    "remove": _stage("remove", "cut verticals out of a student, into a new working directory"),
    "merge": _stage("merge", "make one vertical of several, in a student and a new working directory"),
    "evaluate": _stage("evaluate", "measure a student, a teacher, or all teachers (name=specialists)"),
    "calibrate": _stage("calibrate", "true probabilities over all classes, thresholds, and none of these (on val)"),
    "report": _stage("report", "a page with everything that was measured"),
    "export": _stage("export", "a student as one folder that predicts: ONNX, int8, torch.export, a model card"),
}


def write_command(verb: str, vertical: str) -> str:
    """What is typed to run the verb for a vertical, whatever its name."""
    return f"concentrate {verb} {write_override('vertical', vertical)}"


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides among the words of a command line (KEY=VALUE, ~KEY), and the others.

    A word that is a file is none, though it may have '=' inside.
    """
    overrides = [word for word in words if re.match(r"[+~]{0,2}[\w./@]+=|~\w", word) and not os.path.exists(word)]
    return overrides, [word for word in words if word not in overrides]
