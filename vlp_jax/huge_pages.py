"""Memory in huge pages, for training on a CPU under Linux.

XLA takes the memory of a step's activations from malloc and gives it back, at
every step. In pages of 4 KiB, making them anew is a quarter of a step's time at
`tiny`; in pages of 2 MiB it is little. The C library (glibc 2.35 or later) asks
for them if a tunable says so, which it reads when a process starts.
"""

import os
import pathlib
import sys
from collections.abc import Mapping

_TUNABLE = "glibc.malloc.hugetlb"
_KERNEL = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use(kernel: pathlib.Path = _KERNEL) -> None:
  """Starts this command again with huge pages, where that helps.

  It is the same process with the same arguments. Nothing happens where pages
  are huge anyway or cannot be asked for, where `GLIBC_TUNABLES` says something
  about them already, and when it has been started again. Call it before
  anything else is done.
  """
  environ = environment(os.environ, kernel)
  if environ:
    sys.stdout.flush()
    os.execve(sys.executable, sys.orig_argv, environ)


def environment(
  environ: Mapping[str, str], kernel: pathlib.Path = _KERNEL
) -> dict[str, str] | None:
  """Returns the environment to start again in, or None to go on."""
  tunables = environ.get("GLIBC_TUNABLES", "")
  try:
    on_request = "[madvise]" in kernel.read_text()
  except OSError:  # another system
    return None
  if not on_request or _TUNABLE in tunables:
    return None
  more = f"{_TUNABLE}=1"
  tunables = f"{tunables}:{more}" if tunables else more
  return {**environ, "GLIBC_TUNABLES": tunables}
