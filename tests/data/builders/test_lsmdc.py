import pytest

from tests.data.builders import toy
from tests.data.builders.test_msrvtt import CLIP, read
from vlp_jax.errors import UserError

TIMES = "00.00.51.926\t00.00.54.129\t00.00.51.926\t00.00.54.129"
FIRST = "0001_American_Beauty_00.00.51.926-00.00.54.129"
SECOND = "3009_BATTLE_LOS_ANGELES_00.03.07.170-00.03.09.675"
LISTS = {
  "LSMDC16_annos_training.csv": [
    f'{FIRST}\t{TIMES}\t"SOMEONE," he says, smiles.',
    f"{SECOND}\t{TIMES}\tA helicopter.",
    f"{FIRST}\t{TIMES}\tHe laughs.",
    f"1_Film_00.00.01.000-00.00.02.000\t{TIMES}\tNo clip.",
    "a broken line",
  ],
  "LSMDC16_annos_val.csv": [f"{FIRST}\t{TIMES}\tVal."],
  "LSMDC16_challenge_1000_publictect.csv": [f"{SECOND}\t{TIMES}\tTest."],
}


def _write(tmp_path, lists=LISTS):
  for name, lines in lists.items():
    content = "".join(f"{line}\r\n" for line in lines).encode()
    toy.put(tmp_path / "manual" / name, content)
  clips = tmp_path / "manual" / "videos"
  toy.put(clips / "0001_American_Beauty" / f"{FIRST}.avi", CLIP)
  toy.put(clips / "3009_BATTLE_LOS_ANGELES" / f"{SECOND}.avi", CLIP + b"\0")


def test_clips_with_their_captions(tmp_path):
  _write(tmp_path)
  builder = toy.make("lsmdc", tmp_path)
  assert toy.sizes(builder) == {"train": 2, "validation": 1, "test": 1}
  first, second = read(builder, "train")
  assert first == {
    "video": CLIP,
    "captions": ['"SOMEONE," he says, smiles.', "He laughs."],
    "video_id": FIRST,
  }
  assert second["video"] == CLIP + b"\0"
  assert toy.skipped(builder) == {
    "not 6 columns": ["LSMDC16_annos_training.csv:5"],
    "missing file": ["1_Film_00.00.01.000-00.00.02.000"],
  }
  assert read(builder, "test")[0]["captions"] == ["Test."]


def test_a_list_of_another_kind(tmp_path):
  _write(tmp_path, {**LISTS, "LSMDC16_annos_val.csv": ["a,b"]})
  with pytest.raises(UserError, match=r"val\.csv: no line has 6 columns"):
    toy.make("lsmdc", tmp_path)


def test_missing_files_are_named(tmp_path):
  message = toy.missing("lsmdc", tmp_path)
  for name in (*LISTS, "videos"):
    assert f"missing {tmp_path}/manual/{name}, from https" in message
