"""`decelerate` and `accelerated` restore the model to the last attribute."""

import copy
import pickle
from functools import partial

import pytest
import torch
from official_contract import ConditionalDETR, SetCriterion, Transformer

import conddetr
from conddetr.kernels import native


def our_model():
    return conddetr.build("conditional-detr-tiny", num_classes=3, backend="eager").eval()


def official_model():
    return ConditionalDETR(Transformer(layers=2, ffn=64), num_classes=5, num_queries=12).eval()


def transformers_model(name):
    pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[test])")
    import small_huggingface

    return getattr(small_huggingface, name)()


MAKERS = {
    "ours": our_model,
    "official": official_model,
    "official criterion": partial(SetCriterion, num_classes=5),
    "transformers": partial(transformers_model, "small_model"),
    "transformers' DAB-DETR": partial(transformers_model, "small_dab"),
}
each_model = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def snapshot(model):
    """Class and attributes of every module; the objects themselves, so that they are compared by identity."""
    return {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}


def difference(before, after):
    """Names of modules and attributes that differ."""
    names = [name for name in before.keys() | after.keys() if before.get(name, (0,))[0] is not after.get(name, (1,))[0]]
    for name in before.keys() & after.keys():
        old, new = before[name][1], after[name][1]
        names += [f"{name}.{key}" for key in old.keys() | new.keys() if old.get(key, old) is not new.get(key, new)]
    return names


@each_model
def test_decelerate_restores_every_attribute(make):
    model = make()
    before = snapshot(model)
    conddetr.decelerate(model)
    assert not difference(before, snapshot(model)), "there was nothing to undo"
    conddetr.accelerate(model)
    assert difference(before, snapshot(model)), "nothing was accelerated"
    conddetr.accelerate(model, "native" if native.NOT_LOADED is None else "eager")
    conddetr.decelerate(model)
    assert not difference(before, snapshot(model))


@each_model
def test_model_is_accelerated_within_the_block_only(make):
    model = make()
    before = snapshot(model)
    with conddetr.accelerated(model) as report:
        assert report.replaced
        assert difference(before, snapshot(model))
    assert not difference(before, snapshot(model))
    with pytest.raises(KeyError, match="inside"), conddetr.accelerated(model):
        raise KeyError("inside")
    assert not difference(before, snapshot(model))


@each_model
def test_copies_and_pickles_can_be_decelerated(make):
    model = make()
    before = [(type(module), sorted(vars(module))) for module in model.modules()]
    conddetr.accelerate(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [(type(module), sorted(vars(module))) for module in twin.modules()] != before
        conddetr.decelerate(twin)
        assert [(type(module), sorted(vars(module))) for module in twin.modules()] == before


def test_backends_of_our_model_are_restored():
    model = our_model()
    conddetr.accelerate(model, "auto")
    model.note = "stays"
    conddetr.decelerate(model)
    assert model.backend == "eager"
    assert {module.backend for module in model.modules() if hasattr(module, "backend")} == {"eager"}
    assert model.note == "stays"


def test_outputs_are_restored_bit_for_bit():
    model = official_model()
    images = [torch.randn(3, 64, 96)]
    with torch.no_grad():
        expected = model(images)["pred_logits"]
        with conddetr.accelerated(model):
            assert not torch.equal(model(images)["pred_logits"], expected), "nothing was accelerated"
        assert torch.equal(model(images)["pred_logits"], expected)


def test_later_changes_by_the_user_stay():
    model = transformers_model("small_model")
    conddetr.accelerate(model)

    def user_loss(*args):
        return None

    model.loss_function = user_loss
    conddetr.decelerate(model)
    assert model.loss_function is user_loss


def test_later_change_of_a_class_raises_and_nothing_is_undone():
    model = transformers_model("small_model")
    conddetr.accelerate(model)
    decoder = model.model.decoder
    decoder.__class__ = type("ShardedDecoder", (type(decoder),), {})
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"model\.decoder cannot be decelerated: its class became .*ShardedDecoder"):
        conddetr.decelerate(model)
    assert not difference(before, snapshot(model))


def test_accelerated_model_is_saved_and_loaded_like_the_plain_one(tmp_path):
    """Files, and configuration, class and outputs after loading them, are the plain model's."""
    model = transformers_model("small_model")
    from small_huggingface import batch
    from transformers import ConditionalDetrForObjectDetection

    model.save_pretrained(tmp_path / "plain")
    with torch.no_grad():
        expected = model(**batch(True))
        conddetr.accelerate(model)
        model.save_pretrained(tmp_path / "fast")
        files = sorted(path.name for path in (tmp_path / "plain").iterdir())
        assert files == sorted(path.name for path in (tmp_path / "fast").iterdir())
        for name in files:
            assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
        loaded = ConditionalDetrForObjectDetection.from_pretrained(tmp_path / "fast")
        assert torch.equal(loaded(**batch(True)).logits, expected.logits)
        report = conddetr.accelerate(loaded)
        assert "cross-attention" in str(report) or "decoder attention" in str(report)
        outputs = loaded(**batch(True))
    assert loaded.config._attn_implementation == model.config._attn_implementation
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs.loss, expected.loss, atol=0, rtol=1e-4)
