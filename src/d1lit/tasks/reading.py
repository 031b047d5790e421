"""Rows from a file or the hub. Every fault of the data is one line: which key, file and line, the cause, the cure."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

Columns = Mapping[str, str | Sequence[str]]
"""Field of an example -> name of its column, or several names to try in order."""

MAX_FILE_BYTES = 8 * 2**30
MAX_LINE_BYTES = 16 * 2**20

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_ARCHIVES = (".gz", ".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z")
_ARCHIVE_MAGIC = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf")
_HUB_ID = re.compile(
    r"(?P<path>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<subset>[\w.-]+))?(:(?P<split>[\w.-]+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_CHECKS_VERSION = 1  # part of the cache's name: raise it when a check is added
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One row of data under the field names of its task."""

    place: str
    """Where it stands: "task.train_data: FILE:LINE"."""
    values: Mapping[str, Any]
    commit: str | None = None
    """Of the hub's data set; None for a file."""


def read_rows(location: str, key: str, columns: Columns, required: Sequence[str], default_split: str) -> list[Row]:
    """All rows of a JSONL, JSON, CSV or parquet file, or of a hub data set.

    A file is checked line by line once; `datasets` keeps the checked rows in its cache under the file's sha256.

    Args:
        location: a path, or a hub id as `owner/name[@revision][:subset[:split]]`.
        key: the configuration key that named the location, for messages.
        columns: which column each field is read from; a field not listed is read from the column of its own name.
        required: fields that every row must have.
        default_split: the split of a hub data set where its location names none.

    Raises:
        ValueError: one line, for whatever is wrong with the location or a row.
    """
    path = Path(location).expanduser()
    commit = None
    if path.is_file():
        found = _file_rows(path, key)
    elif path.exists():
        raise ValueError(
            f"{key}: {location} is not a regular file. Try: the path of a JSONL or parquet file in it [E301]"
        )
    elif path.suffix in (*_SUFFIXES, *_ARCHIVES) or location.startswith(("/", ".", "~")):
        raise ValueError(
            f"{key}: no file {location}. Try: an existing path, a hub id owner/name, or {key}=builtin [E301]"
        )
    else:
        commit, found = _hub_rows(location, key, default_split)
    rows = [Row(place, _fields(values, place, key, columns, required), commit) for place, values in found]
    if not rows:
        raise ValueError(f"{key}: {location} holds no rows. Try: another file, or {key}=builtin [E305]")
    return rows


def _fields(values: Mapping[str, Any], place: str, key: str, columns: Columns, required: Sequence[str]) -> dict:
    """The values of one row by field; empty columns count as absent."""
    fields: dict[str, Any] = {}
    for field in {*columns, *required}:
        names = columns.get(field, field)
        names = (names,) if isinstance(names, str) else tuple(names)
        present = [name for name in names if values.get(name) is not None]
        if present:
            fields[field] = values[present[0]]
        elif field in required:
            prefix = key.rsplit(".", 1)[0]
            raise ValueError(
                f"{place}: no column {' or '.join(map(repr, names))} for {field}; this row has "
                f"{', '.join(map(str, values)) or 'none'}. Try: {prefix}.columns.{field}=NAME [E303]"
            )
    return fields


# ---------------------------------------------------------------------------------------------------------------- files


def _file_rows(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{key}: {path} is empty. Try: another file, or {key}=builtin [E305]")
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{key}: {path} has {size} bytes, more than {MAX_FILE_BYTES}. Try: split it [E302]")
    with path.open("rb") as file:
        magic = file.read(6)
    if path.suffix in _ARCHIVES or magic.startswith(_ARCHIVE_MAGIC):
        raise ValueError(f"{key}: {path} is an archive, which is never unpacked here. Try: unpack it first [E302]")
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{key}: {path} ends in none of {' '.join(_SUFFIXES)}. Try: convert it to JSONL [E302]")
    if path.suffix == ".parquet":
        return _parquet_rows(path, key)
    return _cached_text_rows(path, key)


def _cached_text_rows(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The checked rows of a text file, out of the cache of `datasets` where this very content was checked before."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        records = _quietly(lambda: _checked_table(path, digest, key))
    except OSError:  # no room or no right to write the cache: nothing that should stop a run
        records = checked_rows(str(path), key)
    for record in records:
        yield f"{key}: {path}:{record['line']}", json.loads(record["row"])


def _checked_table(path: Path, digest: str, key: str) -> Any:
    from datasets import Dataset, Features, Value
    from datasets.exceptions import DatasetGenerationError

    try:
        # Rows travel as JSON text: a table column has one type, and a question that looks like a date must stay text.
        return Dataset.from_generator(
            checked_rows,
            features=Features({"line": Value("int64"), "row": Value("string")}),
            gen_kwargs={"path": str(path), "key": key},
            fingerprint=f"d1lit-{_CHECKS_VERSION}-{path.suffix[1:]}-{digest[:40]}",
        )
    except DatasetGenerationError as failure:
        raise failure.__cause__ or failure from None


def checked_rows(path: str, key: str) -> Iterator[dict[str, Any]]:
    """Line number and JSON text of every row of a text file.

    Raises:
        ValueError: "KEY: FILE:LINE: cause. Try: cure" at the first fault.
    """
    read: Callable[[str], Iterator[tuple[int, dict[str, Any]]]]
    read = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}[Path(path).suffix]
    empty = True
    try:
        for line, values in read(path):
            yield {"line": line, "row": json.dumps(values)}
            empty = False
        if empty:
            raise ValueError(f"{path} holds no rows. Try: another file [E305]")
    except ValueError as failure:
        raise ValueError(f"{key}: {failure}") from None


def _text_lines(path: str) -> Iterator[tuple[int, str]]:
    """Lines as text: UTF-8 with or without a byte order mark, LF or CRLF, none too long."""
    with open(path, "rb") as file:
        _refuse_utf16(file, path)
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(
                    f"{path}:{number}: the line is longer than {MAX_LINE_BYTES} bytes. Try: shorten it [E302]"
                )
            if number == 1:
                line = line.removeprefix(_BOM)
            try:
                yield number, line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as failure:
                raise ValueError(
                    f"{path}:{number}: byte {line[failure.start]:#04x} at column {failure.start + 1} is not UTF-8. "
                    "Try: save the file as UTF-8 (iconv -f latin1 -t utf-8) [E302]"
                ) from None


def _refuse_utf16(file: IO[bytes], path: str) -> None:
    start = file.read(2)
    if start in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path}:1: the file is UTF-16. Try: save it as UTF-8 (iconv -f utf-16 -t utf-8) [E302]")
    file.seek(0)


def _read_jsonl(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _text_lines(path):
        if line.strip():
            yield number, _object(_parse_json(line, f"{path}:{number}"), f"{path}:{number}")


def _read_json(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """A list of objects; a row's line is its place in the list, for JSON keeps no lines."""
    text = "\n".join(line for _, line in _text_lines(path))
    if not text.strip():
        return
    rows = _parse_json(text, path, whole_file=True)
    if not isinstance(rows, list):
        raise ValueError(
            f"{path}:1: a .json file must hold a list of rows. Try: [{{...}}, {{...}}], or name it .jsonl [E302]"
        )
    for number, row in enumerate(rows, start=1):
        yield number, _object(row, f"{path}:{number}")


def _read_csv(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every value stays text, so that leading zeros live."""
    reader = csv.reader((line + "\n" for _, line in _text_lines(path)), strict=True)
    try:
        header = next(reader, [])
        for cells in reader:
            if cells and len(cells) != len(header):
                raise ValueError(
                    f"{path}:{reader.line_num}: {len(cells)} cells under {len(header)} columns. "
                    "Try: quote the commas [E302]"
                )
            if cells:
                yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as failure:
        raise ValueError(f"{path}:{reader.line_num}: not CSV ({failure}). Try: mend the line [E302]") from None


def _parse_json(text: str, place: str, whole_file: bool = False) -> Any:
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique_keys)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except json.JSONDecodeError as failure:
        where = f"{place}:{failure.lineno}" if whole_file else place
        cause = f"not JSON ({failure.msg} at column {failure.colno})"
    except RecursionError:
        where, cause = place, "brackets are nested too deep"
    except UnicodeEncodeError:
        where, cause = place, "half of a surrogate pair (\\ud800 to \\udfff alone) is no character"
    except ValueError as failure:
        where, cause = place, str(failure).split(";")[0]
    raise ValueError(f"{where}: {cause}. Try: mend or delete the line [E302]")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"column {max(keys, key=keys.count)!r} stands twice in the row")
    return dict(pairs)


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(
            f'{place}: a row must be an object, not {type(value).__name__}. Try: {{"question": ...}} [E302]'
        )
    return value


# ------------------------------------------------------------------------------------------------------ parquet and hub


def _parquet_rows(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    def load() -> Any:
        import pyarrow.parquet
        from datasets import load_dataset

        metadata = pyarrow.parquet.read_metadata(path)
        unpacked = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
        if unpacked > MAX_FILE_BYTES:
            raise ValueError(f"{unpacked} bytes when unpacked, more than {MAX_FILE_BYTES}")
        if metadata.num_rows == 0:
            return ()
        return load_dataset("parquet", data_files=str(path), split="train")

    try:
        table = _quietly(load)
    except Exception as failure:  # pyarrow and datasets raise a dozen kinds for a broken file
        raise ValueError(
            f"{key}: {path}: cannot be read as parquet ({_first_line(failure)}). Try: write it again [E302]"
        ) from None
    return _table_rows(table, f"{key}: {path}")


def _table_rows(table: Iterable[Mapping[str, Any]], place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, values in enumerate(table, start=1):
        if len(str(values)) > MAX_LINE_BYTES:
            raise ValueError(f"{place}:{number}: the row is longer than {MAX_LINE_BYTES} bytes. Try: shorten it [E302]")
        yield f"{place}:{number}", dict(values)


def _hub_rows(location: str, key: str, default_split: str) -> tuple[str | None, Iterator[tuple[str, dict[str, Any]]]]:
    """The commit of a hub data set, and its rows; none of it is fetched where its card says that it is too large."""
    match = _HUB_ID.fullmatch(location)
    if match is None:
        raise ValueError(
            f"{key}: {location!r} is neither a file nor a hub id. "
            "Try: a path, or owner/name[@revision][:subset[:split]] [E301]"
        )
    split = match["split"] or default_split

    def load() -> tuple[str | None, Any]:
        from datasets import load_dataset_builder

        builder = load_dataset_builder(match["path"], match["subset"], revision=match["revision"])
        asked, found = match["revision"] or "", str(builder.hash)
        if _COMMIT.fullmatch(asked) and not found.startswith(asked):  # out of the cache, without a connection
            raise _Refused(f"the cache holds commit {found} of it", f"with a connection, or {match['path']}@{found}")
        _check_size(builder.info)
        builder.download_and_prepare()
        _check_size(builder.info)
        return builder.hash, builder.as_dataset(split=split)

    try:
        commit, table = _quietly(load)
    except (ConnectionError, OSError) as failure:
        if type(failure).__name__ == "DatasetNotFoundError":
            raise ValueError(
                f"{key}: the hub has no data set {match['path']!r}. Try: a local file, {key}=PATH [E306]"
            ) from None
        raise ValueError(
            f"{key}: cannot reach the hub for {match['path']!r}. Try: a local file, {key}=PATH [E306]"
        ) from None
    except _Refused as refused:
        raise ValueError(f"{key}: {location}: {refused.cause}. Try: {refused.cure} [E306]") from None
    except Exception as failure:  # a wrong subset or split, a script-only data set, a broken file on the hub, ...
        raise ValueError(
            f"{key}: {location} cannot be loaded ({_first_line(failure)}). "
            f"Try: owner/name:subset:split, or {key}=PATH [E306]"
        ) from None
    return commit, _table_rows(table, f"{key}: {location}")


@dataclass
class _Refused(Exception):
    """A data set of the hub that could be loaded, and is not the one wanted or is too large."""

    cause: str
    cure: str


def _check_size(info: Any) -> None:
    size = max(info.download_size or 0, info.dataset_size or 0)
    if size > MAX_FILE_BYTES:
        raise _Refused(f"{size} bytes, more than {MAX_FILE_BYTES}", "a smaller subset, or a file of its rows")


def _first_line(failure: Exception) -> str:
    return (str(failure) or type(failure).__name__).splitlines()[0][:200]


def _quietly(load: Callable[[], Any]) -> Any:
    """Load with progress bars and retry notices off: the run's own display is the only one."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    had_bars, verbosity = not are_progress_bars_disabled(), hub_logging.get_verbosity()
    disable_progress_bars()
    hub_logging.set_verbosity_error()
    try:
        return load()
    finally:
        hub_logging.set_verbosity(verbosity)
        if had_bars:
            enable_progress_bars()
