"""Statistics of the embedded target on real text, for tests of quality."""

from functools import cache

import transformers

from hasten.accel.compression.calibration.layer_groups import make_layer_groups
from hasten.accel.compression.calibration.shard import Shard
from hasten.accel.compression.levels.level import parse_level
from hasten.accel.data.tokens import load_tokens
from hasten.accel.models import embedded
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint


@cache
def target_model():
    return Architecture(Checkpoint(embedded.path("target")))


@cache
def target_hessians(split, sequences):
    """Hessians of the inputs of the first block on real text, by group key."""
    model = target_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.path("target"))
    tokens = load_tokens("library", tokenizer, sequences, 256, split=split)
    groups = make_layer_groups(model, parse_level("w8"), (), 0, 0)[0]
    trees = Shard(model, {0: tokens}, batch=8).collect(model.load_block(0), groups)
    return {key: tree.total() for key, tree in trees.items()}
