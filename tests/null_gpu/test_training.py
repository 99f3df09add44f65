"""Training: launches of a step, recorded steps beside a loader that pins memory, mixed sizes, two GPUs."""

import re
import threading

import pytest
import torch
import triton
from small_runs import SMALL_MODEL

import conddetr
from conddetr.config.run import TrainConfig
from conddetr.data.batch import collate
from conddetr.data.loader import make_loader
from conddetr.data.synthetic import SyntheticShapes
from conddetr.engine.preflight import preflight
from conddetr.engine.step import Stepper
from conddetr.kernels import addresses
from null_gpu.counts import counted
from null_gpu.test_ops import skip_unless_built

MODEL = {**SMALL_MODEL, "hidden_dim": 32, "num_heads": 1, "num_classes": 3, "dropout": 0.1}
"""With a head of a width that CUDA kernels support."""
COUNTED_WITH = ("2.15", "3.9")
"""Releases of PyTorch and Triton with which the launches and copies below were counted."""


def make_batch(height=64, width=64, padded=True):
    """Two images with three objects each; the second is smaller if the batch is padded."""
    samples = []
    for number in range(2):
        image = torch.zeros(3, height - 8 * number * padded, width, dtype=torch.uint8)
        boxes = torch.full((3, 4), 0.4)
        target = {"labels": torch.arange(3), "boxes": boxes, "image_id": number, "original_size": (64, 64)}
        samples.append((image, target))
    return collate(samples).pin_memory()


def make_stepper(device="cuda", backend="triton", cuda_graphs="off", precision="float32", **options):
    model = conddetr.build("conditional-detr-tiny", **{**MODEL, "backend": backend}).to(device).train()
    config = TrainConfig(max_targets=8, cuda_graphs=cuda_graphs, precision=precision, **options)
    return Stepper(model, config, torch.device(device), steps_per_epoch=9)


def count_step(stepper, batch):
    """Counts of the third step: the first compiles, the second creates the optimizer's state.

    The allocator may give the gradients the addresses that they had in the second step. The table of their addresses is
    then on the device already, so copies are counted without it.
    """
    for step in range(2):
        stepper([batch], step)
    # Each step reads the previous step's report. It has arrived by then, but reading it would count as a wait.
    stepper.flush()
    before = addresses._copied.cache_info().misses
    with counted() as counts:
        stepper([batch], 2)
    tables = addresses._copied.cache_info().misses - before
    assert tables in (0, 1), "a parameter's address changed"
    counts.to_device -= tables
    stepper.flush()
    assert stepper.skipped == 0
    return counts


@pytest.mark.parametrize(
    ("options", "launches", "copies", "graphs"),
    [
        ({"backend": "triton"}, 341, 8, 0),
        ({"backend": "triton", "precision": "bfloat16"}, 358, 8, 0),
        ({"backend": "native"}, 341, 8, 0),
        ({"backend": "triton", "cuda_graphs": "on", "ema_decay": 0.9}, 2, 3, 1),
        ({"backend": "triton", "cuda_graphs": "auto", "precision": "auto"}, 2, 3, 1),
    ],
    ids=["triton", "triton, bfloat16", "native", "triton, CUDA graphs", "triton, defaults of train"],
)
def test_step_never_waits_and_has_the_counted_launches(options, launches, copies, graphs):
    """A change that adds a launch, a copy or a wait fails here; after a change that saves some, lower the number."""
    skip_unless_built(options["backend"])
    counts = count_step(make_stepper(**options), make_batch())
    assert counts.waits == 0
    assert counts.from_device == 1
    assert counts.modules == 0, "a kernel was compiled in the third step"
    assert counts.graph_launches == graphs
    if (torch.__version__[:4], triton.__version__[:3]) != COUNTED_WITH:
        pytest.skip(f"{counts.launches} launches; the expected number was counted with {COUNTED_WITH}")
    assert (counts.launches, counts.to_device) == (launches, copies)


def test_hopper_trains_in_bfloat16_by_default():
    assert make_stepper(precision="auto").config.precision == "bfloat16"
    assert make_stepper("cpu", precision="auto").config.precision == "float32"


def test_recomputed_step_keeps_less_memory_and_does_not_wait():
    """Kept: what the allocator holds after the forward pass, above what it held before."""
    kept = []
    for recomputes in (False, True):
        stepper, batch = make_stepper(checkpoint_activations=recomputes), make_batch(256, 256)
        assert count_step(stepper, batch).waits == 0
        images = batch.to(stepper.device)
        before = torch.cuda.memory_allocated()
        loss = stepper.loss_of(images)
        kept.append(torch.cuda.memory_allocated() - before)
        del loss
    assert kept[1] < 0.7 * kept[0]


def test_preflight_finds_the_largest_batch_below_a_limit():
    """PyTorch's allocator refuses more than a share of the GPU, as a full GPU does."""
    stepper, (_, total) = make_stepper(), torch.cuda.mem_get_info()
    task = (stepper.model, stepper.loss_of, stepper.optimizer, (256, 256))
    torch.cuda.set_per_process_memory_fraction(2**29 / total)
    try:
        with pytest.raises(ValueError, match=r"512 images .* do not fit into the 0\.5 GiB") as error:
            preflight(*task, 512, stepper.device)
        most, too_many = map(int, re.search(r"(\d+) take .* and fit, (\d+) do not", str(error.value)).groups())
        assert 1 < most < too_many <= most + 8
        assert "With checkpoint_activations 512 images need more and do not fit either" in str(error.value)
        assert f"{most} images of 256×256" in preflight(*task, most, stepper.device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_wait_of_eager_matching_is_counted():
    """Shows that the count of waits is not always zero."""
    assert count_step(make_stepper(backend="eager"), make_batch()).waits > 0


class Pinning:
    """A hook of the model that pins memory in another thread, as a DataLoader's thread does at any time."""

    def __init__(self, model):
        self.pinned, self.errors = [], []
        model.register_forward_pre_hook(self._meanwhile)

    def _meanwhile(self, *_):
        thread = threading.Thread(target=self._pin)
        thread.start()
        thread.join()

    def _pin(self):
        try:
            # Kept, so that each is a new allocation.
            self.pinned.append(torch.zeros(4096).pin_memory())
        except RuntimeError as error:
            self.errors.append(error)


def record_three_sizes():
    """Counts, the hook with the other thread's errors, and the number of graphs."""
    stepper = make_stepper(cuda_graphs="auto")
    loader = Pinning(stepper.model)
    with counted() as counts:
        for step, size in enumerate((64, 96, 128)):
            stepper([make_batch(size, 64)], step)
    return counts, loader, len(stepper.graphs.recorded)


def test_steps_are_recorded_while_a_loader_pins_memory():
    counts, loader, graphs = record_three_sizes()
    assert not loader.errors
    assert loader.pinned
    assert counts.graph_launches == graphs == 3
    assert counts.refused_in_capture == 0


def test_recording_that_forbids_other_threads_to_pin_is_detected(monkeypatch):
    """With PyTorch's default mode the null GPU refuses these calls, as CUDA does."""
    record = torch.cuda.graph
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, capture_error_mode, **options: record(*args, **options))
    counts, loader, _ = record_three_sizes()
    assert counts.refused_in_capture == len(loader.errors) == 3


def test_batches_of_workers_that_reuse_memory_are_not_mixed_up():
    """Pinned copies of the batches of two workers, all of them kept, after an epoch that was not finished."""
    shapes = SyntheticShapes(64, seed=1, image_size=64)
    plain = make_loader(shapes, 4, train=True)
    pinned = make_loader(shapes, 4, train=True, workers=2, device=torch.device("cuda"))
    next(iter(pinned))
    for epoch in range(2):
        for loader in (plain, pinned):
            loader.sampler.set_epoch(epoch)
        for expected, batch in zip(list(plain), list(pinned), strict=True):
            assert batch.images.is_pinned()
            assert batch.labels.is_pinned()
            assert batch.image_ids == expected.image_ids
            assert torch.equal(batch.images, expected.images)
            assert torch.equal(batch.boxes, expected.boxes)


def test_mixed_sizes_compile_nothing_new():
    """Grids have 1, 16 and other numbers of cells, for which Triton could compile separate kernels."""
    stepper = make_stepper()
    for step in range(2):
        stepper([make_batch(80, 112)], step)
    with counted() as counts:
        for step, size in enumerate(((64, 256), (256, 64), (16, 512), (272, 16), (160, 96))):
            stepper([make_batch(*size)], step)
    stepper.flush()
    assert counts.launches > 0
    assert counts.modules == 0


@pytest.mark.parametrize("cuda_graphs", ["off", "on"])
def test_training_on_the_second_gpu_launches_nothing_on_the_first(cuda_graphs):
    stepper = make_stepper("cuda:1", cuda_graphs=cuda_graphs)
    with counted() as counts:
        for step in range(3):
            stepper([make_batch()], step)
        stepper.flush()
    assert torch.cuda.current_device() == 0
    assert counts.launches_by_device[1] > 0
    assert counts.launches_by_device[0] == 0
