"""What libtpu is told."""

import pytest

from vlp_jax import libtpu

STACKS = "--fibers_default_thread_stack_size"


@pytest.mark.parametrize(
  ("said", "then"),
  [
    (None, f"{STACKS}=1048576"),
    ("--a=1 --b", f"--a=1 --b {STACKS}=1048576"),
    (f"{STACKS}=65536 --a=1", f"{STACKS}=65536 --a=1"),
  ],
)
def test_stacks_are_enlarged_unless_the_user_has_chosen(said, then):
  environ = {} if said is None else {"LIBTPU_INIT_ARGS": said}
  libtpu.enlarge_stacks(environ)
  assert environ == {"LIBTPU_INIT_ARGS": then}
