"""`lmtrain compare`: runs side by side, those that have ended and those that have not.

  lmtrain compare RUN RUN…                    which settings differ, what each reached, the best first
  lmtrain compare DIR…                        every run below folders: a sweep folder, outputs/, any
  lmtrain compare DIR --metric val/perplexity  by the last value of another metric
  lmtrain compare DIR --to FOLDER             also report.html, comparison.csv and plots/ in a folder of their own
  lmtrain compare DIR --json                  for programs

Runs that differ in nothing but their seed are one setting: where there are several seeds, means have 95 % intervals,
and what cannot be told apart is said. So is where texts, tokenizers or budgets differ and losses do not compare.
"""

from __future__ import annotations

import json
from pathlib import Path

from lmtrain.commands import CommandParser
from lmtrain.run_dir import RunDir


def main(arguments: list[str]) -> int:
    """Print the comparison, and write it if asked to; exit status 0. Raises LmtrainError for what cannot be done."""
    parser = CommandParser("compare", __doc__)
    parser.add_argument("paths", type=Path, nargs="+", metavar="RUN", help="the folder of a run, or of runs")
    parser.add_argument("--metric", metavar="NAME", help="compare by this (default: the objective of the runs)")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="write a page, a table and pictures into this folder")
    parser.add_argument("--json", action="store_true", help="print JSON, numbers whole")
    options = parser.parse_args(arguments)
    from lmtrain.sweep.comparison import compare, find_runs
    from lmtrain.sweep.comparison_report import require_room, write_comparison
    from lmtrain.sweep.comparison_view import print_comparison, to_json

    if options.to is not None:
        require_room(options.to)
    comparison = compare(find_runs(options.paths), options.metric)
    if options.json:
        print(json.dumps(to_json(comparison), indent=2, ensure_ascii=False))
    else:
        print_comparison(comparison)
    if options.to is not None:
        title = ", ".join(str(RunDir(path)) for path in options.paths[:3]) + (", …" if len(options.paths) > 3 else "")
        page, *_ = write_comparison(comparison, options.to, title)
        if not options.json:
            print(f"written to {options.to}: open {page}")
    elif not options.json:
        print("curves, pictures and a page of this: --to FOLDER")
    return 0
