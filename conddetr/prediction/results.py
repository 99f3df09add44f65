"""Files of detections, written image by image: CSV, COCO's results format, and a data set in COCO's format.

`write_csv` and `write_coco` write all predictions of a stream:

    write_csv("objects.csv", detector.predict_stream(paths, batch_size=8))
"""

import contextlib
import csv
import io
import json
import os
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TextIO

from torchvision.ops import box_convert

from conddetr import interrupt
from conddetr.data.annotations import Annotations, read_annotations
from conddetr.detection import Detection, Frame, Prediction
from conddetr.engine.categories import category_ids_of
from conddetr.files import KeptFile, check_json_target

COLUMNS = ("image", "frame", "time", "class", "score", "x1", "y1", "x2", "y2")
"""Columns of the CSV file. `frame` (from 0) and `time` (seconds) are empty for images."""
_HEADER = f"{','.join(COLUMNS)}\n".encode()
_NOT_UNICODE = "backslashreplace"
"""How bytes of a file name that are not Unicode are written: as `\\udce9`, which JSON reads back as Python's name."""


def check_target(option: str, path: str | Path) -> None:
    """Refuse, before any work, a results file of an unknown kind, or one that would replace a file of another kind.

    Raises:
        ValueError: the name does not end in `.json` or `.csv`, or the file exists and is not JSON or not such a table.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".json":
        check_json_target(option, path)
    elif suffix != ".csv":
        raise ValueError(f"{option} {path}: expected a name ending in .json or .csv.")
    elif Path(path).is_dir():
        raise ValueError(f"{option} {path}: expected a name for a CSV file, got a folder.")
    elif Path(path).is_file():
        with open(path, "rb") as file:
            start = file.read(len(_HEADER))
        if start and start != _HEADER:
            raise ValueError(f"{option} {path}: the file exists and is no table of detections: name another file.")


def common_folder(paths: Sequence[Path]) -> str | None:
    """The deepest folder that contains all files, as their paths are written; None if some paths are absolute and
    others are relative, or there are none.
    """
    if len({path.is_absolute() for path in paths}) != 1:
        return None
    return os.path.commonpath([path.parent for path in paths]) or "."


class ResultsFile(KeptFile):
    """A file of detections, within a `with` block; it is complete after an interruption too."""

    def add(self, prediction: Prediction) -> None:
        """Append the objects of one image; an image that cannot be read adds nothing."""
        if prediction.result is not None:
            # A part is written whole or not at all.
            with interrupt.deferred():
                self._add(prediction, prediction.result)

    def _open(self, partial: Path, stack: contextlib.ExitStack) -> None:
        # The stack closes it.
        file = open(partial, "w", encoding="utf-8", errors=_NOT_UNICODE, newline="")  # noqa: SIM115
        self._file: TextIO = stack.enter_context(file)
        self._begin(stack)

    @abstractmethod
    def _begin(self, stack: contextlib.ExitStack) -> None:
        """Write the beginning; a callback of the stack writes the end."""

    @abstractmethod
    def _add(self, prediction: Prediction, detection: Detection) -> None:
        """Write one image."""


class CsvFile(ResultsFile):
    """One row per object, with the columns `COLUMNS`. Boxes are in pixels of the original image."""

    def _begin(self, stack: contextlib.ExitStack) -> None:
        csv.writer(self._file, lineterminator="\n").writerow(COLUMNS)

    def _add(self, prediction: Prediction, detection: Detection) -> None:
        source = prediction.source
        frame = (source.index, f"{source.seconds:.3f}") if isinstance(source, Frame) else ("", "")
        rows = io.StringIO()
        writer = csv.writer(rows, lineterminator="\n")
        objects = (detection.names, detection.scores.tolist(), detection.boxes.tolist())
        for name, score, box in zip(*objects, strict=True):
            writer.writerow((prediction.name, *frame, name, f"{score:.6f}", *(f"{side:.2f}" for side in box)))
        self._file.write(rows.getvalue())


class _JsonFile(ResultsFile):
    """A file with a JSON list of objects that grows."""

    _count = 0

    def _append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        texts = [json.dumps(entry, ensure_ascii=False) for entry in entries]
        separator = ",\n" if self._count else "\n"
        self._file.write((separator + ",\n".join(texts)) if texts else "")
        self._count += len(texts)


class CocoResultsFile(_JsonFile):
    """COCO's results format: a list of image id, category id, box xywh and score, for `pycocotools`."""

    def __init__(self, path: str | Path, ids: "ImageIds", category_ids: Sequence[int]) -> None:
        """`category_ids`: of each label; see `conddetr.engine.categories.category_ids_of`."""
        super().__init__(path)
        self._ids, self._category_ids = ids, category_ids

    def _begin(self, stack: contextlib.ExitStack) -> None:
        self._file.write("[")
        stack.callback(lambda: self._file.write("\n]\n"))

    def _add(self, prediction: Prediction, detection: Detection) -> None:
        self._append(_objects(detection, self._ids.of(prediction.name), self._category_ids))


class CocoDatasetFile(_JsonFile):
    """A data set in COCO's format whose annotations are the detections, with a `score` each.

    Images have the ids 1, 2, … in the order of the stream. A frame of a video has the file name `clip.mp4#12`, and
    `video`, `frame` and `time` (seconds) too.
    """

    def __init__(self, path: str | Path, classes: Sequence[Mapping[str, Any]], root: str | Path | None = None) -> None:
        """
        Args:
            classes: the detector's.
            root: folder to which the file names of images inside it are relative; default: names as they were given.
        """
        super().__init__(path)
        self._classes, self._root = classes, root
        self._images_count = 0

    def _begin(self, stack: contextlib.ExitStack) -> None:
        folder = {} if self._root is None else {"folder": str(self._root)}
        info = {"description": "detections by conddetr", **folder}
        categories = [{"id": entry["id"], "name": entry["name"]} for entry in self._classes]
        # A long video has many images: their list waits in a second file.
        images = tempfile.TemporaryFile("w+", encoding="utf-8", errors=_NOT_UNICODE)  # noqa: SIM115
        self._images = stack.enter_context(images)
        self._file.write(f'{{"info": {json.dumps(info, ensure_ascii=False)},\n')
        self._file.write(f'"categories": {json.dumps(categories, ensure_ascii=False)},\n"annotations": [')
        stack.callback(self._end)

    def _add(self, prediction: Prediction, detection: Detection) -> None:
        assert prediction.image is not None
        height, width = prediction.image.shape[-2:]
        self._images_count += 1
        image = {"id": self._images_count, **self._file_name(prediction), "height": height, "width": width}
        self._images.write((",\n" if self._images_count > 1 else "\n") + json.dumps(image, ensure_ascii=False))
        objects = _objects(detection, self._images_count, [entry["id"] for entry in self._classes])
        self._append(
            {"id": self._count + number, **entry, "area": entry["bbox"][2] * entry["bbox"][3], "iscrowd": 0}
            for number, entry in enumerate(objects, 1)
        )

    def _file_name(self, prediction: Prediction) -> dict[str, Any]:
        source = prediction.source
        if isinstance(source, Frame):
            frame = {"video": source.video, "frame": source.index, "time": round(source.seconds, 3)}
            return {"file_name": f"{source.video}#{source.index}", **frame}
        path = PurePath(prediction.name)
        if self._root is not None and path.is_relative_to(self._root):
            path = path.relative_to(self._root)
        return {"file_name": path.as_posix()}

    def _end(self) -> None:
        self._file.write('\n],\n"images": [')
        self._images.seek(0)
        shutil.copyfileobj(self._images, self._file)
        self._file.write("\n]}\n")


def _objects(detection: Detection, image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """One entry per object in COCO's results format."""
    boxes = box_convert(detection.boxes, "xyxy", "xywh").tolist()
    rows = zip(detection.labels.tolist(), boxes, detection.scores.tolist(), strict=True)
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for label, box, score in rows
    ]


class ImageIds:
    """Image ids from an annotation file, by the names of image files.

    An image's id is that of the annotated image whose `file_name` is the end of the image's path; if there are several,
    of the longest one.
    """

    def __init__(self, annotations: Annotations) -> None:
        self._source = annotations.source
        numbered = zip(annotations.names, annotations.image_ids.tolist(), strict=True)
        self._ids = {PurePath(name).parts: number for name, number in numbered}
        self._names: dict[int, str] = {}

    def of(self, name: str) -> int:
        """The id of an image.

        Raises:
            ValueError: it is not in the annotation file, or another image has its id already.
        """
        parts = PurePath(name).parts
        ends = (parts[start:] for start in range(len(parts)))
        number = next((self._ids[end] for end in ends if end in self._ids), None)
        if number is None:
            raise ValueError(f"{self._source}: no image has the file name {name}: its results need an image id.")
        first = self._names.setdefault(number, name)
        if first != name:
            raise ValueError(f"{self._source}: {first} and {name} are both the image with id {number}.")
        return number


def write_csv(path: str | Path, predictions: Iterable[Prediction]) -> Path:
    """Write the objects of all predictions to a CSV file with the columns `COLUMNS`.

    Images that cannot be read are left out. After an exception, such as Ctrl-C or an error of the stream, the file
    holds all predictions before it.

    Raises:
        OSError: the file cannot be written; it keeps its old content.
    """
    return _write(CsvFile(path), predictions)


def write_coco(
    path: str | Path,
    predictions: Iterable[Prediction],
    classes: Sequence[dict[str, Any]],
    annotations: str | Path | None = None,
    by_name: bool = False,
) -> Path:
    """Write the objects of all predictions as JSON, as `write_csv` does.

    Args:
        classes: the detector's.
        annotations: a file in COCO's format. The result is then in COCO's results format, with the file's image ids
            (`ImageIds`) and category ids. Default: a data set in COCO's format (`CocoDatasetFile`).
        by_name: match the classes with the file's by name and ignore their ids.

    Raises:
        OSError: the file cannot be written; it keeps its old content.
        ValueError: an image is not in the annotation file, or the classes are not the file's.
    """
    if annotations is None:
        return _write(CocoDatasetFile(path, classes), predictions)
    content = read_annotations(annotations, needs_boxes=False)
    category_ids = category_ids_of(list(classes), content.categories, by_name)
    return _write(CocoResultsFile(path, ImageIds(content), category_ids), predictions)


def _write(file: ResultsFile, predictions: Iterable[Prediction]) -> Path:
    with file:
        for prediction in predictions:
            file.add(prediction)
    return file.path
