"""Maps the two source trees onto one installed package; all metadata is in pyproject.toml.

`kernels/` is installed as `conddetr.kernels`: a top-level `kernels` would collide with the package
of that name on PyPI.
"""

from setuptools import find_packages, setup

detector_packages = find_packages(include=["conddetr", "conddetr.*"])
kernel_packages = ["conddetr.kernels"] + [f"conddetr.kernels.{name}" for name in find_packages("kernels")]

setup(
    packages=detector_packages + kernel_packages,
    package_dir={"conddetr": "conddetr", "conddetr.kernels": "kernels"},
)
