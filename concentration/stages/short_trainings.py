"""What a run and its report say of trainings that took few steps: on a small set `max_epochs` passes are soon over."""

from collections.abc import Sequence
from pathlib import Path

from concentration.stages.folders import STUDENTS, TEACHERS
from concentration.stages.run_directory import RunDirectory

#: With fewer, results tell how long was trained rather than what was. The shortest training of the demo takes 357.
FEW_STEPS = 300
#: What is proposed instead.
_ENOUGH_STEPS = 1000


def describe_short_trainings(workdir: Path, students: Sequence[str]) -> str:
    """Which of these students, of all teachers and of all experts took few steps, and what trains longer; empty where none did.

    Raises:
        DataError: the record of a finished training is damaged.
    """
    steps = {name: _load_steps(workdir / STUDENTS / name) for name in students}
    few = {name: number for name, number in steps.items() if number is not None and number < FEW_STEPS}
    taken: dict[str, list[int]] = {"teachers": [], "experts": []}
    for path in (workdir / TEACHERS).glob("*"):
        if (number := _load_steps(path)) is not None:
            taken["experts" if _is_expert(path) else "teachers"].append(number)
    taken_few = {kind: [number for number in numbers if number < FEW_STEPS] for kind, numbers in taken.items()}
    parts = [f"{name} took {number} steps" for name, number in few.items()]
    parts += [
        f"{len(numbers)} of {len(taken[kind])} {kind} took {_describe_range(numbers)} steps"
        for kind, numbers in taken_few.items()
        if numbers
    ]
    if not parts:
        return ""
    told = f"short trainings: {', '.join(parts)}"
    keys = ["trainer.min_steps"] * bool(few) + ["teacher.trainer.min_steps"] * bool(taken_few["teachers"])
    if keys:
        longer = " ".join(f"{key}={_ENOUGH_STEPS}" for key in keys)
        told += f"; `concentrate run` with {longer} overwrite=changed trains them longer"
    if taken["experts"]:
        told += (
            "; where systems are compared, compare.long_trainer, compare.expert.trainer and compare.augment.trainer need "
            "as much more, or the comparison is of unequal trainings"
        )
    return told


def _load_steps(path: Path) -> int | None:
    """Of a finished training; None where it is not finished, or nothing of ours was trained."""
    directory = RunDirectory(path)
    return directory.load_done("concentrate run").get("step") if directory.is_finished else None


def _is_expert(path: Path) -> bool:
    return (path / "config.json").exists() and "group" in RunDirectory(path).load_config()


def _describe_range(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least}" if least == most else f"{least} to {most}"
