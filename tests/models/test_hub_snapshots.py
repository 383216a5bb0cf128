"""Snapshots of the hub's cache: links to files whose names are hashes."""

import hashlib
import os
from pathlib import Path

import torch

from hasten.accel.models.checkpoint import Checkpoint, resolve
from tests.models import tiny


def snapshot(folder: Path, source: Path) -> Path:
    """A folder of links into `blobs`, as huggingface_hub lays out its cache."""
    links, blobs = folder / "models--org--name" / "snapshots" / "0123abc", folder / "models--org--name" / "blobs"
    links.mkdir(parents=True)
    blobs.mkdir()
    for file in source.iterdir():
        name = hashlib.sha256(file.read_bytes()).hexdigest()
        (blobs / name).write_bytes(file.read_bytes())
        (links / file.name).symlink_to(os.path.relpath(blobs / name, links))
    return links


def test_a_snapshot_of_links_is_read_like_the_files(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama", sharded=True, dtype=torch.bfloat16)
    links = snapshot(tmp_path, source)
    plain, linked = Checkpoint(source), Checkpoint(resolve(str(links)))
    assert linked.names == plain.names
    assert linked.fingerprint() == plain.fingerprint()
    for name in plain.names:
        assert torch.equal(linked.tensor(name), plain.tensor(name))
