"""`conddetr train`."""

import argparse
from pathlib import Path

from conddetr.commands.evaluate import evaluate_checkpoint
from conddetr.config.flags import chosen_options
from conddetr.config.run import resolve_run
from conddetr.engine.checkpoint import LATEST
from conddetr.engine.progress import say, show
from conddetr.engine.run import official_evaluation, train
from conddetr.engine.tables import metrics_table


def run(options: argparse.Namespace) -> None:
    chosen, notes = chosen_options(options)
    run = resolve_run(chosen)
    for note in notes:
        say(note)
    checkpoint = Path(run.output_dir) / LATEST
    if not run.eval:
        trainer = train(run)
        if not trainer.is_main:
            return
        metrics, result = trainer.metrics, trainer.result
        say(f"wrote {checkpoint}")
    elif run.resume:
        # The official way to evaluate a checkpoint.
        checkpoint = checkpoint if run.resume == "auto" else Path(run.resume)
        data = official_evaluation(run.data, chosen)
        # Weights do not show dilation: for an official file without arguments it comes from the flags.
        preset = run.preset if {"preset", "family", "backbone", "dilation"} & chosen.keys() else None
        source = checkpoint, preset, run.device, run.backend, run.train.precision
        evaluation = evaluate_checkpoint(*source, data, run.train.batch_size, run.train.workers)
        if evaluation is None:
            return
        result = evaluation.result
        metrics = result.metrics
    else:
        raise ValueError("--eval needs --resume FILE: the checkpoint to evaluate.")
    show(f"COCO metrics of {checkpoint}, in percent", metrics_table(metrics))
    # If the run was complete already, the metrics come from the checkpoint and there is no result.
    if result is not None:
        say(result.describe())
