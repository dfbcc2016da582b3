"""array-api-strict: the standard and nothing else, with several devices that are all the host's memory."""

from __future__ import annotations

from typing import Any

import array_api_strict
import numpy as np

from xaffine.backends.standard import Array, Backend

__all__ = ["BACKEND", "ArrayApiStrict"]


class ArrayApiStrict(Backend):
    """The reference that libraries test with."""

    name = "array-api-strict"
    namespace = "array_api_strict"

    def device_name(self, device: Any) -> str:
        """The name alone, of ``array_api_strict.Device('CPU_DEVICE')``."""
        return str(device).split("'")[1]

    def to_numpy(self, array: Array) -> np.ndarray:
        """Bring it to the one device that NumPy reads."""
        return np.asarray(array.to_device(array_api_strict.Device("CPU_DEVICE")))


BACKEND = ArrayApiStrict()
