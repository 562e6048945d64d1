"""Tables in .csv and .tsv files: their rows with line numbers, and their columns by name."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from concentration.errors import DataError
from concentration.schema import suggest


def read_table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of the rows of a .csv or .tsv file, the header among them; empty lines are left out.

    Raises: DataError where the file is missing, not UTF-8, or a text in quotes has no end.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        # NOTE: a spreadsheet's UTF-8 begins with a mark, which would be part of the first column's name.
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
        raise DataError(f"{path}, line {reader.line_num}: cannot be parsed ({error}); correct its quotes") from None


def find_column(path: Path, header: Sequence[str], name: str, key: str) -> int:
    """The place of a column.

    Args:
        path: of the table.
        header: its names.
        name: the one that is looked for.
        key: of the config, which gives the name.

    Raises: DataError where it is not there, with the nearest name, or there are several.
    """
    if header.count(name) != 1:
        found = "no column" if name not in header else "several columns"
        raise DataError(f"{path}: {found} '{name}' ({key}){suggest(name, header)}")
    return header.index(name)
