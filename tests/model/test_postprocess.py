"""Post-processing from logits to detections, compared with the official code and by property."""

import pytest
import torch
from golden_rule import read_arrays, read_json

import conddetr


@pytest.mark.parametrize(("case", "activation"), [("p4", "sigmoid"), ("p4_detr", "softmax")])
def test_official_detections(case, activation):
    info, golden = read_json(case), read_arrays(case)
    source = read_arrays(info["source_case"])
    outputs = {"pred_logits": source["pred_logits"], "pred_boxes": source["pred_boxes_all"][-1]}
    sizes = info["orig_sizes_hw"]
    for index, detections in enumerate(conddetr.postprocess(outputs, sizes, 100, activation)):
        scores, order = golden[f"img{index}/scores"].sort(descending=True, stable=True)
        torch.testing.assert_close(detections["scores"], scores, atol=1e-6, rtol=0)
        assert torch.equal(detections["labels"], golden[f"img{index}/labels"][order])
        torch.testing.assert_close(detections["boxes"], golden[f"img{index}/boxes"][order], atol=1e-3, rtol=1e-6)
        centers = outputs["pred_boxes"][index, detections["queries"], :2] * torch.tensor(sizes[index][::-1])
        torch.testing.assert_close((detections["boxes"][:, :2] + detections["boxes"][:, 2:]) / 2, centers)


def test_fewer_candidates_than_top_k():
    outputs = {"pred_logits": torch.randn(1, 2, 3), "pred_boxes": torch.rand(1, 2, 4)}
    assert len(conddetr.postprocess(outputs, [(10, 10)])[0]["scores"]) == 6
    assert len(conddetr.postprocess(outputs, [(10, 10)], activation="softmax")[0]["scores"]) == 2


def test_half_precision_is_scored_in_float32():
    outputs = {"pred_logits": torch.randn(1, 4, 3).half(), "pred_boxes": torch.rand(1, 4, 4).half()}
    detections = conddetr.postprocess(outputs, torch.tensor([[100, 200]]))[0]
    assert detections["scores"].dtype == detections["boxes"].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": [(1, 1), (2, 2)]}, r"sizes: expected shape \(1, 2\), got \(2, 2\)"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"activation": "relu"}, "activation: expected 'sigmoid' or 'softmax', got 'relu'"),
    ],
)
def test_errors_name_the_argument(change, message):
    outputs = {"pred_logits": torch.randn(1, 2, 3), "pred_boxes": torch.rand(1, 2, 4)}
    with pytest.raises(ValueError, match=message):
        conddetr.postprocess(outputs, **{"sizes": [(1, 1)], **change})
