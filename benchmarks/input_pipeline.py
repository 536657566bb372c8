"""How fast do pictures come? The pipeline beside its ceiling and webdataset.

  python -m benchmarks.input_pipeline            about three minutes
  python -m benchmarks.input_pipeline --memory   peak memory, two minutes

A step is a batch of 64: JPEG pictures of 500 x 375 pixels are read, decoded,
cropped at random, resized to 224 x 224 and batched, their captions tokenized.
The contenders:

  threads      ours, data.num_workers=0: threads of the training process
  workers      ours, data.num_workers=<cores>: processes
  ceiling      decoding, cropping and resizing alone, with the same library and
               the same numbers, on as many processes; pictures lie in memory,
               and malloc keeps what is freed (else it is slower than ours)
  webdataset   tar shards through webdataset and torch's DataLoader with as many
               processes, transforms as torchvision's on Pillow, and open_clip's
               tokenizer: what open_clip does
  webdataset_huge  the same with huge pages that are kept, which ours have as
               under `vlp_jax.main` (`vlp_jax/step_memory.py`)

All share the same pictures. They take turns, round by round, and each uses up
what it has made ahead before its time is taken. A ratio is taken within each
round and given as median [least, greatest]. One line of JSON is
added to `--output`. webdataset needs the [parity] extra (docs/parity.md);
without it its row and ratio are left out.

`--memory` reads data sets of 1,000 and of 100,000 records in processes of their
own, prepares them, and gives the peaks.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile

import numpy as np
from PIL import Image

from benchmarks import open_clip_peer, rounds
from vlp_jax import step_memory

BATCH, SIZE, PICTURES = 64, 224, 1024
LEAD = 16  # steps; every contender makes fewer ahead
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
RATIOS = {
  "threads / ceiling": ("ceiling", "threads", ">= 0.85 of its pictures/s"),
  "workers / ceiling": ("ceiling", "workers", ">= 0.85 of its pictures/s"),
  "threads / webdataset": ("webdataset", "threads", ">= 1.5 times"),
  "workers / webdataset": ("webdataset", "workers", ">= 1.5 times"),
  "threads / webdataset, huge pages": ("webdataset_huge", "threads", ""),
  "workers / webdataset, huge pages": ("webdataset_huge", "workers", ""),
}
# glibc's malloc gives nothing back to the system.
_KEEP = "glibc.malloc.hugetlb=1" + "".join(
  f":glibc.malloc.{name}={2**26}"
  for name in ("mmap_threshold", "trim_threshold", "top_pad")
)
PACKAGES = ("grain", "array-record", "pillow", "torch", "webdataset")


def main() -> None:
  options = parse()
  if options.worker:
    facts, run = MAKERS[options.worker](options.data)
    run(3)
    rounds.serve(facts, run, LEAD)
    return
  if options.peak:
    print(json.dumps(peak(options.peak, options.data)))
    return
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    found = memory(folder) if options.memory else speed(folder, options)
  rounds.show_machine(found["machine"])
  show(found)
  rounds.keep(found, options.output)


def parse() -> argparse.Namespace:
  parser = rounds.parser("input_pipeline", __doc__)
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--steps", type=int, default=20, help="a round")
  parser.add_argument("--memory", action="store_true")
  parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
  parser.add_argument("--peak", default="", help=argparse.SUPPRESS)
  parser.add_argument("--data", type=pathlib.Path, help=argparse.SUPPRESS)
  return parser.parse_args()


# --- The pictures -----------------------------------------------------------


def photo(seed: int, width: int = 500, height: int = 375) -> bytes:
  """A JPEG with the spectrum of a photograph: noise of many sizes."""
  draw = np.random.default_rng(seed)
  pixels = np.zeros((height, width, 3), np.float32)
  for power in range(1, 8):
    side = (width >> power) + 1, (height >> power) + 1
    noise = draw.normal(size=(side[1], side[0], 3)).astype(np.float32)
    for channel in range(3):
      layer = Image.fromarray(noise[..., channel]).resize(
        (width, height), Image.Resampling.BICUBIC
      )
      pixels[..., channel] += np.asarray(layer) * 2.0**power
  pixels = 128 + pixels * (50 / pixels.std())
  file = io.BytesIO()
  image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
  image.save(file, "JPEG", quality=90)
  return file.getvalue()


def caption(seed: int) -> str:
  draw = np.random.default_rng(seed)
  words = (
    "a the red old small dog cat tree house on under beside with green sea"
  )
  return " ".join(draw.choice(words.split(), size=10))


def add_pair(tar: tarfile.TarFile, number: int, picture: bytes) -> None:
  """Adds a picture and a caption, as img2dataset does."""
  for suffix, data in ("jpg", picture), ("txt", caption(number).encode()):
    info = tarfile.TarInfo(f"{number:06d}.{suffix}")
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_shards(folder: pathlib.Path, count: int = PICTURES) -> None:
  """Writes the pictures as four tar shards."""
  folder.mkdir()
  for shard in range(4):
    with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
      for i in range(shard, count, 4):
        add_pair(tar, i, photo(i))


# --- The contenders: facts, and a function that makes so many batches --------


def config(data: pathlib.Path, workers: int):
  from vlp_jax import config as config_lib

  found = config_lib.default_config()
  found.batch_size = BATCH
  found.data.name = str(data / "tfds" / "photos" / "1.0.0")
  found.data.image_size = SIZE
  found.data.augment = "crop"
  found.data.num_workers = workers
  return found


def make_ours(data: pathlib.Path, workers: int):
  from vlp_jax.data import mixture, pipeline, tokenizer

  settings = config(data, workers)
  source = mixture.open_training(settings.data)
  words = tokenizer.get_tokenizer(settings, source)
  batches = pipeline.train_batches(source, words, settings)

  def run(steps: int) -> None:
    for _ in range(steps):
      batch = next(batches)
      assert batch["image"].shape == (BATCH, SIZE, SIZE, 3)

  return {}, run


def make_ceiling(data: pathlib.Path):
  pictures = []
  for path in sorted((data / "shards").glob("*.tar")):
    with tarfile.open(path) as tar:
      pictures += [
        tar.extractfile(m).read() for m in tar if m.name.endswith("jpg")
      ]
  processes = rounds.cores()
  pool = multiprocessing.get_context("spawn").Pool(
    processes, _keep, (pictures, data)
  )

  def run(steps: int) -> None:
    pool.map(_decode_and_resize, [steps * BATCH // processes] * processes)

  return {}, run


def _keep(pictures: list[bytes], data: pathlib.Path) -> None:
  from vlp_jax.data import recipe

  global _pictures, _recipe
  _pictures = pictures
  _recipe = recipe.make_recipe(None, None, config(data, 0))


def _decode_and_resize(count: int) -> None:
  rng = np.random.default_rng()
  for index in rng.integers(len(_pictures), size=count):
    _recipe.crop(_recipe.decode(_pictures[index]), rng)


def make_webdataset(data: pathlib.Path):
  import torch
  import webdataset

  tokenize = open_clip_peer.load().get_tokenizer("ViT-B-32")
  rng = np.random.default_rng()
  mean = torch.tensor(MEAN).view(3, 1, 1)
  std = torch.tensor(STD).view(3, 1, 1)

  def preprocess(image: Image.Image) -> torch.Tensor:
    width, height = image.size
    area = width * height * rng.uniform(0.9, 1.0)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w = min(width, round(math.sqrt(area * aspect)))
    h = min(height, round(math.sqrt(area / aspect)))
    left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
    image = image.crop((left, top, left + w, top + h))
    image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return (pixels.float().div(255) - mean) / std

  shards = [str(p) for p in sorted((data / "shards").glob("*.tar"))]
  dataset = webdataset.DataPipeline(
    webdataset.ResampledShards(shards),
    webdataset.tarfile_to_samples(),
    webdataset.shuffle(1000),
    webdataset.decode("pilrgb"),
    webdataset.rename(image="jpg", text="txt"),
    webdataset.map_dict(image=preprocess, text=lambda text: tokenize(text)[0]),
    webdataset.to_tuple("image", "text"),
    webdataset.batched(BATCH, partial=False),
  )
  loader = iter(
    webdataset.WebLoader(
      dataset, batch_size=None, shuffle=False, num_workers=rounds.cores()
    )
  )

  def run(steps: int) -> None:
    for _ in range(steps):
      image, _ = next(loader)
      assert image.shape == (BATCH, 3, SIZE, SIZE)

  return {}, run


MAKERS = {
  "threads": lambda data: make_ours(data, 0),
  "workers": lambda data: make_ours(data, rounds.cores()),
  "ceiling": make_ceiling,
  "webdataset": make_webdataset,
  "webdataset_huge": make_webdataset,
}


# --- Runs --------------------------------------------------------------------


def prepare(source: pathlib.Path, data: pathlib.Path, *flags: str) -> None:
  command = [sys.executable, "-m", "vlp_jax.data.prepare", "--name=photos"]
  flags = (f"--source={source}", f"--data_dir={data}", *flags)
  subprocess.run([*command, *flags], check=True, stdout=subprocess.DEVNULL)


def speed(folder: pathlib.Path, options: argparse.Namespace) -> dict:
  write_shards(folder / "shards")
  prepare(folder / "shards", folder / "tfds", "--splits=train:1")
  names = list(MAKERS)
  if not open_clip_peer.available("webdataset"):
    names = [name for name in names if "webdataset" not in name]

  def start(name: str) -> rounds.Worker:
    sys.argv.append(f"--data={folder}")
    environ = dict(os.environ)
    if name == "ceiling":
      environ["GLIBC_TUNABLES"] = _KEEP
    elif name != "webdataset":
      environ = step_memory.environment(environ) or environ
    try:
      return rounds.Worker(__spec__.name, name, environ)
    finally:
      sys.argv.pop()

  _, seconds = rounds.compare(names, start, options.rounds, options.steps)
  rows = {
    name: dict(pictures_per_s=BATCH / statistics.median(times))
    for name, times in seconds.items()
  }
  return rounds.record(
    "input_pipeline",
    PACKAGES,
    dict(rows=rows, ratios=rounds.ratios(RATIOS, seconds)),
  )


def memory(folder: pathlib.Path) -> dict:
  """Returns peaks in MiB of preparing and of reading, by number of records."""
  rows = {}
  for count in (1_000, 100_000):
    place = folder / str(count)
    (place / "shards").mkdir(parents=True)
    data = photo(0, 64, 48)
    with tarfile.open(place / "shards" / "0.tar", "w") as tar:
      for i in range(count):
        add_pair(tar, i, data)
    for what in ("prepare", "read"):
      flags = [f"--peak={what}", f"--data={place}"]
      done = subprocess.run(
        [sys.executable, "-m", __spec__.name, *flags],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
      )
      rows[f"{what} {count:,}"] = json.loads(done.stdout.splitlines()[-1])
  return rounds.record("input_pipeline", PACKAGES, dict(peak_mib=rows))


def peak(what: str, data: pathlib.Path) -> float:
  """Prepares or reads in this process; returns its peak memory in MiB."""
  if what == "prepare":
    from vlp_jax.data.prepare.__main__ import main

    flags = [f"--source={data / 'shards'}", f"--data_dir={data / 'tfds'}"]
    main([*flags, "--name=photos", "--splits=train:1", "--num_workers=1"])
  else:
    _, run = make_ours(data, 0)
    run(200)
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def show(found: dict) -> None:
  for name, row in found.get("rows", {}).items():
    print(f"{name:16}{row['pictures_per_s']:>8.0f} pictures/s")
  for name, value in found.get("peak_mib", {}).items():
    print(f"{name:20}{value:>8.0f} MiB")
  if "ratios" in found:
    print("\nratio of pictures/s, by round")
    rounds.show_ratios(found["ratios"])


if __name__ == "__main__":
  main()
