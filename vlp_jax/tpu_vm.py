"""Tells whether a Cloud TPU VM is one of several that make a slice.

Their environment does not say so, Google's metadata server does. It is asked
only where JAX has found TPU chips in the machine.
"""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Mapping

_PATH = "/computeMetadata/v1/instance/attributes/"
_SECONDS = 10
# A proxy of the network has nothing to do with it.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def is_one_of_several(environ: Mapping[str, str]) -> bool:
  """Returns whether JAX will find other hosts of this machine's slice or job.

  Args:
    environ: of the process, after JAX was imported: it notes there whether it
      has found TPUs (`TPU_ML_PLATFORM`), and what to do without the server
      (`TPU_SKIP_MDS_QUERY`). `GCE_METADATA_IP` is another server, as for JAX.
  """
  if "TPU_ML_PLATFORM" not in environ or "TPU_SKIP_MDS_QUERY" in environ:
    return False
  server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
  if "," in _read(server, "worker-network-endpoints"):
    return True
  # Lines such as MEGASCALE_NUM_SLICES: '2'
  slices = re.search(
    r"^MEGASCALE_NUM_SLICES\s*:\D*(\d+)", _read(server, "tpu-env"), re.MULTILINE
  )
  return slices is not None and int(slices[1]) > 1


def _read(server: str, name: str) -> str:
  """Reads an attribute of the machine; without one, nothing."""
  request = urllib.request.Request(
    f"http://{server}{_PATH}{name}", headers={"Metadata-Flavor": "Google"}
  )
  try:
    with _open(request, timeout=_SECONDS) as answer:
      return answer.read().decode()
  except (urllib.error.URLError, OSError):
    return ""
