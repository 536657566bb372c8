"""Lists of pictures: JSONL, CSV, TSV and Parquet files, a row each.

The columns of pictures and captions go by the names that are usual, or by
those that are given. Rows are read as a stream.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlp_jax.data import intake, splits
from vlp_jax.data.prepare import entries
from vlp_jax.data.prepare.spill import Spill
from vlp_jax.errors import UserError

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
# The usual names of columns, the likeliest first; in any case.
_IMAGE = (
  *("image", "file_name", "filename", "filepath", "file_path", "image_path"),
  *("path", "file", "img", "video", "clip", "url", "image_url"),
)
_CAPTION = ("captions", "caption", "text", "title", "texts", "sentence")
_ID = ("image_id", "id", "key", "uid", "__key__")
_SPLIT = ("split",)
_LOOKED_AT = 100  # rows of a JSONL file that show its columns
_URL = re.compile(r"\s*(https?|ftp|s3|gs)://", re.IGNORECASE)

Row = tuple[str, Mapping[str, Any]]  # its name, and its cells


@dataclasses.dataclass(frozen=True)
class Columns:
  """Which columns to read; "" is to be guessed.

  Attributes:
    image: of the picture: a path relative to the list, or its bytes.
    caption: of the caption or captions.
    image_id: of a name that is unique among pictures. A guess names pictures
      that stand in the list; others go by their paths, since such a column
      may name captions.
    split: of the split; "-" for none.
    keep: others to keep.
    clips: whether a picture is a clip: its file, or a folder of frames.
  """

  image: str = ""
  caption: str = ""
  image_id: str = ""
  split: str = ""
  keep: tuple[str, ...] = ()
  clips: bool = False

  def found(self, path: pathlib.Path, names: Sequence[str]) -> Columns:
    """Returns the columns among a list's.

    Raises:
      UserError: if one that is needed or given is missing.
    """
    there = f"its columns are {', '.join(map(str, names)) or 'none'}"
    lower = {str(name).lower(): name for name in reversed(names)}

    def find(kind: str, given: str, usual: Sequence[str], needed: bool) -> str:
      if given:
        if given not in names:
          raise UserError(f"{path} has no column {given!r}; {there}")
        return given
      for name in usual:
        if name in lower:
          return lower[name]
      if needed:
        raise UserError(
          f"{path} has no column for the {kind}; {there}; name it with "
          f"--{kind}_column=NAME"
        )
      return ""

    for name in self.keep:
      find("keep", name, (), True)
    split = (
      "" if self.split == "-" else find("split", self.split, _SPLIT, False)
    )
    return Columns(
      image=find("image", self.image, _IMAGE, True),
      caption=find("caption", self.caption, _CAPTION, True),
      image_id=find("id", self.image_id, _ID, False),
      split=split,
      keep=self.keep,
      clips=self.clips,
    )


def scan(
  path: pathlib.Path, columns: Columns, tally: entries.Tally, spill: Spill
) -> Iterator[entries.Entry]:
  """Yields the entries of a list.

  Args:
    path: of the list; its pictures' paths are relative to its folder.
    columns: to be read.
    tally: counts the rows, and those that are skipped.
    spill: keeps pictures that stand in the list itself.

  Raises:
    UserError: if a line is broken, a column missing, a split's name not
      possible, or pictures are URLs.
  """
  names, rows = _READERS[path.suffix.lower()](path, columns)
  asked_id = columns.image_id
  columns = columns.found(path, names)
  folder = str(path.parent)
  for number, (name, row) in enumerate(rows):
    tally.read += 1
    try:
      picture = row.get(columns.image)
      if isinstance(picture, Mapping):  # as Hugging Face's Parquet files
        picture = picture.get("bytes") or picture.get("path")
      if isinstance(picture, bytes):
        image_id, place = name, spill.add(picture)
      elif not isinstance(picture, str) or not picture.strip():
        raise intake.Rejected("no picture named")
      elif _URL.match(picture):
        if not number:
          raise UserError(_is_urls(path, columns))
        raise intake.Rejected("picture is a URL")
      else:
        image_id, name = picture, f"{name} {picture}"
        place = entries.Place(picture, folder)
      by = columns.image_id if isinstance(picture, bytes) else asked_id
      given = row.get(by) if by else None
      split = row.get(columns.split) if columns.split else None
      yield entries.Entry(
        name=name,
        image_id=entries.text_id(image_id if given in (None, "") else given),
        split=splits.checked(str(split or "").strip(), f"{folder}/{name}"),
        place=place,
        captions=entries.clean_captions(
          _listed(row.get(columns.caption)), name, tally
        ),
        extra={key: row[key] for key in columns.keep if key in row},
      )
    except intake.Rejected as e:
      tally.skip(name, e.reason)


def _listed(value: Any) -> list[Any]:
  """Returns a caption column's cell as a list: CSV may hold one as JSON."""
  if isinstance(value, str) and value.startswith('["'):
    try:
      return json.loads(value)
    except ValueError:
      pass
  return list(value) if isinstance(value, list | tuple) else [value]


def _is_urls(path: pathlib.Path, columns: Columns) -> str:
  kind = path.suffix.lower().lstrip(".")
  kind = {"jsonl": "json"}.get(kind, kind)
  return (
    f"{path} lists URLs; download them first, for instance with: img2dataset "
    f"--url_list={path} --input_format={kind} --url_col={columns.image} "
    f"--caption_col={columns.caption} --output_format=webdataset "
    f"--output_folder={path.stem}-tars; then --source={path.stem}-tars"
  )


def _read_jsonl(
  path: pathlib.Path, columns: Columns
) -> tuple[list[str], Iterator[Row]]:
  del columns
  rows = _jsonl_rows(path)
  first = list(itertools.islice(rows, _LOOKED_AT))
  names = dict.fromkeys(key for _, row in first for key in row)
  return list(names), itertools.chain(first, rows)


def _jsonl_rows(path: pathlib.Path) -> Iterator[Row]:
  with path.open("rb") as file:
    for number, line in enumerate(file, start=1):
      if not line.strip():
        continue
      name = f"{path.name}:{number}"
      # A caption that is no UTF-8 is one row's trouble, not the file's.
      text = line.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
      try:
        row = json.loads(text)
      except (ValueError, RecursionError) as e:
        raise UserError(f"{path}:{number}: not valid JSON ({e})") from e
      if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: not a JSON object")
      yield name, row


def _read_csv(
  path: pathlib.Path, columns: Columns
) -> tuple[list[str], Iterator[Row]]:
  del columns
  csv.field_size_limit(2**31 - 1)
  with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
    header = file.readline()
  tabs = path.suffix.lower() == ".tsv" or ("\t" in header and "," not in header)
  delimiter = "\t" if tabs else ","
  names = next(csv.reader([header], delimiter=delimiter), [])
  return names, _csv_rows(path, delimiter, len(names))


def _csv_rows(
  path: pathlib.Path, delimiter: str, num_columns: int
) -> Iterator[Row]:
  with path.open(
    encoding="utf-8-sig", errors="surrogateescape", newline=""
  ) as file:
    reader = csv.reader(file, delimiter=delimiter)
    try:
      names = next(reader, [])
      for cells in reader:
        if not cells:
          continue
        name = f"{path.name}:{reader.line_num}"
        if len(cells) != num_columns:
          raise UserError(
            f"{path}:{reader.line_num}: {len(cells)} cells in a row of a list "
            f"with {num_columns} columns; quote cells that hold {delimiter!r}"
          )
        yield name, dict(zip(names, cells, strict=True))
    except csv.Error as e:
      raise UserError(f"{path}:{reader.line_num}: {e}") from e


def _read_parquet(
  path: pathlib.Path, columns: Columns
) -> tuple[list[str], Iterator[Row]]:
  import pyarrow
  import pyarrow.parquet

  try:
    file = pyarrow.parquet.ParquetFile(path)
  except (pyarrow.ArrowException, OSError) as e:
    raise UserError(f"{path}: not a Parquet file ({e})") from e
  names = file.schema_arrow.names
  found = columns.found(path, names)
  wanted = (found.image, found.caption, found.image_id, found.split)
  wanted = [c for c in dict.fromkeys([*wanted, *found.keep]) if c]

  def rows() -> Iterator[Row]:
    number = 0
    for batch in file.iter_batches(batch_size=64, columns=wanted):
      cells = {c: _values(batch.column(c)) for c in wanted}
      for index in range(batch.num_rows):
        number += 1
        yield (
          f"{path.name}:{number}",
          {c: cells[c][index] for c in wanted},
        )

  return names, rows()


def _values(column: Any) -> list[Any]:
  try:
    return column.to_pylist()
  except UnicodeDecodeError:
    import pyarrow

    raw = column.cast(pyarrow.large_binary()).to_pylist()
    return [v and v.decode("utf-8", "surrogateescape") for v in raw]


_READERS = {
  ".jsonl": _read_jsonl,
  ".csv": _read_csv,
  ".tsv": _read_csv,
  ".parquet": _read_parquet,
}
