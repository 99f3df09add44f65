"""Where the time of a training step goes: backbone, encoder, decoder, loss, optimizer, host.

Each moment at which one part ends and the next begins is noted by a hook: of a module, of the gradient that arrives at
a module's output, of the optimizer. Forward and backward of a part count together; prediction heads count as loss.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from harness.machine import DEVICE

NAMES = ("backbone", "encoder", "decoder", "loss", "optimizer", "host")


class Parts:
    """Hooks in a model and its optimizer; `remove` takes them out."""

    def __init__(self, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
        """
        Args:
            modules: `backbone`, `encoder` and `decoder`, which run in this order.
            optimizer: of the step.
        """
        self._moments: list[tuple[str, float | torch.cuda.Event]] = []
        self._hooks = [modules["backbone"].register_forward_pre_hook(lambda *_: self._end("host"))]
        # What a gradient that arrives at the output has gone through before.
        behind = {"backbone": "encoder", "encoder": "decoder", "decoder": "loss"}
        for name, module in modules.items():
            self._hooks.append(module.register_forward_hook(self._output_hook(name, behind[name])))
        # Norm and clipping of gradients count as the optimizer's.
        self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._end("optimizer")))

    def time(self, step: Callable[[], object]) -> dict[str, float]:
        """Part → seconds of one step, in the order of `NAMES`; on a GPU they are the device's, idle time included."""
        self._moments = []
        self._end("")
        step()
        self._end("host")
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        found = dict.fromkeys(NAMES, 0.0)
        for (_, before), (name, after) in zip(self._moments, self._moments[1:], strict=False):
            found[name] += after - before if isinstance(after, float) else 1e-3 * before.elapsed_time(after)
        return found

    def remove(self) -> None:
        """Leave model and optimizer as they were."""
        for hook in self._hooks:
            hook.remove()

    def _end(self, name: str) -> None:
        moment = time.perf_counter()
        if DEVICE.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._moments.append((name, moment))

    def _output_hook(self, name: str, behind: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            self._end(name)
            outputs = [tensor for tensor in _tensors(output) if tensor.requires_grad]
            # Of a backbone's stages the last is the one that is used; a decoder's reference points, which come second,
            # get their gradient when it is through.
            used = outputs[-1 if name == "backbone" else 0]
            used.register_hook(lambda _: self._arrived(behind))

        return hook

    def _arrived(self, behind: str) -> None:
        self._end(behind)
        if behind == "encoder":
            # What remains of backward is the backbone's.
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
