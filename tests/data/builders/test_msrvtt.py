import pytest

from tests.data.builders import toy
from tests.data.test_clips import animation
from vlp_jax import config as config_lib
from vlp_jax.data import pipeline, sources
from vlp_jax.data.builders import videos
from vlp_jax.errors import UserError

CLIP = animation(count=3)  # whatever the name says
HEADER = "key,vid_key,video_id,sentence\n"
TEST = HEADER + (
  "ret0,msr9770,video9770,a person is connecting something to system\n"
  'ret1,msr9771,video9771,"a girl, and a horse"\n'
)


def write(tmp_path, test=TEST):
  manual = tmp_path / "manual"
  sentences = [
    ("video0", "a car is shown"),
    ("video9770", "not for the test set"),
    ("video0", "a vehicle"),
    ("video0", " "),
    ("video1", None),
    ("video2", "its clip is empty"),
    ("video3", "its clip is missing"),
    ("video4", "its clip is a page"),
    ("video6", "its clip breaks off"),
  ]
  data = {
    "info": {"year": "2016", "version": "1.0"},
    "videos": [
      {
        "category": 9,
        "url": "https://www.youtube.com/watch?v=9lZi22qLlEo",
        "video_id": "video0",
        "start time": 137.72,
        "end time": 149.44,
        "split": "train",
        "id": 0,
      }
    ],
    "sentences": [
      {"caption": caption, "video_id": video_id, "sen_id": i}
      for i, (video_id, caption) in enumerate(sentences)
    ],
  }
  toy.put(manual / "MSRVTT_data.json", data)
  listed = "video_id\n" + "".join(f"video{i}\n" for i in range(7))
  toy.put(manual / "MSRVTT_train.9k.csv", listed.encode())
  toy.put(manual / "MSRVTT_JSFUSION_test.csv", test.encode())
  clips = {0: CLIP, 1: CLIP, 2: b"", 4: b"\n<!DOCTYPE html><html>", 5: CLIP}
  clips |= {6: CLIP[: len(CLIP) // 2], 9770: CLIP + b"\0", 9771: CLIP + b"\0\0"}
  for number, clip in clips.items():
    toy.put(manual / f"videos/all/video{number}.mp4", clip)


def read(builder, split):
  return [
    {
      "video": example["video"],
      "captions": [c.decode() for c in example["captions"]],
      "video_id": example["video_id"].decode(),
    }
    for example in builder.as_data_source(split)
  ]


def test_clips_with_their_captions(tmp_path):
  write(tmp_path)
  builder = toy.make("msrvtt", tmp_path)
  assert toy.sizes(builder) == {"train": 1, "test": 2}
  captions = ["a car is shown", "a vehicle"]
  expected = {"video": CLIP, "captions": captions, "video_id": "video0"}
  assert read(builder, "train") == [expected]
  first, second = read(builder, "test")
  assert first["video"] == CLIP + b"\0"
  assert first["captions"] == ["a person is connecting something to system"]
  assert second["captions"] == ["a girl, and a horse"]
  assert toy.skipped(builder) == {
    "no usable caption": ["video1", "video5"],
    "empty file": ["video2"],
    "missing file": ["video3"],
    "not a video": ["video4"],
    "damaged video": ["video6"],
  }


def test_clips_are_read_as_frames(tmp_path, monkeypatch):
  write(tmp_path)
  toy.make("msrvtt", tmp_path)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
  config = config_lib.default_config()
  config.data.update(name="msrvtt", num_frames=3, image_size=16)
  source = sources.open_source(config.data, "test")
  assert source[0]["captions"] == ["a person is connecting something to system"]
  batch = next(pipeline.eval_images(source, config, 2))
  assert batch["image"].shape == (2, 3, 16, 16, 3)
  assert (
    batch["image"].mean(axis=(2, 3, 4)).round().tolist() == [[0, 6, 12]] * 2
  )
  config.data.num_frames = 0
  with pytest.raises(UserError, match="for its clips, set --config"):
    sources.open_source(config.data, "test")


def test_names_do_not_leave_the_folder(tmp_path):
  write(tmp_path, TEST + "ret2,m,../../secret,a secret\n")
  toy.put(tmp_path / "manual/secret.mp4", CLIP)
  builder = toy.make("msrvtt", tmp_path)
  assert toy.skipped(builder, "test") == {
    "path leaves the source folder": ["../../secret"]
  }


@pytest.mark.parametrize(
  ("test", "message"),
  [
    ("a,b\n1,2\n", "no column video_id, sentence; is it the right"),
    ("", "no column video_id, sentence"),
  ],
)
def test_a_list_of_another_kind(test, message, tmp_path):
  write(tmp_path, test)
  with pytest.raises(UserError, match=message):
    toy.make("msrvtt", tmp_path)


def test_a_list_that_is_no_text(tmp_path):
  toy.put(tmp_path / "list.csv", b"video_id\n\xff\xfe\n")
  with pytest.raises(UserError, match=r"list\.csv: not CSV in UTF-8"):
    list(videos.table(tmp_path / "list.csv", ["video_id"]))


def test_missing_files_are_named(tmp_path):
  message = toy.missing("msrvtt", tmp_path)
  folder = f"{tmp_path}/manual"
  for name in ("MSRVTT_data.json", "MSRVTT_train.9k.csv", "videos/all"):
    assert f"missing {folder}/{name}, from https" in message
