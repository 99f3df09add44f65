"""The table of families: its facts match the models, and each family has all parts."""

from dataclasses import fields
from typing import get_args

import pytest

import conddetr
from conddetr.config import PRESETS
from conddetr.model.families import FAMILIES, FamilyName
from conddetr.model.families.table import PARTS


def test_every_family_has_its_parts_and_presets():
    assert get_args(FamilyName) == tuple(FAMILIES) == tuple(PARTS)
    assert [config.family for config in PRESETS.values()] == [name for name in FAMILIES for _ in range(7)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_identified_by_its_tensors(family):
    names = conddetr.build(f"{family}-tiny").state_dict()
    layers = [f"transformer.decoder.layers.{index}." for index in range(2)]
    known = {name for name, entry in FAMILIES.items() if all(layer + entry.known_by in names for layer in layers)}
    assert known == {family}


@pytest.mark.parametrize("family", FAMILIES)
def test_options_of_one_family_are_refused_by_the_others(family):
    types = {field.name: get_args(field.type) for field in fields(conddetr.ModelConfig)}
    for option in FAMILIES[family].own_options:
        other_value = types[option][1]
        assert getattr(conddetr.build(f"{family}-tiny", **{option: other_value}).config, option) == other_value
        for other in FAMILIES.keys() - {family}:
            with pytest.raises(ValueError, match=rf"{option}.* of the {family} family, not of {other}\."):
                conddetr.build(f"{other}-tiny", **{option: other_value})
