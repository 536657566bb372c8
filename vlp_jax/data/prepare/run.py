"""The whole of `prepare` on one machine.

Pass one lists the source in a table (`table.py`); pass two opens the pictures
and writes shards (`shards.py`). All of it stands in a folder of its own beside
the data set, `.NAME.preparing`, until it is complete and renamed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import naming

from vlp_jax.data import builders, splits
from vlp_jax.data.prepare import report, shards, sources
from vlp_jax.data.prepare.entries import Entry, Tally
from vlp_jax.data.prepare.lists import Columns
from vlp_jax.data.prepare.records import Kinds, Schema
from vlp_jax.data.prepare.table import Shard, Table
from vlp_jax.data.sources import data_dir
from vlp_jax.errors import UserError

VERSION = "1.0.0"
TABLE = "table.sqlite"  # of the entries, in the scratch folder
_PLAN = "plan.json"
_STOPPED = "stopped.json"  # the tally with which too much was skipped
_MOST_SHARDS = 1024  # of a split
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_RESERVED = {"image", "frames", "captions", "image_id"}


@dataclasses.dataclass(frozen=True)
class Options:
  """What the command's flags say; see `__main__.py`."""

  source: str
  name: str
  data_dir: str = ""
  splits: str = ""
  image_column: str = ""
  caption_column: str = ""
  id_column: str = ""
  keep: str = ""
  image_size: int = 0
  num_frames: int = 0
  min_side: int = 8
  max_bad: float = 0.01
  num_workers: int = 0
  records_per_shard: int = 1000
  overwrite: bool = False

  def check(self) -> None:
    """Raises a `UserError` on what cannot be."""
    if not _NAME.fullmatch(self.name):
      raise UserError(
        f"--name={self.name}: a data set's name is made of small letters, "
        "digits and _, and begins with a letter"
      )
    if self.name in builders.EMBEDDED:
      raise UserError(
        f"--name={self.name} is the embedded data; choose another"
      )
    for flag in ("image_size", "num_frames", "num_workers"):
      if getattr(self, flag) < 0:
        raise UserError(f"--{flag}={getattr(self, flag)} is negative")
    for flag in ("min_side", "records_per_shard"):
      if getattr(self, flag) < 1:
        raise UserError(f"--{flag}={getattr(self, flag)}: at least 1")
    for name in self.columns.keep:
      if name in _RESERVED:
        raise UserError(f"--keep={name}: records have a field of this name")

  @property
  def folder(self) -> pathlib.Path:
    """Where the data set will be."""
    root = self.data_dir or data_dir()
    return pathlib.Path(root).expanduser().absolute() / self.name / VERSION

  @property
  def columns(self) -> Columns:
    """Which columns of a list to read."""
    keep = tuple(filter(None, self.keep.split(",")))
    split = "-" if ":" in self.splits else self.splits
    return Columns(
      self.image_column,
      self.caption_column,
      self.id_column,
      split,
      keep,
      clips=self.num_frames > 0,
    )

  @property
  def shares(self) -> Sequence[tuple[str, float]]:
    """Reads `--splits=train:0.9,test:0.1`.

    Raises:
      UserError: if the shares do not add up to 1, or a name is not possible.
    """
    if ":" not in self.splits:
      return splits.SHARES
    try:
      pairs = [part.split(":") for part in self.splits.split(",")]
      shares = {splits.checked(k, "--splits"): float(v) for k, v in pairs}
    except ValueError:
      shares = {}
    if not shares or abs(sum(shares.values()) - 1) > 1e-6:
      raise UserError(
        f"--splits={self.splits}: it is a column's name, or shares that add "
        "up to 1, such as train:0.9,validation:0.05,test:0.05"
      )
    return tuple(shares.items())

  @property
  def description(self) -> str:
    """What the data set says of itself."""
    return f"Pictures and captions from {self.source}."

  def schema(self, kinds: dict[str, str]) -> Schema:
    """Returns what records are made of, given the kinds of kept fields."""
    return Schema(self.min_side, self.image_size, self.num_frames, kinds)


def prepare(options: Options, write: Write | None = None) -> None:
  """Makes the data set, and prints what became of the source.

  Args:
    options: what to make.
    write: makes it of the plan and the scratch folder; else this machine
      does, with `write_here`.

  Raises:
    UserError: if the source or an option is unfit, or too much was skipped.
  """
  options.check()
  parts = sources.find(options.source)
  final = options.folder
  if final.exists() and not options.overwrite:
    raise UserError(
      f"{final} exists; choose another --name, or replace it with --overwrite"
    )
  scratch = final.parent.parent / f".{options.name}.preparing"
  with _locked(scratch):
    _forget_others(scratch, _fingerprint(options, parts))
    _forget_skipping(scratch, options.max_bad, parts)
    plan = _read_plan(scratch) or _list(options, parts, scratch)
    try:
      report.check(plan.tally, options.max_bad)
      total = (write or write_here)(options, plan, scratch)
    except report.TooMuchSkipped as e:
      shards.write_json(scratch / _STOPPED, dataclasses.asdict(e.tally))
      raise
    shutil.rmtree(scratch)
  report.show(options, final, total)


def write_here(options: Options, plan: Plan, scratch: pathlib.Path) -> Tally:
  """Makes the data set with this machine's processes."""
  total, written = plan.tally.copy(), []
  with contextlib.closing(_write(options, plan, scratch)) as finished:
    for shard in finished:
      total.add(shard.tally)
      report.check(total, options.max_bad)
      written.append(shard)
  complete = scratch / "complete"
  describe(options, plan, written, complete)
  report.write(complete / report.NAME, options, total)
  if options.folder.exists():
    shutil.rmtree(options.folder)
  options.folder.parent.mkdir(parents=True, exist_ok=True)
  complete.rename(options.folder)
  return total


@dataclasses.dataclass(frozen=True)
class Plan:
  """What pass one has found.

  Attributes:
    tally: of the entries that it skipped.
    kinds: of the fields that are kept.
    shards: to be written.
  """

  tally: Tally
  kinds: dict[str, str]
  shards: tuple[Shard, ...]


# Makes the data set of a plan; returns what became of the source.
Write = Callable[[Options, Plan, pathlib.Path], Tally]


def _list(
  options: Options, parts: Sequence[sources.Part], scratch: pathlib.Path
) -> Plan:
  """Pass one: makes the table and the plan."""
  tally, kinds = Tally(), Kinds(options.columns.keep)

  def entries(progress: report.Progress) -> Iterator[Entry]:
    for number, part in enumerate(parts):
      spill = scratch / f"spill-{number:05d}.bin"
      for entry in part.scan(options.columns, tally, spill):
        kinds.look(entry)
        progress.update(tally.read)
        yield entry

  with report.Progress("listing") as progress:
    Table.write(scratch / TABLE, entries(progress), options.shares)
  if tally.read == tally.num_skipped:
    raise UserError(report.nothing(options.source, tally))
  with Table(scratch / TABLE) as table:
    found = table.shards(options.records_per_shard, _MOST_SHARDS)
  plan = Plan(tally, kinds.found(), tuple(found))
  shards.write_json(scratch / _PLAN, dataclasses.asdict(plan))
  return plan


def _read_plan(scratch: pathlib.Path) -> Plan | None:
  try:
    plan = json.loads((scratch / _PLAN).read_text())
  except FileNotFoundError:
    return None
  return Plan(
    Tally(**plan["tally"]),
    plan["kinds"],
    tuple(Shard(**shard) for shard in plan["shards"]),
  )


def _write(
  options: Options, plan: Plan, scratch: pathlib.Path
) -> Iterator[shards.Written]:
  """Pass two: writes the shards."""
  rows = sum(shard.rows for shard in plan.shards)
  with report.Progress("reading pictures", rows) as progress:
    yield from shards.write_all(
      plan.shards,
      scratch / TABLE,
      scratch,
      options.schema(plan.kinds),
      options.num_workers or _cores(),
      progress.update,
    )


def describe(
  options: Options,
  plan: Plan,
  written: Sequence[shards.Written],
  folder: pathlib.Path,
) -> None:
  """Gives the shards their final names, and writes TFDS's description."""
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir()
  template = naming.ShardedFileTemplate(
    data_dir=folder, dataset_name=options.name, filetype_suffix="array_record"
  )
  infos = []
  written = sorted(written, key=lambda w: (w.shard.split, w.shard.index))
  for split in sorted({w.shard.split for w in written}):
    filled = [w for w in written if w.shard.split == split and w.tally.written]
    if not filled:
      continue
    name = template.replace(split=split)
    for index, one in enumerate(filled):
      target = name.sharded_filepath(shard_index=index, num_shards=len(filled))
      one.path.rename(target)
    infos.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[one.tally.written for one in filled],
        num_bytes=sum(one.num_bytes for one in filled),
        filename_template=name,
      )
    )
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=options.schema(plan.kinds).features(),
    split_infos=infos,
    version=VERSION,
    filename_template=template,
    check_data=False,
    description=options.description,
  )


def _fingerprint(options: Options, parts: Sequence[sources.Part]) -> str:
  """Returns what must be equal for unfinished work to go on."""
  said: dict[str, Any] = dataclasses.asdict(options)
  for free in ("max_bad", "num_workers", "overwrite", "data_dir"):
    del said[free]
  said["parts"] = [part.fingerprint() for part in parts]
  return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _forget_others(scratch: pathlib.Path, fingerprint: str) -> None:
  """Empties the folder if it is of another source or other options."""
  mark = scratch / "fingerprint"
  if mark.is_file() and mark.read_text() == fingerprint:
    if (scratch / _PLAN).is_file():
      print(f"going on with what is in {scratch}", file=sys.stderr)
    return
  for path in scratch.iterdir():
    if path.name != "lock":
      shutil.rmtree(path) if path.is_dir() else path.unlink()
  mark.write_text(fingerprint)


def _forget_skipping(
  scratch: pathlib.Path, max_bad: float, parts: Sequence[sources.Part]
) -> None:
  """Forgets what lacks entries, if that has stopped it and would again.

  Then something has been mended, which is to be looked at; where more is
  allowed than before, all that is finished stays.
  """
  stopped = scratch / _STOPPED
  if not stopped.is_file():
    return
  tally = Tally(**json.loads(stopped.read_text()))
  if not report.is_too_much(tally, max_bad):
    return
  plan = _read_plan(scratch)
  if plan is not None:
    shards.forget_skipping(plan.shards, scratch)
    if any(part.path.is_dir() for part in parts):
      (scratch / _PLAN).unlink()
  stopped.unlink()


@contextlib.contextmanager
def _locked(scratch: pathlib.Path) -> Iterator[None]:
  """Holds the folder for this process.

  Raises:
    UserError: if another one has it, or it cannot be written.
  """
  try:
    scratch.mkdir(parents=True, exist_ok=True)
    file = (scratch / "lock").open("w")
  except OSError as e:
    raise UserError(
      f"cannot write to {scratch.parent} ({e.strerror}); choose another "
      "--data_dir"
    ) from e
  with file:
    try:
      import fcntl

      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
      pass  # a system without locks
    except OSError as e:
      raise UserError(f"another process is preparing in {scratch}") from e
    yield


def _cores() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
