"""What a model, its data and a run are made of: typed options, checked and printable. No PyTorch is imported here.

`model.py` has the model and its presets, `run.py` data, training and the whole run, `flags.py` the same options on the
command line, `checks.py` what they share.
"""

from conddetr.config.checks import nearest
from conddetr.config.model import PRESETS, Backbone, Backend, ModelConfig, Precision, from_dict, preset_name, resolve

__all__ = [
    "PRESETS",
    "Backbone",
    "Backend",
    "ModelConfig",
    "Precision",
    "from_dict",
    "nearest",
    "preset_name",
    "resolve",
]
