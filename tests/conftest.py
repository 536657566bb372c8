"""The whole suite runs on eight CPU devices, whatever the machine has."""

import os

# Workers of pytest-xdist keep to their own cores, with the commands that their
# tests start: thread pools that share cores spend their time on waiting.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
  _worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
  _count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
  _cores = sorted(os.sched_getaffinity(0))
  os.sched_setaffinity(0, _cores[_worker::_count] or _cores)

# A CPU for the commands that tests start, too.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

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


@pytest.fixture
def strict_ranks():
  """Arrays of different rank are an error, not a broadcast."""
  with jax.numpy_rank_promotion("raise"):
    yield
