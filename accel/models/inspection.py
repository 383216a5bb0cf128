"""The adapter of a model, found by inspection: transformers' model runs once, without weights, and is watched.

Blocks run on the meta device, where tensors have identities but no values: linear layers that are called with the same
tensor read the same input. Everything outside the blocks runs on a few tokens with random values, one module at a time.
"""

import copy
import json
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten.accel.errors import UserError
from hasten.accel.models.adapter import Adapter, BlockLayout, FusedExperts, InputGroup
from hasten.accel.models.experts import Layout, is_fused
from hasten.accel.models.plain_linears import reason_to_skip
from hasten.accel.models.skeleton import (
    NOT_RUN,
    Call,
    Skeleton,
    Stop,
    build_model,
    compute_buffers,
    each_module,
    placeholder,
)

BATCH, LENGTH = 2, 6
_FAILURES = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    IndexError,
    NotImplementedError,
    ImportError,
    AssertionError,
)


class NotBlockwise(Exception):  # noqa: N818 (the reason why a model cannot be run block by block)
    """Why a model cannot be run block by block."""


def find_blocks(model: Any, config: Any) -> str:
    """Path of the list of blocks; NotBlockwise where there is none, or several."""
    number = getattr(config, "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    start = next((path for path, module in model.named_modules() if module is decoder), "")
    lists = [
        f"{start}.{path}" if start else path
        for path, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == number and _is_list_of_blocks(module)
    ]
    lists = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    if not lists:
        raise NotBlockwise(f"its decoder has no list of {number} blocks")
    if len(lists) > 1:
        raise NotBlockwise(f"its decoder has several lists of {number} blocks: {', '.join(lists)}")
    return lists[0]


def _is_list_of_blocks(module: nn.ModuleList) -> bool:
    return not any(isinstance(child, nn.Linear | nn.Embedding) for child in module) and any(
        parameter.ndim > 1 for parameter in module.parameters()
    )


_ADAPTERS: dict[str, Adapter | str] = {}


def adapter_of(config: Any, folder: Path) -> Adapter:
    """Adapter of the model of transformers' config; NotBlockwise states why there is none.

    It is derived once for a config. folder: of the checkpoint, for error messages.
    """
    key = json.dumps(config.to_dict(), sort_keys=True, default=str)
    if key not in _ADAPTERS:
        try:
            model = build_model(config, torch.float32, folder)
            _ADAPTERS[key] = derive_adapter(model, config.get_text_config(decoder=True))
        except NotBlockwise as reason:
            _ADAPTERS[key] = str(reason)
    adapter = _ADAPTERS[key]
    if isinstance(adapter, str):
        raise NotBlockwise(adapter)
    return adapter


def derive_adapter(model: Any, config: Any) -> Adapter:
    """Adapter of a float32 model on the meta device, which is used up; NotBlockwise states the reason."""
    blocks = find_blocks(model, config)
    return _Inspection(model, config, blocks).adapter()


class _Inspection:
    """The run outside the blocks."""

    def __init__(self, model: Any, config: Any, blocks: str) -> None:
        self._model, self._path = model, blocks
        self._skeleton = Skeleton(model, config, blocks)
        self._vocabulary = int(config.vocab_size)
        generator = torch.Generator().manual_seed(0)
        low = min(10, self._vocabulary // 2)
        ids = torch.randint(low, self._vocabulary, (2, BATCH, LENGTH), generator=generator)
        self._tokens, self._others = ids[0], ids[1]
        self._called: dict[str, nn.Module] = {}
        self._tables: dict[str, nn.Module] = {}
        self._calls: list[tuple[str, Tensor, Tensor]] = []
        self._depth: int | None = None

    def adapter(self) -> Adapter:
        """See derive_adapter."""
        head = self._head()
        self._head_path = next(path for path, module in self._model.named_modules() if module is head)
        embedding = self._model.get_input_embeddings()
        if not isinstance(embedding, nn.Embedding):
            raise NotBlockwise(f"its embedding is a {type(embedding).__name__}, not a table of tokens")
        tied = head.weight is embedding.weight
        with self._watched():
            hidden, call = self._first_call()
            self._skeleton.outputs = _outputs(self._skeleton.blocks[0], hidden, call)
            entered, calls = self._all_calls(self._tokens)
            others = self._all_calls(self._others)[1]
            self._entered = entered, calls
            self._check_calls(calls, others)
            batched = not _fits(self._skeleton.blocks[0], hidden, self._all_calls(self._tokens[:1])[1][0])
            front = [
                path
                for path, module in self._called.items()
                if path not in self._tables and list(module.parameters(recurse=False))
            ]
            tail, scale, logits, probe = self._after(entered, head)
        logit_scale, cap = _logit_map(probe, logits)
        names = {id(module): path for path, module in self._model.named_modules()}
        if id(embedding) not in {id(module) for module in self._tables.values()}:
            raise NotBlockwise("its embedding is not called with the tokens")
        return Adapter(
            blocks=self._path,
            layouts=self._layouts(entered, calls),
            embedding=names[id(embedding)],
            tables=tuple(self._tables),
            front=tuple(front),
            run=tuple(self._called),
            tail=tuple(tail),
            head=self._head_path,
            input_scale=scale,
            logit_scale=logit_scale,
            cap=cap,
            outputs=self._skeleton.outputs,
            tied=tied,
            batched=batched,
            loads_packed=_can_initialise_packed(self._model, self._skeleton.blocks),
        )

    def _layouts(self, hidden: Tensor, calls: Sequence[Call]) -> tuple[BlockLayout, ...]:
        """Layout of each block; blocks of the same modules, called alike, run the same."""
        known: dict[object, BlockLayout] = {}
        layouts = []
        for block, call in zip(self._skeleton.blocks, calls, strict=True):
            key: tuple[object, ...] = tuple(
                (path, type(module), *(tuple(parameter.shape) for parameter in module.parameters(recurse=False)))
                for path, module in block.named_modules()
            )
            key = (*key, call.is_incomplete)
            if key not in known:
                known[key] = trace_block(block, hidden.to("meta"), Call(on_meta(call.positional), on_meta(call.named)))
            layouts.append(known[key])
        return tuple(layouts)

    def _head(self) -> nn.Linear:
        head = self._model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise NotBlockwise(f"its output layer is a {type(head).__name__}, not a linear layer")
        return head

    def _run(self, tokens: Tensor, visit: Callable[[int, Tensor, Call], Tensor]) -> Tensor | None:
        try:
            return self._skeleton.run(tokens, visit)
        except _FAILURES as error:
            raise NotBlockwise(f"it does not run on tokens alone: {_first_line(error)}") from None

    def _first_call(self) -> tuple[Tensor, Call]:
        seen: list[tuple[Tensor, Call]] = []

        def visit(number: int, hidden: Tensor, call: Call) -> Tensor:
            seen.append((hidden, call))
            raise Stop

        self._run(self._tokens, visit)
        if not seen:
            raise NotBlockwise("it does not call its list of blocks")
        if seen[0][0].shape[:2] != (BATCH, LENGTH) or seen[0][0].ndim != 3:
            shape = list(seen[0][0].shape)
            raise NotBlockwise(f"the hidden states of {BATCH} sequences of {LENGTH} tokens have the shape {shape}")
        return seen[0]

    def _all_calls(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        calls: list[Call] = []
        last: list[Tensor] = []

        def visit(number: int, hidden: Tensor, call: Call) -> Tensor:
            if number != len(calls):
                raise NotBlockwise("it does not run its blocks one after another, each once")
            if last and not _is_same(hidden, last[0]):
                raise NotBlockwise(f"it changes the hidden states between the blocks {number - 1} and {number}")
            calls.append(call)
            last[:] = [hidden]
            if len(calls) == len(self._skeleton.blocks):
                raise Stop
            return hidden

        self._run(tokens, visit)
        if len(calls) < len(self._skeleton.blocks):
            raise NotBlockwise("it does not run all of its blocks")
        return last[0], calls

    def _check_calls(self, calls: Sequence[Call], others: Sequence[Call]) -> None:
        """NotBlockwise where arguments of blocks depend on tokens, or are states that blocks change."""
        for call, other in zip(calls, others, strict=True):
            for (name, value), (_, second) in zip(_leaves(call), _leaves(other), strict=True):
                if isinstance(value, Tensor):
                    if not isinstance(second, Tensor) or not torch.equal(value, second):
                        raise NotBlockwise(f"its blocks take the argument {name}, which depends on the tokens")
                elif isinstance(value, MutableMapping):
                    self._check_shared(name)
                elif (
                    value is not None
                    and value is not NOT_RUN
                    and not isinstance(value, bool | int | float | str | torch.dtype)
                ):
                    raise NotBlockwise(f"its blocks take the argument {name}, a {type(value).__name__}")

    def _check_shared(self, name: str) -> None:
        """NotBlockwise where blocks put something into a dict that they are called with, for later blocks."""
        hidden, calls = self._entered
        for block, call in zip(self._skeleton.blocks, calls, strict=True):
            trace_block(block, hidden.to("meta"), Call(on_meta(call.positional), on_meta(call.named)))
        if any(value for _, value in _leaves(calls[-1]) if isinstance(value, MutableMapping)):
            raise NotBlockwise(f"its blocks pass {name} on to later blocks")

    def _after(self, hidden: Tensor, head: nn.Module) -> tuple[list[str], float, Tensor, Tensor]:
        """Modules behind the last block, factor of the head's inputs, logits, and the head's outputs they are of."""
        given = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        probe = _probe(self._vocabulary_of(head))
        count = len(self._skeleton.blocks)

        def visit(number: int, hidden: Tensor, call: Call) -> Tensor:
            if number < count - 1:
                return hidden
            self._depth = 0
            return given

        # Of one token only: its logits are large.
        vars(head)["forward"] = lambda inputs: probe.view(*[1] * (inputs.ndim - 1), -1)
        try:
            logits = self._run(self._tokens, visit)
        finally:
            del vars(head)["forward"]
            self._depth = None
        assert logits is not None
        tail: list[str] = []
        output, scale = given, 1.0
        for path, inputs, result in self._calls:
            scale = _factor(output, inputs)
            if path == self._head_path:
                return tail, scale, logits, probe
            if scale != 1.0:
                raise NotBlockwise(f"it scales the hidden states before {path}")
            tail.append(path)
            output = result
        raise NotBlockwise("it does not call its output layer")

    def _vocabulary_of(self, head: Any) -> int:
        return int(head.weight.shape[0])

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Give every module random parameters while it runs, and note its calls."""
        handles = []
        for path, module in each_module(self._model, self._skeleton.recorders):
            if module is self._model.get_input_embeddings():
                module.weight = placeholder(module)
            handles.append(module.register_forward_pre_hook(self._before_call(path), with_kwargs=True))
            handles.append(module.register_forward_hook(self._after_call(path)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before_call(self, path: str) -> Any:
        def enter(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if self._depth is None:
                self._called[path] = module
            elif not self._holds_head(path):
                self._depth += 1
            compute_buffers(self._model, module)
            ids = inputs[0] if inputs else None
            if self._is_table(module) and self._is_tokens(ids):
                assert isinstance(ids, Tensor)
                self._tables[path] = module
                unique, places = ids.unique(return_inverse=True)
                module.padding_idx = None
                module.weight = nn.Parameter(_random((len(unique), module.embedding_dim), path), requires_grad=False)
                return (places, *inputs[1:]), named
            if "forward" not in vars(module):
                for name, parameter in module.named_parameters(recurse=False):
                    value = _random(tuple(parameter.shape), f"{path}.{name}").to(parameter.dtype)
                    setattr(module, name, nn.Parameter(value, requires_grad=False))
            return None

        return enter

    def _after_call(self, path: str) -> Any:
        def leave(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if self._depth and not self._holds_head(path):
                self._depth -= 1
                if self._depth == 0 and inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                    self._calls.append((path, inputs[0], output))
            if path in self._tables:
                module.weight = placeholder(module)
                return
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

        return leave

    def _holds_head(self, path: str) -> bool:
        """Whether a module contains the output matrix, so that its parts are seen one by one."""
        return path == "" or self._head_path.startswith(f"{path}.")

    def _is_table(self, module: nn.Module) -> bool:
        """Whether a module looks rows up by the numbers that it is called with; tables of positions compute others."""
        kinds = nn.Embedding, type(self._model.get_input_embeddings())
        return isinstance(module, nn.Embedding) and any(type(module).forward is kind.forward for kind in kinds)

    def _is_tokens(self, ids: object) -> bool:
        return isinstance(ids, Tensor) and any(
            ids.shape == tokens.shape and torch.equal(ids, tokens)
            for tokens in (self._tokens, self._others, self._tokens[:1])
        )


def trace_block(block: nn.Module, hidden: Tensor, call: Call) -> BlockLayout:
    """What a block on the meta device runs; NotBlockwise where it cannot run there.

    hidden, call: any of the block's, on the meta device.
    """
    held: list[Tensor] = []  # so that no identity is used twice
    norms: dict[object, str] = {}
    linears = {path: module for path, module in block.named_modules() if isinstance(module, nn.Linear)}
    mixtures = {path: Layout.of(module).number for path, module in block.named_modules() if is_fused(module)}
    handles, replaced = [], []
    order: list[tuple[str, object]] = []

    def note(path: str) -> Any:
        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                held.append(inputs[0])
                order.append((path, _identity(inputs[0])))

        return before

    def note_norm(path: str) -> Any:
        def after(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                held.append(output)
                norms[_identity(output)] = path

        return after

    for path, module in block.named_modules():
        if any(path.startswith(f"{mixture}.") for mixture in mixtures):
            continue
        if path in linears or path in mixtures:
            handles.append(module.register_forward_pre_hook(note(path)))
        if _is_norm(module):
            handles.append(module.register_forward_hook(note_norm(path)))
        if path in mixtures:
            # Which expert runs depends on values.
            vars(module)["forward"] = lambda inputs, *_, **__: torch.zeros_like(inputs)
            replaced.append(module)
    try:
        with torch.no_grad():
            block(hidden, *call.positional, **call.named)
    except _FAILURES as error:
        if call.is_incomplete:
            raise NotBlockwise("its blocks need more of the block before them than hidden states") from None
        raise NotBlockwise(
            f"a block ({type(block).__name__}) does not run without values: {_first_line(error)}"
        ) from None
    finally:
        for handle in handles:
            handle.remove()
        for module in replaced:
            del vars(module)["forward"]
    return _layout(order, norms, linears, mixtures)


def _layout(
    order: Sequence[tuple[str, object]],
    norms: dict[object, str],
    linears: dict[str, nn.Linear],
    mixtures: dict[str, int],
) -> BlockLayout:
    keys: dict[str, set[object]] = {}
    for path, key in order:
        keys.setdefault(path, set()).add(key)
    skipped = {path: "the block does not call it" for path in linears if path not in keys}
    skipped |= {path: "the block calls it with several inputs" for path in linears if len(keys.get(path, ())) > 1}
    skipped |= {path: reason for path, layer in linears.items() if (reason := reason_to_skip(path, layer, mixtures))}
    skipped |= {
        path: f"loaders cannot pack a {type(module).__name__}, which has its own product"
        for path, module in linears.items()
        if path not in skipped and type(module).forward is not nn.Linear.forward
    }
    # In the order of the layers that are compressed: a router may read the input of a layer that runs much later.
    groups: dict[object, list[str]] = {}
    for path, key in order:
        if path not in skipped:
            members = groups.setdefault((path,) if path in mixtures else key, [])
            if path not in members:
                members.append(path)
    items: list[InputGroup | FusedExperts] = []
    for key, members in groups.items():
        if members and members[0] in mixtures:
            items.append(FusedExperts(members[0]))
        elif members:
            items.append(InputGroup(tuple(members), norms.get(key)))
    return BlockLayout(tuple(items), skipped)


def on_meta(value: Any) -> Any:
    """A call's argument, its tensors on the meta device."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if type(value) is dict:
        return {key: on_meta(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(on_meta(item) for item in value)
    return value


def _outputs(block: nn.Module, hidden: Tensor, call: Call) -> int:
    """See Adapter.outputs."""
    # Experts' values are not needed here either.
    form: list[object] = []
    handle = block.register_forward_hook(lambda module, inputs, output: form.append(output))
    try:
        trace_block(block, hidden.to("meta"), Call(on_meta(call.positional), on_meta(call.named)))
    finally:
        handle.remove()
    output = form[0]
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor) or first.shape != hidden.shape:
        raise NotBlockwise(f"its blocks return a {type(first).__name__}, not hidden states")
    return len(output) if isinstance(output, tuple) else 0


def _can_initialise_packed(model: Any, blocks: Sequence[nn.Module]) -> bool:
    """Whether transformers can initialise blocks whose linear layers have no `weight`, as packed ones have none."""
    for block in (blocks[0], blocks[-1]):
        packed = copy.deepcopy(block, {id(model.config): model.config})
        for module in packed.modules():
            if isinstance(module, nn.Linear):
                del module.weight
                module.register_parameter("bias", None)
        try:
            for module in packed.modules():
                if not isinstance(module, nn.Linear):
                    model._init_weights(module)
        except _FAILURES:
            return False
    return True


def _fits(block: nn.Module, hidden: Tensor, call: Call) -> bool:
    """Whether arguments of one sequence fit several."""
    try:
        trace_block(block, hidden.to("meta"), Call(on_meta(call.positional), on_meta(call.named)))
    except NotBlockwise:
        return False
    return True


def _leaves(call: Call) -> Iterator[tuple[str, object]]:
    """Name and value of each argument; of those in tuples, lists and dicts, of each item."""

    def inner(name: str, value: object) -> Iterator[tuple[str, object]]:
        # Dicts without items are filled by blocks.
        if isinstance(value, tuple | list) and value:
            for item in value:
                yield from inner(name, item)
        elif type(value) is dict and value:
            for key, item in value.items():
                yield from inner(f"{name}[{key}]", item)
        else:
            yield name, value

    for place, value in enumerate(call.positional):
        yield from inner(f"number {place + 2}", value)
    for name, value in call.named.items():
        yield from inner(name, value)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1


def _identity(tensor: Tensor) -> object:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.numel(), tensor._version


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    return tensor is other or (tensor.shape == other.shape and torch.equal(tensor, other))


def _random(shape: tuple[int, ...], name: str) -> Tensor:
    """Random values, the same for a name at every call."""
    generator = torch.Generator().manual_seed(sum(ord(letter) * (31 + place) for place, letter in enumerate(name)))
    # Matrices have no mean, so that an activation function does not pass for the identity; norms keep the signs.
    return torch.randn(shape, generator=generator) * 0.3 + (0.5 if len(shape) == 1 else 0.0)


def _probe(size: int) -> Tensor:
    """Outputs of the head: small and large ones of both signs."""
    powers = torch.linspace(-3, 6, size, dtype=torch.float64)
    signs = torch.ones(size, dtype=torch.float64)
    signs[::2] = -1
    return (signs * 10**powers).float()


def _factor(output: Tensor, inputs: Tensor) -> float:
    """Factor between a module's output and the next one's input; NotBlockwise where they differ by more than that."""
    if output.numel() == inputs.numel() and output.shape[-1] == inputs.shape[-1]:
        first, second = output.flatten().double(), inputs.flatten().double()
        if torch.equal(first, second):
            return 1.0
        factor = float((first @ second) / (first @ first))
        if torch.allclose(second, first * factor, rtol=1e-5, atol=1e-8):
            return _rounded(factor)
    raise NotBlockwise("it computes something between the last block and the output layer that is no module")


def _rounded(factor: float) -> float:
    """The factor without the error of float32 arithmetic."""
    for form in (factor, 1 / factor):
        short = float(f"{form:.6g}")
        if abs(short - form) <= 1e-6 * abs(form):
            return short if form is factor else 1 / short
    return factor


def _logit_map(probe: Tensor, logits: Tensor) -> tuple[float, float | None]:
    """Adapter.logit_scale and Adapter.cap of a model whose head returned the probe."""
    given, made = probe.double(), logits[0, 0].double()
    if made.shape != given.shape:
        raise NotBlockwise(f"its logits have {len(made)} entries for {len(given)} rows of the output layer")
    small = given.abs() < 2e-2
    scale = _rounded(float((made[small] / given[small]).median()))
    if torch.allclose(made, given * scale, rtol=1e-4, atol=1e-6):
        return scale, None
    cap = _rounded(float(made.abs().max()))
    if torch.allclose(made, cap * (given * scale / cap).tanh(), rtol=1e-3, atol=1e-4):
        return scale, cap
    raise NotBlockwise("its logits are not a scaled or capped output of its output layer")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0] or type(error).__name__


def refusal(model_type: object, reason: NotBlockwise) -> UserError:
    """Error that states why a model is not supported."""
    return UserError(f"model_type={model_type!r} is not supported: {reason}")
