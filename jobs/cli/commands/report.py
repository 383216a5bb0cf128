"""Compare runs, or the points of a sweep: tables in the terminal, one HTML page and its charts.

RUN and SWEEP are folders of runs and sweeps, or the report.json in them. The page is one self-contained file; the
charts are also written beside it as PNG files. Of a sweep that still runs, the finished points are compared.
"""

from pathlib import Path

from hasten.jobs.cli.commands._arguments import Parser


def main(words: list[str]) -> int:
    """0 once the page is written; UserError if a folder is not that of a run or sweep, or if nothing has finished."""
    parser = Parser("report", __doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN|SWEEP", help="folder, or the report.json in it")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where page and charts go; else into the folder `report` of the run or sweep, or, of several, into "
        "runs/reports/DATE_TIME",
    )
    parser.add_argument("--open", action="store_true", help="show the page in a browser")
    arguments = parser.parse_args(words)

    from hasten.jobs.common.logs import default_folder
    from hasten.jobs.report.comparison import compare, with_quality_of_checkpoints
    from hasten.jobs.report.page import write
    from hasten.jobs.report.reading import read
    from hasten.jobs.report.terminal import show

    sources = read(arguments.paths)
    groups = compare(sources)
    folders = [source.folder for source in sources]
    alone = folders[0] / "report" if len(folders) == 1 else Path(default_folder("reports"))
    page, missing = write(groups, with_quality_of_checkpoints(groups), folders, arguments.output or alone)
    show(groups, missing)
    if arguments.open:
        import webbrowser

        webbrowser.open(page.absolute().as_uri())
    print(f"report: {page}", flush=True)
    return 0
