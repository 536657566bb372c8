"""The whole suite runs on eight CPU devices, whatever the machine has."""

import os
import re

# Workers of pytest-xdist keep to their own cores, with the commands that their
# tests start: thread pools that share cores spend their time on waiting.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
  _worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
  _count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
  _cores = sorted(os.sched_getaffinity(0))
  os.sched_setaffinity(0, _cores[_worker::_count] or _cores)

# What the shell that starts the suite says is not meant for what is tested,
# which inherits it: of other processes, by which a command would wait for them;
# of devices; and of a terminal, which messages are wrapped to. With a folder
# for compiled programs this process would read programs with collectives from
# it, and stop at the first one (`command.keep_compiled`).
if _inherited := [
  name
  for name in os.environ
  if re.match("(SLURM|OMPI|KUBERNETES|MEGASCALE)_", name)
  or name
  in (
    *("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    *("JAX_LOCAL_DEVICE_IDS", "JAX_NUM_CPU_DEVICES", "JOB_COMPLETION_INDEX"),
    *("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "TPU_ML_PLATFORM"),
    *("JAX_COMPILATION_CACHE_DIR", "COLUMNS"),
  )
]:
  list(map(os.environ.pop, _inherited))

# A CPU for the commands that tests start, too.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

from vlp_jax.data import warn

# Not by the environment: the commands that tests start choose for themselves.
jax.config.update("jax_num_cpu_devices", 8)


def _takes_minutes(item) -> bool:
  return item.path.stem == "test_train_step" or item.path.parent.name == "e2e"


def pytest_collection_modifyitems(config, items):
  """Orders the tests, and leaves out slow ones unless they are asked for.

  `-m` asks for them, or a test's own name. Files that take minutes come first,
  so that no worker is left alone with one.
  """
  items.sort(key=lambda item: not _takes_minutes(item))
  named = any("::" in argument for argument in config.args)
  if config.option.markexpr or named:
    return
  slow = [item for item in items if item.get_closest_marker("slow")]
  config.hook.pytest_deselected(items=slow)
  items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def _warn_again():
  """A record that a test before has met is told of again."""
  with warn._lock:
    warn._seen.clear()


@pytest.fixture
def strict_ranks():
  """Arrays of different rank are an error, not a broadcast."""
  with jax.numpy_rank_promotion("raise"):
    yield
