"""`concentrate merge verticals=[A,B] into=NAME destination=WORKDIR`: a student some of whose verticals have become one."""

import pydantic

from concentration.errors import ConfigError, DataError
from concentration.stages.regroup import RegroupConfig, Regrouping, load_taxonomy, regroup
from concentration.stages.verbs import write_command


class MergeConfig(RegroupConfig):
    """Writes a working directory in which these verticals are one: shards, teachers, targets, and `students/NAME/`.

    Nothing is trained: `concentrate add vertical=INTO` there trains the merged vertical's teacher, and the student with it.

    verticals: two or more.
    into: the name of what they become; it may be one of theirs.
    """

    verticals: tuple[str, ...]
    into: str

    @pydantic.model_validator(mode="after")
    def _check_verticals(self):
        if len(set(self.verticals)) < 2 or len(set(self.verticals)) < len(self.verticals):
            raise ValueError(f"verticals={list(self.verticals)}: expected two or more, each once")
        return self


def merge(config: MergeConfig) -> None:
    """Runs the stage.

    Raises:
        ConfigError: there is no such vertical, another one has the name, or as `regroup`.
        DataError: as `regroup`.
    """
    before = load_taxonomy(config.workdir)
    try:
        after = before.merged(config.verticals, config.into)
    except DataError as error:
        raise ConfigError(f"verticals={','.join(config.verticals)}: {error}") from None
    regroup(config, Regrouping(before, after))
    print(
        f"{config.name}: {config.into} has the classifiers of {' and '.join(config.verticals)} side by side; to train them "
        f"together: {write_command('add', config.into)} student={config.name} workdir={config.destination}"
    )
