"""Silence for what is printed of errors that are told."""

import errno
import functools
import logging
import sys


def hush() -> None:
  """Leaves it to whoever catches an error of a checkpoint to tell it, once.

  Orbax logs what it raises. Where one of many files cannot be written, it does
  not wait for the others, and asyncio or TensorStore prints a traceback for
  each that ends later and finds nobody to tell. And from Python 3.13 on, a file
  says when it goes that what it still holds does not fit on the disk.
  """
  logging.getLogger("absl").addFilter(_not_orbax)
  logging.getLogger("asyncio").addFilter(_not_orbax_s_task)
  _hush_what_is_late()


def _not_orbax(record: logging.LogRecord) -> bool:
  return "orbax" not in record.pathname


def _not_orbax_s_task(record: logging.LogRecord) -> bool:
  text = record.getMessage()
  return not ("exception was never retrieved" in text and "orbax" in text)


@functools.cache
def _hush_what_is_late() -> None:
  """Puts itself before what shows errors that cannot be raised."""
  show = sys.unraisablehook

  def show_others(unraisable) -> None:
    error = unraisable.exc_value
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if not full and str(error) != "Event loop is closed":
      show(unraisable)

  sys.unraisablehook = show_others
