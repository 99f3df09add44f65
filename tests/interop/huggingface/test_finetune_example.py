"""The HuggingFace example: training with the added line equals training without it."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[test])")
pytest.importorskip("accelerate", reason="accelerate is not installed; transformers' Trainer needs it")

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "finetune_huggingface.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("finetune_huggingface", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_added_line_does_not_change_the_training(example, small_coco, tmp_path, capsys, monkeypatch):
    tiny_model = example.tiny_model

    def without_dropout(num_labels):
        """transformers before 5 samples a random number per decoder layer that ours does not need."""
        model = tiny_model(num_labels)
        for module in model.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        return model

    monkeypatch.setattr(example, "tiny_model", without_dropout)
    arguments = [str(small_coco.root), "--steps", "3", "--batch-size", "2", "--size", "64", "--out", str(tmp_path)]
    plain = example.main([*arguments, "--plain"])
    assert "accelerated" not in capsys.readouterr().out
    fast = example.main(arguments)
    assert "accelerated" in capsys.readouterr().out
    assert len(plain["losses"]) == 3
    assert fast["losses"] == pytest.approx(plain["losses"], rel=1e-4)
