"""Apache Beam writes the same records."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.data.prepare import test_run, toy
from vlp_jax.errors import UserError

pytest.importorskip("apache_beam")

WORKERS = (
  "--beam_options=runner=DirectRunner,direct_num_workers=2,"
  "direct_running_mode=multi_processing"
)


def in_order(folder, split):
  source = tfds.builder_from_directory(folder).as_data_source(split)
  return [source[i] for i in range(len(source))]


def test_several_beam_workers_write_what_one_machine_does(tmp_path):
  root = test_run.pictures(tmp_path / "source", 40)
  (root / "0003.png").write_bytes(b"")
  (root / "0007.txt").write_text("")
  flags = (test_run.SMALL, "--max_bad=0.1")
  splits = "train:0.7,test:0.3"
  here = toy.prepare(root, tmp_path / "here", *flags, split=splits)
  beam = toy.prepare(root, tmp_path / "beam", *flags, WORKERS, split=splits)
  for split in ("train", "test"):
    ours, theirs = in_order(here, split), in_order(beam, split)
    assert len(ours) == len(theirs) > 5
    for one, other in zip(ours, theirs, strict=True):
      assert one.keys() == other.keys()
      for key in one:
        np.testing.assert_array_equal(one[key], other[key])
  reports = [toy.report(folder) for folder in (here, beam)]
  for report in reports:
    del report["options"]
  assert reports[0] == reports[1] and reports[0]["written"] == 38
  assert [p.name for p in (tmp_path / "beam").iterdir()] == ["toy"]


def test_too_many_bad_ones(tmp_path):
  root = toy.folder_of_texts(tmp_path / "source")
  (root / "b.png").write_bytes(b"")
  with pytest.raises(UserError, match="empty file: 1"):
    toy.prepare(root, tmp_path / "data", "--beam_options=runner=DirectRunner")
  assert not list((tmp_path / "data" / "toy").glob("*"))
  (root / "b.png").unlink()  # the same command looks at the folder again
  folder = toy.prepare(
    root, tmp_path / "data", "--beam_options=runner=DirectRunner"
  )
  assert set(toy.records(folder)) == {"a.png", "c.png"}


def test_unfit_options(tmp_path):
  with pytest.raises(UserError, match="name=value"):
    toy.prepare(tmp_path, tmp_path / "data", "--beam_options=DirectRunner")
