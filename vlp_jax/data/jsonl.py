"""Image-caption pairs listed in a JSONL file, read in place.

One object a line:

  {"image": "images/1.png", "captions": ["a cat", "a grey cat"]}

- `image` (or `file_name`, as in Hugging Face's imagefolder): a path, relative
  to the JSONL file, whose folder it may not leave (links in it may).
- `captions`, a list, or `caption` (or `text`), a string; `intake.caption` says
  what is none.
- `split`, optional: rows without one are shared out, 90/5/5, by a hash of the
  `image_id` in the picture's first row, or of its path; see `_Draws`.
- `image_id`, optional: an integer.
- `label`, `category` and `keywords` are kept; other fields are ignored.

Lines that name the same picture make one record with all of their captions.
A file of a million lines is indexed in seconds: what stays in memory is where
each line begins.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from array import array
from typing import Any, NamedTuple

import numpy as np

from vlp_jax.data import intake
from vlp_jax.data import splits as splits_lib
from vlp_jax.data.warn import warn
from vlp_jax.errors import UserError

_EMPTY = "empty caption"
_MISSING = "rows whose picture does not exist"
_OUTSIDE = "rows whose picture is not inside the folder"
_BLANK = "rows without a caption"
_KEPT = ("label", "category", "keywords")
_INT32_MAX = 2**31 - 1


class Row(NamedTuple):
  """A parsed line.

  Attributes:
    image: path as written.
    captions: that can be used, blanks collapsed.
    refused: what is wrong with the others; "empty caption" is not told.
    split, image_id, extra: the other fields that are kept.
  """

  image: str
  captions: list[str]
  refused: list[str]
  split: str
  image_id: Any
  extra: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Index:
  """Where the rows of a JSONL file are.

  Attributes:
    path: the file.
    sha256: hash of its bytes.
    offset: int64 `[rows]`, first byte of each row; rows without a picture or
      a caption are left out.
    length: int32 `[rows]`, bytes of each row.
    picture: int32 `[rows]`, equal for rows of the same picture.
    image_id: int32 `[rows]`.
    split: int32 `[rows]`, position in `splits`.
    splits: the names of the splits.
  """

  path: pathlib.Path
  sha256: str
  offset: np.ndarray
  length: np.ndarray
  picture: np.ndarray
  image_id: np.ndarray
  split: np.ndarray
  splits: tuple[str, ...]

  def counts(self) -> dict[str, int]:
    """Returns the number of rows of each split."""
    return {s: int(np.sum(self.split == i)) for i, s in enumerate(self.splits)}

  def records(self, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Groups the rows of a split by picture, in order of first appearance.

    Returns:
      rows: positions in the arrays above, grouped.
      starts: `[n + 1]`; record i is `rows[starts[i]:starts[i + 1]]`.
    """
    rows = np.flatnonzero(self.split == self.splits.index(split))
    _, first, inverse = np.unique(
      self.picture[rows], return_index=True, return_inverse=True
    )
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    group = rank[inverse]
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(first) + 1))
    return rows[order], starts


def find(source: str) -> pathlib.Path:
  """Returns the JSONL file that `data.source` means.

  Raises:
    UserError: if it does not exist or is something else.
  """
  path = pathlib.Path(source).expanduser()
  if path.is_dir():
    path = path / "metadata.jsonl"
  if not path.is_file():
    raise UserError(
      f"data.source: no file {path}; it takes FILE.jsonl, or a folder that "
      'holds metadata.jsonl, with {"image": PATH, "caption": TEXT} on each line'
    )
  if path.suffix != ".jsonl":
    raise UserError(
      f"data.source: {path} is not a .jsonl file; turn other lists, folders "
      "and tar shards into a data set with python -m vlp_jax.data.prepare"
    )
  return path


def parse(line: bytes) -> Row:
  """Parses a line.

  Raises:
    ValueError: saying what is wrong with it.
  """
  try:
    text = line.decode("utf-8", "surrogateescape")
    row = json.loads(text.removeprefix("\ufeff"))  # byte-order mark
  except (ValueError, RecursionError) as e:
    raise ValueError(f"not valid JSON ({e})") from e
  if not isinstance(row, dict):
    raise ValueError("not a JSON object")
  image = row.get("image", row.get("file_name"))
  if not isinstance(image, str) or not image:
    raise ValueError('no "image" (a path)')
  try:
    image.encode()
  except UnicodeEncodeError as e:
    raise ValueError(f'not valid JSON ("image": {e})') from e
  captions = row.get("captions", row.get("caption", row.get("text")))
  if isinstance(captions, str):
    captions = [captions]
  if not isinstance(captions, list) or not all(
    isinstance(c, str) for c in captions
  ):
    raise ValueError('no "caption" (a string) or "captions" (a list of them)')
  split = row.get("split")
  if split is not None and not isinstance(split, str):
    raise ValueError(f'"split" is not a string: {split!r}')
  image_id = row.get("image_id")
  if image_id is not None and not isinstance(image_id, int | str):
    raise ValueError(f'"image_id" is not an integer or string: {image_id!r}')
  kept, refused = [], []
  for caption in captions:
    try:
      kept.append(intake.caption(caption))
    except intake.Rejected as e:
      if e.reason != _EMPTY:
        refused.append(e.reason)
  return Row(
    image=image,
    captions=kept,
    refused=refused,
    split=splits_lib.canonical(split or ""),
    image_id=image_id,
    extra={k: row[k] for k in _KEPT if row.get(k) is not None},
  )


def read_index(path: pathlib.Path) -> Index:
  """Reads and checks a JSONL file; once per process while it is unchanged.

  Rows whose picture does not exist or is elsewhere, rows that have no caption,
  and captions that are too long or no text are left out: warnings on stderr
  count them and name the first ten pictures.

  Raises:
    UserError: at the first broken line (file:line and what is wrong), or if
      no row is left.
  """
  stat = path.stat()
  return _read_index(path.absolute(), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=8)
def _read_index(path: pathlib.Path, mtime_ns: int, size: int) -> Index:
  del mtime_ns, size  # keys of the cache
  folder = str(path.parent)
  ways = os.path.normpath(folder), os.path.realpath(folder)
  folders = tuple(os.path.join(way, "") for way in ways)
  digest = hashlib.sha256()
  offset, length, code, hashes = array("q"), array("i"), array("i"), array("Q")
  ids, splits, draws = array("q"), {}, _Draws()
  skipped = collections.defaultdict(_Tally)
  position = 0
  with path.open("rb") as file:
    for number, line in enumerate(file, start=1):
      start, position = position, position + len(line)
      digest.update(line)
      if line.isspace():
        continue
      try:
        row = parse(line)
      except ValueError as e:
        raise UserError(f"{path}:{number}: {e}") from e
      for reason in row.refused:
        skipped[f"captions ({reason})"].add(row.image)
      if not row.captions:
        if not row.refused:
          skipped[_BLANK].add(row.image)
        continue
      if not _inside(folders, row.image):
        skipped[_OUTSIDE].add(row.image)
        continue
      if not os.path.isfile(os.path.join(folder, row.image)):
        skipped[_MISSING].add(row.image)
        continue
      picture = splits_lib.hash64(row.image)
      offset.append(start)
      length.append(len(line))
      hashes.append(picture)
      ids.append(_int32_or_none(row.image_id))
      split = row.split or draws.split(picture, row.image_id)
      code.append(splits.setdefault(split, len(splits)))
  if not offset:
    raise UserError(f"{path}{_nothing_left(path, skipped)}")
  for what, tally in skipped.items():
    warn(f"{path}: skipped {tally.count} {what}: {tally}")
  picture = _dense(np.frombuffer(hashes, np.uint64))
  image_id = np.frombuffer(ids, np.int64)
  if (image_id < 0).any():  # not all rows have one that is an integer
    image_id = picture
  return Index(
    path=path,
    sha256=digest.hexdigest(),
    offset=np.frombuffer(offset, np.int64),
    length=np.frombuffer(length, np.int32),
    picture=picture,
    image_id=image_id.astype(np.int32),
    split=np.frombuffer(code, np.int32),
    splits=tuple(splits),
  )


class _Draws:
  """Draws splits of rows that name none: pictures stay whole, and ids.

  A picture has the split of its first row: that of an earlier row with the
  same id, else drawn by the id, or by the path where there is none. So
  pictures may share an id, as frames do, and each caption may have its own.
  Where both are mixed, a picture is still whole; an id is, too, unless a row
  joins it to a picture of an earlier row that was drawn apart from it.
  """

  def __init__(self):
    self._of_picture, self._of_id = {}, {}

  def split(self, picture: int, image_id: Any) -> str:
    """Returns a row's split; `picture` is the hash of its path."""
    if image_id in (None, ""):
      return self._of_picture.setdefault(picture, splits_lib.draw(picture))
    key = splits_lib.hash64(str(image_id))
    split = self._of_picture.get(picture) or self._of_id.get(key)
    split = split or splits_lib.draw(key)
    self._of_id.setdefault(key, split)
    return self._of_picture.setdefault(picture, split)


class _Tally:
  """Counts names and keeps the first ten."""

  def __init__(self):
    self.count = 0
    self.first = []

  def add(self, name: str) -> None:
    self.count += 1
    if len(self.first) < 10:
      self.first.append(name)

  def __str__(self) -> str:
    more = ", ..." if self.count > len(self.first) else ""
    return ", ".join(self.first) + more


def _inside(folders: tuple[str, ...], image: str) -> bool:
  """Whether a path stays in a folder, by its text: the disk is slower.

  Args:
    folders: names of the folder, with a slash at the end.
    image: relative to it, or absolute.
  """
  if os.path.isabs(image):
    return os.path.normpath(image).startswith(folders)
  return ".." not in image or os.path.normpath(image).split(os.sep)[0] != ".."


def _nothing_left(path: pathlib.Path, skipped: dict[str, _Tally]) -> str:
  if _MISSING in skipped:
    missing = skipped[_MISSING]
    return (
      f": none of its {missing.count} pictures exists ({missing}); paths are "
      f"relative to {path.parent}"
    )
  if [*skipped] == [_BLANK]:
    return f": none of its {skipped[_BLANK].count} rows has a caption"
  if skipped:
    reasons = (
      f"{tally.count} {what}: {tally}" for what, tally in skipped.items()
    )
    return f": none of its rows can be used; skipped {'; '.join(reasons)}"
  return " is empty"


def _int32_or_none(image_id: Any) -> int:
  valid = isinstance(image_id, int) and 0 <= image_id <= _INT32_MAX
  return image_id if valid else -1


def _dense(values: np.ndarray) -> np.ndarray:
  """Numbers distinct values 0, 1, ... in order of first appearance."""
  _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
  rank = np.empty(len(first), np.int32)
  rank[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
  return rank[inverse]
