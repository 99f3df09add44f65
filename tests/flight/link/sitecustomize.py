"""Makes every Python with this folder on PYTHONPATH import `conddetr` from this checkout; nothing is installed.

`kernels/` is installed as `conddetr.kernels`, so the checkout on the path would not be enough.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = {"conddetr": ROOT / "conddetr", "conddetr.kernels": ROOT / "kernels"}


class Checkout:
    """Finds the two packages."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The spec of one of the two packages; Python calls this for every entry of `sys.meta_path`."""
        folder = PACKAGES.get(name)
        if folder is None:
            return None
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


# In first position, because another checkout may be installed.
sys.meta_path.insert(0, Checkout)
