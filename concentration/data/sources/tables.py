"""Reads tables in .csv and .tsv files: rows with their line numbers, and columns by name."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from concentration.errors import DataError
from concentration.schema import suggest

#: What may separate columns, and how messages call it.
_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}


def read_table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, cells) of each row of a .csv or .tsv file, the header included; empty lines are left out.

    Raises:
        DataError: the file is missing or not UTF-8, or a quoted text has no end.
    """
    delimiter = _choose_delimiter(path)
    try:
        # NOTE: spreadsheets write a byte order mark, which would become a part of the first column's name.
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            for row in reader:
                if row:
                    yield reader.line_num, row
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give the path of the table") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: cannot be parsed ({error}); correct its quotes, or part its columns by "
            f"{_DELIMITERS[delimiter]}"
        ) from None


def find_column(path: Path, header: Sequence[str], name: str, key: str) -> int:
    """The place of the column with this name.

    Args:
        path: the table.
        header: the names of its columns.
        name: the name that is looked for.
        key: the option that gives this name.

    Raises:
        DataError: there is no such column, or several. The message suggests the nearest name, or another separator of columns.
    """
    places = [place for place, column in enumerate(header) if column == name]
    if len(places) > 1:
        numbers = ", ".join(str(place + 1) for place in places)
        raise DataError(
            f"{path}: several columns '{name}' ({key}): the columns {numbers}; leave one, or rename the others"
        )
    if not places:
        for other, called in _DELIMITERS.items():
            if any(name in _split_names(column, other) for column in header):
                expected = _DELIMITERS[_choose_delimiter(path)]
                raise DataError(
                    f"{path}: no column '{name}' ({key}): its columns are parted by {called}, expected {expected}; "
                    "part them by commas in a .csv, by tabs in a .tsv"
                )
        raise DataError(f"{path}: no column '{name}' ({key}){suggest(name, header)}")
    return places[0]


def _choose_delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _split_names(column: str, delimiter: str) -> list[str]:
    return [part.strip(" \"'") for part in column.split(delimiter)] if delimiter in column else []
