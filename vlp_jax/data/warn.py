"""Warnings on stderr about data that is left out: counted and named."""

import collections
import sys
import threading

_lock = threading.Lock()
_seen = collections.defaultdict(set)


def warn(message: str) -> None:
  """Prints `warning: <message>` on stderr."""
  print(f"warning: {message}", file=sys.stderr, flush=True)


def warn_skipped(source: str, record: str, reason: str) -> None:
  """Says once per process and record that a record of `source` is skipped."""
  with _lock:
    if record in _seen[source]:
      return
    _seen[source].add(record)
    count = len(_seen[source])
    # Still locked, so that the counts come in order.
    warn(f"skipped {record}: {reason} ({count} skipped in {source} so far)")
