"""Ends a command that is preempted while there is nothing to save.

It imports next to nothing: it is called before what takes seconds to import.
"""

import contextlib
import os
import signal
import sys

# What a launcher takes as "start me again" (sysexits.h: EX_TEMPFAIL).
STATUS = 75
_LINE = b"preempted with nothing to save; the same command resumes\n"


def end_on_sigterm() -> None:
  """Has SIGTERM end this process at once, with status 75.

  The loop notes SIGTERM instead while it trains, and so does JAX from when it
  has joined others on (`hosts.Preemption`). Call it in the main thread.
  """
  own = os.getpid()

  def end(*_) -> None:
    if os.getpid() != own:  # a worker: it dies of the signal, as it would have
      signal.signal(signal.SIGTERM, signal.SIG_DFL)
      os.kill(os.getpid(), signal.SIGTERM)
      return
    with contextlib.suppress(Exception):  # if it came amid a print
      sys.stdout.flush()
    with contextlib.suppress(OSError):
      os.write(2, _LINE)
    os._exit(STATUS)

  signal.signal(signal.SIGTERM, end)
