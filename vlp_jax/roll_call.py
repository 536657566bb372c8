"""Finds out whether all processes of a run have come, before JAX starts.

`jax.distributed` ends a process with a stack trace, or by a segmentation
fault, where another does not come or the port is taken. So they meet here
first, on the port that JAX will have: each tells its number to the first
process, which lets all go on when it has heard of everyone.
"""

from __future__ import annotations

import contextlib
import socket
import time

from vlp_jax.errors import UserError

_GO = "go"
_PAUSE = 0.1  # seconds between attempts to connect
_SILENCE = 2.0  # seconds in which a process says who it is


class AbsentError(UserError):
  """Others did not come in time; that may be no mistake: they may yet come.

  Commands end with another status than after a mistake, so that whoever started
  them starts them again.
  """


def meet(address: str, count: int, number: int, seconds: float) -> None:
  """Returns when all processes have called it.

  Args:
    address: `host:port` of process 0.
    count: of the processes.
    number: of this one, from 0.
    seconds: to wait for the others.

  Raises:
    AbsentError: if they do not come in time.
    UserError: if two have the same number or were told different counts, or if
      the port is taken.
  """
  host, port = address.rsplit(":", 1)
  deadline = time.monotonic() + seconds
  try:
    if number == 0:
      _receive_all(int(port), count, deadline)
    else:
      _report((host.strip("[]"), int(port)), count, number, deadline)
  except TimeoutError as error:
    raise AbsentError(f"{error} within {seconds:.0f} s") from None


def _receive_all(port: int, count: int, deadline: float) -> None:
  """Hears of every process, and lets all go on."""
  dual = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if dual else socket.AF_INET
  try:
    server = socket.create_server(
      ("", port), family=family, backlog=count, dualstack_ipv6=dual
    )
  except OSError as error:
    raise UserError(
      f"cannot use port {port} for the processes to meet ({error.strerror}); "
      "choose another in JAX_COORDINATOR_ADDRESS"
    ) from None
  with contextlib.ExitStack() as stack:
    stack.enter_context(server)
    came: dict[int, socket.socket] = {}
    while len(came) < count - 1:
      server.settimeout(_left(deadline))
      try:
        other, _ = server.accept()
      except TimeoutError:
        missing = sorted(set(range(1, count)) - set(came))
        raise TimeoutError(
          f"of the {count} processes, {_names(missing)} did not come"
        ) from None
      stack.enter_context(other)
      other.settimeout(_SILENCE)
      try:
        number, others = map(int, _read_line(other).split())
      except (OSError, ValueError):
        continue  # a stranger, who was silent or said something else
      problem = _problem(number, others, count, came)
      if problem:
        for each in (other, *came.values()):
          _tell(each, problem)
        raise UserError(problem)
      came[number] = other
    for other in came.values():
      _tell(other, _GO)
    # They hang up first: the port is then free at once.
    for other in came.values():
      with contextlib.suppress(OSError):
        other.recv(1)


def _problem(number: int, others: int, count: int, came: dict) -> str | None:
  if others != count:
    return (
      f"process {number} was told of {others} processes, and process 0 of "
      f"{count}; set JAX_NUM_PROCESSES alike everywhere"
    )
  if number in came or not 0 < number < count:
    return (
      f"two processes have the number {number}; give each its own "
      f"JAX_PROCESS_ID, from 0 to {count - 1}"
    )
  return None


def _report(
  address: tuple[str, int], count: int, number: int, deadline: float
) -> None:
  """Tells process 0 of this one, and waits for its answer."""
  while True:
    try:
      with socket.create_connection(address, _left(deadline)) as first:
        first.sendall(f"{number} {count}\n".encode())
        first.settimeout(_left(deadline) + 1)  # it says who is missing
        answer = _read_line(first)
    except OSError as error:
      reason = error.strerror or str(error)
      if _left(deadline) <= _PAUSE:
        raise TimeoutError(
          f"process 0 could not be reached at {address[0]}:{address[1]} "
          f"({reason}; JAX_COORDINATOR_ADDRESS)"
        ) from None
      time.sleep(_PAUSE)
      continue
    if answer == _GO:
      return
    if answer:
      raise UserError(answer)
    raise AbsentError("process 0 gave up: see what it says")


def _left(deadline: float) -> float:
  return max(deadline - time.monotonic(), 0.01)


def _read_line(connection: socket.socket) -> str:
  """Reads up to the end of a line, or of the connection."""
  with connection.makefile("r", encoding="utf-8") as file:
    return file.readline(1000).strip()


def _tell(connection: socket.socket, text: str) -> None:
  with contextlib.suppress(OSError):
    connection.sendall(f"{text}\n".encode())


def _names(numbers: list[int]) -> str:
  shown = ", ".join(map(str, numbers[:8]))
  return f"{shown} and {len(numbers) - 8} more" if numbers[8:] else shown
