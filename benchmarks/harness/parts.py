"""Where the time of a training step goes: backbone, encoder, decoder, loss, optimizer, host.

Hooks record each moment at which one part ends and the next begins: hooks of modules, of the gradients that arrive at
their outputs, and of the optimizer. Forward and backward of a part count together; prediction heads count as loss.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from harness.machine import DEVICE

NAMES = ("backbone", "encoder", "decoder", "loss", "optimizer", "host")


class Parts:
    """Hooks in a model and its optimizer; `remove` removes them."""

    def __init__(self, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
        """
        Args:
            modules: `backbone`, `encoder` and `decoder`, which run in this order.
            optimizer: of the step.
        """
        self._moments: list[tuple[str, float | torch.cuda.Event]] = []
        self._hooks = [modules["backbone"].register_forward_pre_hook(lambda *_: self._end("host"))]
        # The part whose backward ends when a gradient arrives at the output.
        next_parts = {"backbone": "encoder", "encoder": "decoder", "decoder": "loss"}
        for name, module in modules.items():
            self._hooks.append(module.register_forward_hook(self._output_hook(name, next_parts[name])))
        # Gradient norm and clipping count as the optimizer.
        self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._end("optimizer")))

    def time(self, step: Callable[[], object]) -> dict[str, float]:
        """Part → seconds of one step, in the order of `NAMES`; on a GPU they are the device's, idle time included."""
        self._moments = []
        self._end("")
        step()
        self._end("host")
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds = dict.fromkeys(NAMES, 0.0)
        for (_, before), (name, after) in zip(self._moments, self._moments[1:], strict=False):
            seconds[name] += after - before if isinstance(after, float) else 1e-3 * before.elapsed_time(after)
        return seconds

    def remove(self) -> None:
        """Restore model and optimizer."""
        for hook in self._hooks:
            hook.remove()

    def _end(self, name: str) -> None:
        moment = time.perf_counter()
        if DEVICE.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._moments.append((name, moment))

    def _output_hook(self, name: str, next_part: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            self._end(name)
            outputs = [tensor for tensor in _tensors(output) if tensor.requires_grad]
            # Only the last of a backbone's stages is used. A decoder's reference points, which come second, get their
            # gradient at the end of its backward.
            used = outputs[-1 if name == "backbone" else 0]
            used.register_hook(lambda _: self._arrived(next_part))

        return hook

    def _arrived(self, part: str) -> None:
        self._end(part)
        if part == "encoder":
            # The rest of backward is the backbone's.
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end("backbone"))


def _tensors(output: object) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
