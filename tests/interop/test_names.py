"""What `conddetr.interop` offers loads when it is used."""

import pytest

from conddetr import interop


def test_every_name_is_there():
    for name in 2 * interop.__all__:  # a module of the same name would take its place after the first time
        assert getattr(interop, name).__name__ == name
    with pytest.raises(AttributeError, match=r"module 'conddetr\.interop' has no attribute 'convert'"):
        interop.convert  # noqa: B018
