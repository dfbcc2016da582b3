"""What figures from this machine depend on."""

from __future__ import annotations

import os
import platform
from typing import Any

from xaffine import __version__

__all__ = ["describe_machine"]


def describe_machine() -> dict[str, Any]:
    """Describe versions, cores, and the BLAS of NumPy, as JSON has them."""
    machine = {
        "xaffine": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
    }
    try:
        import threadpoolctl
    except ImportError:
        return {**machine, "blas": "unknown without threadpoolctl"}
    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    texts = [
        f"{pool['internal_api']} {pool['version']}, {pool['num_threads']} threads, "
        f"{pool.get('architecture', 'unnamed')} kernels"
        for pool in pools
    ]
    return {**machine, "blas": "; ".join(texts) or "unknown to threadpoolctl"}
