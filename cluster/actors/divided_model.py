"""One rank's part of a model that DeepSpeed divides: tensor parallelism by AutoTP, or ZeRO-3 without an optimiser.

Both are applied to a block as soon as it is read, so that a rank never holds the whole model.

Source: DeepSpeed-Inference, Aminabadi et al. 2022, arXiv:2207.00032; ZeRO-Infinity, Rajbhandari et al. 2021,
arXiv:2104.07857. AutoTP replaces the linear layers of a block through a method that is not public: the version of
deepspeed is bounded in pyproject.toml, and tests hold the result against one process.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.assembled import Sizes, WholeModel
from hasten.accel.models.checkpoint import Checkpoint

TENSOR_PARALLEL, ZERO3 = "tensor_parallel", "zero3"
MODES = (TENSOR_PARALLEL, ZERO3)
# Parameters of ZeRO-3 below this number of elements, such as norms, are on every rank.
PERSISTENT_ELEMENTS = 10_000

# Context in which a parameter is complete; all ranks enter it at once.
WholeParameter = Callable[[Tensor], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Division:
    """How a target is divided over `size` ranks.

    offload: where ZeRO-3 holds the parts of the weights: None is the device, `cpu` main memory, and else a folder on an
    NVMe disk.
    """

    size: int
    mode: str = TENSOR_PARALLEL
    offload: str | None = None


def load_part(
    folder: Path, division: Division, dtype: torch.dtype, device: str
) -> tuple[PreTrainedModel, WholeParameter | None]:
    """The part of a checkpoint's model that belongs to this rank; to be called on all ranks at once.

    A part is called like the whole model, on all ranks with the same arguments, and all get the same result. The second
    value is None if parameters outside the blocks are complete anyway.
    """
    checkpoint = Checkpoint(folder)
    if division.mode == TENSOR_PARALLEL:
        return _tensor_parallel(WholeModel(checkpoint, dtype), division.size).to(device), None
    assert division.mode == ZERO3, division
    return _zero3(WholeModel(checkpoint, dtype, device), division, dtype)


class TensorParallelArchitecture(Architecture):
    """An architecture of whose blocks this rank computes its part; all ranks run the same blocks on the same states.

    A rank holds a whole block in main memory while it is loaded.
    """

    streams: ClassVar[bool] = False

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: str, size: int) -> None:
        super().__init__(checkpoint, dtype, device)
        self._whole = WholeModel(checkpoint, dtype)
        self._divide = _divider(self._whole, size)

    def load_block(self, index: int) -> nn.Module:
        """See Architecture; all ranks load it at once."""
        block = self._whole.load_block(index)
        self._divide(block)
        return block.to(self.device)


def _tensor_parallel(source: WholeModel, size: int) -> Any:
    return source.assemble(_divider(source, size))


def _divider(source: WholeModel, size: int) -> Callable[[nn.Module], None]:
    """Function that replaces the linear layers of a whole block by this rank's parts."""
    if source.rounds_inputs:
        raise UserError(
            f"{source.checkpoint.path} rounds inputs of its layers, or keys and values, which target_group.mode="
            "tensor_parallel does not: use target_group.mode=zero3, or target_group.size=1"
        )
    if any(source.input_rotations(block) for block in range(source.num_blocks)):
        raise UserError(
            f"{source.checkpoint.path} rotates inputs of its layers, which target_group.mode=tensor_parallel does not: "
            "use target_group.mode=zero3, or target_group.size=1"
        )
    from deepspeed.module_inject.auto_tp import AutoTP

    # By block class, the names of the layers whose inputs are divided, and whose outputs are summed over the ranks.
    policies = AutoTP.tp_parser(source.empty())
    summed = {name for _, names in policies for name in names}

    def divide(block: nn.Module) -> None:
        auto = AutoTP(block, summed, "", None, None, type(block), model_config=source.config)
        auto.set_tensor_parallel_config(size, torch.distributed.group.WORLD)
        auto.update_linear_policies()
        auto._replace_module(block)

    return divide


def _zero3(source: WholeModel, division: Division, dtype: torch.dtype) -> tuple[Any, WholeParameter]:
    import deepspeed
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if division.offload not in (None, "cpu") and not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            f"target_group.offload={division.offload} needs the library libaio and its headers on every node (package "
            "libaio-dev): install it, or use target_group.offload=cpu"
        )
    config = zero3_config(division, dtype, source.sizes())
    # Its argument dtype is not given: on a CPU, DeepSpeed would take bfloat16 instead of float32.
    model = source.assemble(partial(deepspeed.zero.Init, config_dict_or_path=config))
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine.module, deepspeed.zero.GatheredParameters


def zero3_config(division: Division, dtype: torch.dtype, sizes: Sizes) -> dict[str, Any]:
    """DeepSpeed's config of ZeRO-3 for inference.

    By default DeepSpeed keeps what it has collected, up to 1e9 elements. Here a block is dropped once it has run, while
    the next one is collected, so that a rank holds its part and little more.
    """
    zero: dict[str, Any] = {
        "stage": 3,
        # Else F.linear is replaced in the whole process, with what saves memory in a backward pass.
        "memory_efficient_linear": False,
        "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": sizes.block,
        "stage3_max_live_parameters": 2 * sizes.block + sizes.outside,
    }
    if division.offload == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    elif division.offload is not None:
        # A buffer holds a rank's part of one parameter; two blocks are on their way. By default they are 5e8 elements.
        zero["offload_param"] = {
            "device": "nvme",
            # DeepSpeed names files by the rank's number alone, which several groups on a node may share.
            "nvme_path": os.path.join(division.offload, f"group-{os.environ['MASTER_PORT']}"),
            "buffer_count": 2 * sizes.parameters,
            "buffer_size": -(-sizes.largest // division.size),
            "max_in_cpu": 0,
        }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
