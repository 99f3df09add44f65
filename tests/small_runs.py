"""Training runs of a second or two, in this process or in others, for the tests of the engine."""

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import conddetr
from conddetr.cli import main
from conddetr.config.run import RunConfig, TrainConfig
from conddetr.data.batch import Batch, collate
from conddetr.data.synthetic import SyntheticShapes
from conddetr.data.transforms import augmentation_generator
from conddetr.engine.checkpoint import BEST, LATEST, has_run, read_checkpoint
from conddetr.engine.distributed import process_group, rank, world_size
from conddetr.engine.lock import sole_run
from conddetr.engine.step import Stepper
from conddetr.engine.trainer import Trainer
from conddetr.interrupt import InterruptedRunError

CONTEXT = multiprocessing.get_context("forkserver")
LIMIT = 600.0
"""Seconds after which a process counts as hung; a busy machine may need many times as long as a quiet one."""
PRELOADED = [
    "conddetr.engine.trainer",
    "conddetr.data.synthetic",
    "conddetr.viz.curves",
    "matplotlib.figure",
    "pycocotools.cocoeval",
    "scipy.optimize",
    "torch._dynamo",
]
"""Modules that a run imports late; those that are not installed are skipped."""
SMALL_MODEL = {
    "hidden_dim": 16,
    "num_heads": 2,
    "ffn_dim": 32,
    "encoder_layers": 1,
    "num_queries": 8,
    "image_size": 64,
    "max_image_size": 64,
}
SMALL_TRAINING = {"epochs": 2, "batch_size": 4, "workers": 0, "lr": 1e-3, "lr_backbone": 1e-3}


def small_trainer(
    folder: Path,
    images: int = 16,
    model_options: dict | None = None,
    log_to: str = "",
    **options: object,
) -> Trainer:
    """A trainer of a tiny model on synthetic shapes; `options` are fields of `TrainConfig`."""
    device = torch.device("cpu")
    torch.manual_seed(0)
    model = conddetr.build("conditional-detr-tiny", num_classes=3, **{**SMALL_MODEL, **(model_options or {})})
    run = RunConfig(output_dir=str(folder), log_to=log_to, train=TrainConfig(**{**SMALL_TRAINING, **options}))
    size = model.config.image_size
    return Trainer(model, SyntheticShapes(images, 1, size), SyntheticShapes(4, 2, size), run, device)


def batches(run: Trainer, count: int) -> list[Batch]:
    """`count` batches of four training images."""
    dataset = run.train_set
    samples = [dataset.load(i, dataset.plan(i, augmentation_generator(0, 0, i))) for i in range(4 * count)]
    return [collate(samples[first : first + 4]) for first in range(0, 4 * count, 4)]


def counter() -> ctypes.c_int:
    """A counter that processes share, without a lock, which a killed process would keep."""
    return CONTEXT.RawValue(ctypes.c_int, 0)


def run_to_the_end(folder: Path, options: dict, steps: ctypes.c_int) -> None:
    """Train with `small_trainer`, resuming a killed run; counts its steps in `steps`."""
    torch.set_num_threads(1)
    with process_group("cpu"):
        trainer = small_trainer(folder, **options)
        if has_run(folder):
            trainer.resume(folder / LATEST)

        def count(*_: object) -> None:
            steps.value += 1

        trainer.stepper.optimizer.register_step_post_hook(count)
        try:
            trainer.fit()
        except InterruptedRunError:
            sys.exit(143)


def train_without_loggers(folder: Path) -> None:
    """Train; fails if the package of a logger is imported."""
    torch.set_num_threads(1)
    small_trainer(folder, images=4, epochs=1).fit()
    imported = {"tensorboard", "torch.utils.tensorboard", "wandb", "mlflow"} & sys.modules.keys()
    assert not imported, imported


def stop_in_evaluation(folder: Path, options: dict) -> None:
    """Train. The last rank gets SIGTERM after its first evaluated batch; then no rank may evaluate another."""
    torch.set_num_threads(1)
    with process_group("cpu"):
        trainer, evaluated = small_trainer(folder, **options), []

        def count(model: conddetr.DETR, *_: object) -> None:
            if not model.training:
                evaluated.append(1)
                if rank() == world_size() - 1:
                    os.kill(os.getpid(), signal.SIGTERM)

        trainer.model.register_forward_hook(count)
        try:
            trainer.fit()
        except InterruptedRunError:
            assert len(evaluated) == 1
            sys.exit(143)


def steps_of_a_resnet(file: Path, family: str, batches_per_step: int) -> None:
    """Two steps on fixed batches of four images, shared by all ranks; saves gradients and losses.

    The ResNet's norms are frozen, so images of a batch do not affect each other. Every second image has no object: with
    two ranks, every image of the second one.
    """
    torch.set_num_threads(1)
    with process_group("cpu") as device:
        torch.manual_seed(0)
        small = {**SMALL_MODEL, "num_classes": 3, "dropout": 0.0, "decoder_layers": 2}
        # In float32, rounding differs from CPU to CPU and can move a value across the kink of a ReLU.
        model = conddetr.build(f"{family}-r50", **small).train().double()
        model.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(), *inputs[1:]))
        # The learning rate is tiny, because Adam's division would turn rounding errors into differences.
        config = TrainConfig(lr=1e-7, lr_backbone=1e-7, clip_max_norm=0.0)
        stepper = Stepper(model, config, device, steps_per_epoch=2)
        shapes = SyntheticShapes(8, seed=1, image_size=64)
        samples = [shapes.load(index, shapes.plan(index, augmentation_generator(0, 0, index))) for index in range(8)]
        for _, target in samples[1::2]:
            target.update(labels=target["labels"][:0], boxes=target["boxes"][:0])
        for step, step_samples in enumerate((samples[:4], samples[4:])):
            rank_samples = step_samples[rank() :: world_size()]
            size = len(rank_samples) // batches_per_step
            stepper([collate(rank_samples[first : first + size]) for first in range(0, len(rank_samples), size)], step)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        losses = {name: value for name, value in stepper.epoch_means().items() if name.startswith("loss")}
        if rank() == 0:
            torch.save({"gradients": gradients, "losses": losses}, file)


def recomputing_ranks(file: Path) -> None:
    """A step of two accumulated batches on each rank, without and with activation checkpointing; saves the weights."""
    torch.set_num_threads(1)
    with process_group("cpu"):
        results = []
        for recomputes in (False, True):
            run = small_trainer(file.parent, checkpoint_activations=recomputes, lr=1e-2)
            run.stepper(batches(run, 4)[2 * rank() :][:2], 0)
            run.stepper.flush()
            results.append(run.model.state_dict())
        if rank() == 0:
            torch.save(results, file)


def command_line(folder: Path, arguments: list[str]) -> None:
    """Run `conddetr` as one rank; its output goes to `printed-RANK` in the folder."""
    torch.set_num_threads(1)
    with open(folder / f"printed-{os.environ['RANK']}", "w") as file, contextlib.redirect_stdout(file):
        status = main(arguments)
    sys.exit(status)


def hold_folder(folder: Path, worker: ctypes.c_int) -> None:
    """Lock a folder, with a child process like a data loader's; both run until they are killed."""
    with sole_run(folder):
        child = os.fork()
        if child:
            worker.value = child
        time.sleep(LIMIT)


def start(function: Callable[..., None], *arguments: object) -> BaseProcess:
    """Call a function of this module in a new process, forked from one that has imported everything."""
    CONTEXT.set_forkserver_preload(PRELOADED)
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def free_port() -> int:
    """A free port for processes of this machine to meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(size: int, function: Callable[..., None], *arguments: object) -> Sequence[BaseProcess]:
    """Call a function of this module on every rank of a process group, with torchrun's environment."""
    port = free_port()
    return [start(_as_rank, number, size, port, function, *arguments) for number in range(size)]


def _as_rank(number: int, size: int, port: int, function: Callable[..., None], *arguments: object) -> None:
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    function(*arguments)


def wait_for_steps(process: BaseProcess, steps: ctypes.c_int, target: int) -> None:
    """Wait until the process has done `target` steps, or has ended."""
    while process.is_alive() and steps.value < target:
        time.sleep(0.001)


def finish(*processes: BaseProcess) -> None:
    """Wait for processes, which must exit with status 0."""
    for process in processes:
        process.join(LIMIT)
        assert process.exitcode == 0


def assert_same_run(actual: Path, expected: Path) -> None:
    """Everything that two runs saved and logged is equal bit for bit, except times."""
    contents = [{name: read_checkpoint(folder / name) for name in (BEST, LATEST)} for folder in (actual, expected)]
    logs = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (actual, expected)
    ]
    for files in contents:
        del files[LATEST]["seconds"]
        for content in files.values():
            # The save interval and the number of workers must not change anything.
            del content["run"]["output_dir"], content["run"]["train"]["save_every_steps"]
            del content["run"]["train"]["workers"]
    for record in logs[0] + logs[1]:
        del record["seconds"], record["images_per_second"], record["loading_share"]
    assert logs[0] == logs[1]
    assert_equal(*contents)


def assert_equal(actual: object, expected: object) -> None:
    """Equality of nested dicts and lists with tensors in them."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(actual[key], value)
    elif isinstance(expected, (list, tuple)):
        for actual_item, expected_item in zip(actual, expected, strict=True):
            assert_equal(actual_item, expected_item)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
    else:
        assert actual == expected
