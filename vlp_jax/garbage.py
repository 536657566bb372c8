"""Python's garbage collector, while a command starts.

Imports and tracing make objects by the hundred thousand, and next to none of
them is garbage in a cycle. To look for it among them, over and over, takes a
fifth of that time.
"""

import gc


def ignore() -> None:
  """Lets garbage lie. Call it before anything is imported."""
  gc.disable()


def collect() -> None:
  """Collects garbage again, after `ignore`: of what is made from now on."""
  if not gc.isenabled():
    gc.freeze()
    gc.enable()
