"""What a model, its data and a run are made of: typed options, checked and printable. No PyTorch is imported here.

`model.py` has the model and its presets, `build.py` how it is built and run, `run.py` data, training and the whole run,
`flags.py` the same options on the command line, `checks.py` what they share.
"""

from conddetr.config.build import BUILD_OPTIONS, Backend, Precision, check_backend, check_build
from conddetr.config.checks import nearest
from conddetr.config.model import PRESETS, Backbone, ModelConfig, from_dict, preset_name, resolve

__all__ = [
    "BUILD_OPTIONS",
    "PRESETS",
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
