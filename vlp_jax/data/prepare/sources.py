"""Tells a source's kind by looking at it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import glob
import os
import pathlib
import posixpath
import re
from collections.abc import Iterator, Sequence

from vlp_jax.data import splits
from vlp_jax.data.prepare import entries, folders, lists, tars
from vlp_jax.data.prepare.spill import Spill
from vlp_jax.errors import UserError

_METADATA = tuple(f"metadata{suffix}" for suffix in lists.SUFFIXES)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")  # {00000..00099}, as in the shell
_SPLIT = re.compile(r"[A-Za-z]\w*=")


@dataclasses.dataclass(frozen=True)
class Part:
  """One file, or one folder of pictures, of a source.

  Attributes:
    path: of the list, the tar or the folder.
    split: that all of it belongs to, or "".
    prefix: folder that ids begin with, but for those of `--id_column`; "" for
      none.
  """

  path: pathlib.Path
  split: str = ""
  prefix: str = ""

  @property
  def folder(self) -> pathlib.Path:
    """The folder of its pictures, of its list or of its tar."""
    return self.path if self.path.is_dir() else self.path.parent

  def scan(
    self, columns: lists.Columns, tally: entries.Tally, scratch: pathlib.Path
  ) -> Iterator[entries.Entry]:
    """Yields its entries; `scratch` is a file that may be written."""
    with contextlib.ExitStack() as stack:
      spill = stack.enter_context(Spill(scratch))
      if self.path.is_dir():
        found = folders.scan(self.path, tally, columns.clips)
      elif _is_tar(self.path):
        found = tars.scan(self.path, columns, tally, spill)
      else:
        found = lists.scan(self.path, columns, tally, spill)
      prefix = "" if columns.image_id else entries.text_id(self.prefix)
      for entry in found:
        yield entry._replace(
          image_id=posixpath.join(prefix, entry.image_id),
          split=self.split or entry.split,
        )

  def fingerprint(self) -> str:
    """Returns what changes when the part does; of a folder, its name only."""
    if self.path.is_dir():
      return f"{self.path}:{self.split}"
    stat = self.path.stat()
    return f"{self.path}:{self.split}:{stat.st_size}:{stat.st_mtime_ns}"


def find(source: str) -> list[Part]:
  """Returns the parts of what `--source` says.

  It is a path, with `*` or `{000..099}` if it stands for several; or several
  with their splits, as in `train=a.jsonl,test=b.jsonl`. Where those of a split
  lie in several folders, ids begin with them.

  Raises:
    UserError: if there is nothing, or nothing that can be read.
  """
  if not source:
    raise UserError(
      "--source=PATH is missing: a folder of pictures, a .jsonl, .csv, .tsv "
      "or .parquet list, or webdataset .tar shards"
    )
  if _SPLIT.match(source) and not os.path.exists(source):
    parts = []
    for piece in re.split(r",(?=[A-Za-z]\w*=)", source):
      split, _, path = piece.partition("=")
      split = splits.canonical(split)
      parts += [dataclasses.replace(p, split=split) for p in find(path)]
    return _with_prefixes(parts)
  paths = _expand(source)
  parts = [part for path in paths for part in _parts(path)]
  return _with_prefixes(sorted(parts, key=lambda part: str(part.path)))


def _with_prefixes(parts: Sequence[Part]) -> list[Part]:
  """Names the folders of each split's parts, as seen from their common one."""
  folders = collections.defaultdict(set)
  for part in parts:
    folders[part.split].add(part.folder)
  common = {split: os.path.commonpath(f) for split, f in folders.items()}
  below = [part.folder.relative_to(common[part.split]) for part in parts]
  return [
    dataclasses.replace(part, prefix="/".join(folder.parts))
    for part, folder in zip(parts, below, strict=True)
  ]


def _expand(source: str) -> list[pathlib.Path]:
  source = os.path.expanduser(source)
  if os.path.exists(source):
    return [pathlib.Path(source).absolute()]
  names, match = [source], _RANGE.search(source)
  if match:
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    names = [
      source[: match.start()] + str(n).zfill(len(first)) + source[match.end() :]
      for n in numbers
    ]
    missing = [name for name in names if not glob.glob(name)]
    if missing:
      raise UserError(
        f"--source={source}: {len(missing)} of {len(names)} files do not "
        f"exist, the first of them {missing[0]}"
      )
  found = sorted({path for name in names for path in glob.glob(name)})
  if not found:
    raise UserError(f"--source={source}: no such file or folder")
  return [pathlib.Path(path).absolute() for path in found]


def _parts(path: pathlib.Path) -> list[Part]:
  if not path.is_dir():
    if not (_is_tar(path) or path.suffix.lower() in lists.SUFFIXES):
      raise UserError(
        f"--source={path}: not a list or tar; it takes a folder, "
        f"{', '.join(lists.SUFFIXES + tars.SUFFIXES)}"
      )
    return [Part(path)]
  for name in _METADATA:
    if (path / name).is_file():
      return [Part(path / name)]
  inside = sorted(path.iterdir())
  for is_kind in (_is_tar, lambda p: p.suffix.lower() == ".parquet"):
    files = [Part(p) for p in inside if p.is_file() and is_kind(p)]
    if files:
      return files
  return [Part(path)]


def _is_tar(path: pathlib.Path) -> bool:
  return path.name.lower().endswith(tars.SUFFIXES)
