"""`conddetr check`."""

import argparse

from conddetr.devices import find_device
from conddetr.engine.progress import Steps, say, show
from conddetr.files import check_json_target, write_text
from conddetr.kernels.check import examine
from conddetr.kernels.check.table import TITLE, TUNING_TITLE, summary, tuning_table, verdict_table


def run(options: argparse.Namespace) -> int:
    check_json_target("--json", options.json)
    with Steps("check") as steps:
        device = find_device(options.device)
        report = examine(device, short=options.short, tune=options.tune, progress=steps.tell)
    try:
        show(TITLE, verdict_table(report))
        if report.tuning is not None and report.tuning.choices:
            show(TUNING_TITLE, tuning_table(report.tuning))
        for line in summary(report):
            say(line)
    finally:
        # The file is written even if the pipe of the output ends early; the table is shown even if writing fails.
        if options.json:
            write_text(options.json, report.record.to_json())
    return 1 if any(verdict.refused for verdict in report.record.verdicts) else 0
