"""`lmtrain sweep`: look at a study, running or ended, in its sweep folder.

  lmtrain sweep status DIR [--watch]                      its trials, how far they are, the best so far
  lmtrain sweep report DIR                                write the page, pictures and tables of the study again
  lmtrain sweep export DIR [NAME] [--trial N] [--to DIR]  the best trial, or trial N, as experiments/NAME.yaml

DIR is the folder of the sweep, such as multirun/NAME. A study in a database whose address has a password is opened with
--storage URL.
"""

from __future__ import annotations

from pathlib import Path

from lmtrain.commands import CommandParser, run_verb


def main(arguments: list[str]) -> int:
    """Run `status`, `report` or `export`; exit status 0. Raises LmtrainError for what cannot be done."""
    return run_verb("sweep", __doc__, {"status": status, "report": report, "export": export}, arguments)


def status(arguments: list[str]) -> None:
    """Print the trials of a study; with --watch, until it ends."""
    parser = _parser("status", "The trials of a study: those running, those that ended by objective, what is left.")
    parser.add_argument("--watch", action="store_true", help="keep looking until the study ends")
    options = parser.parse_args(arguments)
    from lmtrain.sweep.reading import StudyReader
    from lmtrain.sweep.tables import running_table
    from lmtrain.sweep.terminal import output
    from lmtrain.sweep.view import StudyView, show_results

    reader = StudyReader.open(options.folder, options.storage)
    if options.watch:
        with StudyView(lambda: reader) as view:
            view.wait()
        return
    study = reader.read()
    if study.running:
        console = output()
        console.print(running_table(study, width=console.width), "")
    show_results(study)


def report(arguments: list[str]) -> None:
    """Write the report of a study and print where."""
    options = _parser("report", "Write the page, pictures and tables of a study into its folder.").parse_args(arguments)
    from lmtrain.sweep.confirmation import read_confirmation
    from lmtrain.sweep.reading import read_study
    from lmtrain.sweep.report import write_report

    study = read_study(options.folder, options.storage)
    for path in write_report(study, read_confirmation(options.folder, options.storage)):
        print(path)


def export(arguments: list[str]) -> None:
    """Write the settings of a trial as an experiment and print where."""
    parser = _parser("export", "Write the settings of a study's best trial as an experiment that trains it again.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="of the experiment (default: of the study)")
    parser.add_argument("--trial", type=int, metavar="N", help="this trial rather than the best")
    parser.add_argument("--to", type=Path, metavar="DIR", help="a folder named experiment (default: experiments/)")
    parser.add_argument("--force", action="store_true", help="replace an experiment of that name")
    options = parser.parse_intermixed_args(arguments)
    from lmtrain.sweep.export import command_for, export_best
    from lmtrain.sweep.reading import read_study

    study = read_study(options.folder, options.storage)
    path = export_best(study, options.name, options.trial, options.to, force=options.force)
    print(f"{path}\ntrain it with: {command_for(path)}")


def _parser(verb: str, description: str) -> CommandParser:
    parser = CommandParser(f"sweep {verb}", description)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of the sweep, such as multirun/NAME")
    parser.add_argument("--storage", metavar="URL", help="where the study is kept, if DIR does not say all of it")
    return parser
