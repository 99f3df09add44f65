"""Memory around tensors that nobody may write to: inputs lie in it, and what Python allocates meanwhile does too."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from conddetr.kernels.check.inputs import Inputs

MARGIN = 128 * 1024
"""Bytes on either side: more than a tile of any kernel; a multiple of every alignment that kernels look at."""
PATTERN = 0xFF
"""In every byte: NaN in all floating dtypes, so that what is read outside shows in the result."""


@dataclass
class _Guarded:
    """A buffer with a tensor in it."""

    name: str
    buffer: Tensor
    """uint8."""
    expected: Tensor | None
    """A copy, of an input's buffer, which must stay as it is; None: the margins are known."""
    inner: Tensor
    """The tensor."""


class Guards:
    """Inputs and allocations of one run, and whether it wrote where it must not."""

    def __init__(self) -> None:
        self._guarded: list[_Guarded] = []
        # Taken before they are replaced.
        self._allocate = torch.empty

    def place(self, inputs: Inputs) -> Inputs:
        """Copies of the inputs with their strides, guarded."""
        return {name: self._place(name, x) for name, x in inputs.items()}

    def _place(self, name: str, x: Tensor) -> Tensor:
        buffer, inner = self._surround(x)
        # Of what is several times in one memory, once.
        once = tuple(slice(None) if stride else slice(1) for stride in x.stride())
        inner[once].copy_(x[once])
        self._guarded.append(_Guarded(name, buffer, buffer.clone(), inner))
        return inner

    def _surround(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A buffer, and a tensor in it of the shape, strides and dtype of x. To all who look it is no view, but begins
        where its storage does.
        """
        elements = 0 if x.numel() == 0 else 1
        elements += sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True) if elements)
        size = elements * x.element_size()
        buffer = self._allocate(2 * MARGIN + size, dtype=torch.uint8, device=x.device).fill_(PATTERN)
        inner = self._allocate(0, dtype=x.dtype, device=x.device)
        storage = torch.from_dlpack(buffer[MARGIN : MARGIN + size]).untyped_storage()
        inner.set_(storage, 0, x.shape, x.stride())
        return buffer, inner

    @contextmanager
    def watching(self) -> Iterator[None]:
        """What is allocated from Python meanwhile is guarded, and holds NaN."""
        # Here, not above: it takes longer to import than all kernels' functions.
        from unittest import mock

        with (
            mock.patch.object(torch, "empty", self._watched(torch.empty)),
            mock.patch.object(torch, "empty_like", self._watched(torch.empty_like)),
            mock.patch.object(torch, "empty_strided", self._watched(torch.empty_strided)),
            mock.patch.object(Tensor, "new_empty", self._watched(Tensor.new_empty), create=True),
        ):
            yield

    def _watched(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*arguments: object, **options: object) -> Tensor:
            made = make(*arguments, **options)
            is_other = made.layout != torch.strided or made.device.type == "meta" or options.get("pin_memory")
            if is_other or made.numel() == 0:
                return made
            with torch.no_grad():
                buffer, inner = self._surround(made)
            self._guarded.append(_Guarded("its own memory", buffer, None, inner))
            return inner

        return allocate

    def violation(self) -> str | None:
        """What was written where it must not be; None: nothing."""
        # Asked for all at once, since the answers wait for the device.
        devices = {guarded.buffer.device for guarded in self._guarded}
        for device in devices:
            there = [guarded for guarded in self._guarded if guarded.buffer.device == device]
            answers = torch.stack([self._is_broken(guarded) for guarded in there]).tolist()
            for guarded, is_broken in zip(there, answers, strict=True):
                if is_broken:
                    return self._describe(guarded)
        return None

    def _is_broken(self, guarded: _Guarded) -> Tensor:
        """A bool on its device, which is not waited for."""
        if guarded.expected is not None:
            return (guarded.buffer != guarded.expected).any()
        before, after = guarded.buffer[:MARGIN], guarded.buffer[-MARGIN:]
        return (before != PATTERN).any() | (after != PATTERN).any()

    def _describe(self, guarded: _Guarded) -> str:
        size = guarded.buffer.numel()
        expected = torch.full_like(guarded.buffer, PATTERN) if guarded.expected is None else guarded.expected
        where = (guarded.buffer != expected).nonzero()[:, 0]
        where = where[(where < MARGIN) | (where >= size - MARGIN)] - MARGIN
        if len(where) == 0:
            return f"changes its input {guarded.name}"
        first, end = where[0].item(), size - 2 * MARGIN
        place = f"{-first} bytes before" if first < 0 else f"{first - end} bytes behind the end of"
        return f"writes outside: {place} {guarded.name}"
