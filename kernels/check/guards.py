"""Guard memory around tensors, which no kernel may write to: around inputs, and around allocations from Python."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from conddetr.kernels.check.inputs import Inputs

MARGIN = 128 * 1024
"""Bytes on either side: more than a tile of any kernel, and a multiple of every alignment that kernels test."""
PATTERN = 0xFF
"""Value of every byte: NaN in all floating dtypes, so that reads outside a tensor show in the result."""


@dataclass
class _Guarded:
    """A buffer and the tensor in its middle."""

    name: str
    buffer: Tensor
    """uint8."""
    expected: Tensor | None
    """Copy of an input's buffer, which must not change; None: only the margins must not change."""
    inner: Tensor
    """The tensor."""


class Guards:
    """Guards the inputs and allocations of one run, and reports writes outside them."""

    def __init__(self) -> None:
        self._guarded: list[_Guarded] = []
        # Saved before `watching` replaces it.
        self._allocate = torch.empty

    def place(self, inputs: Inputs) -> Inputs:
        """Copies of the inputs with their strides, guarded."""
        return {name: self._place(name, x) for name, x in inputs.items()}

    def _place(self, name: str, x: Tensor) -> Tensor:
        buffer, inner = self._surround(x)
        # Expanded dimensions share memory: copy one element of each.
        once = tuple(slice(None) if stride else slice(1) for stride in x.stride())
        inner[once].copy_(x[once])
        self._guarded.append(_Guarded(name, buffer, buffer.clone(), inner))
        return inner

    def _surround(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Allocate a buffer, and in it a tensor with the shape, strides and dtype of x. The tensor is not a view: it
        starts at the beginning of its own storage.
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
        """Guard all allocations from Python meanwhile, and fill them with NaN."""
        # Imported here, because its import takes longer than that of all kernels' functions.
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
            is_exempt = made.layout != torch.strided or made.device.type == "meta" or options.get("pin_memory")
            if is_exempt or made.numel() == 0:
                return made
            with torch.no_grad():
                buffer, inner = self._surround(made)
            self._guarded.append(_Guarded("its own memory", buffer, None, inner))
            return inner

        return allocate

    def violation(self) -> str | None:
        """The first forbidden write; None: there was none."""
        # One transfer for each device, since reading a result waits for the device.
        devices = {guarded.buffer.device for guarded in self._guarded}
        for device in devices:
            local = [guarded for guarded in self._guarded if guarded.buffer.device == device]
            flags = torch.stack([self._is_broken(guarded) for guarded in local]).tolist()
            for guarded, is_broken in zip(local, flags, strict=True):
                if is_broken:
                    return self._describe(guarded)
        return None

    def _is_broken(self, guarded: _Guarded) -> Tensor:
        """A bool on the buffer's device, computed without a synchronization."""
        if guarded.expected is not None:
            return (guarded.buffer != guarded.expected).any()
        before, after = guarded.buffer[:MARGIN], guarded.buffer[-MARGIN:]
        return (before != PATTERN).any() | (after != PATTERN).any()

    def _describe(self, guarded: _Guarded) -> str:
        size = guarded.buffer.numel()
        expected = torch.full_like(guarded.buffer, PATTERN) if guarded.expected is None else guarded.expected
        offsets = (guarded.buffer != expected).nonzero()[:, 0]
        offsets = offsets[(offsets < MARGIN) | (offsets >= size - MARGIN)] - MARGIN
        if len(offsets) == 0:
            return f"changes its input {guarded.name}"
        first, end = offsets[0].item(), size - 2 * MARGIN
        position = f"{-first} bytes before" if first < 0 else f"{first - end} bytes past the end of"
        return f"writes outside: {position} {guarded.name}"
