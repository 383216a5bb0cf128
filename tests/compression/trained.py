"""Statistics of the embedded target on real text, for tests of quality."""

from functools import cache

import transformers

from accel.compression.calibration import Shard
from accel.compression.plan import make_plan
from accel.compression.quantizers.base import Scheme
from accel.data.tokens import load_tokens
from accel.models import embedded
from accel.models.architecture import Architecture
from accel.models.checkpoint import Checkpoint


@cache
def target_model():
    return Architecture(Checkpoint(embedded.path("target")))


@cache
def target_moments(split, sequences):
    """Second moments of the inputs of the first block on real text, by group key."""
    model = target_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.path("target"))
    tokens = load_tokens("library", tokenizer, sequences, 256, split=split)
    groups = make_plan(model, Scheme(8, -1), (), 0, 0)[0]
    trees = Shard(model, {0: tokens}, batch=8).collect(model.load_block(0), groups)
    return {key: tree.total() for key, tree in trees.items()}
