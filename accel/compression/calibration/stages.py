"""A block that runs once for each part of the calibration tokens, and waits wherever layers are to be compressed.

Source: `true_sequential` of GPTQ's published code (Frantar et al. 2022, arXiv:2210.17323). The forward stops where
the layers of a group read their input. When all sequences have come so far, the group is compressed on these inputs,
and the forward goes on with the compressed weights, so that layers are calibrated on outputs of compressed layers of
their own block, too. A block that is calibrated on its original layers runs twice: again for the next block's input.
Departs from it: the experts of a layer are one stage, whose layers are calibrated on the original experts.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.calibration.statistics import Hessian, Tree

Stage = tuple[Group, ...]


def stages_of(groups: Sequence[Group]) -> list[Stage]:
    """Groups of a block that are compressed at the same time, in the order in which the block runs them."""
    stages: list[Stage] = []
    for group in groups:
        if group.is_expert and stages and stages[-1][0].is_expert:
            stages[-1] += (group,)
        else:
            stages.append((group,))
    return stages


class _Run(greenlet):
    """The forward of one part of the tokens, which can wait in the middle of the block.

    stage: the last one at which it waited, or that it passed; -1 before the first. inputs: of the layers where it
    waits; None at experts.
    """

    def __init__(self, forward: Callable[[], Tensor]) -> None:
        super().__init__(forward)
        self.stage = -1
        self.inputs: Tensor | None = None

    def wait(self, inputs: Tensor | None) -> None:
        """Return to whoever resumed the run, until it is resumed again."""
        self.inputs = inputs
        assert self.parent is not None
        self.parent.switch()
        self.inputs = None


class StagedBlock:
    """A block in the middle of its forward on some chunks of the calibration sequences.

    groups: all layer groups of the block. chunks: by number their parts [sequences, T, D]; they are taken out, so that
    they are freed as early as the forward allows. run: the block's output for one part. cut: see statistics.Tree.
    """

    def __init__(
        self,
        block: nn.Module,
        groups: Sequence[Group],
        chunks: dict[int, list[Tensor]],
        run: Callable[[Tensor], Tensor],
        cut: int = 0,
    ) -> None:
        self._cut = cut
        self.stages = stages_of(groups)
        # Stage whose inputs were collected last, and the number of stages whose weights are replaced.
        self.collected, self.replaced = -1, 0
        self._block = block
        # Undo what was changed in the block, which would otherwise be in a reference cycle with this object, and would
        # stay in memory until the garbage collector finds it.
        self._undo: list[Callable[[], None]] = []
        self._target = 0
        self._sums: dict[str, Hessian] = {}
        self._runs = {
            number: [_Run(_taken(run, parts, place)) for place in range(len(parts))] for number, parts in chunks.items()
        }
        for number, stage in enumerate(self.stages):
            watch = self._watch_experts if stage[0].is_expert else self._watch_layers
            watch(number, stage)

    def can_collect(self, stage: int) -> bool:
        """Whether the inputs of the stage are to come, or are still held: those of experts are not."""
        return stage > self.collected or (stage == self.collected and not self.stages[stage][0].is_expert)

    def replace(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the weights of the next stage. weights: [rows, columns], by the path of the layer in the block."""
        replace_weights(self._block, weights)
        self.replaced += 1

    def collect(self, stage: int, keys: Collection[str]) -> dict[str, Tree]:
        """Hessians of the inputs of groups of a stage, by group key. Experts that no token reached have no entry.

        The weights of all stages before it must have been replaced.
        """
        assert self.can_collect(stage)
        assert self.replaced == stage
        group = self.stages[stage][0]
        trees: dict[str, Tree] = {}
        for number, runs in self._runs.items():
            self._sums = {}
            for run in runs:
                self._resume(run, stage)
                if run.inputs is not None:
                    self._add(group, run.inputs)
            for key in keys:
                if key in self._sums:
                    trees.setdefault(key, Tree(self._cut)).add(number, 1, self._sums[key])
        self.collected = stage
        return trees

    def finish(self) -> dict[int, list[Tensor]]:
        """Outputs of the block for all chunks; all weights must have been replaced."""
        assert self.replaced == len(self.stages)
        outputs = {number: [self._end(run) for run in runs] for number, runs in self._runs.items()}
        for undo in self._undo:
            undo()
        return outputs

    def _resume(self, run: _Run, stage: int) -> None:
        """Let a run go on until it waits at a stage; passes stages before it."""
        if run.stage < stage:
            self._target = stage
            run.switch()
            if run.dead:
                raise RuntimeError(f"the block does not run {self.stages[stage][0].key}")

    def _end(self, run: _Run) -> Tensor:
        self._target = len(self.stages)
        output: Tensor = run.switch()
        assert run.dead
        return output

    def _add(self, group: Group, inputs: Tensor) -> None:
        rows = inputs.reshape(-1, group.columns)
        if len(rows):
            self._sums.setdefault(group.key, Hessian(group.columns)).add(rows)

    def _reach(self, number: int) -> _Run | None:
        """The current run, where it has come to a stage for the first time; it passes stages before the target."""
        run = getcurrent()
        assert isinstance(run, _Run)
        if run.stage >= number:
            return None
        if run.stage != number - 1:
            raise RuntimeError(f"the block runs {self.stages[number][0].key} before {self.stages[number - 1][0].key}")
        run.stage = number
        return None if number < self._target else run

    def _watch_layers(self, number: int, stage: Stage) -> None:
        def arrive(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            run = self._reach(number)
            if run is not None:
                run.wait(inputs[0])

        # The layers of a group share their input; any of them may be the first to read it.
        for layer in stage[0].layers:
            self._undo.append(self._block.get_submodule(layer.module).register_forward_pre_hook(arrive).remove)

    def _watch_experts(self, number: int, stage: Stage) -> None:
        """Run the experts once for their inputs, wait, and run them again with the compressed weights."""
        experts = self._block.get_submodule(_container(stage))
        usual = experts.forward
        collecting = False

        def forward(*arguments: Tensor, **named: Tensor) -> Tensor:
            nonlocal collecting
            run = self._reach(number)
            if run is not None:
                collecting = True
                usual(*arguments, **named)
                collecting = False
                run.wait(None)
            output: Tensor = usual(*arguments, **named)
            return output

        def hook(group: Group) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                if collecting:
                    self._add(group, inputs[0])

            return add

        experts.forward = forward
        # The class's own forward again.
        self._undo.append(lambda: delattr(experts, "forward"))
        for group in stage:
            layer = self._block.get_submodule(group.layers[0].module)
            self._undo.append(layer.register_forward_pre_hook(hook(group)).remove)


def replace_weights(block: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Replace weights of a block. weights: [rows, columns], by the path of the layer in the block."""
    for path, weight in weights.items():
        parameter = block.get_submodule(path).weight
        assert isinstance(parameter, nn.Parameter)
        parameter.data = weight.to(parameter.device, parameter.dtype)


def _taken(run: Callable[[Tensor], Tensor], parts: list[Tensor], place: int) -> Callable[[], Tensor]:
    held = [parts[place]]
    return lambda: run(held.pop())


def _container(stage: Stage) -> str:
    """Path of the module that holds all experts of a stage."""
    layer = stage[0].layers[0]
    path = layer.module.split(".")
    return ".".join(path[: path.index(str(layer.expert))])
