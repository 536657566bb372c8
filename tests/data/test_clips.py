"""Frames of clips: which ones, and out of which files."""

import io
import sys
import wave

import numpy as np
import pytest
from PIL import Image

from vlp_jax.data import clips
from vlp_jax.errors import UserError

NUM = 40  # frames of the files here; frame i is of the grey 6 i


def gray_frames(count=NUM, size=(48, 32)):
  return [Image.new("RGB", size, (6 * i,) * 3) for i in range(count)]


def animation(kind="GIF", **kwargs):
  """Encodes a clip that Pillow reads."""
  first, *rest = gray_frames(**kwargs)
  file = io.BytesIO()
  options = {"lossless": True} if kind == "WEBP" else {}
  first.save(file, kind, save_all=True, append_images=rest, **options)
  return file.getvalue()


def video(path, codec, count=NUM, **options):
  """Encodes a clip that PyAV reads; skips the test where there is none."""
  av = pytest.importorskip("av")
  with av.open(str(path), "w", options=options) as container:
    stream = container.add_stream(codec, rate=10)
    stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
    stream.gop_size, stream.bit_rate = 12, 4_000_000
    for image in gray_frames(count):
      container.mux(stream.encode(av.VideoFrame.from_image(image)))
    container.mux(stream.encode())
  return path.read_bytes()


def grays(data, places):
  frames = list(clips.open_clip(data).frames(places))
  assert all(f.mode == "RGB" and f.size == (48, 32) for f in frames)
  return [round(np.asarray(frame).mean() / 6) for frame in frames]


# ------------------------------------------------------------- which frames


@pytest.mark.parametrize(
  ("count", "num_frames", "expected"),
  [
    (9, 1, [4]),
    (8, 4, [1, 3, 5, 7]),
    (10, 4, [1, 3, 6, 8]),
    (4, 4, [0, 1, 2, 3]),
    (3, 6, [0, 0, 1, 1, 2, 2]),
    (1, 3, [0, 0, 0]),
  ],
)
def test_the_middle_of_each_segment(count, num_frames, expected):
  assert clips.places(count, num_frames) == expected


@pytest.mark.parametrize(("count", "num_frames"), [(10, 4), (7, 7), (3, 5)])
def test_any_frame_of_each_segment(count, num_frames):
  rng = np.random.default_rng(0)
  drawn = np.array([clips.places(count, num_frames, rng) for _ in range(300)])
  assert (np.diff(drawn) >= 0).all()
  seen = [sorted({*column}) for column in drawn.T.tolist()]
  if count >= num_frames:  # the segments share out the clip
    assert [place for segment in seen for place in segment] == [*range(count)]
  else:
    assert {place for segment in seen for place in segment} == {*range(count)}


# ---------------------------------------------------------------- which files


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animations(kind):
  data = animation(kind)
  assert len(clips.open_clip(data)) == NUM
  assert grays(data, [0, 7, 39]) == [0, 7, 39]


def test_frames_that_are_pictures():
  data = []
  for image in gray_frames():
    file = io.BytesIO()
    image.save(file, "PNG")
    data.append(file.getvalue())
  assert len(clips.open_clip(data)) == NUM
  assert grays(data, [3, 11]) == [3, 11]
  assert len(clips.open_clip(data[5])) == 1  # a picture is one frame
  repeated = clips.DecodeClip(3)(data[5])
  assert [np.asarray(f).mean() for f in repeated] == [30] * 3
  other = io.BytesIO()
  Image.new("RGB", (20, 20)).save(other, "PNG")
  with pytest.raises(clips.UnreadableClip, match="frames differ in size"):
    clips.DecodeClip(2)([data[0], other.getvalue()])


_FILES = {
  "h264.mp4": ("libx264", {}),
  "faststart.mp4": ("libx264", {"movflags": "faststart"}),
  "fragments.mp4": ("libx264", {"movflags": "frag_keyframe+empty_moov"}),
  "vp8.webm": ("libvpx", {}),
  "vp9.webm": ("libvpx-vp9", {}),
  "mpeg4.avi": ("mpeg4", {}),
}


@pytest.mark.parametrize("name", _FILES)
@pytest.mark.parametrize(
  "places", [[0, 13, 26, 39], [5], [38, 39], [*range(40)]]
)
def test_videos(tmp_path, name, places):
  codec, options = _FILES[name]
  data = video(tmp_path / name, codec, **options)
  assert len(clips.open_clip(data)) == NUM
  assert grays(data, places) == places


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize(
  "name", ["h264.mp4", "faststart.mp4", "vp8.webm", "vp9.webm", "mpeg4.avi"]
)
def test_a_truncated_file_is_refused(tmp_path, name, share):
  codec, options = _FILES[name]
  data = video(tmp_path / name, codec, **options)
  with pytest.raises(clips.UnreadableClip):
    clips.check(data[: int(share * len(data))])
  clips.check(data)


def test_a_truncated_animation_is_refused():
  data = animation()
  with pytest.raises(clips.UnreadableImage):
    clips.check(data[: len(data) // 2])
  clips.check(data)


def test_what_has_no_video_is_refused():
  pytest.importorskip("av")
  file = io.BytesIO()
  with wave.open(file, "wb") as sound:
    sound.setnchannels(1)
    sound.setsampwidth(2)
    sound.setframerate(8000)
    sound.writeframes(bytes(16000))
  for data, reason in (
    (file.getvalue(), "no video stream"),
    (b"no clip at all", "not a video"),
  ):
    with pytest.raises(clips.UnreadableClip) as error:
      clips.check(data)
    assert error.value.reason == reason
  for data in (b"", []):
    with pytest.raises(clips.UnreadableClip, match=r"^(empty file|no frames)$"):
      clips.check(data)


def test_without_pyav_it_is_said_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "av", None)
  with pytest.raises(UserError, match=r"pip install 'vlp_jax\[video\]'") as e:
    clips.open_clip(b"\0\0\0\x20ftypisom")
  assert not isinstance(e.value, clips.UnreadableClip)
  clips.check(animation())
