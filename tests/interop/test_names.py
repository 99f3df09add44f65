"""Names of `conddetr.interop` load when they are first used."""

import pytest

from conddetr import interop


def test_every_name_can_be_loaded():
    for name in 2 * interop.__all__:  # twice: a module of the same name would replace it after the first time
        assert getattr(interop, name).__name__ == name
    with pytest.raises(AttributeError, match=r"module 'conddetr\.interop' has no attribute 'convert'"):
        interop.convert  # noqa: B018
