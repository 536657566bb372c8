"""Launch scripts make commands that are understood."""

import os
import pathlib
import shlex
import subprocess

import pytest

from vlp_jax.data.prepare import __main__ as prepare
from vlp_jax.flags import parse_flags

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"


def run(script, *args, **env):
  return subprocess.run(
    ["bash", LAUNCH / script, *args],
    env={**os.environ, **env},
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize(
  ("kind", "env", "runner"),
  [
    (
      "dataflow",
      dict(PROJECT="p", REGION="r", BUCKET="gs://b", IMAGE="i"),
      "DataflowRunner",
    ),
    ("flink", dict(FLINK_MASTER="host:8081"), "FlinkRunner"),
    ("spark", dict(SPARK_JOB_ENDPOINT="host:8099"), "PortableRunner"),
  ],
)
def test_prepare_beam(kind, env, runner):
  script = "prepare_beam.sh"
  done = run(script, "--dry_run", kind, "--source=/a b", "--name=web", **env)
  python, m, module, *args = shlex.split(done.stdout)
  assert (python, m, module) == ("python", "-m", "vlp_jax.data.prepare")
  flags, _ = parse_flags(args, prepare.FLAGS)
  assert flags["source"] == "/a b" and flags["name"] == "web"
  options = dict(o.split("=") for o in flags["beam_options"].split(","))
  assert options["runner"] == runner
  lacking = run(script, "--dry_run", kind, "--source=x", "--name=web")
  assert lacking.returncode and "set " in lacking.stderr


def test_prepare_beam_says_how_to_use_it():
  done = run("prepare_beam.sh", "hadoop")
  assert done.returncode == 2 and "dataflow|flink|spark" in done.stderr
