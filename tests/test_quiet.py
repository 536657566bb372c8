"""What is told of an error of a checkpoint: once, by who catches it."""

import logging
import subprocess
import sys

import pytest

from vlp_jax import quiet

# A future whose event loop is gone when it ends, and a file on a full disk.
LATE = """
import asyncio, errno, sys, tensorstore
from vlp_jax import quiet

async def leave_waiting():
  promise, future = tensorstore.Promise.new()
  waiting.append(asyncio.ensure_future(wait(future)))
  await asyncio.sleep(0)
  return promise

async def wait(future):
  await future

class Untold:
  def __del__(self):
    raise RuntimeError("something else")

class File:
  def __del__(self):
    raise OSError(errno.ENOSPC, "No space left on device")

if sys.argv[1] == "hushed":
  quiet.hush()
  quiet.hush()
waiting = []
loop = asyncio.new_event_loop()
promise = loop.run_until_complete(leave_waiting())
loop.close()
promise.set_result(1)
Untold()
File()
print("done")
"""
# Tasks that fail when nobody waits for them, of Orbax and of others.
FAILING = """
import asyncio, sys
from vlp_jax import quiet

if sys.argv[1] == "hushed":
  quiet.hush()
source = "async def fail(what): raise ValueError(what)"
places = {}
for name in ("orbax/checkpoint/writing.py", "ours.py"):
  exec(compile(source, f"/site-packages/{name}", "exec"), places)
  async def leave():
    asyncio.ensure_future(places["fail"](f"in {name}"))
    await asyncio.sleep(0)
  asyncio.run(leave())
"""


def _run(program, hushed):
  return subprocess.run(
    [sys.executable, "-c", program, "hushed" if hushed else "loud"],
    capture_output=True,
    text=True,
    check=True,
    timeout=60,
  )


@pytest.mark.parametrize("hushed", [False, True])
def test_what_ends_too_late_says_nothing(hushed):
  found = _run(LATE, hushed)
  assert found.stdout == "done\n"
  assert ("Event loop is closed" in found.stderr) == (not hushed)
  assert ("No space left" in found.stderr) == (not hushed)
  assert "something else" in found.stderr


@pytest.mark.parametrize("hushed", [False, True])
def test_what_fails_beside_another_failure_says_nothing(hushed):
  found = _run(FAILING, hushed)
  assert ("in orbax" in found.stderr) == (not hushed)
  assert "in ours" in found.stderr


def test_orbax_s_log_is_dropped(caplog):
  quiet.hush()
  logger = logging.getLogger("absl")
  for path in ("/site-packages/orbax/checkpoint/x.py", "/vlp_jax/main.py"):
    record = logger.makeRecord("absl", logging.ERROR, path, 1, path, (), None)
    logger.handle(record)
  assert [record.pathname for record in caplog.records] == ["/vlp_jax/main.py"]
