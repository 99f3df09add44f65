"""Training: epochs, evaluations and checkpoints of a run that may be killed at any moment.

Source of the recipe: Conditional DETR, section 4.1; `main.py` and `engine.py` of the official code.
"""

import functools
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from conddetr.capture import MAX_GRAPHS
from conddetr.config import lists
from conddetr.config.run import RunConfig
from conddetr.data.batch import Batch
from conddetr.data.device_decoder import DeviceDecoder
from conddetr.data.loader import make_loader
from conddetr.data.sets import HasFiles, ImageSet
from conddetr.engine import distributed
from conddetr.engine.checkpoint import LATEST, CheckpointWriter, has_run, read_latest, save_run
from conddetr.engine.chosen import Chosen, chosen, prove
from conddetr.engine.coco_metrics import CocoResult, coco_library
from conddetr.engine.distributed import StopRequest
from conddetr.engine.early_stopping import EarlyStopping
from conddetr.engine.evaluator import evaluate
from conddetr.engine.graphs import buckets
from conddetr.engine.lines import bar_note, epoch_line, graphs_line
from conddetr.engine.log import RunLog
from conddetr.engine.loggers import Loggers, RunLogger, make_loggers
from conddetr.engine.parameters import describe_rates
from conddetr.engine.precision import WITHOUT_BFLOAT16, has_bfloat16, resolve_precision
from conddetr.engine.preflight import preflight
from conddetr.engine.progress import Progress, say
from conddetr.engine.same_run import check_same_batches, check_same_model, parameter_changes
from conddetr.engine.step import Stepper
from conddetr.files import write_text
from conddetr.interrupt import InterruptedRunError
from conddetr.model.detr import DETR

STOP_TIME, STOP_SIGNAL = 1.0, 2.0
"""Requests to stop, by urgency: end as if all epochs were done; save the state and end at once."""


@dataclass
class Position:
    """Position in a run from which it continues."""

    epoch: int = 0
    batch: int = 0
    """Finished batches of this epoch; if all are finished, the evaluation is next."""
    step: int = 0
    """Finished steps of the whole run."""


class Trainer:
    """Trains and evaluates a model; writes checkpoints, `log.jsonl` and curves into the run's folder.

    With several processes (`torchrun`) each has its own trainer; the first process writes.
    """

    def __init__(
        self,
        model: DETR,
        train_set: ImageSet,
        val_set: ImageSet,
        run: RunConfig,
        device: torch.device,
        loggers: Sequence[RunLogger] = (),
    ) -> None:
        """
        Args:
            model: with as many classes as the data set.
            train_set, val_set: `CocoDetection`, `SyntheticShapes`, or other `ImageSet`s.
            run: how to train, and the folder to write to, created if absent.
            device: where to train.
            loggers: receive the records too, beside those that `run.log_to` names; the first process uses its own.

        Raises:
            ImportError: the package of a logger is not installed.
            ValueError: the model's number of classes is not the data set's; there are fewer images than in a batch;
                `patience` is set and the validation set has no objects; or images cannot be decoded on the device.
        """
        if model.config.num_classes != len(train_set.classes):
            raise ValueError(
                f"num_classes: expected {len(train_set.classes)} as the data set has, "
                f"got {model.config.num_classes} of the model."
            )
        if run.train.patience and getattr(val_set, "objects", None) == 0:
            raise ValueError(
                "Training option patience: the validation set has no objects, so there is no AP that could rise: leave "
                "it out, or name other validation images."
            )
        self.is_main = distributed.is_main()
        """Whether this process writes the run's files."""
        self.loggers = [*make_loggers(run.log_to), *loggers] if self.is_main else []
        self.model, self.device = model.to(device, non_blocking=True), device
        self._requested_precision = run.train.precision
        self._has_bfloat16 = not distributed.any_of(not has_bfloat16(device), device)
        """Whether the devices of all processes have it: they train in one precision."""
        precision = resolve_precision(run.train.precision, self._has_bfloat16)
        prove(device, model.backend)
        pad_buckets = buckets(model.config, model.backend, run.train, device)
        self.config = replace(run.train, pad_buckets=pad_buckets, precision=precision)
        self.run = replace(run, model=model.config, backend=model.backend, train=self.config, augment=train_set.augment)
        self.train_set, self.val_set = train_set, val_set
        self.folder = Path(run.output_dir)
        self.loader = make_loader(
            train_set,
            self.config.batch_size,
            train=True,
            workers=self.config.workers,
            seed=self.config.seed,
            rank=distributed.rank(),
            world=distributed.world_size(),
            pad_buckets=self.config.pad_buckets,
            device=device,
            decoder=self._decoder(),
        )
        steps_per_epoch = math.ceil(len(self.loader) / self.config.accumulate)
        self.stepper = Stepper(model, self.config, device, steps_per_epoch)
        self._limit_graphs()
        self.position = Position()
        self.resumed_from: Path | None = None
        self.changes: list[str] = []
        """Differences between a resumed run and the saved one, one line each."""
        self.seconds = 0.0
        """Training time so far, without evaluation."""
        self.best_ap = -1.0
        self.early_stopping = EarlyStopping()
        self.metrics: dict[str, float] = {}
        """Metrics of the last evaluation."""
        self.result: CocoResult | None = None
        """The last evaluation of this process."""
        self._speed = (0, 0.0)
        self._loading = 0.0
        """Seconds of this epoch in which the process waited for batches, or loaded them itself."""
        self._ahead: tuple[int, Iterator[Batch]] | None = None
        """An epoch that is not begun, and its batches, which workers load already."""

    def _decoder(self) -> DeviceDecoder | None:
        if self.config.decode == "workers":
            return None
        if not isinstance(self.train_set, HasFiles):
            raise ValueError(
                f"Training option decode: {self.train_set.source} are not files that could be decoded: leave it out."
            )
        if self.device.type != "cuda":
            raise ValueError(
                f"Training option decode: `device` needs an NVIDIA GPU, the device is {self.device}: leave it out."
            )
        try:
            return DeviceDecoder(self.device)
        except ValueError as error:
            raise ValueError(f"Training option decode: {error} Train with `workers`.") from error

    def _limit_graphs(self) -> None:
        """With `auto`, use no graphs if steps come in more than `MAX_GRAPHS` kinds."""
        graphs, size = self.stepper.graphs, self.config.accumulate
        kinds = len(self.loader.sampler.shapes) ** size
        if graphs is not None and self.config.cuda_graphs == "auto" and kinds > MAX_GRAPHS:
            graphs.give_up(f"steps of {size} batches come in {kinds} kinds (accumulate, pad_buckets)")

    @property
    def trained(self) -> DETR:
        """The model to use: the moving average of the weights if there is one."""
        return self.stepper.average.model if self.stepper.average else self.model

    @property
    def chosen(self) -> Chosen:
        """The implementations and the precision of this run."""
        model, config = self.model, self.config
        options = {"trains": True, "compiled": config.compile}
        return chosen(model.config, model.backend, self.device, config.precision, **options)

    def resume(self, path: str | Path) -> None:
        """Resume exactly where the checkpoint of a run was saved, even in the middle of an epoch.

        If `checkpoint.pt` is damaged, the previous one is used, with a warning.

        Raises:
            FileNotFoundError, ValueError: not a checkpoint of a run; or one of another model, another class list, or
                (inside an epoch) another order of the images; the message says what differs.
        """
        path, content = read_latest(path)
        absent = [key for key in ("model", "optimizer", "position", "run") if key not in content]
        if absent:
            raise ValueError(
                f"Checkpoint {path} cannot be resumed: it has no {absent[0]!r}, only weights. "
                f"Start from them with --weights {path}."
            )
        check_same_model(path, content, self.train_set.classes, self.model.config)
        position = Position(**content["position"])
        if position.batch:
            check_same_batches(path, content, self.config, self.train_set, distributed.world_size())
        else:
            # With other batches an epoch has another number of steps, and the schedule counts epochs.
            position.step = position.epoch * self.stepper.steps_per_epoch
        added = self.stepper.load_state(content)
        self.changes += parameter_changes(content["run"]["train"], self.config, added)
        self._keep_precision(content["run"]["train"].get("precision", "float32"))
        # Older checkpoints have the backend in the model's configuration.
        was, now = content["run"].get("backend", content["config"].get("backend")), self.model.backend
        if was != now:
            self.changes.append(f"backend was {was}, is {now}: rounding and the random numbers of dropout differ")
        was_decoded = content["run"]["train"].get("decode", "workers")
        if was_decoded != self.config.decode:
            self.changes.append(f"decode was {was_decoded}, is {self.config.decode}: rounding of the pixels differs")
        self.changes += self.chosen.changes(content.get("chosen", {}))
        self.position, self.resumed_from = position, path
        self.seconds, self.best_ap, self.metrics = content["seconds"], content["best_ap"], content["metrics"]
        # Older checkpoints lack it: the count starts with the next evaluation.
        self.early_stopping = EarlyStopping(**content.get("early_stopping", {}))

    def _keep_precision(self, saved: str) -> None:
        """Use the saved run's precision if `auto` allows it and the devices support it."""
        precision = resolve_precision(self._requested_precision, self._has_bfloat16, trained=saved)
        self.config = replace(self.config, precision=precision)
        self.run = replace(self.run, train=self.config)
        self.stepper.config = self.config
        if precision != saved:
            is_requested = self._requested_precision != "auto"
            reason = "as requested" if is_requested else f"{WITHOUT_BFLOAT16}; --precision {saved} keeps it"
            self.changes.append(f"precision was {saved}, is {precision}: {reason}")

    def _data(self) -> dict[str, int]:
        return {"images": len(self.train_set), "processes": distributed.world_size()}

    def fit(self) -> dict[str, float]:
        """Train to the last epoch, or until `patience` or `time_limit` ends the run; a complete run stays as it is.

        Returns:
            The metrics of the last evaluation.

        Raises:
            FileExistsError: the folder holds another run's checkpoint, which would be overwritten.
            FloatingPointError: more steps than may be skipped were not finite; names the first such tensor and images.
            InterruptedRunError: SIGTERM or SIGINT was received; the state is saved.
            ModuleNotFoundError: no library for COCO's metrics is installed.
            Any error of a logger's `start`.
        """
        # Every run ends with an evaluation, so a missing library is reported now, not after the last epoch.
        coco_library()
        if self.resumed_from is None and has_run(self.folder):
            raise FileExistsError(
                f"{self.folder / LATEST} is from an earlier run: resume it, delete it or name another folder."
            )
        if reason := self._why_complete():
            # Killed after the last save, or restarted by a scheduler: not an error.
            if self.is_main:
                say(f"{self.resumed_from} holds {reason}: nothing to train.")
            return self.metrics
        if self.config.preflight:
            self._preflight()
        if self.is_main:
            self._say_start()
        with self._start_loggers() as loggers, StopRequest() as request, CheckpointWriter() as writer:
            log = self._open_log(loggers) if self.is_main else None
            while self.position.epoch < self.config.epochs:
                stop = self._train_epoch(request, writer)
                if stop == STOP_SIGNAL:
                    self.save(writer)
                    self._interrupt(request, writer)
                if self._finish_epoch(log, writer, request, out_of_time=stop == STOP_TIME):
                    break
        return self.metrics

    def _why_complete(self) -> str:
        """The finished epochs of a complete run, and why it ended early if it did; empty: it is not complete."""
        done = f"{self.position.epoch} epochs of {self.config.epochs}"
        if self.position.epoch >= self.config.epochs:
            return done
        line = self.early_stopping.describe(self.config.patience)
        return f"{done}; {line}" if line else ""

    def _preflight(self) -> None:
        line = preflight(
            self.model,
            self.stepper.loss_of,
            self.stepper.optimizer,
            self.loader.sampler.largest_shape(),
            self.config.batch_size,
            self.device,
            self.config.max_targets,
        )
        if self.is_main:
            say(line)

    def _say_start(self) -> None:
        stepper, shapes = self.stepper, len(self.loader.sampler.shapes)
        rates = describe_rates(self.model, self.config, stepper.groups)
        graphs = graphs_line(stepper.graphs, stepper.why_no_graphs, shapes, self.device)
        for line in (stepper.frozen.describe(), rates, self.chosen.line(), graphs):
            if line:
                say(line)

    def _start_loggers(self) -> Loggers:
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
        return Loggers(self.loggers, self.run.to_dict(), self.folder, self.position.epoch, bool(self.resumed_from))

    def _open_log(self, loggers: Loggers) -> RunLog:
        write_text(self.folder / "config.json", json.dumps(self.run.to_dict(), indent=1) + "\n")
        return RunLog(self.folder, self.position.epoch, loggers)

    def _train_epoch(self, request: StopRequest, writer: CheckpointWriter) -> float:
        """Train the rest of the epoch; returns the request to stop that all processes agree on."""
        self.stepper.train_mode()
        images, before, start = 0, self.seconds, time.perf_counter()
        title = f"epoch {self.position.epoch + 1}/{self.config.epochs}"
        with Progress(title, len(self.train_set), disable=not self.is_main) as progress:
            progress.advance(self.position.batch * self.config.batch_size * distributed.world_size())
            for window in _windows(self._batches(), self.config.accumulate):
                request.watch()
                self.stepper(window, self.position.step, self._stop_request(request))
                self.position.batch += len(window)
                self.position.step += 1
                count = sum(len(batch) for batch in window) * distributed.world_size()
                images += count
                self.seconds = before + time.perf_counter() - start
                progress.advance(count, self._note() if progress.is_shown else "")
                if self.stepper.stop:
                    break
                if self._is_time_to_save():
                    self.save(writer)
        self.stepper.flush()
        if not self.stepper.stop and self.position.epoch + 1 < self.config.epochs:
            # Workers load while this epoch is evaluated and saved.
            following = self.position.epoch + 1
            self._ahead = following, self._started(following, 0)
        self.seconds = before + time.perf_counter() - start
        self._speed = (images, self.seconds - before)
        return self.stepper.stop

    def _started(self, epoch: int, start: int) -> Iterator[Batch]:
        """The batches of an epoch, the first ones requested from the workers."""
        self.loader.sampler.set_epoch(epoch, start)
        return iter(self.loader)

    def _batches(self) -> Iterator[Batch]:
        """The batches that are left of this epoch; measures the time until each arrives."""
        self._loading, start = 0.0, time.perf_counter()
        ahead, self._ahead = self._ahead, None
        position = self.position.epoch, self.position.batch
        # Another position follows if the evaluation failed and the trainer resumes.
        for batch in ahead[1] if ahead and (ahead[0], 0) == position else self._started(*position):
            self._loading += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def _note(self) -> str:
        return bar_note(self.stepper.means, self.stepper.skipped, self.device)

    def _stop_request(self, request: StopRequest) -> float:
        if request.name:
            return STOP_SIGNAL
        return STOP_TIME if 0 < self.config.time_limit <= self.seconds else 0.0

    def _is_time_to_save(self) -> bool:
        every = self.config.save_every_steps
        return every > 0 and self.position.step % every == 0 and self.position.batch < len(self.loader)

    def _interrupt(self, request: StopRequest, writer: CheckpointWriter) -> None:
        """End the run after its state is written."""
        writer.wait()
        raise InterruptedRunError(f"{request.name or 'A signal'} received: the state is in {self.folder / LATEST}.")

    def _finish_epoch(
        self, log: RunLog | None, writer: CheckpointWriter, request: StopRequest, out_of_time: bool
    ) -> bool:
        """Evaluate if it is due, log, and save. Returns whether the run ends, on which all processes agree."""
        request.watch()
        epoch = self.position.epoch
        is_last = out_of_time or epoch + 1 == self.config.epochs
        is_best = False
        record = {"epoch": epoch, **self._record()}
        if is_last or (epoch + 1) % self.config.eval_every == 0:
            # Save first, so that a failed evaluation does not lose the epoch.
            self.save(writer)
            self.metrics = self._evaluate(request, writer)
            record.update(self.metrics)
            # Only the first process has metrics.
            ap = self.metrics.get("AP", -1.0)
            is_best = ap > self.best_ap
            self.best_ap = max(self.best_ap, ap)
            self.early_stopping.update(ap, self.config.min_delta)
            is_last |= distributed.any_of(self.early_stopping.is_over(self.config.patience), self.device)
        self.stepper.start_epoch()
        self.position = Position(epoch + 1, 0, self.position.step)
        # The record first: a run that is killed before the save evaluates again when it resumes, and replaces it.
        if log is not None:
            log.write(record, is_last)
            say(epoch_line(record, self.config.epochs))
        keep = self.config.save_every > 0 and (epoch + 1) % self.config.save_every == 0
        self.save(writer, epoch=epoch + 1, is_best=is_best, keep=keep)
        if self.is_main and (line := self.early_stopping.describe(self.config.patience)):
            say(line)
        return is_last

    def _record(self) -> dict[str, float]:
        images, seconds = self._speed
        record = {
            "step": self.position.step,
            **self._rates(),
            **self.stepper.epoch_means(),
            "skipped_steps": self.stepper.skipped,
            "seconds": self.seconds,
            "images_per_second": images / seconds if seconds else 0.0,
            "loading_share": self._loading / seconds if seconds else 0.0,
        }
        if self.device.type == "cuda":
            record["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        if self.stepper.graphs is not None:
            record["cuda_graphs"] = len(self.stepper.graphs.recorded)
            record["cuda_graphs_gib"] = self.stepper.graphs.bytes / 2**30
        return record

    def _rates(self) -> dict[str, float]:
        """Learning rates of the last step: `lr`, `lr_backbone`, and one for each of `lr_patterns`."""
        patterns = [f"lr_pattern/{pattern}" for pattern in lists.rates("lr_patterns", self.config.lr_patterns)]
        rates = self.stepper.learning_rates(self.position.step - 1)
        return dict(zip(("lr", "lr_backbone", *patterns), rates, strict=True))

    def _evaluate(self, request: StopRequest, writer: CheckpointWriter) -> dict[str, float]:
        """The twelve metrics; empty on all ranks but 0. A signal to any process ends the run after the batch."""

        def check_signals() -> None:
            if distributed.any_of(bool(request.name), self.device):
                self._interrupt(request, writer)

        result = evaluate(
            self.trained,
            self.train_set.classes,
            self.val_set,
            self.device,
            self.config.batch_size,
            self.config.workers,
            distributed.rank(),
            distributed.world_size(),
            self.config.pad_buckets,
            check_signals,
            precision=self.config.precision,
        )
        self.result = result
        return result.metrics if result else {}

    def save(self, writer: CheckpointWriter, epoch: int = 0, is_best: bool = False, keep: bool = False) -> None:
        """Write the state of the run in the background; every process must call it. Arguments as `save_run`."""
        self.stepper.flush()
        state = self.stepper.state()
        if not self.is_main:
            return
        content = {
            **state,
            "config": self.model.config.to_dict(),
            "classes": self.train_set.classes,
            "position": asdict(self.position),
            "data": self._data(),
            "seconds": self.seconds,
            "best_ap": self.best_ap,
            "early_stopping": asdict(self.early_stopping),
            "metrics": self.metrics,
            "run": self.run.to_dict(),
            "chosen": self.chosen.to_dict(),
        }
        writer.submit(functools.partial(save_run, self.folder, epoch=epoch, is_best=is_best, keep=keep), content)


def _windows(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Groups of `size` batches; the last one of the epoch may be smaller."""
    window: list[Batch] = []
    for batch in batches:
        window.append(batch)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window
