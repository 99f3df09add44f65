"""Streams of images: order, equal results for every batch size, bounded memory, errors in the order of the images."""

import gc
import itertools
import threading
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

import conddetr
from models.model import spread_outputs

CLASSES = [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}, {"id": 90, "name": "toothbrush"}]
SIZES = [(60, 90), (90, 60), (60, 90), (50, 50), (120, 180), (90, 60), (60, 90), (60, 90), (50, 50), (60, 90)]
"""Heights and widths; images of 2:3 are all resized to one shape."""
SCORES, PIXELS = 2e-6, 5e-4
"""Largest differences by rounding, of scores and of boxes in pixels."""


@pytest.fixture
def detector(tiny_model):
    spread_outputs(tiny_model)
    return conddetr.Detector(tiny_model, CLASSES, "cpu", precision="float32")


@pytest.fixture
def images():
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def assert_equal_up_to_rounding(actual, expected):
    """Compares every query and class, because rounding may swap equal scores."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        order, expected_order = (
            sorted(range(len(item)), key=lambda row, item=item: (item.queries[row].item(), item.labels[row].item()))
            for item in (one, other)
        )
        assert torch.equal(one.queries[order], other.queries[expected_order])
        torch.testing.assert_close(one.scores[order], other.scores[expected_order], rtol=0, atol=SCORES)
        torch.testing.assert_close(one.boxes[order], other.boxes[expected_order], rtol=0, atol=PIXELS)


def test_results_do_not_depend_on_the_batch_size(detector, images):
    frozen = detector.fused()
    expected = [frozen.predict(image, 0.0)[0] for image in images]
    for one, other in itertools.pairwise(expected):
        assert (one.scores - other.scores).abs().max() > 100 * SCORES
    for batch_size in (1, 2, 7):
        assert_equal_up_to_rounding(detector.predict(images, 0.0, batch_size=batch_size), expected)
    for ahead in (1, 3):
        stream = frozen.predict_stream(iter(images), 0.0, batch_size=4, ahead=ahead)
        assert_equal_up_to_rounding([prediction.detection for prediction in stream], expected)


def test_results_do_not_depend_on_the_batch_size_on_photos(detector, coco_path):
    paths = sorted((coco_path / "val2017").glob("*.jpg"))[:24]
    single = detector.predict(paths, 0.0)
    assert_equal_up_to_rounding(detector.predict(paths, 0.0, batch_size=7), single)


def test_a_batch_holds_images_of_one_shape(detector, images):
    batches = []
    frozen = detector.fused()
    frozen.model.register_forward_pre_hook(lambda _, inputs: batches.append(tuple(inputs[0].shape)))
    frozen.predict(images, batch_size=3)
    assert sorted(batches) == [(2, 3, 128, 128), (2, 3, 192, 128), (3, 3, 128, 192), (3, 3, 128, 192)]


class Counted:
    """Makes images one by one and counts those that are alive."""

    def __init__(self, count):
        self.count, self.alive, self.most, self.threads = count, 0, 0, set()
        self._lock = threading.Lock()

    def __iter__(self):
        for index in range(self.count):
            self.threads.add(threading.current_thread())
            image = torch.full((3, 40, 40 + 20 * (index % 2)), index / self.count)
            with self._lock:
                self.alive += 1
                self.most = max(self.most, self.alive)
            weakref.finalize(image, self._freed)
            yield image
            del image

    def _freed(self):
        with self._lock:
            self.alive -= 1


@pytest.mark.parametrize(("batch_size", "ahead", "most"), [(1, 3, 3), (2, 5, 5), (4, None, 16), (1, None, 8)])
def test_memory_holds_a_bounded_number_of_images(detector, batch_size, ahead, most):
    images = Counted(40)
    count = 0
    for index, prediction in enumerate(detector.predict_stream(images, batch_size=batch_size, ahead=ahead)):
        assert prediction.index == index
        assert prediction.image[0, 0, 0] == pytest.approx(index / 40)
        count += 1
    del prediction
    gc.collect()
    assert count == 40
    # The images in the window, the one that this loop holds, and the one that the iterable makes.
    assert most - 1 <= images.most <= most + 2
    assert images.alive == 0
    assert threading.current_thread() not in images.threads


def test_an_image_that_cannot_be_read_is_delivered_in_its_place(detector, tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(7)]
    for path in paths:
        Image.new("RGB", (40, 30)).save(path)
    paths[2].write_bytes(paths[2].read_bytes()[:50])
    paths[5].unlink()
    predictions = list(detector.predict_stream(paths, batch_size=3))
    assert [prediction.source for prediction in predictions] == paths
    assert [prediction.index for prediction in predictions if prediction.error] == [2, 5]
    with pytest.raises(ValueError, match=r"2\.png: truncated or damaged"):
        _ = predictions[2].detection
    with pytest.raises(FileNotFoundError, match=r"5\.png does not exist"):
        detector.predict(paths[3:], batch_size=2)
    # None is an image of a wrong type, not the end.
    wrong = list(detector.predict_stream([None, torch.rand(3, 20, 20)]))
    assert isinstance(wrong[0].error, TypeError)
    assert wrong[1].error is None


def test_an_error_of_the_iterable_comes_after_the_images_before_it(detector):
    def failing():
        for _ in range(5):
            yield torch.rand(3, 30, 30)
        raise OSError("the camera is gone")

    stream = detector.predict_stream(failing(), batch_size=4)
    for index in range(5):
        assert next(stream).index == index
    with pytest.raises(OSError, match="the camera is gone"):
        next(stream)
    assert list(detector.predict_stream([])) == []


def test_a_stream_that_is_left_early_ends_its_threads(detector):
    images = Counted(1000)
    stream = detector.predict_stream(images, batch_size=2)
    next(stream)
    stream.close()
    assert images.most < 20
    assert not any(thread.name.startswith("conddetr") for thread in threading.enumerate())


def test_an_error_of_the_model_is_raised(detector):
    frozen = detector.fused()
    frozen.model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        frozen.predict([torch.rand(3, 30, 30)] * 3)
    assert not any(thread.name.startswith("conddetr") for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"batch_size": 2.0}, "batch_size: expected an int, got float 2.0"),
        ({"ahead": 0}, "ahead: expected at least 1, got 0"),
        ({"threshold": 2.0}, "threshold: expected a number from 0 to 1"),
    ],
)
def test_options_are_checked_before_the_first_image(detector, options, message):
    with pytest.raises(ValueError, match=message):
        detector.predict_stream(["/nowhere.png"], **options)
    if "ahead" not in options:
        with pytest.raises(ValueError, match=message):
            detector.predict("/nowhere.png", **options)


def test_detections_become_plain_data(detector, images):
    [detection] = detector.predict(images[0], 0.0, top_k=2)
    content = detection.to_dict()
    assert list(content) == ["scores", "labels", "boxes", "queries", "names"]
    assert torch.equal(torch.tensor(content["boxes"]), detection.boxes)
    assert content["names"] == [CLASSES[label]["name"] for label in content["labels"]]


@pytest.fixture
def small_detector():
    """A detector that compiles in seconds."""
    torch.compiler.reset()
    sizes = {"num_classes": 3, "num_queries": 5, "encoder_layers": 1, "decoder_layers": 1}
    model = conddetr.build("conditional-detr-tiny", **sizes).eval()
    spread_outputs(model)
    yield conddetr.Detector(model, CLASSES, "cpu", precision="float32")
    torch.compiler.reset()


def compile_with(monkeypatch, backend):
    """Replace Inductor, which takes minutes."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_module(self, **options, backend=backend)
    )


def test_compiled_copy_equals_the_frozen_one(small_detector, images, monkeypatch):
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_with(monkeypatch, counted)
    compiled = small_detector.fused(compile=True)
    few = [images[0], images[2]]
    expected = [small_detector.fused().predict(image, 0.0)[0] for image in few]
    assert_equal_up_to_rounding(compiled.predict(few, 0.0, batch_size=2), expected)
    assert len(graphs) == 1


def test_compilation_that_fails_is_a_one_line_error(small_detector, monkeypatch):
    def failing(graph, inputs):
        raise RuntimeError("no compiler")

    compile_with(monkeypatch, failing)
    message = r"^compile: torch\.compile cannot compile the model \(.*no compiler.*\): run without it\.$"
    with pytest.raises(ValueError, match=message) as error:
        small_detector.fused(compile=True).predict(torch.rand(3, 30, 30))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="graphs and compile: expected at most one of them"):
        small_detector.fused(graphs=True, compile=True)
