"""What pytest-xdist leaves of the machine to this process."""

from __future__ import annotations

import os

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
CORES = max(1, len(os.sched_getaffinity(0)) // WORKERS)
