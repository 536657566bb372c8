"""What every command does first and last: caches, errors, exits."""

from __future__ import annotations

import errno
import logging
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence

import jax

from vlp_jax import hosts, libtpu, preemption, roll_call
from vlp_jax.errors import UserError

PREEMPTED = preemption.STATUS
# Another host ended, whose status says whether to start again, or did not come
# in time (EX_UNAVAILABLE).
LOST = 69


class Preempted(Exception):
  """The run was asked to stop, and has saved itself."""


def execute(main: Callable[[Sequence[str]], None]) -> None:
  """Runs a command and exits.

  Status 0: done. 2: a mistake of the user's, told in one line on stderr. 75:
  stopped by SIGTERM, and saved if there was anything to save, or by what it has
  mended: may be started again. 69: of several hosts another has ended, or does
  not come in time. Anything else is a bug and ends in a traceback.

  Args:
    main: called with the arguments, without the program's name.
  """
  logging.getLogger("absl").setLevel(logging.WARNING)
  libtpu.enlarge_stacks()
  try:
    main(sys.argv[1:])
  except Preempted as stop:
    print(stop, file=sys.stderr)
    sys.exit(PREEMPTED)
  except hosts.StartAgainError as error:
    _end(str(error), PREEMPTED)
  except roll_call.AbsentError as error:
    _fail(str(error), LOST)
  except UserError as error:
    _fail(str(error))
  except PermissionError as error:
    _fail(f"no permission to write {error.filename}; choose another folder")
  except KeyboardInterrupt:
    _end("stopped; the same command resumes", 130)
  except Exception as error:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
      file = error.filename
      _fail(f"no space left on the disk ({file}); free some and resume")
    if not hosts.several():
      raise
    if hosts.is_loss(error):
      reason = str(error).partition("\n")[0][:200]
      _fail(f"another host has ended, see what it says ({reason})", LOST)
    _end(traceback.format_exc(), 1)


def _fail(message: str, status: int = 2) -> None:
  where = f"host {jax.process_index()}: " if hosts.several() else ""
  _end(f"error: {where}{' '.join(message.split())}", status)


def _end(message: str, status: int) -> None:
  print(message, file=sys.stderr)
  hosts.abandon(status)
  sys.exit(status)


def keep_compiled() -> None:
  """Keeps what is compiled, so that the next run starts sooner.

  `JAX_COMPILATION_CACHE_DIR`, where set, is where. Call it before JAX is used.
  Several CPU devices go without: programs with collectives that jaxlib 0.10.2
  reads from its cache stop at the first one, for good.
  """
  if hosts.several() and jax.default_backend() == "cpu":
    jax.config.update("jax_enable_compilation_cache", False)
    return
  several = os.environ.get("JAX_NUM_CPU_DEVICES", "1") != "1"
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ and not several:
    cache = pathlib.Path.home() / ".cache" / "vlp_jax" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(cache))


def make_folder(path: str | os.PathLike) -> pathlib.Path:
  """Makes a folder that can be written to.

  Raises:
    UserError: if it cannot be made or written.
  """
  path = pathlib.Path(path)
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe = path / ".writable"
    probe.touch()
    probe.unlink(missing_ok=True)  # several processes may do this
  except OSError as error:
    raise UserError(
      f"cannot write to {path} ({error.strerror}); choose another folder"
    ) from None
  return path
