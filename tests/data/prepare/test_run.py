import io
import json
import signal
import subprocess
import sys
import tarfile
import tracemalloc

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from tests.data.prepare import toy
from tests.data.toy import png
from vlp_jax.data.prepare.entries import Entry, Place, Tally
from vlp_jax.data.prepare.table import Table, merged
from vlp_jax.errors import UserError

SMALL = "--records_per_shard=8"


def pictures(root, count, size=(16, 16)):
  """A folder of pictures that differ, with captions."""
  root.mkdir()
  rng = np.random.default_rng(0)
  for i in range(count):
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(root / f"{i:04d}.png")
    (root / f"{i:04d}.txt").write_text(f"picture {i}")
  return root


def files(folder):
  return {
    path.name: path.read_bytes()
    for path in folder.iterdir()
    if path.name != "prepare_report.json"
  }


def inodes(paths):
  """Tells files apart, whatever their names: also from later ones."""
  return {(s.st_ino, s.st_mtime_ns) for s in (p.stat() for p in paths)}


def start(*args):
  command = [sys.executable, "-m", "vlp_jax.data.prepare", *args]
  return subprocess.Popen(
    command,
    stderr=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


def test_any_number_of_processes_writes_the_same_bytes(tmp_path):
  root = pictures(tmp_path / "source", 40)
  (root / "0003.png").write_bytes(b"")
  flags = (SMALL, "--max_bad=0.1")
  one = toy.prepare(root, tmp_path / "1", "--num_workers=1", *flags)
  two = toy.prepare(root, tmp_path / "2", "--num_workers=2", *flags)
  assert files(one) == files(two)
  assert len(list(one.glob("*array_record*"))) == 5
  assert toy.skipped(two) == {"empty file": ["0003.png"]}
  assert len(toy.records(two)) == 39


def test_records_are_in_the_order_that_tfds_itself_writes(tmp_path):
  root = pictures(tmp_path / "source", 30)
  folder = toy.prepare(root, tmp_path / "data", SMALL)

  class Same(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}  # noqa: RUF012 - TFDS's protocol

    def _info(self):
      features = tfds.builder_from_directory(folder).info.features
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
      del dl_manager
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for path in root.glob("*.png"):
        captions = [path.with_suffix(".txt").read_text()]
        yield (
          path.name,
          {"image": path, "captions": captions, "image_id": path.name},
        )

  builder = Same(data_dir=tmp_path / "tfds", file_format="array_record")
  builder.download_and_prepare()
  raw = tfds.decode.DeserializeMethod.RAW_BYTES
  ours, theirs = (
    b.as_data_source("train", deserialize_method=raw)
    for b in (tfds.builder_from_directory(folder), builder)
  )
  read = tf_example_pb2.Example.FromString
  for i in range(30):
    assert read(ours[i]) == read(theirs[i])


# Ends itself and its workers when two shards of `train` are complete.
_DYING = """
import os, signal
from vlp_jax import command
from vlp_jax.data.prepare import __main__, shards
write_all = shards.write_all
def dying(some, table, folder, schema, workers, on_progress):
  def told(rows):
    on_progress(rows)
    if len(list(folder.glob("train-*.json"))) >= 2:
      os.killpg(0, signal.SIGKILL)
  return write_all(some, table, folder, schema, workers, told)
shards.write_all = dying
command.execute(__main__.main)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_started_again_it_goes_on(workers, tmp_path):
  root = pictures(tmp_path / "source", 60, (200, 200))
  flags = [f"--source={root}", "--name=toy", SMALL, f"--num_workers={workers}"]
  flags.append(f"--data_dir={tmp_path / 'data'}")
  scratch = tmp_path / "data" / ".toy.preparing"
  victim = subprocess.run(
    [sys.executable, "-c", _DYING, *flags],
    start_new_session=True,
    capture_output=True,
    text=True,
  )
  assert victim.returncode == -signal.SIGKILL, victim.stderr
  kept = {p: p.stat().st_mtime_ns for p in scratch.glob("train-*.json")}
  assert not (tmp_path / "data" / "toy").exists() and len(kept) >= 2
  # A shard that was cut off is not taken for a finished one.
  victim, *kept = [path.with_suffix(".array_record") for path in sorted(kept)]
  victim.write_bytes(victim.read_bytes()[:-1])
  stamps = inodes(kept)
  process = start(*flags)
  _, err = process.communicate()
  assert process.returncode == 0 and "going on" in err
  folder = tmp_path / "data" / "toy" / "1.0.0"
  assert stamps <= inodes(folder.iterdir())
  whole = toy.prepare(root, tmp_path / "whole", SMALL, split="")
  assert files(folder) == files(whole)
  assert not scratch.exists()


def test_other_options_or_a_changed_list_start_anew(tmp_path):
  path = toy.jsonl(tmp_path / "source")
  (path.parent / "images" / "b.png").write_bytes(b"")
  with pytest.raises(UserError, match="what is finished is kept"):
    toy.prepare(path, tmp_path / "data")
  rows = path.read_text().splitlines()
  path.write_text("\n".join(rows[:1]) + "\n")
  folder = toy.prepare(path, tmp_path / "data")
  assert list(toy.records(folder)) == ["images/a.png"]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_mended_is_looked_at_again(workers, tmp_path):
  root = pictures(tmp_path / "source", 40)
  good = (root / "0003.png").read_bytes()
  (root / "0003.png").write_bytes(b"")
  (root / "0004.png").write_bytes(b"")
  args = (root, tmp_path / "data", SMALL, f"--num_workers={workers}")
  scratch = tmp_path / "data" / ".toy.preparing"
  with pytest.raises(UserError, match="empty file"):
    toy.prepare(*args, "--max_bad=0")
  kept = [json.loads(p.read_text()) for p in scratch.glob("train-*.json")]
  assert any(note["tally"]["skipped"] for note in kept)
  assert len(kept) == len([*scratch.glob("train-*.array_record")])
  (root / "0003.png").write_bytes(good)
  (root / "0004.png").unlink()
  (root / "0004.txt").unlink()
  folder = toy.prepare(*args, "--max_bad=0")
  assert files(folder) == files(
    toy.prepare(root, tmp_path / "whole", SMALL, "--max_bad=0")
  )


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_finished_is_kept_where_more_is_allowed(workers, tmp_path):
  root = pictures(tmp_path / "source", 40)
  for number in range(1, 40, 2):  # some of each shard
    (root / f"{number:04d}.png").write_bytes(b"")
  args = (root, tmp_path / "data", SMALL, f"--num_workers={workers}")
  scratch = tmp_path / "data" / ".toy.preparing"
  plans, finished = set(), set()
  for max_bad in (0, 0.2):
    with pytest.raises(UserError, match="what is finished is kept"):
      toy.prepare(*args, f"--max_bad={max_bad}")
    plans.add((scratch / "plan.json").stat().st_mtime_ns)
    before, finished = finished, inodes(scratch.glob("*.array_record"))
    assert before <= finished and finished
  assert len(plans) == 1
  folder = toy.prepare(*args, "--max_bad=0.5")
  assert finished <= inodes(folder.iterdir())
  assert len(toy.records(folder)) == 20


def test_captions_that_are_mended_are_read_again(tmp_path):
  root = pictures(tmp_path / "source", 10)
  (root / "0003.txt").write_text("")
  with pytest.raises(UserError, match="empty caption: 1"):
    toy.prepare(root, tmp_path / "data")
  (root / "0003.txt").write_text("mended")
  records = toy.records(toy.prepare(root, tmp_path / "data"))
  assert records["0003.png"]["captions"] == ["mended"] and len(records) == 10


def test_pictures_of_a_list_that_are_mended(tmp_path):
  path = toy.jsonl(tmp_path / "source")
  (path.parent / "images" / "b.png").write_bytes(b"")
  with pytest.raises(UserError, match="empty file: 1"):
    toy.prepare(path, tmp_path / "data")
  (path.parent / "images" / "b.png").write_bytes(png("lime"))
  assert len(toy.records(toy.prepare(path, tmp_path / "data"))) == 3


def test_a_shard_of_other_entries_is_made_anew(tmp_path):
  """Even if it has as many of them, and begins with the same one."""
  tables = []
  for number, caption in enumerate(("one", "two")):
    path = tmp_path / f"{number}.sqlite"
    Table.write(path, [entry("x", captions=[caption])], (("train", 1.0),))
    with Table(path) as table:
      tables.append(table.shards(rows=8, most=1))
  assert tables[0] != tables[1]


def test_a_data_set_is_replaced_on_request_only(tmp_path):
  source = toy.jsonl(tmp_path / "source")
  toy.prepare(source, tmp_path / "data")
  with pytest.raises(UserError, match="exists; choose another --name"):
    toy.prepare(source, tmp_path / "data")
  source = toy.folder_of_texts(tmp_path / "other")
  folder = toy.prepare(source, tmp_path / "data", "--overwrite")
  assert set(toy.records(folder)) == {"a.png", "b.png", "c.png"}


def test_two_at_once(tmp_path):
  fcntl = pytest.importorskip("fcntl")
  scratch = tmp_path / "data" / ".toy.preparing"
  scratch.mkdir(parents=True)
  with (scratch / "lock").open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process is preparing"):
      toy.prepare(toy.jsonl(tmp_path / "source"), tmp_path / "data")


def test_a_folder_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="choose another --data_dir"):
    toy.prepare(toy.jsonl(tmp_path / "source"), tmp_path / "file")


def test_a_full_disk(tmp_path):
  root = pictures(tmp_path / "source", 60, (200, 200))  # 7 MB
  disk = tmp_path / "disk"
  disk.mkdir()
  mounted = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)],
    capture_output=True,
  )
  if mounted.returncode:
    pytest.skip("cannot mount a small file system here")
  flags = [f"--source={root}", "--name=toy", f"--data_dir={disk}", SMALL]
  try:
    process = start(*flags)
    _, err = process.communicate()
    assert process.returncode == 2
    last = err.splitlines()[-1]
    assert last.startswith("error: no space left on the disk"), err
    assert "Traceback" not in err and not (disk / "toy").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    process = start(*flags)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert toy.report(disk / "toy" / "1.0.0")["written"] == 60
  finally:
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_exit_status_and_the_table(tmp_path):
  root = toy.folder_of_texts(tmp_path / "source")
  (root / "d.png").write_bytes(b"")
  (root / "d.txt").write_text("d")
  flags = [f"--source={root}", "--name=toy", f"--data_dir={tmp_path / 'data'}"]
  process = start(*flags)
  out, err = process.communicate()
  assert process.returncode == 2 and not out
  assert err.splitlines()[-1].startswith("error: 1 of 4 pictures")
  process = start(*flags, "--max_bad=50%")
  out, err = process.communicate()
  assert process.returncode == 0
  for line in ("read", "written", "skipped: empty file", "d.png"):
    assert line in out
  assert "--config.data.name=toy" in out


def entry(image_id, file="", captions=("a",)):
  return Entry(image_id, image_id, "", Place(file), list(captions), {})


def test_a_table_keeps_entries_in_hash_order_and_cuts_no_id(tmp_path):
  entries = [entry(str(i % 50), captions=[str(i)]) for i in range(100)]
  path = tmp_path / "table.sqlite"
  Table.write(path, entries, (("train", 1.0),))
  with Table(path) as table:
    shards = table.shards(rows=7, most=5)
    assert len(shards) == 5 and sum(s.rows for s in shards) == 100
    found = [row for shard in shards for row in table.entries(shard)]
    assert found == sorted(found, key=lambda row: row[0]) and len(found) == 100
    for shard in shards:
      ids = [e.image_id for _, e in table.entries(shard)]
      assert all(ids.count(i) == 2 for i in ids)


def test_merged():
  tally = Tally()
  same = [entry("x", "f", "a"), entry("x", "f", "ab"), entry("x", "f", "b")]
  other = entry("x", "g")
  found = list(merged([(1, e) for e in [*same, other]], tally))
  assert [e.captions for _, e in found] == [["a", "b"]]
  assert tally.merged == 1 and tally.skipped == {
    "duplicate id": (2, ["x", "x"])
  }


@pytest.mark.parametrize("kind", ["jsonl", "tar"])
def test_memory_does_not_grow_with_the_source(tmp_path, kind):
  (tmp_path / "x.png").write_bytes(png("red"))
  path = tmp_path / f"pairs.{kind}"
  peaks = []
  for rows in (1000, 3000):
    write = {"jsonl": write_list, "tar": write_tar}[kind]
    write(path, rows)
    tracemalloc.start()
    flags = ["--num_workers=1"]
    flags += ["--id_column=image_id"] if kind == "jsonl" else []
    toy.prepare(path, tmp_path / str(rows), *flags)
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  assert peaks[1] - peaks[0] < 2**20  # of 4 MB more captions


def write_list(path, rows):
  with path.open("w") as file:
    for i in range(rows):
      row = {"image": "x.png", "image_id": i, "caption": "x" * 2000}
      file.write(json.dumps(row) + "\n")


def write_tar(path, rows):
  with tarfile.open(path, "w") as tar:
    for i in range(rows):
      for suffix, data in ("png", png("red")), ("txt", b"x" * 2000):
        info = tarfile.TarInfo(f"{i:06d}.{suffix}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
