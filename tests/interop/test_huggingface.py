"""Names against the verified table of the golden set."""

import torch
from golden_rule import read_json

from conddetr.interop.huggingface import to_huggingface


def test_names_and_thirds_are_those_of_the_verified_table():
    mapping = read_json("hf_mapping")["mapping"]
    shapes = read_json("state_dict_cdetr_r101")["state_dict"]
    for name, expected in mapping.items():
        value = torch.randn(shapes[name])
        found = to_huggingface({name: value})
        if isinstance(expected, str):
            expected = [expected]
        assert list(found) == expected
        assert torch.equal(torch.cat(list(found.values())), value)
