"""Entries on disk, in the order in which they are written.

A table of SQLite keeps memory constant whatever the size. Its order is that
of TFDS: by a hash of the image's id, salted with the split's name. That mixes
the sources, brings equal ids together, and depends on nothing else.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import pathlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence

from tensorflow_datasets.core import hashing

from vlp_jax.data import splits
from vlp_jax.data.prepare.entries import Entry, Tally


@dataclasses.dataclass(frozen=True)
class Shard:
  """A range of a split's entries that becomes one file.

  Attributes:
    split: its name.
    index: its number in the split.
    first: hash of the first entry.
    end: hash of the first entry behind it; empty for the last shard.
    rows: number of entries.
    digest: hash of the entries.
  """

  split: str
  index: int
  first: str
  end: str
  rows: int
  digest: str = ""


class Table:
  """All entries of a source; `with` closes it."""

  def __init__(self, path: pathlib.Path):
    """Opens a table that exists, for reading."""
    self._db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)

  @classmethod
  def write(
    cls,
    path: pathlib.Path,
    entries: Iterable[Entry],
    shares: Sequence[tuple[str, float]],
  ) -> None:
    """Makes a table.

    Args:
      path: its file, which is there when the table is complete.
      entries: what goes into it.
      shares: of splits that are drawn, where an entry does not name one.
    """
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    hashers: dict[str, hashing.Hasher] = {}
    db = sqlite3.connect(partial, isolation_level=None)
    try:
      db.execute("PRAGMA journal_mode=OFF")  # a partial table is made anew
      db.execute("PRAGMA synchronous=OFF")
      db.execute("CREATE TABLE entries (split TEXT, hash TEXT, entry TEXT)")
      db.execute("BEGIN")
      for entry in entries:
        drawn = splits.draw(splits.hash64(entry.image_id), shares)
        split = entry.split or drawn
        hasher = hashers.setdefault(split, hashing.Hasher(split))
        key = f"{hasher.hash_key(entry.image_id):032x}"
        db.execute(
          "INSERT INTO entries VALUES (?, ?, ?)", (split, key, entry.to_json())
        )
      db.execute("CREATE INDEX by_hash ON entries (split, hash)")
      db.execute("COMMIT")
    except sqlite3.OperationalError as e:
      raise _as_os_error(e, partial) from e
    finally:
      db.close()
    partial.rename(path)

  def __enter__(self) -> Table:
    return self

  def __exit__(self, *exc) -> None:
    self._db.close()

  def shards(self, rows: int, most: int) -> list[Shard]:
    """Cuts every split into shards of about equal numbers of entries.

    Args:
      rows: entries of a shard, unless that makes too many shards.
      most: number of shards a split has at most.
    """
    shards = []
    counts = self._db.execute(
      "SELECT split, COUNT(*) FROM entries GROUP BY split ORDER BY split"
    ).fetchall()
    for split, count in counts:
      number = min(most, max(1, round(count / rows)))
      cuts = [count * i // number for i in range(number)]
      keys = self._db.execute(
        "SELECT hash FROM entries WHERE split = ? ORDER BY hash", (split,)
      )
      wanted, starts = set(cuts), []
      for place, (key,) in enumerate(keys):
        if place in wanted and key not in starts[-1:]:
          starts.append(key)
      ends = [*starts[1:], ""]
      for index, (first, end) in enumerate(zip(starts, ends, strict=True)):
        shards.append(Shard(split, index, first, end, 0))
    return [self._counted(shard) for shard in shards]

  def _counted(self, shard: Shard) -> Shard:
    query, values = _range(shard)
    rows, digest = 0, hashlib.sha256()
    for (text,) in self._db.execute(
      f"SELECT entry {query} ORDER BY hash, rowid", values
    ):
      rows += 1
      digest.update(text.encode())
    return dataclasses.replace(shard, rows=rows, digest=digest.hexdigest())

  def entries(self, shard: Shard) -> Iterator[tuple[int, Entry]]:
    """Yields (hash, entry) of a shard, in order."""
    query, values = _range(shard)
    rows = self._db.execute(
      f"SELECT hash, entry {query} ORDER BY hash, rowid", values
    )
    for key, text in rows:
      yield int(key, 16), Entry.from_json(text)


def merged(
  entries: Iterable[tuple[int, Entry]], tally: Tally
) -> Iterator[tuple[int, Entry]]:
  """Makes one entry of successive ones with the same id.

  Rows that name the same picture add their captions. Another picture with an
  id that was there before is skipped, and so is a row that adds nothing.
  """
  held: tuple[int, Entry] | None = None
  for key, entry in entries:
    if held is None or held[0] != key:
      if held is not None:
        yield held
      held = key, entry
      continue
    first = held[1]
    new = [c for c in entry.captions if c not in first.captions]
    if entry.place != first.place or not new:
      tally.skip(entry.name, "duplicate id")
    else:
      tally.merged += 1
      held = key, first._replace(captions=first.captions + new)
  if held is not None:
    yield held


def _range(shard: Shard) -> tuple[str, tuple[str, ...]]:
  query = "FROM entries WHERE split = ? AND hash >= ?"
  values = (shard.split, shard.first)
  if shard.end:
    return query + " AND hash < ?", (*values, shard.end)
  return query, values


def _as_os_error(
  error: sqlite3.OperationalError, path: pathlib.Path
) -> OSError:
  """SQLite's errors of the disk, as Python calls them."""
  full = "full" in str(error)
  return OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path))
