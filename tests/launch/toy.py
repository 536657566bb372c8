"""A command that ends as vlp_jax's do: 0, 2, or 75 once SIGTERM has come.

toy.py FOLDER [wait | hold | mistake | crash | lost] [late]

With `wait` and `crash`, the first start goes no further than step 2 before
SIGTERM; process 1 of a `crash` ends with 7. With `hold`, none goes further
before there is a file FOLDER/go. With `lost`, the first start ends
as one does that misses another process: with 69. With `late`, a process that
saves takes half a second longer to end. All print at each step.
"""

import os
import pathlib
import signal
import sys
import time

folder, *how = sys.argv[1:]
who = next(
  os.environ[name]
  for name in ("JAX_PROCESS_ID", "SLURM_PROCID", "WORKER", "HOME")
  if name in os.environ
).replace("/", "_")
folder = pathlib.Path(folder)
folder.mkdir(parents=True, exist_ok=True)
saved = folder / f"step-{who}"
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
step = int(saved.read_text()) if saved.exists() else 0
flags = os.environ.get("LIBTPU_INIT_ARGS", "")[:6]
# Unbuffered, print writes a line's end apart, and others' lines come between.
print(f"{who} starts at {step}, {flags}\n", end="")
if "mistake" in how:
  sys.exit(2)
if "crash" in how and who == "1":
  sys.exit(7)
if "lost" in how and step == 0:
  saved.write_text("1")
  sys.exit(69)
first = step == 0
until = time.monotonic() + 100
while step < 4 and time.monotonic() < until:
  held = first and {"wait", "crash"} & set(how)
  held = held or ("hold" in how and not (folder / "go").exists())
  if not (step == 2 and held):
    step += 1
  aside = folder / f"aside-{who}"
  aside.write_text(str(step))
  aside.replace(saved)
  (folder / f"at-{step}-{who}").touch()
  print(f"{who} is at {step}\n", end="", flush=True)
  if stop:
    time.sleep(0.5 * ("late" in how))
    (folder / f"ended-{who}").write_text("75")
    sys.exit(75)
  time.sleep(0.01)
assert step == 4, "nothing came in 100 s"
(folder / f"done-{who}").write_text(str(step))
