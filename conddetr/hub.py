"""Detectors on HuggingFace's hub, through `huggingface_hub` with its cache, token and offline switch
(`HF_HUB_OFFLINE`).
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import conddetr
from conddetr import config as configs
from conddetr.engine.checkpoint import save_weights
from conddetr.engine.tables import percent
from conddetr.files import write_text
from conddetr.model.detr import DETR
from conddetr.model.families import FAMILIES
from conddetr.weights.read import CONFIG, PREPROCESSOR, WEIGHT_FILES, read_json

try:
    from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging as logging_of_hub
except ImportError as error:
    raise ImportError("HuggingFace's hub needs huggingface_hub: pip install 'conddetr[hub]'.") from error

log = logging.getLogger(__name__)

# The base classes include the errors of the HTTP library, which depends on the version of huggingface_hub.
_ERRORS: tuple[type[Exception], ...] = (OSError, EntryNotFoundError, HfHubHTTPError, *HfHubHTTPError.__bases__)


class HubError(OSError):
    """A repository of the hub cannot be read."""


@contextlib.contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn any error of reading a repository into one sentence, without a line for each retry."""
    verbosity = logging_of_hub.get_verbosity()
    logging_of_hub.set_verbosity_error()
    try:
        yield
    except HubError:
        raise
    except _ERRORS as error:
        cause = error.__cause__ or error
        reason = next((line for line in str(cause).splitlines() if line.strip()), "no detail")
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{type(cause).__name__}: {reason}"
        raise HubError(
            f"{repository} could not be read from {constants.ENDPOINT} ({reason}) and is not in the cache "
            f"{constants.HF_HUB_CACHE}."
        ) from error
    finally:
        logging_of_hub.set_verbosity(verbosity)


def download(
    repository: str,
    names: Sequence[str] = WEIGHT_FILES,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """Download a repository's weights, and the configuration beside them, into the hub's cache.

    Args:
        repository: `owner/name`.
        names: file names to try; the first that exists is downloaded.
        revision, cache_dir, force_download, token, local_files_only: as in `hf_hub_download`.

    Returns:
        The weight file, or the index of several weight files.

    Raises:
        HubError: no network and not in the cache, no such repository, or no such file in it.
    """

    def get(name: str) -> Path:
        return Path(
            hf_hub_download(
                repository,
                name,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                token=token,
                local_files_only=local_files_only,
                library_name="conddetr",
                library_version=conddetr.__version__,
            )
        )

    with _explained(repository):
        for name in names:
            try:
                file = get(name)
                break
            except EntryNotFoundError:
                if name == names[-1]:
                    raise
        if file.name.endswith(".index.json"):
            for part in sorted({Path(part).name for part in read_json(file).get("weight_map", {}).values()}):
                get(part)
        for name in (CONFIG, PREPROCESSOR):
            try:
                get(name)
            except LocalEntryNotFoundError:
                log.warning(
                    "%s of %s is not in the cache: class names or image sizes may be missing.", name, repository
                )
            except EntryNotFoundError:
                log.info("%s has no %s.", repository, name)
    return file


class HubDetector(ModelHubMixin, library_name="conddetr", pipeline_tag="object-detection", tags=["conditional-detr"]):
    """A detector in the form that `huggingface_hub` saves and uploads."""

    def __init__(
        self,
        model: DETR,
        classes: list[dict[str, Any]],
        run: dict[str, Any] | None,
        metrics: dict[str, float] | None,
    ) -> None:
        """The arguments are those attributes of `conddetr.Detector`."""
        self.model, self.classes, self.run, self.metrics = model, classes, run, metrics

    def _save_pretrained(self, save_directory: Path) -> None:
        metadata = {
            "config": self.model.config.to_dict(),
            "classes": self.classes,
            "run": self.run and _without_paths(self.run),
            "metrics": self.metrics,
        }
        metadata = {key: value for key, value in metadata.items() if value}
        save_weights(save_directory / WEIGHT_FILES[0], {"model": self.model.state_dict(), **metadata})
        # For readers and for the hub's download counter; loading reads the metadata of the weight file.
        content = {"conddetr": conddetr.__version__, **metadata}
        write_text(save_directory / CONFIG, json.dumps(content, indent=1) + "\n")

    def generate_model_card(
        self,
        repository: str = "FOLDER",
        metrics: Mapping[str, float] | None = None,
        license: str | None = None,
    ) -> ModelCard:
        """The README of a repository: data, metrics, and how to load.

        Args:
            repository: the name to load it by.
            metrics: COCO metrics in [0, 1] by name; default: those of the last evaluation in training.
            license: the weights' license, as the hub names it, e.g. `apache-2.0`.
        """
        info = self._hub_mixin_info.model_card_data
        data = ModelCardData(
            license=license, library_name=info.library_name, pipeline_tag=info.pipeline_tag, tags=info.tags
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_card(self, repository, metrics)}")


def _plain(text: str) -> str:
    """Markdown that shows a text literally, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>$#~&])", r"\\\1", " ".join(text.split()))


def _card(detector: HubDetector, repository: str, metrics: Mapping[str, float] | None) -> str:
    config = detector.model.config
    family = FAMILIES[config.family]
    model = f"[{family.title}]({family.paper})"
    preset = configs.preset_name(config.family, config.backbone, config.dilation)
    parameters = sum(parameter.numel() for parameter in detector.model.parameters())
    names = ", ".join(_plain(str(entry["name"])) for entry in detector.classes)
    return f"""# {preset}, {len(detector.classes)} classes

An object detector, saved by conddetr {conddetr.__version__}. The model is {model}, with
{parameters / 1e6:.1f} million parameters and {config.num_queries} queries. Images are resized to a short side of
{config.image_size} pixels, and a long side of at most {config.max_image_size}.

## Load

    pip install 'conddetr[hub]'

```python
import conddetr

detector = conddetr.Detector.from_pretrained("{repository}")
[detection] = detector.predict("photo.jpg")
print(detection.captions, detection.boxes)
```

## Data

{_data(detector)}

Classes: {names}.

## Metrics

{_metrics(detector, metrics)}
"""


def _data(detector: HubDetector) -> str:
    if detector.run is None:
        return "Not known: the weights hold no training configuration."
    data = _without_paths(detector.run)["data"]
    if data.get("dataset"):
        return f"Trained and evaluated on a data set in the folder `{data['dataset']}`."
    if data.get("coco_path"):
        return f"Trained and evaluated on a data set in COCO's layout, folder `{data['coco_path']}`."
    if data.get("annotations"):
        evaluation = f"`{data['val_annotations']}`" if data.get("val_annotations") else "a held-out share of it"
        return f"Trained on `{data['annotations']}` in COCO's format, evaluated on {evaluation}."
    return "Trained and evaluated on synthetic shapes that conddetr draws."


def _metrics(detector: HubDetector, given: Mapping[str, float] | None) -> str:
    metrics = given or detector.metrics
    if not metrics:
        return "Not measured."
    origin = "As given by the publisher" if given else "From the last evaluation in training, on its validation images"
    header, separator = " | ".join(metrics), "|---" * len(metrics)
    values = " | ".join(percent(value) for value in metrics.values())
    return f"{origin}, in percent:\n\n| {header} |\n{separator}|\n| {values} |"


def _without_paths(run: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration with only the last part of every path, so that no local folders are published."""

    def last(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        return {**options, **{name: Path(options[name]).name for name in names if options.get(name)}}

    data = last(run["data"], ("dataset", "coco_path", "annotations", "images", "val_annotations", "val_folder"))
    return {**last(run, ("output_dir", "resume", "weights")), "data": data}
