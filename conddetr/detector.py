"""A detector that is ready to use: weights, class names and preprocessing in one object."""

from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from conddetr import config as configs
from conddetr.config.checks import check_fraction, check_least
from conddetr.detection import Detection, Frame, Prediction
from conddetr.devices import find_device
from conddetr.engine.checkpoint import save_checkpoint, save_weights
from conddetr.engine.precision import check_precision, for_inference, has_bfloat16, resolve_precision
from conddetr.model.detr import DETR
from conddetr.model.postprocess import postprocess
from conddetr.weights.load import load_model
from conddetr.weights.public import locate

if TYPE_CHECKING:
    from conddetr.config.run import DataConfig
    from conddetr.data.images import ImageLike
    from conddetr.engine.coco_metrics import Detections
    from conddetr.engine.loggers import RunLogger
    from conddetr.export import ExportReport
    from conddetr.prediction.stream import Inference
    from conddetr.viz.attention import AttentionMaps


class Detector:
    """A model with its class list: untrained, as `Detector("conditional-detr-r50")`, or trained, as
    `Detector.from_checkpoint(file)` or `Detector("conditional-detr-r50", weights="coco")`.
    """

    def __init__(
        self,
        model: DETR | str,
        classes: Sequence[dict[str, Any]] = (),
        device: str | None = None,
        weights: str | Path | None = None,
        precision: str = "auto",
        backend: str | None = None,
        pretrained_backbone: bool | None = None,
        **overrides: Any,
    ) -> None:
        """
        Args:
            model: a model with weights; or the name of a preset, to be trained first unless `weights` are given.
            classes: `id` (category id of the data set) and `name` of every label of a model with weights.
            device: `cpu` or a GPU, as torch names it; default: CUDA if available.
            weights: weights of a preset: `coco`, trained on COCO and downloaded from HuggingFace's hub; `official`, the
                authors' file; or a path as for `from_checkpoint`. The detector then has the weights' class list and is
                ready to use. Training on other classes starts from these weights without the class head.
                `conddetr.weights.public` has the table of names.
            precision: `float32`, `bfloat16`, or `auto`; see the property `precision`.
            backend: with a preset: as in `build`; default: `auto`.
            pretrained_backbone: with an untrained preset: as in `build`; default: True, except for `tiny`.
            overrides: with a preset: fields of `ModelConfig`, e.g. `num_queries=100`.

        Raises:
            ValueError: no such device; the number of classes is not the model's; unknown preset, override or name of
                weights; the weights do not fit.
            FileNotFoundError, ImportError, OSError: `weights` are not available; the message says what to do.
        """
        self.device = find_device(device)
        check_precision(precision)
        self._precision = precision
        requested = {"backend": backend, "pretrained_backbone": pretrained_backbone}
        build_options: dict[str, Any] = {name: value for name, value in requested.items() if value is not None}
        self.run: dict[str, Any] | None = None
        """The whole configuration of the run that trained the weights, as `RunConfig.to_dict`; None: not known."""
        self.metrics: dict[str, float] | None = None
        """COCO's twelve metrics of the last evaluation in training; None: not known."""
        if weights is not None:
            if not isinstance(model, str):
                raise ValueError("weights: expected the name of a preset with it; a model has its own weights.")
            configs.check_build(configs.resolve(model, **overrides).backbone, **build_options)
            model, content = load_model(locate(weights, model), model, backend=backend or "auto", **overrides)
            classes, build_options, overrides = classes or content.classes or (), {}, {}
            self.run, self.metrics = content.run, content.metrics
        if isinstance(model, str):
            self.config = configs.resolve(model, **overrides)
            configs.check_build(self.config.backbone, **build_options)
            self._options: dict[str, Any] = {"preset": model, **build_options, **overrides}
            self._model: DETR | None = None
            self.classes: list[dict[str, Any]] = []
            return
        if build_options or overrides:
            raise ValueError(
                f"{next(iter((*build_options, *overrides)))}: options apply to a preset, not to a built model."
            )
        if len(classes) != model.config.num_classes:
            raise ValueError(f"classes: expected {model.config.num_classes} as the model has, got {len(classes)}.")
        self.config = model.config
        self._options = _options_of(model)
        self._model = model.to(self.device).eval()
        self.classes = list(classes)

    @property
    def model(self) -> DETR:
        """The model, in eval mode.

        Raises:
            ValueError: the detector has no weights yet.
        """
        if self._model is None:
            raise ValueError("This detector has no weights yet: train it, or use Detector.from_checkpoint(file).")
        return self._model

    @property
    def precision(self) -> str:
        """Precision of inference: `float32`, or `bfloat16` by autocast, with heads in float32. A cast model computes in
        its own dtype.

        `auto` means the precision in which the weights were trained, or bfloat16 if that is not known. On a device that
        is not an NVIDIA GPU of compute capability 8.0 or newer, it means float32.
        """
        trained = (self.run or {}).get("train", {}).get("precision")
        return resolve_precision(self._precision, has_bfloat16(self.device), trained)

    def fused(
        self,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        graphs: bool = False,
        compile: bool = False,
    ) -> "Detector":
        """A frozen copy for inference at full speed, for loops over single images; see `DETR.fused`.

        `evaluate`, and `predict` with several images, make such a copy automatically in each call.

        Args:
            backend: the copy's backend, as in `build`; default: the model's.
            dtype: float16 or bfloat16 to compute in, as in `DETR.fused`; default: from `precision`.
            graphs: on a GPU, replay CUDA graphs, one for each batch shape; see `DETR.fused`.
            compile: compile the copy with `torch.compile`: at the first call, and again for a second image size or
                batch size, then for all. On a CPU it needs a C++ compiler and takes minutes.

        Returns:
            A detector that predicts, evaluates and exports like this one, but cannot be trained or saved. Later changes
            of this detector's weights do not affect it.

        Raises:
            ValueError: both graphs and compile.
        """
        if graphs and compile:
            raise ValueError(
                "graphs and compile: expected at most one of them, because a compiled model has no graphs."
            )
        if dtype is None and self.precision == "bfloat16" and self.model.dtype == torch.float32:
            dtype = torch.bfloat16
        fused = self.model.fused(backend, dtype, graphs)
        if compile:
            fused.compile(fullgraph=True)
        copy = Detector(fused, self.classes, str(self.device), precision=self._precision)
        copy.run, copy.metrics = self.run, self.metrics
        return copy

    def _refuse_copies(self, done: str) -> None:
        if self.model.fusion is not None:
            raise ValueError(
                f"A frozen copy (Detector.fused) cannot be {done}: use the detector that it was made from."
            )

    def train(self, *, loggers: "Sequence[RunLogger]" = (), **options: Any) -> dict[str, float]:
        """Train on a data set and write checkpoints, log and curves into a folder; the detector is then ready to use.

        A detector with weights starts from them, without its class head if the classes differ.

        Args:
            loggers: objects with the methods of `conddetr.engine.loggers.RunLogger`, which receive the record of each
                epoch; the option `log_to` names TensorBoard, W&B and MLflow.
            options: fields of `RunConfig`, `DataConfig`, `TrainConfig` and `AugmentConfig` in `conddetr.config`: the
                options of `conddetr train`, e.g. `coco_path="coco", epochs=50, output_dir="runs/mine", resume="auto"`.

        Returns:
            COCO's twelve metrics of the last evaluation.

        Raises:
            ValueError: unknown option (with the nearest name) or a wrong value; the data set or a checkpoint does
                not fit; or this is a copy made by `fused`.
            OSError: a file is missing or cannot be written.
            ImportError: the package of a logger is not installed.
            FloatingPointError: losses remain not finite; the message names the first such tensor and the images.
        """
        from conddetr.config.run import flatten, resolve_run
        from conddetr.engine.run import train

        if self._model is not None:
            self._refuse_copies("trained")
        options_of_detector = {**self._options, "device": str(self.device), "precision": self._precision}
        run = resolve_run({**options_of_detector, **flatten(options)})
        content = {"model": self._model.state_dict(), "classes": self.classes} if self._model else None
        trainer = train(run, start=content, loggers=loggers)
        self.device = trainer.device
        self._model, self.classes = trainer.trained.eval(), trainer.train_set.classes
        self.config = self._model.config
        self._options = _options_of(self._model)
        self.run, self.metrics = trainer.run.to_dict(), trainer.metrics or None
        return trainer.metrics

    @property
    def data(self) -> "DataConfig | None":
        """The data it was trained on, the default of `evaluate`; None: not known."""
        # Imported here, because `import conddetr` does not need it.
        from conddetr.config.run import DataConfig

        return DataConfig(**self.run["data"]) if self.run else None

    def evaluate(
        self,
        batch_size: int = 2,
        workers: int = 2,
        classes_by_name: bool = False,
        split: str = "val",
        report: str | Path | None = None,
        **data: Any,
    ) -> dict[str, float]:
        """COCO's twelve metrics: on all images of an annotation file that is named, otherwise on validation images. One
        line is printed that describes the data.

        Args:
            batch_size: images per forward pass.
            workers: processes that load images.
            classes_by_name: match classes by name and ignore their ids in the data set.
            split: `val` or `test` of a `dataset`.
            report: an HTML file to write, with curves, the best score threshold, the confusion matrix and pictures of
                the worst errors; an older report is replaced.
            data: fields of `DataConfig` in `conddetr.config`, e.g. `coco_path="coco"`, or `annotations` and
                `images`; default: the validation images of its training.

        Returns:
            The metrics by name, in [0, 1]; -1 if a metric is undefined, such as that of small objects if there are
            none.

        Raises:
            ValueError: unknown option, or one that has no effect with the others; `batch_size` below 1 or `workers`
                below 0; no data is named and the training data is not known; the data set has classes that the detector
                lacks, or an id with another name; `report` does not end in `.html` or is another file.
            FileNotFoundError: no such data set.
            OSError: `report` cannot be written.
        """
        from conddetr.data.loader import check_loading
        from conddetr.engine.coco_metrics import coco_library, coco_result
        from conddetr.engine.evaluator import detect
        from conddetr.engine.progress import say
        from conddetr.engine.run import evaluation_set
        from conddetr.viz.report import check_report_target, facts, write_report

        check_loading(batch_size, workers)
        if report is not None:
            check_report_target("report", report)
        val_set = evaluation_set(data, self.data, self.classes, self.model.config, split)
        if not val_set.is_annotated:
            raise ValueError(
                f"{val_set.source} has no list 'annotations': there is nothing to compare detections with."
            )
        options: dict[str, Any] = {"by_name": classes_by_name, "precision": self.precision}
        coco_library()
        detections = detect(self.model, self.classes, val_set, self.device, batch_size, workers, **options)
        # They are None only with several processes.
        detections = cast("Detections", detections)
        truth = val_set.ground_truth()
        result = coco_result(truth, detections, source=val_set.source)
        say(result.describe())
        if report is not None:
            say(write_report(report, result, truth, detections, val_set, facts(self)))
        return result.metrics

    def save(self, path: str | Path) -> Path:
        """Write weights, classes, and the configuration of model and run; `from_checkpoint` reads the file.

        Args:
            path: ending in `.safetensors` or `.pt`.

        Raises:
            ValueError: another ending; or this is a copy made by `fused`.
        """
        self._refuse_copies("saved")
        path = Path(path)
        if path.suffix not in (".safetensors", ".pt"):
            raise ValueError(f"path: expected a name ending in .safetensors or .pt, got {str(path)!r}.")
        content = {"model": self.model.state_dict(), "config": self.config.to_dict(), "classes": self.classes}
        known = {"run": self.run, "metrics": self.metrics}
        content.update({key: value for key, value in known.items() if value is not None})
        save = save_weights if path.suffix == ".safetensors" else save_checkpoint
        save(path, content)
        return path

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        preset: str | None = None,
        device: str | None = None,
        backend: str = "auto",
        precision: str = "auto",
    ) -> "Detector":
        """Load a checkpoint of ours, an official one of Conditional DETR or DETR, or one of transformers'
        `ConditionalDetrForObjectDetection`.

        Args:
            path: the file, or a folder of `save_pretrained`. If it has a moving average, that is loaded. With a preset
                also the name of public weights, `coco` or `official`.
            preset: the preset of a checkpoint that is not ours; needed only for dilation, which weights do not show.
                Default: detected from the weights and their metadata.
            device: as torch names it; default: CUDA if available.
            backend: as in `build`, independent of the backend that trained the weights.
            precision: as for `Detector`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged, or the weights do not fit; the message gives the expected and the actual value.
        """
        # Checked before a download.
        find_device(device)
        check_precision(precision)
        model, weights = load_model(locate(path, preset), preset, backend=backend)
        detector = cls(model, weights.classes or (), device, precision=precision)
        detector.run, detector.metrics = weights.run, weights.metrics
        return detector

    @classmethod
    def from_pretrained(
        cls,
        repository: str | Path,
        *,
        preset: str | None = None,
        device: str | None = None,
        backend: str = "auto",
        precision: str = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> "Detector":
        """Load a detector that `push_to_hub` uploaded to HuggingFace's hub, or a `ConditionalDetrForObjectDetection`.

        Args:
            repository: `owner/name`; or a folder, which needs no hub.
            preset, device, backend, precision: as in `from_checkpoint`.
            revision, token, cache_dir, force_download, local_files_only: as in `huggingface_hub`.

        Raises:
            ImportError: `huggingface_hub` is not installed: `pip install 'conddetr[hub]'`.
            OSError: no network and not in the cache, or no such repository.
            ValueError: as `from_checkpoint`.
        """
        find_device(device)
        if Path(repository).is_dir():
            return cls.from_checkpoint(repository, preset, device, backend, precision)
        from conddetr.hub import download

        file = download(
            str(repository),
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            token=token,
            local_files_only=local_files_only,
        )
        return cls.from_checkpoint(file, preset, device, backend, precision)

    def save_pretrained(
        self, folder: str | Path, metrics: Mapping[str, float] | None = None, license: str | None = None
    ) -> Path:
        """Write a folder for HuggingFace's hub: weights, configuration, and a model card unless the folder has one.

        The run's configuration is included, with only the last part of every path.

        Args:
            folder: created if absent; `from_pretrained` and `from_checkpoint` read it.
            metrics: COCO metrics by name for the card; default: those of the last evaluation in training.
            license: the weights' license for the card, as the hub names it, e.g. `apache-2.0`.

        Raises:
            ImportError: `huggingface_hub` is not installed: `pip install 'conddetr[hub]'`.
            ValueError: this is a copy made by `fused`.
        """
        from conddetr.hub import HubDetector

        self._refuse_copies("saved")
        card = {"metrics": metrics, "license": license}
        HubDetector(self.model, self.classes, self.run, self.metrics).save_pretrained(folder, model_card_kwargs=card)
        return Path(folder)

    def push_to_hub(
        self,
        repository: str,
        *,
        metrics: Mapping[str, float] | None = None,
        license: str | None = None,
        commit_message: str = "Upload detector",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Upload the files of `save_pretrained` to HuggingFace's hub, for `Detector.from_pretrained(repository)`.

        Args:
            repository: `owner/name`, created if absent.
            metrics, license: as in `save_pretrained`.
            commit_message, private, token, branch, create_pr: as in `huggingface_hub`.

        Returns:
            The URL of the commit.

        Raises:
            ImportError: `huggingface_hub` is not installed: `pip install 'conddetr[hub]'`.
            ValueError: this is a copy made by `fused`.
        """
        from conddetr.hub import HubDetector

        self._refuse_copies("uploaded")
        return HubDetector(self.model, self.classes, self.run, self.metrics).push_to_hub(
            repository,
            commit_message=commit_message,
            private=private,
            token=token,
            branch=branch,
            create_pr=create_pr,
            model_card_kwargs={"repository": repository, "metrics": metrics, "license": license},
        )

    def predict(
        self,
        images: "ImageLike | Sequence[ImageLike]",
        threshold: float = 0.5,
        top_k: int = 100,
        batch_size: int = 1,
    ) -> list[Detection]:
        """Detect objects.

        Args:
            images: one image or a list: file, PIL image, array [H, W] or [H, W, 3], tensor [3, H, W]; see
                `conddetr.data.images.read_image`. They may differ in size. For several images each call makes a frozen
                copy (`DETR.fused`), which takes about as long as copying all weights, unless this detector is such a
                copy or its backend is `eager`.
            threshold: smallest score to keep, in [0, 1].
            top_k: maximum number of objects per image, at least 1.
            batch_size: maximum number of images per forward pass; results do not depend on it, see `predict_stream`.

        Returns:
            One `Detection` per image in their order, always in a list.

        Raises:
            FileNotFoundError, ValueError, TypeError: an image cannot be read; the message names the file, or the
                expected and the actual value.
        """
        # A file name is a sequence too.
        several = cast("Sequence[ImageLike]", images if isinstance(images, (list, tuple)) else [images])
        if len(several) == 1:
            # Imported here: torchvision's transforms take 0.17 s to import, `import conddetr` without them 0.02 s.
            from conddetr.data.images import read_image

            check_least("batch_size", batch_size, 1)
            return self._inference(self.model, threshold, top_k).detect([read_image(several[0])])
        return [prediction.detection for prediction in self.predict_stream(several, threshold, top_k, batch_size)]

    def predict_stream(
        self,
        images: "Iterable[ImageLike | Frame]",
        threshold: float = 0.5,
        top_k: int = 100,
        batch_size: int = 1,
        ahead: int | None = None,
    ) -> Generator[Prediction, None, None]:
        """Detect objects in many images with bounded memory, while threads read the next ones.

        A batch holds only images that are resized to one shape, because padding would change their results. So results
        depend on the batch size by rounding only: on 164 COCO images, with the tiny preset in float32 and batches of 1,
        2 and 7 images, scores differed by at most 7e-7 and boxes by at most 1.3e-4 pixels.

        Args:
            images: as for `predict`, also from a generator, which runs in another thread, such as the frames of a
                `conddetr.prediction.video.Video`.
            threshold, top_k, batch_size: as for `predict`.
            ahead: maximum number of images that are taken from `images` and not yet returned; more fill batches of rare
                shapes better. Default: four batches, at least 8. For the shortest delay of a camera: 1.

        Yields:
            One `Prediction` per image in their order. If an image cannot be read, its `error` says why, its `detection`
            raises that error, and the stream continues. An error of `images` itself is raised in its place.

        Raises:
            ValueError: a number is out of its range, or a compiled model cannot be compiled.
        """
        from conddetr.prediction.stream import images_ahead, stream

        check_least("batch_size", batch_size, 1)
        if ahead is not None:
            check_least("ahead", ahead, 1)
        inference = self._inference(for_inference(self.model, self.precision), threshold, top_k)
        return stream(inference, images, batch_size, images_ahead(batch_size) if ahead is None else ahead)

    def _inference(self, model: DETR, threshold: float, top_k: int) -> "Inference":
        from conddetr.prediction.stream import Inference

        check_fraction("threshold", threshold)
        check_least("top_k", top_k, 1)
        return Inference(model, self.device, self.precision, self.classes, threshold, top_k)

    @torch.inference_mode()
    def attention(
        self, image: "ImageLike", queries: Sequence[int] | None = None, top_k: int = 1, layer: int = -1
    ) -> "tuple[Detection, AttentionMaps]":
        """Attention maps of a decoder layer for detected objects; `conddetr.viz.attention.attention_figure` draws them.

        Args:
            image: as in `predict`.
            queries: object queries to show, each with its best class; default: those of the best detections.
            top_k: number of queries if `queries` is not given.
            layer: decoder layer, from 0; negative: from the end.

        Returns:
            The detections of the queries, one object each, and the maps of all queries.

        Raises:
            ValueError: no such query or layer, or `top_k` below 1.
            FileNotFoundError, ValueError, TypeError: as `predict`.
        """
        from conddetr.data.images import read_image
        from conddetr.prediction.stream import detection_of, model_input
        from conddetr.viz.attention import attention_maps

        config = self.model.config
        if top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {top_k}.")
        for query in queries or ():
            if not 0 <= query < config.num_queries:
                raise ValueError(f"queries: expected 0 to {config.num_queries - 1}, got {query}.")
        image = read_image(image)
        output, maps = attention_maps(self.model, model_input(self.model, image, self.device), layer)
        candidates = output["pred_logits"][0].numel()
        detections = postprocess(output, [(image.shape[-2], image.shape[-1])], candidates, config.activation)[0]
        # Best first, so the first row of a query is its best class.
        rows: dict[int, int] = {}
        for row, query in enumerate(detections["queries"].tolist()):
            rows.setdefault(query, row)
        chosen = list(rows)[:top_k] if queries is None else queries
        return detection_of(detections, [rows[query] for query in chosen], self.classes), maps

    def export(
        self,
        path: str | Path,
        format: str = "onnx",
        size: tuple[int, int] | None = None,
        *,
        postprocess: bool = False,
        top_k: int = 100,
        precision: Literal["float32", "float16"] = "float32",
        check_with: Literal["", "openvino"] = "",
    ) -> "ExportReport":
        """Write a file that runs without this package and check it against the model; see `conddetr.export.export`."""
        from conddetr.export import export

        return export(
            self.model,
            path,
            format,
            size,
            self.classes,
            postprocess=postprocess,
            top_k=top_k,
            precision=precision,
            check_with=check_with,
        )


def _options_of(model: DETR) -> dict[str, Any]:
    """Options with which training builds the same model, for existing weights."""
    config = model.config
    build_options = {"backend": model.backend, "pretrained_backbone": False}
    return {
        "preset": configs.preset_name(config.family, config.backbone, config.dilation),
        **build_options,
        **config.to_dict(),
    }
