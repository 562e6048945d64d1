"""Writes answers as JSON lines, as CSV, or as a table for people."""

import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Literal, Protocol, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from concentration.schema import CONTROL
from concentration.serving.answers import ImageAnswer

Format = Literal["table", "jsonl", "csv"]

CSV_COLUMNS = (
    "path", "rank", "class", "name", "vertical", "probability", "lineage", "is_sure", "none_of_these", "error"
)  # fmt: skip
SEPARATOR = " > "
#: Characters that turn the direction of all that follows.
_TURNING = re.compile(r"[\u202a-\u202e\u2066-\u2069]")

#: How text is encoded, in a terminal and in files. Names of classes may be in any script; in the name of a file that is not
#: UTF-8, a `?` stands for each wrong byte.
TEXT_ENCODING = {"encoding": "utf-8", "errors": "replace"}


class Writer(Protocol):
    """Writes answers to a file, batch by batch."""

    def write(self, answers: Iterable[ImageAnswer]) -> None: ...

    def close(self) -> None:
        """Writes what is still held back; called once, after the last batch."""


def build_writer(format: Format, file: TextIO) -> Writer:
    """The writer of this format."""
    return {"table": TableWriter, "jsonl": JsonLinesWriter, "csv": CsvWriter}[format](file)


def describe_answer(answer: ImageAnswer) -> dict:
    """An answer as a JSON object. Values that are None or empty are left out."""
    described = {"path": answer.path}
    if answer.error is not None:
        return described | {"error": answer.error}
    described["classes"] = [_without_none(asdict(c)) | {"probability": round(c.probability, 6)} for c in answer.classes]
    if answer.none_of_these is not None:
        described["none_of_these"] = answer.none_of_these
    if answer.neighbours:
        described["neighbours"] = [
            {"name": n.name, "similarity": round(n.similarity, 4), "share": round(n.share, 4)}
            for n in answer.neighbours
        ]
    return described


def _without_none(values: dict) -> dict:
    return {key: value for key, value in values.items() if value is not None}


class JsonLinesWriter:
    """One JSON object a line."""

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, answers: Iterable[ImageAnswer]) -> None:
        self._file.writelines(json.dumps(describe_answer(answer), ensure_ascii=False) + "\n" for answer in answers)

    def close(self) -> None:
        self._file.flush()


class CsvWriter:
    """Writes a row for each class of an answer, and for an image without an answer a row with the error."""

    def __init__(self, file: TextIO):
        self._file = file
        self._rows = csv.writer(file, lineterminator="\n")
        self._rows.writerow(CSV_COLUMNS)

    def write(self, answers: Iterable[ImageAnswer]) -> None:
        for answer in answers:
            if answer.error is not None:
                self._rows.writerow([answer.path, *[""] * (len(CSV_COLUMNS) - 2), answer.error])
            for rank, c in enumerate(answer.classes, 1):
                values = [
                    answer.path,
                    rank,
                    c.id,
                    c.name,
                    c.vertical,
                    f"{c.probability:.6f}",
                    SEPARATOR.join(c.lineage),
                ]
                self._rows.writerow([*values, c.is_sure, answer.none_of_these, ""])  # None is written as nothing

    def close(self) -> None:
        self._file.flush()


class TableWriter:
    """Writes a table for people: for each image its classes, and below them its neighbours."""

    def __init__(self, file: TextIO):
        # A file or pipe has no width, so lines there may have up to 200 characters.
        self._console = Console(file=file, highlight=False, width=None if file.isatty() else 200)
        self._table = Table(box=None, pad_edge=False, header_style="dim")
        self._table.add_column("image", overflow="fold", max_width=40)
        self._table.add_column("answer", overflow="fold")
        self._table.add_column("vertical", style="dim")
        self._table.add_column("probability", justify="right")

    def write(self, answers: Iterable[ImageAnswer]) -> None:
        for answer in answers:
            self._add(answer)

    def close(self) -> None:
        self._console.print(self._table)

    def _add(self, answer: ImageAnswer) -> None:
        path = _show(answer.path)
        if answer.error is not None:
            self._table.add_row(path, f"[red]{_show(answer.error)}[/red]", "", "")
            return
        if answer.none_of_these:
            self._table.add_row(path, "[yellow]none of these classes, it seems; the nearest are[/yellow]", "", "")
            path = ""
        for number, c in enumerate(answer.classes):
            *above, name = map(_show, c.lineage)
            ancestors = "".join(f"[dim]{ancestor}{SEPARATOR}[/dim]" for ancestor in above)
            shown = f"{ancestors}[bold]{name}[/bold]" if number == 0 else f"{ancestors}{name}"
            self._table.add_row(path if number == 0 else "", shown, _show(c.vertical), f"{100 * c.probability:.1f} %")
        for neighbour in answer.neighbours:
            self._table.add_row(
                "", f"[dim]near[/dim] {_show(neighbour.name)}", "", f"[dim]{neighbour.similarity:.2f} alike[/dim]"
            )
        self._table.add_section()


def _show(text: str) -> str:
    """The name of a file or a class for a terminal, whose colours, screen and direction it might otherwise change."""
    return escape(_TURNING.sub("?", CONTROL.sub("?", text)))


def count_errors(answers: Sequence[ImageAnswer]) -> int:
    """How many images have an error instead of an answer."""
    return sum(answer.error is not None for answer in answers)
