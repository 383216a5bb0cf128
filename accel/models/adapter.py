"""What is known about a model that runs block by block; derived from its config by `inspection`.

Paths are those of modules in transformers' model (`model.layers`), or in a block (`self_attn.q_proj`).
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class InputGroup:
    """Linear layers of a block that read the same input, in the order in which they run.

    norm: path of the module with a weight vector whose output is that input, None where the input comes from elsewhere.
    """

    paths: tuple[str, ...]
    norm: str | None = None


@dataclass(frozen=True)
class FusedExperts:
    """A module of a block that holds all experts of a mixture in three-dimensional parameters."""

    path: str


@dataclass(frozen=True)
class BlockLayout:
    """What a block runs, in the order in which it does.

    skipped: linear layers that are not compressed, with the reason.
    """

    order: tuple[InputGroup | FusedExperts, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def groups(self) -> tuple[InputGroup, ...]:
        """The groups of linear layers."""
        return tuple(item for item in self.order if isinstance(item, InputGroup))

    @property
    def experts(self) -> tuple[FusedExperts, ...]:
        """The mixtures."""
        return tuple(item for item in self.order if isinstance(item, FusedExperts))


@dataclass(frozen=True)
class Adapter:
    """How the model of a config is run block by block.

    blocks: path of the list of blocks. layouts: of each block. embedding: path of the table of tokens. tables: paths of
    all tables whose rows are chosen by token, the embedding among them. front: paths of modules with parameters of
    their own that run before the first block, except tables. run: paths of all modules that run before it. tail: paths
    of the modules between the last block and the output matrix, each called with the output of the one before it. head:
    path of the output matrix. input_scale: factor of the output matrix's inputs. logit_scale, cap: the model's logits
    are `cap * tanh(logit_scale * x / cap)` for outputs x of the head, or `logit_scale * x` where cap is None. outputs:
    number of values that a block returns in a tuple, the hidden states first; 0 where it returns the hidden states
    alone. tied: whether head and embedding are one matrix. batched: whether blocks take arguments that depend on the
    number of sequences. loads_packed: whether transformers loads packed layers as they are; else it must unpack them,
    because its class initialises blocks by the weights of their layers.
    """

    blocks: str
    layouts: tuple[BlockLayout, ...]
    embedding: str
    tables: tuple[str, ...]
    front: tuple[str, ...]
    run: tuple[str, ...]
    tail: tuple[str, ...]
    head: str
    input_scale: float = 1.0
    logit_scale: float = 1.0
    cap: float | None = None
    outputs: int = 0
    tied: bool = False
    batched: bool = False
    loads_packed: bool = True
