"""transformers' Conditional DETR without its heads as CUDA graphs: forward and backward, one pair per padded shape."""

from torch import Tensor, is_grad_enabled, nn
from transformers.models.conditional_detr import modeling_conditional_detr as modeling

from conddetr.capture import MAX_GRAPHS
from conddetr.graphed import Graphs
from conddetr.interop.changes import change
from conddetr.interop.huggingface.calls import wants_more
from conddetr.interop.report import AccelerationReport, Part

_IRRELEVANT = frozenset(("return_dict", "num_items_in_batch"))
"""Keywords that do not change the model's outputs; the second is from transformers' Trainer."""


class Model(modeling.ConditionalDetrModel):
    """In training both passes are replayed, unless a call requests more than its outputs."""

    graphs: Graphs | None

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, *others: object, **kwargs: object
    ) -> modeling.ConditionalDetrModelOutput:
        """As the base class, which documents the arguments."""
        outputs = None
        if self.graphs is not None and self.training and is_grad_enabled():
            given = sorted(name for name, value in kwargs.items() if value is not None and name not in _IRRELEVANT)
            requested = [name for name in given if kwargs[name] is not False]
            if wants_more(self.config, kwargs) or any(value is not None for value in others) or requested:
                self.graphs.say(f"a call requests more than its outputs ({', '.join(requested) or 'by configuration'})")
            else:
                outputs = self.graphs(self, super().forward, (pixel_values, pixel_mask))
        return super().forward(pixel_values, pixel_mask, *others, **kwargs) if outputs is None else outputs


def graph_body(model: nn.Module, graphs: bool, report: AccelerationReport) -> None:
    """Replay the body from now on, or stop that."""
    body = model.model
    if not graphs:
        if type(body) is Model:
            change(body, graphs=None)
        return
    if type(body) not in (modeling.ConditionalDetrModel, Model):
        report.left.append(Part("graphs of the body", 1, f"{type(body).__name__} is another class and stays"))
        return
    change(body, Model, graphs=Graphs())
    note = f"forward and backward in training on a GPU, for the first {MAX_GRAPHS} kinds of inputs"
    report.replaced.append(Part("graphs of the body", 1, note))
