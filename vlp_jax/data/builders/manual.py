"""What builders of data sets that people download by hand have in common.

Files are read as their owners hand them out. What cannot be used is left out,
counted and named: on stderr, and in `skipped.json` beside the data.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from vlp_jax.data import intake
from vlp_jax.data.builders import streamed
from vlp_jax.data.prepare.entries import Tally
from vlp_jax.errors import UserError

_BATCH = 256  # rows that are under way at once
_NAMED = 3  # names of skipped rows on stderr

Row = tuple[str, Any]  # a unique name, and what the list says


@dataclasses.dataclass
class Split:
  """How the examples of a split are made.

  Attributes:
    rows: of the list.
    make: turns a row's name and content into an example. It is called on
      several threads. It may raise `intake.Rejected`, and note in the tally
      what it leaves out of an example; a `KeyError`, `TypeError` or
      `ValueError` says that the row is not as it should be.
    tally: what was skipped; `rows` may add to it.
  """

  rows: Iterable[Row]
  make: Callable[[str, Any, Tally], dict[str, Any]]
  tally: Tally = dataclasses.field(default_factory=Tally)


class ManualBuilder(streamed.StreamedBuilder, skip_registration=True):
  """Base of builders that read TFDS's `manual_dir`.

  Subclasses define `_info`, `splits`, and which files they read
  (`MANUAL_DOWNLOAD_INSTRUCTIONS`). They are not registered with TFDS, which
  has data sets of the same names.
  """

  VERSION = tfds.core.Version("1.0.0")
  # Nothing is downloaded; TFDS looks for checksums beside the code otherwise,
  # with a package (importlib_resources) that it does not ask for.
  url_infos = {}  # noqa: RUF012

  def splits(self, folder: pathlib.Path) -> dict[str, Split]:
    """Returns the splits, by name.

    Args:
      folder: where the owners' files are.

    Raises:
      UserError: if files are missing or broken.
    """
    raise NotImplementedError

  def write_beside(self, name: str, content: Any) -> None:
    """Writes a JSON file into the folder of the data that are being built."""
    path = pathlib.Path(self.data_dir, name)
    path.write_text(json.dumps(content, indent=1) + "\n")

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
    try:
      folder = pathlib.Path(dl_manager.manual_dir)
    except AssertionError as e:  # no such folder, or an empty one
      raise UserError(f"{self.name}: {' '.join(str(e).split())}") from e
    self._tallies: dict[str, Tally] = {}
    return {
      name: self._generate_examples(name, split)
      for name, split in self.splits(folder).items()
    }

  def _generate_examples(
    self, name: str, split: Split
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    rows, tally = iter(split.rows), split.tally
    with concurrent.futures.ThreadPoolExecutor() as pool:
      while batch := list(itertools.islice(rows, _BATCH)):
        made = pool.map(functools.partial(_make, split.make), batch)
        for (key, _), (example, seen) in zip(batch, made, strict=True):
          tally.add(seen)
          if example is not None:
            yield key, example
    self._tallies[name] = tally
    if not tally.written:
      raise UserError(f"{self.name}: nothing to write: {_told(name, tally)}")
    report = {k: dataclasses.asdict(v) for k, v in self._tallies.items()}
    self.write_beside("skipped.json", report)

  def _post_download_and_prepare_hook(self) -> None:
    for name, tally in self._tallies.items():
      print(f"{self.name}: {_told(name, tally)}", file=sys.stderr)


def _make(
  make: Callable[[str, Any, Tally], dict[str, Any]], row: Row
) -> tuple[dict[str, Any] | None, Tally]:
  """Returns a row's example, or None, and what was skipped."""
  tally = Tally(read=1)
  try:
    example = make(*row, tally)
    tally.written = 1
    return example, tally
  except intake.Rejected as e:
    tally.skip(row[0], e.reason)
  except KeyError as e:
    tally.skip(row[0], f"no {e}")
  except (TypeError, ValueError):
    tally.skip(row[0], "malformed entry")
  return None, tally


def _told(name: str, tally: Tally) -> str:
  """Returns one line on what a split has, and what it lacks."""
  parts = [f"split {name}: {tally.written:,} records"]
  for verb, counts in (("skipped", tally.skipped), ("noted", tally.notes)):
    for reason, (count, names) in sorted(counts.items()):
      more = ", ..." if count > _NAMED else ""
      listed = ", ".join(names[:_NAMED]) + more
      parts.append(f"{verb} {count:,}: {reason} ({listed})")
  return "; ".join(parts)


def require(
  folder: pathlib.Path, wanted: Sequence[tuple[str, ...]]
) -> list[pathlib.Path]:
  """Returns where files are, each by the first of its names that exists.

  Args:
    folder: that they are in.
    wanted: for each, its names and, last, the page that it comes from.

  Raises:
    UserError: naming all that are missing.
  """
  found, missing = [], []
  for *names, source in wanted:
    paths = [folder / name for name in names if (folder / name).exists()]
    if paths:
      found.append(paths[0])
    else:
      missing.append(f"{folder / names[0]}{_or(names[1:])}, from {source}")
  if missing:
    raise UserError(f"missing {'; missing '.join(missing)}")
  return found


def _or(names: Sequence[str]) -> str:
  return "".join(f" (or {name})" for name in names)


def load(path: pathlib.Path, field: str = "") -> list[dict[str, Any]]:
  """Returns the list of objects in a JSON file, or in a field of it.

  Raises:
    UserError: if there is none.
  """
  try:
    content = json.loads(path.read_bytes())
  except ValueError as e:
    raise UserError(f"{path}: not valid JSON ({e}); get it again") from e
  if field:
    content = content.get(field) if isinstance(content, Mapping) else None
  if not isinstance(content, list):
    what = f"no list {field!r} in it" if field else "not a list"
    raise UserError(f"{path}: {what}; is it the file of this name?")
  if not all(isinstance(row, dict) for row in content):
    raise UserError(f"{path}: its rows are not objects")
  return content


def lines(path: pathlib.Path) -> Iterator[Row]:
  """Yields the lines of a file, named by their numbers."""
  with path.open("rb") as file:
    for number, line in enumerate(file, start=1):
      if line.strip():
        yield f"{path.name}:{number}", line


def captions(texts: Iterable[Any], name: str, tally: Tally) -> list[str]:
  """Returns the usable captions, and notes the others.

  Repeated ones stay: retrieval is measured on all captions of a test set.

  Raises:
    intake.Rejected: if none is usable.
  """
  kept = []
  for text in texts:
    try:
      kept.append(intake.caption(text))
    except intake.Rejected as e:
      tally.note(name, e.reason)
  if not kept:
    raise intake.Rejected("no usable caption")
  return kept


class Pictures:
  """Checked pictures of a folder, or of the zip that it comes in."""

  def __init__(self, path: pathlib.Path):
    """Opens a folder, or `<folder>.zip` with that folder inside.

    Raises:
      UserError: if the zip is damaged.
    """
    self._path, self._zip = path, None
    if path.is_file():
      try:
        self._zip = zipfile.ZipFile(path)
      except (zipfile.BadZipFile, OSError) as e:
        raise UserError(f"{path}: not a complete zip ({e})") from e

  def read(self, name: str) -> bytes:
    """Returns a picture, as `intake.picture` does.

    Raises:
      intake.Rejected: if it is missing or cannot be used.
    """
    if self._zip is None:
      return intake.picture(intake.read(self._path, name))
    try:
      data = self._zip.read(f"{self._path.stem}/{name}")
    except KeyError as e:
      raise intake.Rejected("missing file") from e
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError) as e:
      raise intake.Rejected("unreadable file", str(e)) from e
    return intake.picture(data)
