"""Which files of a checkpoint are copied to every checkpoint that is made from it."""

import re
from pathlib import Path

# Files of the original that are copied: the tokenizer's and similar ones, and terms of use. Its model card is not: it
# describes the original's weights.
_COPIED = re.compile(
    r".*\.(json|txt|model|jinja|tiktoken)|.*(licen[cs]e|notice|copying|copyright|use_policy).*", re.IGNORECASE
)
# Those among them that are not, because the run writes its own.
OWN = ("config.json", "model.safetensors.index.json")


def copied_files(folder: Path) -> list[Path]:
    """Files of a checkpoint that every checkpoint made from it gets, too."""
    return sorted(
        file
        for file in folder.iterdir()
        if _COPIED.fullmatch(file.name)
        and file.is_file()
        and file.name not in OWN
        and not file.name.endswith((".index.json", ".safetensors"))
    )
