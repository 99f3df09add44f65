"""`conddetr attention`."""

import argparse

from conddetr.data.images import read_image
from conddetr.detector import Detector
from conddetr.engine.progress import say
from conddetr.prediction.sources import image_file
from conddetr.viz.attention import attention_figure
from conddetr.viz.pictures import PictureFolder


def run(options: argparse.Namespace) -> None:
    path = image_file(options.image)
    pictures = PictureFolder(options.out, "attention", [path])
    image = read_image(path)
    detector = Detector.from_checkpoint(options.checkpoint, options.preset, options.device)
    queries = None if options.query is None else [options.query]
    detection, maps = detector.attention(image, queries, options.top, options.layer)
    for index, (caption, query) in enumerate(zip(detection.captions, detection.queries.tolist(), strict=True)):
        file = pictures.save(attention_figure(image, detection, index, maps), path, f"-layer{maps.layer}-query{query}")
        say(f"{caption}: wrote {file}")
