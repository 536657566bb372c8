"""What libtpu, XLA's compiler and runtime for TPUs, is to be told."""

import os
from collections.abc import MutableMapping

_STACKS = "--fibers_default_thread_stack_size"


def enlarge_stacks(
  environ: MutableMapping[str, str] = os.environ,
) -> None:
  """Gives the compiler's threads stacks of 1 MiB, unless it is told otherwise.

  With what they have by default they overflow while they compile some steps,
  such as SCL's, which ends the process without a word (libtpu 0.0.42.1).

  Args:
    environ: of the process; libtpu reads `LIBTPU_INIT_ARGS` of it when the
      first device is asked for.
  """
  said = environ.get("LIBTPU_INIT_ARGS", "")
  if _STACKS not in said:
    environ["LIBTPU_INIT_ARGS"] = f"{said} {_STACKS}={2**20}".strip()
