"""A command starts itself again, once; what a step gives back is kept."""

import json
import os
import subprocess
import sys

import pytest

from vlp_jax import step_memory

MADVISE = "always [madvise] never\n"
HUGE = "glibc.malloc.hugetlb=1:"
KEPT = f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**40}"

_SAY = """
import json, os, pathlib, sys
from vlp_jax import step_memory
print(os.getpid())
step_memory.use(pathlib.Path(sys.argv[1]))
print(json.dumps([os.getpid(), sys.argv[1:], os.environ["GLIBC_TUNABLES"]]))
"""


def _run(tmp_path, state, **environ):
  kernel = tmp_path / "enabled"
  kernel.write_text(state)
  return subprocess.run(
    [sys.executable, "-c", _SAY, str(kernel), "--a=b c", "é"],
    env={**os.environ, **environ},
    capture_output=True,
    text=True,
    check=True,
  ).stdout.splitlines()


@pytest.mark.parametrize(
  ("before", "state", "after"),
  [
    ("", MADVISE, HUGE + KEPT),
    ("glibc.malloc.check=1", MADVISE, "glibc.malloc.check=1:" + HUGE + KEPT),
    ("", "[always] madvise never\n", KEPT),
  ],
)
def test_starts_again_once(tmp_path, before, state, after):
  first, second, said = _run(tmp_path, state, GLIBC_TUNABLES=before)
  assert first == second  # the same process
  pid, arguments, tunables = json.loads(said)
  assert pid == int(first)
  assert arguments[1:] == ["--a=b c", "é"]
  assert tunables == after


@pytest.mark.parametrize(
  "tunables", ["glibc.malloc.hugetlb=0", "glibc.malloc.trim_threshold=1000000"]
)
def test_goes_on(tmp_path, tunables):
  first, said = _run(tmp_path, MADVISE, GLIBC_TUNABLES=tunables)
  assert json.loads(said)[0] == int(first)
  assert json.loads(said)[2] == tunables


def test_goes_on_where_there_is_no_such_kernel(tmp_path):
  assert step_memory.environment({}, tmp_path / "none") is None


_FAULTS = """
import os, pathlib, resource, sys
from vlp_jax import step_memory
step_memory.use(pathlib.Path(sys.argv[1]))
if sys.argv[2] == "main":
  step_memory.stay_in_main_thread()

import jax, jax.numpy as jnp

# 128 MiB that a step needs for itself.
x = jnp.ones((32, 1024, 1024))
sums = lambda x: jax.lax.optimization_barrier(jnp.sin(x)).sum()
step = jax.jit(sums).lower(x).compile()
assert step.memory_analysis().temp_size_in_bytes == 2**27

def run(steps):
  for _ in range(steps):
    jax.block_until_ready(step(x))
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

print((-run(3) + run(30)) / 30)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="as its C library does")
@pytest.mark.parametrize("thread", ["main", "other"])
def test_memory_of_a_step_is_kept(tmp_path, thread):
  kernel = tmp_path / "enabled"
  kernel.write_text("always madvise [never]\n")  # pages of 4 KiB
  environ = {**os.environ, "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ""}
  command = [sys.executable, "-c", _FAULTS, str(kernel), thread]
  found = subprocess.run(
    command, env=environ, capture_output=True, text=True, check=True
  )
  faults, pages = float(found.stdout), 2**27 // 4096
  if thread == "other":
    assert faults > pages - 100
  else:  # a small block in its place makes a step take as much once more
    assert faults < pages / 5
