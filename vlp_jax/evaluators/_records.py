"""Which records of a split an evaluation can use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from vlp_jax.data import sources
from vlp_jax.data.warn import warn_skipped


def usable(
  source: sources.Source,
  known: dict[int, dict[str, Any] | None],
  max_examples: int,
  clean: Callable[[str], str] | None,
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields records as they are read, and warns of those that it leaves out.

  Damaged records are left out and, as in training, records none of whose
  captions has a text once it is clean.

  Args:
    source: of the records.
    known: records that have been read; others are added. None is damaged.
    max_examples: looks at so many, or at all if it is 0.
    clean: what is done to captions; None if they do not matter.

  Yields:
    The place in the source, and the record without its picture.
  """
  for index in range(min(max_examples or len(source), len(source))):
    if index not in known:
      known[index] = _read(source, index)
    record = known[index]
    if record is None:
      continue
    if clean is not None:
      texts = [text for text in record["captions"] if clean(text).strip()]
      if not texts:
        warn_skipped(source.name, source.describe(index), "no caption")
        continue
      record = record | {"captions": texts}
    yield index, record


def _read(source: sources.Source, index: int) -> dict[str, Any] | None:
  try:
    record = dict(source[index])
  except sources.UnreadableRecord as e:
    warn_skipped(source.name, source.describe(index), e.reason)
    return None
  record.pop("image")
  return record
