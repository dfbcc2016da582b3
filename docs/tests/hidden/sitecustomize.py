"""Python imports this file as it starts, and then finds no package that the variable HIDDEN names."""

import os
import sys
from importlib.machinery import PathFinder

NAMES = set(os.environ["HIDDEN"].split())


class Unhidden(PathFinder):
    """The search of sys.path, where a hidden package is not installed."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        """Find it, unless it is hidden."""
        return None if fullname in NAMES else super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Unhidden
