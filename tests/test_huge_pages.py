"""A command starts itself again, once, and is the same command."""

import json
import os
import subprocess
import sys

import pytest

from vlp_jax import huge_pages

_SAY = """
import json, os, pathlib, sys
from vlp_jax import huge_pages
print(os.getpid())
huge_pages.use(pathlib.Path(sys.argv[1]))
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
  ("before", "after"),
  [
    ("", "glibc.malloc.hugetlb=1"),
    ("glibc.malloc.check=1", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
  ],
)
def test_starts_again_once(tmp_path, before, after):
  first, second, said = _run(
    tmp_path, "always [madvise] never\n", GLIBC_TUNABLES=before
  )
  assert first == second  # the same process
  pid, arguments, tunables = json.loads(said)
  assert pid == int(first)
  assert arguments[1:] == ["--a=b c", "é"]
  assert tunables == after


@pytest.mark.parametrize(
  ("state", "tunables"),
  [
    ("[always] madvise never\n", ""),
    ("always madvise [never]\n", ""),
    ("always [madvise] never\n", "glibc.malloc.hugetlb=0"),
  ],
)
def test_goes_on(tmp_path, state, tunables):
  first, said = _run(tmp_path, state, GLIBC_TUNABLES=tunables)
  assert json.loads(said)[0] == int(first)
  assert json.loads(said)[2] == tunables


def test_goes_on_where_there_is_no_such_kernel(tmp_path):
  assert huge_pages.environment({}, tmp_path / "none") is None
