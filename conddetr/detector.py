"""A trained detector, ready to use: weights, class names and preprocessing in one object."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from conddetr import config as configs
from conddetr.config.checks import check_fraction, check_least
from conddetr.detection import Detection
from conddetr.devices import find_device
from conddetr.engine.checkpoint import save_checkpoint, save_weights
from conddetr.engine.precision import autocast, check_precision, for_inference, has_bfloat16, resolve_precision
from conddetr.model.detr import DETR
from conddetr.model.postprocess import postprocess
from conddetr.weights.load import load_model
from conddetr.weights.public import locate

if TYPE_CHECKING:
    from conddetr.config.run import DataConfig
    from conddetr.data.images import ImageLike
    from conddetr.engine.coco_metrics import CocoResult
    from conddetr.export import ExportReport
    from conddetr.viz.attention import AttentionMaps


class Detector:
    """A model with its class list: to be trained, `Detector("conditional-detr-r50")`, or trained,
    `Detector.from_checkpoint(file)`, `Detector("conditional-detr-r50", weights="coco")`.
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
            model: with weights; or the name of a preset, to be trained first unless `weights` are named.
            classes: `id` (category id of the data set) and `name` of every label of a model with weights.
            device: `cpu` or a GPU, as torch names it; default CUDA where there is one.
            weights: of a preset: `coco`, trained on COCO and downloaded from HuggingFace's hub; `official`, the file of
                the authors; or a path as for `from_checkpoint`. The detector is then ready, with the weights' class
                list; trained on other classes it starts from them without the class head. `conddetr.weights.public`
                has the table of names.
            precision: `float32`, `bfloat16`, or `auto`, of which the property of this name says what it means.
            backend: with a preset: as in `build`; default: `auto`.
            pretrained_backbone: with a preset to be trained: as in `build`; default: True for a ResNet.
            overrides: with a preset: fields of `ModelConfig`, e.g. `num_queries=100`.

        Raises:
            ValueError: no such device here; the number of classes is not the model's; unknown preset, override or name
                of weights; the weights do not fit.
            FileNotFoundError, ImportError, OSError: `weights` are not to be had; says what to do.
        """
        self.device = find_device(device)
        check_precision(precision)
        self._precision = precision
        given = {"backend": backend, "pretrained_backbone": pretrained_backbone}
        how: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        self.run: dict[str, Any] | None = None
        """The whole configuration of the run that the weights are of, as `RunConfig.to_dict`; None: not known."""
        self.metrics: dict[str, float] | None = None
        """COCO's twelve numbers of the last evaluation in training; None: not known."""
        if weights is not None:
            if not isinstance(model, str):
                raise ValueError("weights: expected the name of a preset with them; a model has its own weights.")
            configs.check_build(configs.resolve(model, **overrides).backbone, **how)
            model, content = load_model(locate(weights, model), model, backend=backend or "auto", **overrides)
            classes, how, overrides = classes or content.classes or (), {}, {}
            self.run, self.metrics = content.run, content.metrics
        if isinstance(model, str):
            self.config = configs.resolve(model, **overrides)
            configs.check_build(self.config.backbone, **how)
            self._options: dict[str, Any] = {"preset": model, **how, **overrides}
            self._model: DETR | None = None
            self.classes: list[dict[str, Any]] = []
            return
        if how or overrides:
            raise ValueError(f"{next(iter((*how, *overrides)))}: options change a preset, not a model that is built.")
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
            ValueError: it was never trained.
        """
        if self._model is None:
            raise ValueError("This detector has no weights yet: train it, or take Detector.from_checkpoint(file).")
        return self._model

    @property
    def precision(self) -> str:
        """What it computes in: `float32`, or `bfloat16` by autocast, with heads in float32. A model that was cast
        computes in its own dtype.

        `auto` means what the weights were trained in, and bfloat16 where that is not known. Where the device is no
        NVIDIA GPU of compute capability 8.0 or newer, it means float32.
        """
        trained = (self.run or {}).get("train", {}).get("precision")
        return resolve_precision(self._precision, has_bfloat16(self.device), trained)

    def fused(self, backend: str | None = None, dtype: torch.dtype | None = None, graphs: bool = False) -> "Detector":
        """A frozen copy for inference at full speed, for loops over single images; see `DETR.fused`.

        `predict` over several images and `evaluate` make one by themselves, anew for each call.

        Args:
            backend: of the copy, as in `build`; default: the model's own.
            dtype: float16 or bfloat16 to compute in, as `DETR.fused` takes it; default: by `precision`.
            graphs: on a GPU, replay CUDA graphs, one for each shape of a batch; see `DETR.fused`.

        Returns:
            A detector that predicts, evaluates and exports as this one does, but cannot be trained or saved. What
            happens to this one's weights later does not change it.
        """
        if dtype is None and self.precision == "bfloat16" and self.model.dtype == torch.float32:
            dtype = torch.bfloat16
        fused = self.model.fused(backend, dtype, graphs)
        copy = Detector(fused, self.classes, str(self.device), precision=self._precision)
        copy.run, copy.metrics = self.run, self.metrics
        return copy

    def _refuse_copies(self, done: str) -> None:
        if self.model.fusion is not None:
            raise ValueError(f"A frozen copy (Detector.fused) cannot be {done}: take the detector that it was made of.")

    def train(self, **options: Any) -> dict[str, float]:
        """Train on a data set and leave checkpoints, log and curves in a folder; the detector is then ready to use.

        A detector that has weights starts from them, without its class head where the classes are others.

        Args:
            options: fields of `RunConfig`, `DataConfig` and `TrainConfig` in `conddetr.config`: the options of
                `conddetr train`, e.g. `coco_path="coco", epochs=50, output_dir="runs/mine", resume="auto"`.

        Returns:
            COCO's twelve numbers of the last evaluation.

        Raises:
            ValueError: unknown option (with the nearest name) or a wrong value; the data set or a checkpoint does
                not fit; or this is a copy that `fused` made.
            OSError: a file is missing or cannot be written.
            FloatingPointError: losses stay not finite; names the first such tensor and the images.
        """
        from conddetr.config.run import flatten, resolve_run
        from conddetr.engine.run import train

        if self._model is not None:
            self._refuse_copies("trained")
        own = {**self._options, "device": str(self.device), "precision": self._precision}
        run = resolve_run({**own, **flatten(options)})
        content = {"model": self._model.state_dict(), "classes": self.classes} if self._model else None
        trainer = train(run, start=content)
        self.device = trainer.device
        self._model, self.classes = trainer.trained.eval(), trainer.train_set.classes
        self.config = self._model.config
        self._options = _options_of(self._model)
        self.run, self.metrics = trainer.run.to_dict(), trainer.metrics or None
        return trainer.metrics

    @property
    def data(self) -> "DataConfig | None":
        """What it was trained on, the default of `evaluate`; None: not known."""
        # Here, not above: `import conddetr` does without it.
        from conddetr.config.run import DataConfig

        return DataConfig(**self.run["data"]) if self.run else None

    def evaluate(
        self,
        batch_size: int = 2,
        workers: int = 2,
        classes_by_name: bool = False,
        split: str = "val",
        **data: Any,
    ) -> dict[str, float]:
        """COCO's twelve numbers, on all images of an annotation file that is named, else on validation images. What
        they are of is printed in a line.

        Args:
            batch_size: images per forward pass.
            workers: processes that load images.
            classes_by_name: match classes by name, whatever their ids in the data set.
            split: `val` or `test` of a `dataset`.
            data: fields of `DataConfig` in `conddetr.config`, e.g. `coco_path="coco"`, or `annotations` and
                `images`; default: the validation images of its training.

        Returns:
            The numbers by name, in [0, 1]; -1 for one that does not exist, as that of small objects where there are
            none.

        Raises:
            ValueError: unknown option, or one without use beside the others; `batch_size` below 1 or `workers` below 0;
                no data is named and that of the training is not known; the data set has classes that the detector does
                not know, or an id with another name.
            FileNotFoundError: no such data set.
        """
        from conddetr.data.batch import check_loading
        from conddetr.engine.evaluator import evaluate
        from conddetr.engine.progress import say
        from conddetr.engine.run import evaluation_set

        check_loading(batch_size, workers)
        val_set = evaluation_set(data, self.data, self.classes, self.model.config, split)
        if not val_set.is_annotated:
            raise ValueError(
                f"{val_set.source} has no list 'annotations': there is nothing to compare detections with."
            )
        options: dict[str, Any] = {"by_name": classes_by_name, "precision": self.precision}
        result = evaluate(self.model, self.classes, val_set, self.device, batch_size, workers, **options)
        # Only with several processes it may be absent.
        result = cast("CocoResult", result)
        say(result.describe())
        return result.metrics

    def save(self, path: str | Path) -> Path:
        """Write weights, classes, and the configuration of model and run, to be read by `from_checkpoint`.

        Args:
            path: ending in `.safetensors` or `.pt`.

        Raises:
            ValueError: another ending; or this is a copy that `fused` made.
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
            path: the file, or a folder of `save_pretrained`. A moving average in it is taken. With a preset also the
                name of public weights, `coco` or `official`.
            preset: what it is of, where that is not ours; needed only for dilation, which weights do not tell. Default:
                found from the weights and what is stored with them.
            device: as torch names it; default CUDA where there is one.
            backend: as in `build`, whatever the weights were trained with.
            precision: as of a `Detector`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged, or the weights do not fit; says what it is and what was expected.
        """
        # Better refused now than after a download.
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
        """Load from HuggingFace's hub what `push_to_hub` uploaded, or a `ConditionalDetrForObjectDetection`.

        Args:
            repository: `owner/name`; or a folder, which needs no hub.
            preset, device, backend, precision: as `from_checkpoint`.
            revision, token, cache_dir, force_download, local_files_only: as those of `huggingface_hub`.

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
        """Write a folder for HuggingFace's hub: weights, configuration, and a model card unless it has one.

        The configuration of the run is among them, with the last part of every path.

        Args:
            folder: created if absent; read by `from_pretrained` and `from_checkpoint`.
            metrics: for the card: COCO's numbers by name; default: those of the last evaluation in training.
            license: for the card: of the weights, as the hub names it, e.g. `apache-2.0`.

        Raises:
            ImportError: `huggingface_hub` is not installed: `pip install 'conddetr[hub]'`.
            ValueError: this is a copy that `fused` made.
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
        """Upload what `save_pretrained` writes to HuggingFace's hub; `Detector.from_pretrained(repository)` loads it.

        Args:
            repository: `owner/name`, created if absent.
            metrics, license: as `save_pretrained`.
            commit_message, private, token, branch, create_pr: as those of `huggingface_hub`.

        Returns:
            The address of the commit.

        Raises:
            ImportError: `huggingface_hub` is not installed: `pip install 'conddetr[hub]'`.
            ValueError: this is a copy that `fused` made.
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

    @torch.inference_mode()
    def predict(
        self,
        images: "ImageLike | Sequence[ImageLike]",
        threshold: float = 0.5,
        top_k: int = 100,
    ) -> list[Detection]:
        """Find objects.

        Args:
            images: one image or a list: file, PIL image, array [H, W] or [H, W, 3], tensor [3, H, W]; see
                `conddetr.data.images.read_image`. They may differ in size and run one by one; several on a frozen
                copy that is made anew for each call (`DETR.fused`), which takes about as long as copying all weights,
                unless this detector is one or its backend is `eager`.
            threshold: keep scores of at least this, in [0, 1].
            top_k: keep at most so many per image, at least 1.

        Returns:
            One `Detection` per image, always in a list.

        Raises:
            FileNotFoundError, ValueError, TypeError: an image cannot be read; names the file, or what was
                found and what was expected.
        """
        # Here, not above: torchvision's transforms take 0.17 s to import, `import conddetr` without them 0.02 s.
        from conddetr.data.images import read_image

        check_fraction("threshold", threshold)
        check_least("top_k", top_k, 1)
        # A file name is a sequence too.
        several = cast("Sequence[ImageLike]", images if isinstance(images, (list, tuple)) else [images])
        is_alone = len(several) == 1 or self.model.fusion is not None
        model = self.model if is_alone else for_inference(self.model, self.precision)
        return [self._predict_one(model, read_image(image), threshold, top_k) for image in several]

    def _predict_one(self, model: DETR, image: Tensor, threshold: float, top_k: int) -> Detection:
        with autocast(model, self.precision):
            output = model([self._pixels(image)])
        found = postprocess(output, [(image.shape[-2], image.shape[-1])], top_k, model.config.activation)[0]
        return self._detection(found, found["scores"] >= threshold)

    def _pixels(self, image: Tensor) -> Tensor:
        """[3, H, W] as `read_image` gives it -> what the model takes, in its dtype."""
        from conddetr.data.images import prepare

        config = self.model.config
        return prepare(image.to(self.device), config.image_size, config.max_image_size).to(self.model.dtype)

    def _detection(self, found: dict[str, Tensor], keep: Tensor | list[int]) -> Detection:
        scores, labels, boxes, queries = (found[key][keep].cpu() for key in ("scores", "labels", "boxes", "queries"))
        return Detection(scores, labels, boxes, queries, [self.classes[label]["name"] for label in labels.tolist()])

    @torch.inference_mode()
    def attention(
        self, image: "ImageLike", queries: Sequence[int] | None = None, top_k: int = 1, layer: int = -1
    ) -> "tuple[Detection, AttentionMaps]":
        """Where one decoder layer looks when it finds objects; drawn by `conddetr.viz.attention.attention_figure`.

        Args:
            image: as for `predict`.
            queries: object queries to show, each with its best class; default: those of the best detections.
            top_k: how many, where `queries` does not say which.
            layer: decoder layer, from 0; negative: from the end.

        Returns:
            What the queries found, one object each, and the maps of all queries.

        Raises:
            ValueError: no such query or layer, or `top_k` below 1.
            FileNotFoundError, ValueError, TypeError: as `predict`.
        """
        from conddetr.data.images import read_image
        from conddetr.viz.attention import attention_maps

        config = self.model.config
        if top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {top_k}.")
        for query in queries or ():
            if not 0 <= query < config.num_queries:
                raise ValueError(f"queries: expected 0 to {config.num_queries - 1}, got {query}.")
        image = read_image(image)
        output, maps = attention_maps(self.model, self._pixels(image), layer)
        candidates = output["pred_logits"][0].numel()
        found = postprocess(output, [(image.shape[-2], image.shape[-1])], candidates, config.activation)[0]
        # Best first, so the first place of a query is its best class.
        places: dict[int, int] = {}
        for place, query in enumerate(found["queries"].tolist()):
            places.setdefault(query, place)
        chosen = list(places)[:top_k] if queries is None else queries
        return self._detection(found, [places[query] for query in chosen]), maps

    def export(self, path: str | Path, format: str = "onnx", size: tuple[int, int] | None = None) -> "ExportReport":
        """Write a file that runs without this package and check it against the model; see `conddetr.export.export`."""
        from conddetr.export import export

        return export(self.model, path, format, size, self.classes)


def _options_of(model: DETR) -> dict[str, Any]:
    """By which a training builds such a model, for weights that are there already."""
    config = model.config
    how = {"backend": model.backend, "pretrained_backbone": False}
    return {"preset": configs.preset_name(config.family, config.backbone, config.dilation), **how, **config.to_dict()}
