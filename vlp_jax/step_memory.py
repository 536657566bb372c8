"""A step's memory, for training on a CPU under Linux: in huge pages, and kept.

XLA takes the memory of a step's activations from malloc and gives it back, at
every step. So much malloc takes from the kernel each time, which clears it: in
pages of 4 KiB that is a quarter of a step's time at `tiny`, in pages of 2 MiB
a tenth, and more where a virtual machine's host takes what is free. The C
library (glibc 2.35 or later) asks for huge pages, and keeps what is given back,
if tunables say so, which it reads when a process starts. It keeps as much as
that for its main thread alone, so steps run in it.
"""

import os
import pathlib
import sys
from collections.abc import Mapping

_HUGE = "glibc.malloc.hugetlb=1"
_KEPT = (
  "glibc.malloc.mmap_max=0",  # from the heap, whatever the size
  f"glibc.malloc.trim_threshold={1 << 40}",  # which does not shrink
)
_KERNEL = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use(kernel: pathlib.Path = _KERNEL) -> None:
  """Starts this command again with tunables that say so, where that helps.

  It is the same process with the same arguments. Nothing happens where
  `GLIBC_TUNABLES` says something about this already, on other systems, and when
  it has been started again. Call it before anything else is done.
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
  wanted = [*([_HUGE] if on_request else []), *_KEPT]
  if any(one.split("=")[0] in tunables for one in (_HUGE, *_KEPT)):
    return None
  more = ":".join([tunables, *wanted] if tunables else wanted)
  return {**environ, "GLIBC_TUNABLES": more}


def stay_in_main_thread() -> None:
  """Has JAX run steps of one CPU device in the thread that asks for them.

  Call it before JAX is used.
  """
  import jax

  jax.config.update("jax_cpu_enable_async_dispatch", False)
