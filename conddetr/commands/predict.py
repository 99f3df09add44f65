"""`conddetr predict`."""

import argparse

from conddetr.commands.shared import print_chosen
from conddetr.config.checks import check_fraction
from conddetr.data.images import read_image
from conddetr.detector import Detector
from conddetr.engine.progress import say
from conddetr.viz.boxes import detections_figure
from conddetr.viz.pictures import PictureFolder, find_images


def run(options: argparse.Namespace) -> None:
    check_fraction("threshold", options.threshold)
    images = find_images(options.images)
    pictures = PictureFolder(options.out, "predict", images)
    source = options.checkpoint, options.preset, options.device, options.backend, options.precision
    detector = Detector.from_checkpoint(*source)
    print_chosen(detector, detector.device)
    if len(images) > 1 and options.backend != "eager":
        detector = detector.fused()
    errors = []
    for path in images:
        try:
            image = read_image(path)
        except (OSError, ValueError) as error:
            errors.append(error)
            if len(images) > 1:
                say(f"{path}: left out: {error}")
            continue
        detection = detector.predict(image, options.threshold)[0]
        file = pictures.save(
            detections_figure(image, detection.boxes, detection.labels.tolist(), detection.captions), path
        )
        say(f"{path}: {len(detection)} objects; wrote {file}")
    if errors:
        prefix = f"{len(errors)} of {len(images)} images cannot be read, first: " if len(images) > 1 else ""
        raise ValueError(f"{prefix}{errors[0]}")
