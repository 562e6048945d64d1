"""The student in service, as the verbs find it that change it: its network, and how it learned what it knows."""

from dataclasses import dataclass
from pathlib import Path

from concentration.array_files import load_metadata
from concentration.data.split import Split
from concentration.errors import ConfigError
from concentration.files import check_unchanged
from concentration.networks.student import Student, load_student
from concentration.schema import parse_config
from concentration.stages.carried_targets import count_earlier_shards, find_earlier_taxonomy
from concentration.stages.folders import STUDENTS
from concentration.stages.run_directory import NETWORK_FILE, RunDirectory
from concentration.stages.student import LearningConfig
from concentration.taxonomy import Taxonomy


@dataclass(frozen=True)
class Served:
    """A finished student.

    Attributes:
        network: in eval mode.
        taxonomy: of its outputs: that of the data, or its first classes.
        learning: what it was taught.
        epochs: how often it has seen its data, or would have if it had been trained on all of them at once.
        num_shards: of the training data's first ones, that it was trained on.
        checkpoint: a hash of its file.
    """

    network: Student
    taxonomy: Taxonomy
    learning: LearningConfig
    epochs: float
    num_shards: int
    checkpoint: str

    def describe(self) -> dict:
        """The facts that a student made of this one keeps in its DONE.json."""
        return {"learning": self.learning.model_dump(mode="json"), "epochs": self.epochs}


def load_served(workdir: Path, name: str, split: Split) -> Served:
    """The student of this name.

    Args:
        workdir: where it is.
        name: of the student.
        split: the training data that there are now.

    Raises:
        ConfigError: it is not finished, or no network that `student` and what follows it made.
        DataError: its file has changed, or it was made for other classes than the first of the data's, or of other data than the
            first of these.
    """
    directory = RunDirectory(workdir / STUDENTS / name)
    done = directory.load_done(f"concentrate student name={name}", step=int, checkpoint=str)
    begun = directory.load_config()
    known = done.get("learning") or {key: begun[key] for key in LearningConfig.model_fields if key in begun}
    if not known.get("targets"):
        raise ConfigError(
            f"student={name}: was made of trained networks (augment, mixture), and how it learned is not known; give one "
            "that `student` has trained"
        )
    file = directory.path / NETWORK_FILE
    check_unchanged(file, done["checkpoint"], "training finished; restore it, or train again with overwrite=true")
    network, where = load_student(file), str(file)
    made_for = load_metadata(file).get("taxonomy", "")
    earlier = find_earlier_taxonomy(split.taxonomy, network.num_outputs, made_for, where)
    num_shards = count_earlier_shards(split, earlier.fingerprint, directory.load_upstream()["data"], where)
    epochs = done.get("epochs") or done["step"] * begun["trainer"]["batch_size"] / int(split.shard_start[num_shards])
    learning = parse_config(LearningConfig, known)
    return Served(network, earlier, learning, epochs, num_shards, done["checkpoint"])
