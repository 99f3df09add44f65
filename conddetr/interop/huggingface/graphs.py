"""transformers' Conditional DETR without its heads as CUDA graphs: forward and backward, one pair per padded shape."""

from torch import Tensor, is_grad_enabled, nn
from transformers.models.conditional_detr import modeling_conditional_detr as theirs

from conddetr.capture import MAX_GRAPHS
from conddetr.graphed import Graphs
from conddetr.interop.changes import change
from conddetr.interop.huggingface.calls import wants_more
from conddetr.interop.report import AccelerationReport, Part

_NO_MATTER = frozenset(("return_dict", "num_items_in_batch"))
"""Keywords that change nothing of what the model computes; the second is from transformers' Trainer."""


class Model(theirs.ConditionalDetrModel):
    """In training both passes are replayed, as far as nobody wants more of a call than its outputs."""

    graphs: Graphs | None

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, *others: object, **kwargs: object
    ) -> theirs.ConditionalDetrModelOutput:
        """As the base class, which documents the arguments."""
        found = None
        if self.graphs is not None and self.training and is_grad_enabled():
            wanted = sorted(name for name, value in kwargs.items() if value is not None and name not in _NO_MATTER)
            more = [name for name in wanted if kwargs[name] is not False]
            if wants_more(self.config, kwargs) or any(value is not None for value in others) or more:
                self.graphs.say(f"more is wanted of a call than its outputs ({', '.join(more) or 'by configuration'})")
            else:
                found = self.graphs(self, super().forward, (pixel_values, pixel_mask))
        return super().forward(pixel_values, pixel_mask, *others, **kwargs) if found is None else found


def graph_body(model: nn.Module, graphs: bool, report: AccelerationReport) -> None:
    """Let the body be replayed from now on, or not any more."""
    body = model.model
    if not graphs:
        if type(body) is Model:
            change(body, graphs=None)
        return
    if type(body) not in (theirs.ConditionalDetrModel, Model):
        report.left.append(Part("graphs of the body", 1, f"{type(body).__name__} is another class, which stays"))
        return
    change(body, Model, graphs=Graphs())
    note = f"forward and backward in training on a GPU, for the first {MAX_GRAPHS} kinds of inputs"
    report.replaced.append(Part("graphs of the body", 1, note))
