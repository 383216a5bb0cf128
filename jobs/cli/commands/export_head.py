"""Write a trained head in the layout of another program.

medusa is the layout of github.com/FasterDecoding/Medusa, hydra that of github.com/zankner/Hydra; both hold heads that
draft all ids (hasten train draft_vocabulary=0). speculators is the format of EAGLE-3 heads that vLLM serves. To draft
with a folder in such a layout, give drafter.head=FOLDER.
"""

from pathlib import Path

from hasten.jobs.cli.commands._arguments import Parser

_EXAMPLE = """
example:
  hasten train head=medusa target=/models/llama draft_vocabulary=0 output=/heads/medusa
  hasten export_head /heads/medusa --layout medusa --target org/llama --output /heads/published
"""


def main(words: list[str]) -> int:
    """0 once the folder is written; UserError if the layout cannot hold the head."""
    parser = Parser("export_head", f"{__doc__}{_EXAMPLE}")
    parser.add_argument("head", metavar="HEAD", type=Path, help="folder of the trained head")
    parser.add_argument("--layout", metavar="NAME", required=True, help="name of the layout, such as speculators")
    parser.add_argument(
        "--target", metavar="MODEL", required=True, help="what others call the target: a path, or a name on the hub"
    )
    parser.add_argument("--output", metavar="FOLDER", type=Path, required=True, help="new folder to write")
    arguments = parser.parse_args(words)

    from hasten.accel.training.heads.layouts.loading import export_head

    output = arguments.output.expanduser().absolute()
    export_head(arguments.head.expanduser(), arguments.layout, arguments.target, output)
    print(f"written: {output}", flush=True)
    return 0
