import io
import math
import pickle

import numpy as np
import pytest
from PIL import Image

from vlp_jax import config as config_lib
from vlp_jax.data import tokenizer as tokenizer_lib
from vlp_jax.data import transforms
from vlp_jax.errors import UserError


def noise(width, height, mode="RGB", seed=0):
  """A smooth random picture."""
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
  image = Image.fromarray(small).resize((width, height), Image.BICUBIC)
  return image.convert(mode)


def encode(image, kind="PNG", **kwargs):
  file = io.BytesIO()
  image.save(file, kind, **kwargs)
  return file.getvalue()


def decode(data, **kwargs):
  image = transforms.Decode(**kwargs)(data)
  assert image.mode == "RGB"
  return np.asarray(image).astype(int)


# --- Decode -----------------------------------------------------------------


def test_decode_rgb_is_exact():
  image = noise(20, 13)
  np.testing.assert_array_equal(decode(encode(image)), np.asarray(image))


def test_decode_gray():
  image = noise(8, 8, "L")
  expected = np.repeat(np.asarray(image)[..., None], 3, axis=2)
  np.testing.assert_array_equal(decode(encode(image)), expected)


def test_decode_sixteen_bits():
  values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
  pixels = decode(encode(Image.fromarray(values)))
  np.testing.assert_array_equal(pixels[0, :, 0], [0, 0, 1, 128, 255])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_decode_alpha_onto_white(mode):
  image = Image.new(mode, (4, 4), (10,) * (len(mode) - 1) + (0,))
  np.testing.assert_array_equal(decode(encode(image)), np.full((4, 4, 3), 255))
  half = Image.new(mode, (4, 4), (0,) * (len(mode) - 1) + (128,))
  assert abs(decode(encode(half)) - 127).max() <= 1


def test_decode_palette():
  image = Image.new("P", (2, 1))
  image.putpalette([10, 20, 30, 40, 50, 60])
  image.putpixel((1, 0), 1)
  pixels = decode(encode(image))
  np.testing.assert_array_equal(pixels, [[[10, 20, 30], [40, 50, 60]]])
  for kind in ("PNG", "GIF"):
    pixels = decode(encode(image, kind, transparency=0))
    np.testing.assert_array_equal(pixels, [[[255] * 3, [40, 50, 60]]])


def test_decode_transparent_colour():
  image = Image.new("RGB", (2, 1), (10, 20, 30))
  image.putpixel((1, 0), (1, 2, 3))
  pixels = decode(encode(image, transparency=(10, 20, 30)))
  np.testing.assert_array_equal(pixels, [[[255] * 3, [1, 2, 3]]])


def test_decode_cmyk():
  image = Image.new("RGB", (16, 16), (200, 30, 60))
  pixels = decode(encode(image.convert("CMYK"), "JPEG", quality=95))
  assert abs(pixels - [200, 30, 60]).max() <= 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_decode_obeys_exif_orientation(kind):
  image = Image.new("RGB", (32, 16), "blue")
  image.paste("red", (0, 0, 16, 16))  # red on the left
  exif = Image.Exif()
  exif[0x0112] = 6  # to be shown turned right by 90 degrees
  pixels = decode(encode(image, kind, exif=exif))
  assert pixels.shape == (32, 16, 3)
  assert abs(pixels[4, 8] - [255, 0, 0]).max() < 10  # red on top
  assert abs(pixels[28, 8] - [0, 0, 255]).max() < 10


def test_decode_large_jpeg_at_a_fraction():
  image = noise(640, 480)
  data = encode(image, "JPEG", quality=95)
  small = transforms.Decode(min_side=100)(data)
  assert small.size == (160, 120)  # a quarter; an eighth has a side below 100
  assert transforms.Decode(min_side=500)(data).size == (640, 480)
  crop = transforms.ResizeCenterCrop(48)
  exact = crop(transforms.Decode()(data)).astype(int)
  assert np.abs(crop(small) - exact).mean() < 1


def test_undecodable():
  whole = encode(noise(64, 64))
  postscript = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
  )
  bad = [b"", b"no picture", whole[:20], whole[: len(whole) // 2], postscript]
  for data in bad:
    with pytest.raises(transforms.UnreadableImage, match="cannot be decoded"):
      transforms.Decode()(data)


# --- Geometry ---------------------------------------------------------------


@pytest.mark.parametrize(
  "size, resized, box",
  [
    ((120, 80), (48, 32), (8, 0, 40, 32)),
    ((50, 101), (32, 64), (0, 16, 32, 48)),
    ((20, 10), (64, 32), (16, 0, 48, 32)),  # enlarged
    ((40, 32), (40, 32), (4, 0, 36, 32)),  # cropped only
  ],
)
def test_resize_center_crop_against_pillow(size, resized, box):
  image = noise(*size)
  expected = np.asarray(image.resize(resized, Image.BICUBIC).crop(box))
  pixels = transforms.ResizeCenterCrop(32)(image)
  assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
  assert np.abs(pixels.astype(int) - expected).max() <= 1


def test_resize_center_crop_keeps_a_square_of_the_size():
  image = noise(32, 32)
  np.testing.assert_array_equal(
    transforms.ResizeCenterCrop(32)(image), np.asarray(image)
  )


def test_resize_is_antialiased():
  checkers = np.indices((256, 256)).sum(0) % 2 * 255
  image = Image.fromarray(checkers.astype(np.uint8)).convert("RGB")
  pixels = transforms.ResizeCenterCrop(32)(image)[4:-4, 4:-4].astype(int)
  assert np.abs(pixels - 127).max() <= 2


def test_random_resized_crop_against_pillow():
  crop = transforms.RandomResizedCrop(24, scale=(0.3, 0.6))
  image = noise(70, 50)
  for seed in range(20):
    box = crop.box(70, 50, np.random.default_rng(seed))
    expected = np.asarray(image.crop(box).resize((24, 24), Image.BICUBIC))
    pixels = crop(image, np.random.default_rng(seed))
    assert pixels.shape == (24, 24, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= 1


def test_random_resized_crop_boxes():
  crop = transforms.RandomResizedCrop(8, scale=(0.2, 0.8))
  rng = np.random.default_rng(0)
  boxes = np.array([crop.box(300, 200, rng) for _ in range(2000)])
  left, top, right, bottom = boxes.T
  assert left.min() >= 0 and top.min() >= 0
  assert right.max() <= 300 and bottom.max() <= 200
  share = (right - left) * (bottom - top) / 60_000
  ratio = (right - left) / (bottom - top)
  assert 0.19 < share.min() < 0.22 and 0.75 < share.max() < 0.81
  assert 0.74 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.35
  assert len(np.unique(left)) > 100  # places are drawn, too


def test_random_resized_crop_falls_back_to_the_middle():
  crop = transforms.RandomResizedCrop(8, scale=(1.0, 1.0), ratio=(1.0, 1.0))
  rng = np.random.default_rng(0)
  assert crop.box(100, 20, rng) == (40, 0, 60, 20)
  assert crop.box(20, 100, rng) == (0, 40, 20, 60)
  assert crop.box(1, 1, rng) == (0, 0, 1, 1)


class Scripted:
  """A generator that gives out what it is told to."""

  def __init__(self, shares, aspects, corners):
    self._floats = iter(np.stack([shares, aspects], 1).ravel())
    self._corners = iter(corners)

  def uniform(self, low, high):
    return low + (high - low) * next(self._floats)

  def integers(self, end):
    return int(next(self._corners) * end)


def torchvision_box(width, height, scale, ratio, shares, aspects, corners):
  """(left, top, width, height), by torchvision's RandomResizedCrop.

  The numbers that it draws are given, in [0, 1).
  """
  for share, aspect in zip(shares, aspects, strict=True):
    target = width * height * (scale[0] + (scale[1] - scale[0]) * share)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    drawn = math.exp(low + (high - low) * aspect)
    w, h = round(math.sqrt(target * drawn)), round(math.sqrt(target / drawn))
    if 0 < w <= width and 0 < h <= height:
      left = int(corners[0] * (width - w + 1))
      return left, int(corners[1] * (height - h + 1)), w, h
  w, h = width, height
  if width / height < min(ratio):
    h = round(w / min(ratio))
  elif width / height > max(ratio):
    w = round(h * max(ratio))
  return (width - w) // 2, (height - h) // 2, w, h


@pytest.mark.parametrize("size", [(70, 50), (50, 71), (31, 31), (200, 20)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.9, 1.0), (1.0, 1.0)])
def test_random_resized_crop_is_torchvisions(size, scale):
  ratio, rng, image = (3 / 4, 4 / 3), np.random.default_rng(0), noise(*size)
  crop = transforms.RandomResizedCrop(24, scale)
  whole = 0
  for _ in range(100):
    shares, aspects, corners = rng.random(10), rng.random(10), rng.random(2)
    left, top, w, h = torchvision_box(
      *size, scale, ratio, shares, aspects, corners
    )
    box = crop.box(*size, Scripted(shares, aspects, corners))
    assert box == (left, top, left + w, top + h)
    part = image.crop(box).resize((24, 24), Image.BICUBIC)
    pixels = crop(image, Scripted(shares, aspects, corners)).astype(int)
    assert np.abs(pixels - np.asarray(part)).max() <= 1
    whole += (w, h) == size
  assert whole < 100 or size == (31, 31)


@pytest.mark.parametrize("size", [(120, 80), (50, 101), (20, 10), (32, 32)])
def test_stretch_against_pillow(size):
  image = noise(*size)
  expected = np.asarray(image.resize((32, 32), Image.BICUBIC)).astype(int)
  pixels = transforms.Stretch(32)(image)
  assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
  assert np.abs(pixels - expected).max() <= 1


def test_eval_geometry():
  data = config_lib.default_config().data
  data.image_size = 32
  assert transforms.eval_geometry(data) == transforms.ResizeCenterCrop(32)
  data.eval_resize = "stretch"
  assert transforms.eval_geometry(data) == transforms.Stretch(32)
  data.eval_resize = "fit"
  expected = "data.eval_resize='fit' is unknown; it is crop or stretch"
  with pytest.raises(UserError, match=expected):
    transforms.eval_geometry(data)


def test_random_flip():
  pixels, rng = np.asarray(noise(9, 5)), np.random.default_rng(0)
  flip = transforms.RandomFlip(0.25)
  results = [flip(pixels, rng) for _ in range(2000)]
  mirrored = [np.array_equal(r, pixels[:, ::-1]) for r in results]
  same = [np.array_equal(r, pixels) for r in results]
  assert all(a != b for a, b in zip(mirrored, same, strict=True))
  assert 440 < sum(mirrored) < 560


# --- Captions ---------------------------------------------------------------


def test_pick_caption_draws_each():
  rng = np.random.default_rng(0)
  pick = transforms.PickCaption()
  drawn = [pick(["a", "b", "c"], rng) for _ in range(3000)]
  for caption in "abc":
    assert 900 < drawn.count(caption) < 1100


def test_transforms_are_picklable_and_readable():
  model = tokenizer_lib.train(["a red cat", "a dog"], 64)
  tokenizer = tokenizer_lib.Tokenizer(model)
  tokenize = transforms.Tokenize(7, tokenizer)
  copy = pickle.loads(pickle.dumps(tokenize))
  ids, lengths = copy(["a red cat", "a dog"])
  np.testing.assert_array_equal(ids[0], tokenizer.encode("a red cat", 7)[0])
  assert ids.shape == (2, 7) and lengths.shape == (2,)
  assert repr(tokenize) == "Tokenize(max_len=7)"
  for transform in (
    transforms.Decode(4),
    transforms.ResizeCenterCrop(4),
    transforms.Stretch(4),
    transforms.RandomResizedCrop(4),
    transforms.RandomFlip(0.5),
    transforms.PickCaption(),
  ):
    assert pickle.loads(pickle.dumps(transform)) == transform
