"""webdataset `.tar` shards, as img2dataset writes them.

Members with the same path up to the first dot of the file's name belong
together: `000123.jpg`, `000123.txt`, `000123.json`. Only headers and texts are
read here; pictures are read where they stand in the tar.
"""

from __future__ import annotations

import errno
import itertools
import json
import pathlib
import posixpath
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from vlp_jax.data import intake, splits
from vlp_jax.data.prepare import entries
from vlp_jax.data.prepare.lists import Columns
from vlp_jax.data.prepare.spill import Spill

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_MAX_TEXT = 2**20  # bytes of a caption or of its JSON
_CAPTION = ("caption", "captions", "text", "title", "TEXT")
_ID = ("image_id", "key")


def scan(
  path: pathlib.Path, columns: Columns, tally: entries.Tally, spill: Spill
) -> Iterator[entries.Entry]:
  """Yields the entries of a tar.

  Args:
    path: of the tar; a compressed one is unpacked into `spill`.
    columns: fields of the `.json` members.
    tally: counts the pictures, and those that are skipped; a tar that breaks
      off counts as one more.
    spill: keeps pictures of compressed tars.

  Raises:
    UserError: if a split's name is not possible.
  """
  members = _members(path, columns, spill, tally)
  for key, group in itertools.groupby(members, lambda member: member[0]):
    tally.read += 1
    name = entries.text_id(f"{path.name}/{key}")
    try:
      yield _entry(name, key, list(group), columns, tally)
    except intake.Rejected as e:
      tally.skip(name, e.reason)


Member = tuple[str, str, Any]  # key, suffix, and Place or bytes or Rejected


def _is_plain(path: pathlib.Path) -> bool:
  return path.suffix.lower() == ".tar"


def _members(
  path: pathlib.Path, columns: Columns, spill: Spill, tally: entries.Tally
) -> Iterator[Member]:
  try:
    with tarfile.open(path, "r:" if _is_plain(path) else "r|*") as tar:
      for member in iter(tar.next, None):
        tar.members.clear()  # it would keep them all
        if member.isdir():
          continue
        folder, name = posixpath.split(member.name)
        stem, dot, suffix = name.partition(".")
        if not stem:  # hidden, as macOS's ._ files
          continue
        suffix = (dot + suffix).lower()
        key = posixpath.join(folder, stem)
        content = _content(path, tar, member, suffix, columns, spill)
        yield key, suffix, content
  except (tarfile.TarError, EOFError, OSError, zlib.error) as e:
    if getattr(e, "errno", None) == errno.ENOSPC:
      raise
    tally.read += 1
    tally.skip(path.name, "damaged tar")


def _content(
  path: pathlib.Path,
  tar: tarfile.TarFile,
  member: tarfile.TarInfo,
  suffix: str,
  columns: Columns,
  spill: Spill,
) -> entries.Place | bytes | intake.Rejected:
  """Returns a picture's place, a text, or what is wrong with the member."""
  parts = member.name.split("/")
  if member.name.startswith("/") or ".." in parts:
    return intake.Rejected("path leaves the source folder")
  if member.issym() or member.islnk():
    return intake.Rejected("path leaves the source folder", "a link")
  if not member.isreg():
    return intake.Rejected("unreadable file", "not a regular file")
  if suffix in (intake.CLIPS if columns.clips else intake.PICTURES):
    if _is_plain(path) and not member.issparse():
      return entries.Place(str(path), "", member.offset_data, member.size)
    return spill.add(tar.extractfile(member).read())
  if suffix in (".txt", ".json") and member.size <= _MAX_TEXT:
    return tar.extractfile(member).read()
  return b""


def _entry(
  name: str,
  key: str,
  group: list[Member],
  columns: Columns,
  tally: entries.Tally,
) -> entries.Entry:
  found = {suffix: content for _, suffix, content in group}
  for content in found.values():
    if isinstance(content, intake.Rejected):
      raise content
  place = next(
    (c for c in found.values() if isinstance(c, entries.Place)), None
  )
  if place is None:
    raise intake.Rejected("no picture")
  row = _parse(found.get(".json", b""))
  caption = columns.caption or next((c for c in _CAPTION if c in row), "")
  image_id = columns.image_id or next((c for c in _ID if c in row), "")
  texts = [found[".txt"]] if ".txt" in found and not columns.caption else []
  if not texts or not texts[0].strip():
    value = row.get(caption)
    texts = value if isinstance(value, list) else [value]
  split = row.get(columns.split or "split")
  use_split = columns.split != "-" and isinstance(split, str)
  return entries.Entry(
    name=name,
    image_id=entries.text_id(row.get(image_id) or key),
    split=splits.checked(split.strip(), name) if use_split else "",
    place=place,
    captions=entries.clean_captions(texts, name, tally),
    extra={field: row[field] for field in columns.keep if field in row},
  )


def _parse(data: bytes) -> Mapping[str, Any]:
  if not data:
    return {}
  try:
    row = json.loads(data.decode("utf-8", "surrogateescape"))
  except (ValueError, RecursionError) as e:
    raise intake.Rejected("broken JSON") from e
  if not isinstance(row, dict):
    raise intake.Rejected("broken JSON")
  return row
