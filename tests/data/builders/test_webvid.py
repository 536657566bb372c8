from tests.data.builders import toy
from tests.data.builders.test_msrvtt import CLIP, read

HEADER = "videoid,contentUrl,duration,page_dir,name\n"
URL = "https://ak.picdn.net/shutterstock/videos/21179416/preview/stock.mp4"


def _write(tmp_path):
  manual = tmp_path / "manual"
  train = HEADER + (
    f'21179416,{URL},PT00H00M11S,006001_006050,"Aerial shot, winter forest"\n'
    f"5629184,{URL},PT00H00M29S,071501_071550,Senior couple\n"
    f"33,{URL},PT00H00M29S,071501_071550,\n"
  )
  val = HEADER + f'1,{URL},PT00H00M20S,000001_000050,"A ""red"" kite"\n'
  toy.put(manual / "results_2M_train.csv", train.encode())
  toy.put(manual / "results_2M_val.csv", val.encode())
  toy.put(manual / "videos/006001_006050/21179416.mp4", CLIP)
  toy.put(manual / "videos/071501_071550/33.mp4", CLIP)
  toy.put(manual / "videos/000001_000050/1.mp4", CLIP + b"\0")


def test_clips_with_their_captions(tmp_path):
  _write(tmp_path)
  builder = toy.make("webvid", tmp_path)
  assert toy.sizes(builder) == {"train": 1, "validation": 1}
  captions = ["Aerial shot, winter forest"]
  expected = {"video": CLIP, "captions": captions, "video_id": "21179416"}
  assert read(builder, "train") == [expected]
  assert toy.skipped(builder) == {
    "missing file": ["5629184"],
    "no usable caption": ["33"],
  }
  assert read(builder, "validation")[0]["captions"] == ['A "red" kite']


def test_missing_files_are_named(tmp_path):
  message = toy.missing("webvid", tmp_path)
  for name in ("results_2M_train.csv", "results_2M_val.csv", "videos"):
    assert f"missing {tmp_path}/manual/{name}, from https" in message
