"""What `prepare` says: progress, the table at the end, and the report."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

from vlp_jax.data.prepare.entries import Tally
from vlp_jax.data.prepare.lists import SUFFIXES
from vlp_jax.errors import UserError

NAME = "prepare_report.json"

_LEADING = 3  # reasons that an error names
_TERMINAL_SECONDS, _LOG_SECONDS = 0.2, 10.0


class Progress:
  """One line on stderr with what is done, its rate and the time left.

  On a terminal the line is drawn anew; in a log there is one every ten
  seconds.
  """

  def __init__(self, what: str, total: int = 0):
    """Makes a line; `total` is 0 where it is not known."""
    self._what, self._total = what, total
    self._terminal = sys.stderr.isatty()
    self._every = _TERMINAL_SECONDS if self._terminal else _LOG_SECONDS
    self._start = self._shown = time.monotonic()
    self._first: int | None = None  # done in earlier attempts

  def __enter__(self) -> Progress:
    return self

  def __exit__(self, *exc) -> None:
    if self._terminal:
      print(file=sys.stderr)

  def update(self, done: int) -> None:
    """Shows the number of entries done, if it is time to."""
    if self._first is None:
      self._first = done - 1
    now = time.monotonic()
    if now - self._shown < self._every:
      return
    self._shown = now
    rate = (done - self._first) / (now - self._start)
    text = f"{self._what}: {done:,}"
    if self._total:
      text += f"/{self._total:,}"
    text += f"  {rate:,.0f}/s"
    if self._total and rate > 0:
      left = int((self._total - done) / rate)
      text += f"  {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
    end = "" if self._terminal else "\n"
    lead = "\r\033[K" if self._terminal else ""
    print(f"{lead}{text}", end=end, file=sys.stderr, flush=True)


class TooMuchSkipped(UserError):
  """More of a source cannot be used than the user allows.

  Attributes:
    tally: of what was read and skipped so far.
  """

  def __init__(self, tally: Tally, max_bad: float):
    super().__init__(
      f"{tally.num_skipped:,} of {tally.read:,} pictures so far have to be "
      f"skipped, more than --max_bad={max_bad:.4g}: {_leading(tally)}; mend "
      "them, or allow more with --max_bad=10%; what is finished is kept"
    )
    self.tally = tally


def is_too_much(tally: Tally, max_bad: float) -> bool:
  """Whether more is skipped than the user allows."""
  return tally.num_skipped > max_bad * tally.read


def check(tally: Tally, max_bad: float) -> None:
  """Raises `TooMuchSkipped` if it is."""
  if is_too_much(tally, max_bad):
    raise TooMuchSkipped(tally, max_bad)


def nothing(source: str, tally: Tally) -> str:
  """Returns the message for a source of which nothing is left."""
  if not tally.read:
    return (
      f"--source={source} is empty: no pictures with captions were found in it"
    )
  reasons = f"--source={source}: nothing can be used: {_leading(tally)}"
  return reasons + _hint(pathlib.Path(source).expanduser())


def _hint(folder: pathlib.Path) -> str:
  """Names a list that lies in a folder under a name of its own."""
  names = sorted(folder.iterdir()) if folder.is_dir() else []
  lists = [path for path in names if path.suffix.lower() in SUFFIXES]
  if not lists:
    return ""
  return f"; if {lists[0].name} lists them, give --source={lists[0]}"


def _leading(tally: Tally) -> str:
  rows = tally.by_count()[:_LEADING]
  return ", ".join(
    f"{reason}: {n:,} (as {names[0]})" for reason, n, names in rows
  )


def write(path: pathlib.Path, options: Any, tally: Tally) -> None:
  """Writes `prepare_report.json`."""
  report = {
    "source": options.source,
    "options": dataclasses.asdict(options),
    "read": tally.read,
    "written": tally.written,
    "merged": tally.merged,
    "skipped": _by_reason(tally.skipped),
    "captions_left_out": _by_reason(tally.notes),
  }
  path.write_text(json.dumps(report, indent=2) + "\n")


def _by_reason(counts: dict[str, tuple[int, list[str]]]) -> dict[str, Any]:
  rows = sorted(counts.items(), key=lambda row: (-row[1][0], row[0]))
  return {r: {"count": count, "first": names} for r, (count, names) in rows}


def show(options: Any, folder: pathlib.Path, tally: Tally) -> None:
  """Prints the table at the end."""
  print(f"{options.name}: {folder}")
  rows = [("read", tally.read, ""), ("written", tally.written, "")]
  if tally.merged:
    rows.append(("captions added to another row's picture", tally.merged, ""))
  for reason, count, names in tally.by_count():
    rows.append((f"skipped: {reason}", count, names[0]))
  for reason, (count, names) in tally.notes.items():
    rows.append((f"captions left out: {reason}", count, names[0]))
  width = max(len(row[0]) for row in rows)
  for what, count, name in rows:
    more = f"  {name}{', ...' if count > 1 else ''}" if name else ""
    print(f"  {what:<{width}}  {count:>9,}{more}")
  print(f"train on it with --config.data.name={options.name}")
