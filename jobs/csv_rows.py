"""Reads a CSV of unknown making: its encoding, its delimiter, its rows with their lines.

A row that can't be taken is handed on with its reason, its line and its raw text, never dropped.
"""

import csv
import io
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from pathlib import Path

from jobs.csv_files import (
    MAX_LINE_CHARS,
    READ_ERRORS,
    find_encoding,
    open_text,
    unreadable,
)
from jobs.errors import JobError

DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
MAX_CELL_CHARS = 1 << 20
SNIFF_ROWS = 200
_SEPARATOR_LINE = re.compile(r'\ufeff?"?sep=(.)"?\s*', re.IGNORECASE)  # Excel's own first line


class RowFault(StrEnum):
    """Why a row of a CSV became no product."""

    UNCLOSED_QUOTE = "unclosed_quote"
    TOO_FEW_CELLS = "too_few_cells"
    TOO_MANY_CELLS = "too_many_cells"
    BAD_ENCODING = "bad_encoding"
    MISSING_PRODUCT_ID = "missing_product_id"
    DUPLICATE_ID = "duplicate_id"


@dataclass(frozen=True, slots=True)
class CsvRow:
    """One row: as many cells as the header has; `line` is where it begins, from 1."""

    line: int
    cells: list[str]
    raw: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectedRow:
    """One row that became no product, and why."""

    line: int
    reason: RowFault
    detail: str
    raw: str


@dataclass(frozen=True, kw_only=True)
class CsvSource:
    """A CSV whose form was found.

    Attributes:
        encoding: A codec's name.
        delimiter: One character.
        header: The columns' names as written, stripped; may repeat or be empty.
        skip_lines: Lines before the header.
    """

    path: Path
    encoding: str
    delimiter: str
    header: tuple[str, ...]
    skip_lines: int


class _Lines:
    """A file's lines; remembers those of the current row, and takes lines back."""

    def __init__(self, handle: io.TextIOWrapper, path: Path) -> None:
        self._handle = handle
        self._path = path
        self._waiting: deque[str] = deque()
        self.taken: list[str] = []
        self.number = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else self._handle.readline(MAX_LINE_CHARS)
        if not line:
            raise StopIteration
        if len(line) >= MAX_LINE_CHARS:
            raise JobError(
                f"{self._path}: line {self.number + 1} has {MAX_LINE_CHARS:,} characters or more: "
                "no CSV with one product a row"
            )
        self.number += 1
        self.taken.append(line)
        return line

    def give_back(self) -> None:
        """Take back all lines of the current row but its first."""
        rest = self.taken[1:]
        self._waiting.extendleft(reversed(rest))
        self.number -= len(rest)
        del self.taken[1:]


def open_csv(path: Path, *, encoding: str | None, delimiter: str | None) -> CsvSource:
    """Find a CSV's encoding, delimiter and header.

    Args:
        path: The file, plain or gzip.
        encoding: A codec's name; None: a byte order mark, else UTF-8 where most lines with other
            characters than ASCII are valid in it, else cp1252.
        delimiter: One character or its name; None: the one of , ; tab | that splits best.

    Raises:
        JobError: The file is missing, empty, no CSV, or the encoding or delimiter is unknown.
    """
    if not path.is_file():
        raise JobError(f"{path} {'is no file' if path.exists() else 'does not exist'}")
    wanted = DELIMITERS.get(delimiter or "", "\t" if delimiter == "\\t" else delimiter)
    if wanted is not None and (len(wanted) != 1 or wanted in '"\r\n'):
        raise JobError(
            f"--delimiter {delimiter!r}: expected one character or {', '.join(DELIMITERS)}"
        )
    source = CsvSource(
        path=path,
        encoding=encoding or find_encoding(path),
        delimiter=wanted or ",",
        header=(),
        skip_lines=0,
    )
    first = next(_read_lines(source), None)
    if first is None:
        raise JobError(f"{path} is empty: no header")
    named = _SEPARATOR_LINE.fullmatch(first)
    candidates = [wanted] if wanted else [named[1]] if named else list(DELIMITERS.values())
    skip_lines = 1 if named else 0
    best = max(
        (_try_delimiter(source, one, skip_lines) for one in candidates), key=lambda found: found[0]
    )[1]
    if not best.header:
        raise JobError(f"{path} has no header line that can be read")
    return best


def _try_delimiter(
    source: CsvSource, delimiter: str, skip_lines: int
) -> tuple[tuple[bool, float, int], CsvSource]:
    """Return how well a delimiter splits the file's beginning, and the file read so."""
    found = replace(source, delimiter=delimiter, skip_lines=skip_lines)
    rows = list(islice((cells for _, cells, _ in _read_records(found) if cells != []), SNIFF_ROWS))
    first = (rows[0] if rows else None) or []
    header = tuple(cell.strip().lstrip("\ufeff").strip('" ') for cell in first)
    agreeing = sum(cells is not None and len(cells) == len(header) for cells in rows[1:])
    share = agreeing / max(len(rows) - 1, 1)
    return (len(header) > 1, round(share, 1), len(header)), replace(found, header=header)


def read_rows(source: CsvSource) -> Iterator[CsvRow | RejectedRow]:
    """Yield every row after the header; blank lines are none.

    Empty cells beyond the header are cut: many exports end each row with a delimiter. A quote
    that is never closed costs its own line, not the rows that follow.

    Args:
        source: From `open_csv`.

    Raises:
        JobError: The file can't be read or decoded.
    """
    width = len(source.header)
    header_seen = False
    for line, cells, raw in _read_records(source):
        if cells == []:
            continue
        if not header_seen:
            header_seen = True
        elif cells is None:
            detail = "a quote in this line is not closed as it should be"
            yield _reject(line, RowFault.UNCLOSED_QUOTE, detail, raw)
        elif not raw.isascii() and not _is_text(raw):
            detail = f"bytes that are no {source.encoding}"
            yield _reject(line, RowFault.BAD_ENCODING, detail, raw)
        elif len(cells) < width:
            detail = f"{len(cells)} cells, the header has {width}"
            yield _reject(line, RowFault.TOO_FEW_CELLS, detail, raw)
        elif len(cells) > width and any(cell.strip() for cell in cells[width:]):
            detail = f"{len(cells)} cells, the header has {width}"
            yield _reject(line, RowFault.TOO_MANY_CELLS, detail, raw)
        else:
            yield CsvRow(line, cells[:width], raw)


def _reject(line: int, reason: RowFault, detail: str, raw: str) -> RejectedRow:
    shown = raw.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return RejectedRow(line=line, reason=reason, detail=detail, raw=shown)


def _is_text(raw: str) -> bool:
    """Tell whether no byte had to be smuggled in as a lone surrogate."""
    try:
        raw.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_records(source: CsvSource) -> Iterator[tuple[int, list[str] | None, str]]:
    """Yield (first line, cells, raw text); the cells are None where a quote is not closed."""
    csv.field_size_limit(MAX_CELL_CHARS)  # the module's default, 128 KiB, is short of some pages
    with open_text(source.path, source.encoding) as handle:
        lines = _Lines(handle, source.path)
        reader = csv.reader(lines, delimiter=source.delimiter, strict=True)
        try:
            for _ in range(source.skip_lines):
                next(lines)
            while True:
                lines.taken = []
                line = lines.number + 1
                cells: list[str] | None
                try:
                    cells = next(reader)
                except csv.Error:
                    lines.give_back()
                    cells = _split_sloppy(lines.taken[0], source.delimiter)
                    reader = csv.reader(lines, delimiter=source.delimiter, strict=True)
                yield line, cells, "".join(lines.taken).rstrip("\r\n")
        except StopIteration:
            return
        except READ_ERRORS as error:
            raise unreadable(source.path, source.encoding, error) from error


def _split_sloppy(line: str, delimiter: str) -> list[str] | None:
    """Split a line with stray quotes (`"15" TV"`); None if it ends inside a quoted cell."""
    reader = csv.reader(iter([line, "\n"]), delimiter=delimiter)
    try:
        cells = next(reader)
    except csv.Error:
        return None
    return cells if reader.line_num == 1 else None


def _read_lines(source: CsvSource) -> Iterator[str]:
    try:
        with open_text(source.path, source.encoding) as handle:
            yield from iter(lambda: handle.readline(MAX_LINE_CHARS), "")
    except READ_ERRORS as error:
        raise unreadable(source.path, source.encoding, error) from error
