"""`decelerate` and `accelerated`: the model afterwards is the model before, to the last attribute."""

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


def of_transformers(name):
    pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[test])")
    import small_huggingface

    return getattr(small_huggingface, name)()


MAKERS = {
    "ours": our_model,
    "official": official_model,
    "official criterion": partial(SetCriterion, num_classes=5),
    "transformers": partial(of_transformers, "small_model"),
    "transformers' DAB-DETR": partial(of_transformers, "small_dab"),
}
each_model = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def snapshot(model):
    """Class and attributes of every module; the objects themselves, so that they are compared by identity."""
    return {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}


def difference(before, after):
    """Names of what is not the same."""
    found = [name for name in before.keys() | after.keys() if before.get(name, (0,))[0] is not after.get(name, (1,))[0]]
    for name in before.keys() & after.keys():
        old, new = before[name][1], after[name][1]
        found += [f"{name}.{key}" for key in old.keys() | new.keys() if old.get(key, old) is not new.get(key, new)]
    return found


@each_model
def test_undone_to_the_last_attribute(make):
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
def test_accelerated_within_a_block_only(make):
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
def test_copies_and_pickles_are_decelerated(make):
    model = make()
    before = [(type(module), sorted(vars(module))) for module in model.modules()]
    conddetr.accelerate(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [(type(module), sorted(vars(module))) for module in twin.modules()] != before
        conddetr.decelerate(twin)
        assert [(type(module), sorted(vars(module))) for module in twin.modules()] == before


def test_backends_of_ours_are_those_from_before():
    model = our_model()
    conddetr.accelerate(model, "auto")
    model.note = "stays"
    conddetr.decelerate(model)
    assert model.backend == "eager"
    assert {module.backend for module in model.modules() if hasattr(module, "backend")} == {"eager"}
    assert model.note == "stays"


def test_outputs_are_those_from_before_bit_for_bit():
    model = official_model()
    images = [torch.randn(3, 64, 96)]
    with torch.no_grad():
        expected = model(images)["pred_logits"]
        with conddetr.accelerated(model):
            assert not torch.equal(model(images)["pred_logits"], expected), "nothing was accelerated"
        assert torch.equal(model(images)["pred_logits"], expected)


def test_what_others_changed_since_stays():
    model = of_transformers("small_model")
    conddetr.accelerate(model)

    def own_loss(*args):
        return None

    model.loss_function = own_loss
    conddetr.decelerate(model)
    assert model.loss_function is own_loss


def test_a_class_changed_since_is_named_and_nothing_is_undone():
    model = of_transformers("small_model")
    conddetr.accelerate(model)
    decoder = model.model.decoder
    decoder.__class__ = type("ShardedDecoder", (type(decoder),), {})
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"model\.decoder cannot be decelerated: its class became .*ShardedDecoder"):
        conddetr.decelerate(model)
    assert not difference(before, snapshot(model))


def test_saved_from_an_accelerated_model_and_loaded_into_one(tmp_path):
    """The files are those of the plain model; so are configuration, class and outputs after loading them."""
    model = of_transformers("small_model")
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
        found = loaded(**batch(True))
    assert loaded.config._attn_implementation == model.config._attn_implementation
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.loss, expected.loss, atol=0, rtol=1e-4)
