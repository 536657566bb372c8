"""Python's garbage collector, while a command starts."""

import gc

import pytest

from vlp_jax import garbage


@pytest.fixture(autouse=True)
def as_before():
  yield
  gc.unfreeze()
  gc.enable()


def test_what_was_made_while_a_command_starts_is_not_looked_at_again():
  garbage.ignore()
  assert not gc.isenabled()
  made = [[] for _ in range(10_000)]
  garbage.collect()
  assert gc.isenabled()
  assert gc.get_freeze_count() >= len(made)
  seen = {id(x) for x in gc.get_objects()}
  assert not any(id(x) in seen for x in made)


def test_a_caller_that_collects_garbage_keeps_all_of_it_in_sight():
  garbage.collect()
  assert gc.isenabled() and not gc.get_freeze_count()
