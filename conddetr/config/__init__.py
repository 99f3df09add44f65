"""Configuration of models, data and runs: typed options, checked and printable. No PyTorch is imported here.

`model.py` has the model and its presets, `build.py` options of building and running it, `augment.py` augmentation,
`run.py` data, training and the whole run, `flags.py` the same options on the command line, `checks.py` the checks that
they share.
"""

from conddetr.config.build import BUILD_OPTIONS, Backend, Precision, check_backend, check_build
from conddetr.config.checks import nearest
from conddetr.config.model import PRESETS, TIMM, Backbone, ModelConfig, from_dict, preset_name, resolve

__all__ = [
    "BUILD_OPTIONS",
    "PRESETS",
    "TIMM",
    "Backbone",
    "Backend",
    "ModelConfig",
    "Precision",
    "check_backend",
    "check_build",
    "from_dict",
    "nearest",
    "preset_name",
    "resolve",
]
