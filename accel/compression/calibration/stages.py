"""A block that runs once for each part of the calibration tokens, and waits wherever layers are to be compressed.

Source: `true_sequential` of GPTQ's published code (Frantar et al. 2022, arXiv:2210.17323). The forward stops where
the layers of a group read their input. When all sequences have come so far, the group is compressed on these inputs,
and the forward goes on with the compressed weights, so that layers are calibrated on outputs of compressed layers of
their own block, too. A block that is calibrated on its original layers runs twice: again for the next block's input.
Where inputs are rounded, too, layers round them from the moment on at which their weights are replaced. An attention
whose keys and values are rounded is a stage of its own, without layers: the forward stops where it reads them.
Departs from it: experts of a layer are calibrated on the original experts. They are one stage, or several where the
sums of their inputs would need much memory: experts do not depend on each other, so that results are the same.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any

from torch import Tensor, nn

from hasten.accel.activations.hooks import attention_states, prepare_inputs, rotated_inputs
from hasten.accel.activations.ranges import HeadRanges, InputRange
from hasten.accel.activations.rounding import InputRounding
from hasten.accel.compression.calibration.chunk_sums import ChunkSums, Wanted
from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.calibration.statistics import Tree
from hasten.accel.costs.method import hessian_bytes
from hasten.accel.models.architecture import Architecture, Weight
from hasten.accel.models.forwards import Forward, current_forward

Stage = tuple[Group, ...]
# Sums of the inputs of a stage of experts, which has at least one expert.
_STAGE_BYTES = 1 << 27
# The stage of an attention, which has no layers.
ATTENTION: Stage = ()


def stages_of(groups: Sequence[Group], attention: int | None = None) -> list[Stage]:
    """Groups of a block that are compressed at the same time, in the order in which the block runs them.

    attention: number of groups that the block runs before it reads keys and values, where these are a stage.
    """
    if attention is not None:
        return [*stages_of(groups[:attention]), ATTENTION, *stages_of(groups[attention:])]
    stages: list[Stage] = []
    for group in groups:
        if group.is_expert and stages and stages[-1][0].is_expert and _have_room(stages[-1], group):
            stages[-1] += (group,)
        else:
            stages.append((group,))
    return stages


def _have_room(stage: Stage, group: Group) -> bool:
    """Whether a group of experts can be in a stage; those of one expert always are, because they run together."""
    if container(stage) != container((group,)):
        return False
    sums = sum(hessian_bytes(member.columns) for member in (*stage, group))
    return sums <= _STAGE_BYTES or stage[-1].layers[0].expert == group.layers[0].expert


def groups_before_attention(architecture: Architecture, block: int, groups: Sequence[Group]) -> int | None:
    """Number of a block's groups that run before its attention reads keys and values; None if it has no such attention.

    Of the layers in the attention's module, those that read the last input come behind it.
    """
    name = architecture.attention_name(block)
    if name is None:
        return None
    layers = architecture.linears(block)
    inside = [layer.group for layer in layers if layer.name.startswith(f"{name}.")]
    places = {layer.name: place for place, layer in enumerate(layers)}
    first_behind = next(place for place, layer in enumerate(layers) if layer.group == inside[-1])
    return sum(places[group.key] < first_behind for group in groups)


class _Run(Forward):
    """The forward of one part of the tokens, which can wait in the middle of the block.

    chunk: the part's. stage: the last one at which it waited, or that it passed; -1 before the first. inputs: of the
    layers where it waits; None at experts. states: queries, keys and values of the attention where it waits. collects:
    whether it runs experts for their inputs only.
    """

    def __init__(self, forward: Callable[[], Tensor], chunk: int) -> None:
        super().__init__(forward)
        self.chunk = chunk
        self.stage = -1
        self.inputs: Tensor | None = None
        self.states: tuple[Tensor, ...] | None = None
        self.collects = False

    def wait(self, inputs: Tensor | None, states: tuple[Tensor, ...] | None = None) -> None:
        """Return to whoever resumed the run, until it is resumed again."""
        self.inputs, self.states = inputs, states
        self.pause()
        self.inputs = self.states = None


class StagedBlock:
    """A block in the middle of its forward on some chunks of the calibration sequences.

    position: the block's number. groups: all its layer groups. chunks: by number their parts [sequences, T, D]; they
    are taken out, so that they are freed as early as the forward allows. cut: see statistics.Tree. wanted: what is
    collected. ranges, attention: of the stage that was collected last, see Shard. is_original: whether it runs original
    weights for the inputs that another one compares with its own: nothing is replaced, and experts, which may see other
    tokens, are not waited for.
    """

    def __init__(
        self,
        architecture: Architecture,
        block: nn.Module,
        position: int,
        groups: Sequence[Group],
        chunks: dict[int, list[Tensor]],
        cut: int = 0,
        wanted: Wanted | None = None,
        is_original: bool = False,
    ) -> None:
        self._architecture, self._cut, self._wanted = architecture, cut, wanted or Wanted()
        before = groups_before_attention(architecture, position, groups) if self._wanted.attention else None
        self._is_original = is_original
        self.stages = stages_of(groups, before)
        self.ranges: dict[str, InputRange] = {}
        self.attention: HeadRanges | None = None
        # Stage whose inputs were collected last, and the number of stages whose weights are replaced.
        self.collected, self.replaced = -1, 0
        self._block = block
        # Undo what was changed in the block, which would otherwise be in a reference cycle with this object, and would
        # stay in memory until the garbage collector finds it.
        self._undo: list[Callable[[], None]] = []
        self._target = 0
        self._sums = ChunkSums(cut, self._wanted)
        run = partial(architecture.run_block, block, position)
        self._runs = {
            number: [_Run(_taken(run, parts, place), number) for place in range(len(parts))]
            for number, parts in chunks.items()
        }
        mixtures: dict[str, list[int]] = {}
        for number, stage in enumerate(self.stages):
            if stage == ATTENTION:
                self._watch_attention(number)
            elif stage[0].is_expert:
                mixtures.setdefault(container(stage), []).append(number)
            else:
                self._watch_layers(number, stage)
        for path, numbers in mixtures.items():
            self._watch_experts(path, numbers)
        # Behind the hooks above, so that these see inputs that are not rounded.
        for layer in (layer for stage in self.stages for group in stage for layer in group.layers):
            prepare_inputs(block.get_submodule(layer.module))

    def can_collect(self, stage: int) -> bool:
        """Whether the inputs of the stage are to come, or are still held: those of experts are not."""
        return stage > self.collected or (stage == self.collected and not _has_experts(self.stages[stage]))

    def replace(
        self, weights: Iterable[tuple[str, Weight]], roundings: Iterable[tuple[str, InputRounding | None]] = ()
    ) -> None:
        """Replace the weights of the next stage, and round its inputs.

        weights, roundings: paths of layers in the block, and their weights and roundings.
        """
        self._architecture.replace_weights(self._block, weights)
        self._architecture.round_inputs(self._block, roundings)
        self.replaced += 1

    def round_attention(self, roundings: Mapping[str, InputRounding]) -> None:
        """Round queries `q`, keys `k` and values `v` of the next stage, which is the attention."""
        assert self.stages[self.replaced] == ATTENTION
        self._architecture.round_attention(self._block, roundings)
        self.replaced += 1

    def collect(self, stage: int, keys: Collection[str], original: "StagedBlock | None" = None) -> dict[str, Tree]:
        """Hessians of the inputs of groups of a stage, by group key. Experts that no token reached have no entry.

        The weights of all stages before it must have been replaced. original: the original block on the same tokens,
        for the shift of inputs other than experts'.
        """
        assert self.can_collect(stage)
        assert self.replaced == stage
        self._sums = ChunkSums(self._cut, self._wanted)
        self._resume(stage)
        self.attention = HeadRanges() if self.stages[stage] == ATTENTION else None
        if original is not None:
            original._resume(stage)
        others = repeat(None) if original is None else original._all_runs()
        for run, other in zip(self._all_runs(), others, strict=False):
            if run.dead:
                raise RuntimeError(f"the block does not run {_described(self.stages[stage])}")
            if run.inputs is not None:
                shared = None if other is None else other.inputs
                self._sums.add(self.stages[stage][0], run.chunk, run.inputs, shared)
            if self.attention is not None and run.states is not None:
                self.attention.add(*run.states)
        self.collected = stage
        trees, self.ranges, self._sums = self._sums.trees(), self._sums.ranges, ChunkSums(self._cut, self._wanted)
        return {key: trees[key] for key in keys if key in trees}

    def finish(self) -> dict[int, list[Tensor]]:
        """Outputs of the block for all chunks; all weights must have been replaced."""
        assert self._is_original or self.replaced == len(self.stages)
        self._resume(len(self.stages))
        outputs: dict[int, list[Tensor]] = {number: [] for number in self._runs}
        for run in self._all_runs():
            assert run.dead
            assert run.output is not None
            outputs[run.chunk].append(run.output)
        for undo in self._undo:
            undo()
        return outputs

    def _all_runs(self) -> Iterator[_Run]:
        return (run for runs in self._runs.values() for run in runs)

    def _resume(self, stage: int) -> None:
        """Let all runs go on until they wait at a stage, or end; they pass stages before it."""
        self._target = stage
        for run in self._all_runs():
            # One that did not wait for experts may have ended.
            if run.stage < stage and not run.dead:
                run.switch()
        self._architecture.supply(self._block, list(self._all_runs()))

    def _reach(self, number: int) -> _Run | None:
        """The current run, where it has come to a stage for the first time; it passes stages before the target."""
        run = current_forward()
        assert isinstance(run, _Run)
        if run.stage >= number:
            return None
        if run.stage != number - 1:
            this, missing = self.stages[number], self.stages[number - 1]
            raise RuntimeError(f"the block runs {_described(this)} before {_described(missing)}")
        run.stage = number
        return None if number < self._target else run

    def _watch_layers(self, number: int, stage: Stage) -> None:
        def arrive(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            run = self._reach(number)
            if run is not None:
                run.wait(rotated_inputs(module, inputs[0]))

        # The layers of a group share their input; any of them may be the first to read it. Runs wait here before they
        # wait for a weight, which would be dropped meanwhile.
        for layer in stage[0].layers:
            module = self._block.get_submodule(layer.module)
            self._undo.append(module.register_forward_pre_hook(arrive, prepend=True).remove)

    def _watch_attention(self, number: int) -> None:
        def arrive(*states: Tensor) -> None:
            run = self._reach(number)
            if run is not None:
                run.wait(None, states)

        states = attention_states(self._block)
        states.observe = arrive

        def undo() -> None:
            states.observe = None

        self._undo.append(undo)

    def _watch_experts(self, path: str, numbers: Sequence[int]) -> None:
        """Run the experts of each stage for their inputs, wait, and run them again with the compressed weights.

        path: of the module of all experts. numbers: of its stages.
        """
        experts: Any = self._block.get_submodule(path)
        usual = experts.forward

        def forward(*arguments: Tensor, **named: Tensor) -> Tensor:
            for number in numbers:
                run = self._reach(number)
                if run is not None and not self._is_original:
                    run.collects = True
                    experts.show(members[number], *arguments, **named)
                    run.collects = False
                    run.wait(None)
            output: Tensor = usual(*arguments, **named)
            return output

        def hook(group: Group) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                run = current_forward()
                assert isinstance(run, _Run)
                if run.collects:
                    self._sums.add(group, run.chunk, inputs[0])

            return add

        members = {number: members_of(self.stages[number]) for number in numbers}
        experts.forward = forward
        # The class's own forward again.
        self._undo.append(lambda: delattr(experts, "forward"))
        for group in (group for number in numbers for group in self.stages[number]):
            layer = self._block.get_submodule(group.layers[0].module)
            self._undo.append(layer.register_forward_pre_hook(hook(group)).remove)


def members_of(stage: Stage) -> list[int]:
    """Numbers of the experts of a stage."""
    return list(dict.fromkeys(layer.expert for group in stage for layer in group.layers if layer.expert is not None))


def _has_experts(stage: Stage) -> bool:
    return stage != ATTENTION and stage[0].is_expert


def _described(stage: Stage) -> str:
    return "its attention" if stage == ATTENTION else stage[0].key


def _taken(run: Callable[[Tensor], Tensor], parts: list[Tensor], place: int) -> Callable[[], Tensor]:
    held = [parts[place]]
    return lambda: run(held.pop())


def container(stage: Stage) -> str:
    """Path of the module that holds all experts of a stage."""
    layer = stage[0].layers[0]
    return layer.module.rpartition(f".{layer.expert}.")[0]
