"""`concentrate remove vertical=NAME destination=WORKDIR`: the student in service without some of its verticals."""

from typing import Annotated

import pydantic

from concentration.errors import ConfigError, DataError
from concentration.stages.regroup import RegroupConfig, Regrouping, load_taxonomy, regroup


class RemoveConfig(RegroupConfig):
    """Writes a working directory without these verticals: shards, teachers, targets, and `students/NAME/`. Nothing is trained.

    vertical: that is no longer wanted, or several.
    """

    vertical: str | Annotated[tuple[str, ...], pydantic.Field(min_length=1)]

    @property
    def verticals(self) -> tuple[str, ...]:
        return (self.vertical,) if isinstance(self.vertical, str) else self.vertical


def remove(config: RemoveConfig) -> None:
    """Runs the stage.

    Raises:
        ConfigError: there is no such vertical, it is the only one, or as `regroup`.
        DataError: as `regroup`.
    """
    before = load_taxonomy(config.workdir)
    try:
        after = before.without(config.verticals)
    except DataError as error:
        raise ConfigError(f"vertical={','.join(config.verticals)}: {error}") from None
    regroup(config, Regrouping(before, after))
