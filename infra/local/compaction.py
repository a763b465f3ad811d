"""Give disk space back after objects were deleted from the local stack's S3 server.

SeaweedFS appends to volume files and compacts one by itself only when a third of it is garbage.
"""

from __future__ import annotations

import os
import time
import urllib.request
from pathlib import Path

from infra.local.site import HOST, Site

GARBAGE = 0.01  # share of a volume from which compacting it is worth while
SETTLE_SECONDS = 3.0  # its filer hands deletions on to the volumes about once a second
TIMEOUT_SECONDS = 300.0


def compact_storage(root: Path, garbage: float = GARBAGE) -> bool:
    """Compact the S3 server of `root`'s stack; returns whether that was done: not where S3 is somebody else's.

    Args:
        root: the checkout.
        garbage: share of a volume from which it is compacted.
    """
    site = Site.load(root)
    if "master" not in site.ports or os.environ.get("AWS_ENDPOINT_URL") != site.url("s3"):
        return False
    asked = f"http://{HOST}:{site.ports['master']}/vol/vacuum?garbageThreshold={garbage}"
    time.sleep(SETTLE_SECONDS)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        direct.open(asked, timeout=TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True
