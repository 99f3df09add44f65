"""`conddetr show-data`."""

import argparse

from conddetr.config.flags import chosen_augment, chosen_data
from conddetr.config.run import resolve_run
from conddetr.engine.progress import say
from conddetr.engine.run import data_sets
from conddetr.viz.samples import draw_samples


def run(options: argparse.Namespace) -> None:
    chosen = {"preset": options.preset, "seed": options.seed, **chosen_data(options), **chosen_augment(options)}
    run = resolve_run(chosen)
    train_set, _ = data_sets(run.data, run.model, run.augment)
    say("  ".join(f"{name}={value}" for name, value in run.to_dict()["augment"].items()))
    say(draw_samples(train_set, options.out, options.count, options.versions, run.train.seed).describe())
