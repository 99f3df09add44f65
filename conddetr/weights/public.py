"""Weights by name: the public checkpoints of each preset, with addresses and properties.

None of them could be downloaded where this project is developed. All entries come from their pages.
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from conddetr import config as configs

log = logging.getLogger(__name__)

_PAPERS = "https://github.com/Atten4Vis/ConditionalDETR#model-zoo"
_DETR = "https://github.com/facebookresearch/detr#model-zoo"


@dataclass(frozen=True)
class PublicWeights:
    """A published checkpoint."""

    file: str
    """Name of the file on its page."""
    page: str
    """Address of the page that offers it."""
    megabytes: int | None
    """Size that the page states; None: unknown."""
    repository: str = ""
    """On HuggingFace's hub; empty: the file is downloaded by hand, from the page."""
    sha256: str = ""
    """The file's checksum, in full or its first digits; empty: unknown."""
    license: str = "Apache-2.0"
    classes: str = "COCO's category ids, 91 with the unused ones"
    tried: bool = False
    """Whether this project ever loaded it."""

    @property
    def place(self) -> Path:
        """The path for a file that is downloaded by hand: among those of `torch.hub`, under `TORCH_HOME`."""
        name = f"{Path(self.repository).name}-{self.file}" if self.file == "model.safetensors" else self.file
        return Path(torch.hub.get_dir()) / "checkpoints" / name

    @property
    def by_hand(self) -> str:
        """The instruction for a download without the hub."""
        return f"put the file {self.file} from {self.page} at {self.place}"


def _on_hub(repository: str, file: str, megabytes: int, sha256: str = "") -> PublicWeights:
    return PublicWeights(file, f"https://huggingface.co/{repository}", megabytes, repository, sha256)


PUBLIC: dict[str, dict[str, PublicWeights]] = {
    "conditional-detr-r50": {
        "coco": _on_hub(
            "microsoft/conditional-detr-resnet-50",
            "model.safetensors",
            174,
            "e8553b4fa875b7d67d15609e140f969563742b4ee17b75d9095612a8f00d3ed8",
        ),
        # By the paper's first author.
        "official": _on_hub(
            "DepuMeng/ConditionalDETR",
            "ConditionalDETR_r50_epoch50.pth",
            176,
            "ebd17bd934b8b0c75c405cf01d0bad99af8e5df4abaf3d0009de92c208d21d2d",
        ),
    },
    "conditional-detr-dc5-r50": {"official": PublicWeights("ConditionalDETR_r50dc5_epoch50.pth", _PAPERS, None)},
    "conditional-detr-r101": {"official": PublicWeights("ConditionalDETR_r101_epoch50.pth", _PAPERS, None)},
    "conditional-detr-dc5-r101": {
        "coco": _on_hub("Omnifact/conditional-detr-resnet-101-dc5", "model.safetensors", 250),
        "official": PublicWeights("ConditionalDETR_r101dc5_epoch50.pth", _PAPERS, None),
    },
    "detr-r50": {"official": PublicWeights("detr-r50-e632da11.pth", _DETR, 159, sha256="e632da11")},
    "detr-dc5-r50": {"official": PublicWeights("detr-r50-dc5-f0fb7ef5.pth", _DETR, 159, sha256="f0fb7ef5")},
    "detr-r101": {"official": PublicWeights("detr-r101-2c7b67e5.pth", _DETR, 232, sha256="2c7b67e5")},
    "detr-dc5-r101": {"official": PublicWeights("detr-r101-dc5-a2e86def.pth", _DETR, 232, sha256="a2e86def")},
}
"""Checkpoints by preset and name: `coco` from HuggingFace's hub, `official` from the authors."""
NAMES = {name for by_name in PUBLIC.values() for name in by_name}


def locate(source: str | Path, preset: str | None) -> Path:
    """The file of weights that are given by name or by path.

    A file at its `place` is used. Otherwise a file on the hub is downloaded, once, into `huggingface_hub`'s cache. The
    log names the file. If its SHA-256 is not the known one, that is only a warning, because files on the hub may
    change.

    Args:
        source: a name of `PUBLIC`, or a path; `./coco` is a path, and so is any `Path`.
        preset: the model's; None: unknown, then a name is an error unless there is such a file.

    Raises:
        ValueError: no such name for this preset; lists the known ones.
        FileNotFoundError: neither a file nor a name; or a file that is downloaded by hand is not at its `place`.
        ImportError: `huggingface_hub` is not installed.
        OSError: no network, or another error of the hub; says what to do without it.
    """
    path = Path(source)
    if not isinstance(source, str) or source not in NAMES:
        # A source without folder and suffix is meant as a name.
        if path.name == source and not path.suffix and not path.exists():
            raise FileNotFoundError(f"Weights {source!r}: neither a file nor a known name.{_known(preset)}")
        return path
    if preset is None:
        if path.exists():
            return path
        raise ValueError(f"Weights {source!r}: name the preset too.{_known(preset)}")
    configs.resolve(preset)
    public = PUBLIC.get(preset, {}).get(source)
    if public is None:
        raise ValueError(f"Weights {source!r}: {preset} has none of this name.{_known(preset)}")
    return _file_of(public, f"Weights {source!r} of {preset}")


def _known(preset: str | None) -> str:
    """The end of an error message: the names for this preset, or for all."""
    by_name = PUBLIC.get(preset or "", {})
    if by_name:
        return f" Known for {preset}: {', '.join(by_name)}."
    presets = (f"{' and '.join(names)} of {preset}" for preset, names in PUBLIC.items())
    return f" Known: {'; '.join(presets)}."


def _file_of(public: PublicWeights, title: str) -> Path:
    file = public.place
    if not file.is_file():
        if not public.repository:
            raise FileNotFoundError(f"{title} have to be downloaded by hand: {public.by_hand}.")
        try:
            from conddetr import hub

            file = hub.download(public.repository, (public.file,))
        except ImportError as error:
            raise ImportError(f"{title}: {error} Or {public.by_hand}.") from error
        except OSError as error:
            raise OSError(f"{title}: {error} Without a network, {public.by_hand}.") from error
    tried = "" if public.tried else "; this project never tried them"
    log.warning("%s: %s from %s, %s, classes: %s%s.", title, file, public.page, public.license, public.classes, tried)
    if public.sha256:
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if not digest.startswith(public.sha256):
            log.warning("%s: the SHA-256 of %s is %s, expected %s.", title, file, digest, public.sha256)
    return file
