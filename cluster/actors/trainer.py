"""A rank of a training group: the network in a DeepSpeed engine, with ZeRO, on this rank's part of every batch.

Weights and optimizer are float32, as in one process; products are in bfloat16 by autocast. Checkpoints are those of the
one-process trainer, whatever the number of ranks and the stage: parameters are gathered one by one, and rank 0 writes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten.accel.outputs.resumable import write_whole
from hasten.accel.training.division import Division, divided
from hasten.accel.training.heads.draft_head import DraftHead, DraftNetwork, HeadBatch, TargetWeights
from hasten.accel.training.setup import HeadSetup, Measurement
from hasten.accel.training.trainer import STATE, TrainSettings, adamw, check_finite, loss_of, micro_batches, state_bytes
from hasten.cluster.runtime.process_group import Rank

_MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainerRank(Rank):
    """Actor. zero: stage of ZeRO, from 0 to 3. device: cpu or cuda."""

    def __init__(self, setup: HeadSetup, settings: TrainSettings, zero: int, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(True)
        self._setup, self._settings, self._zero, self._kind = setup, settings, zero, device
        self._measurement: Measurement | None = None
        self._engine: Any = None
        self.step = 0

    def prepare(self, zero: int | None = None) -> None:
        """Read the records and build the engine. zero: a stage in place of the constructor's."""
        self._zero = self._zero if zero is None else zero
        self._device = torch.device(self._kind, self.rank) if self._kind == "cuda" else torch.device(self._kind)
        self._windows = self._setup.windows()
        self._vocabulary = self._setup.vocabulary(self._windows)
        self._target_weights = TargetWeights.of(self._setup.target)
        self._division = Division(self.rank, self.size, self._total)
        self._build(None)

    def train(self, count: int, decay_from: int | None = None, decay_steps: int = 1) -> list[dict[str, float]]:
        """Do `count` steps; see `Trainer.train`. All ranks return the same."""
        self._engine.train()
        return [self._step(decay_from, decay_steps) for _ in range(count)]

    def weights(self) -> dict[str, Any] | None:
        """The network's tensors by name, float32 numpy arrays, from rank 0; None from the others."""
        self._gathered = {name: tensor.float() for name, tensor in self._state().items()}
        return {name: tensor.numpy() for name, tensor in self._gathered.items()} if self.rank == 0 else None

    def measure(self) -> dict[str, Any] | None:
        """Rank 0 measures the weights that `weights` gathered last; None from the others."""
        if self.rank:
            return None
        if self._measurement is None:
            embedding = self._target_weights.embedding.to(self._device)
            self._measurement = Measurement(self._setup, self._vocabulary, embedding, self._network)
        return self._measurement(self._gathered)

    def save(self, folder: Path) -> None:
        """Write a checkpoint into a new folder; all ranks take part."""
        network, optimizer = self._state(), self._optimizer_state()
        if self.rank == 0:
            state = {"step": self.step, "network": network, "optimizer": optimizer}
            folder.mkdir(parents=True, exist_ok=True)
            needed = sum(3 * 4 * tensor.numel() for tensor in network.values())
            write_whole(folder / STATE, lambda temporary: torch.save(state, temporary), needed)

    def load(self, folder: Path) -> int:
        """Go on from a checkpoint; returns its step."""
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        self._build(state["network"])
        self._set_optimizer_state(state["optimizer"])
        self.step = int(state["step"])
        return self.step

    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state that this rank holds."""
        return state_bytes(self._inner_optimizer)

    def _build(self, weights: dict[str, Tensor] | None) -> None:
        """A new engine. weights: of its network; None begins the training."""
        import deepspeed

        if self._engine is not None:
            self._engine.destroy()
        network = self._setup.network(self._vocabulary, self._target_weights, self._device)
        if weights is not None:
            network.load_state_dict(weights)
        self._network = network
        # Gathered parameters keep this order in checkpoints, as in one process.
        self._parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._shapes = [parameter.shape for parameter in self._parameters]  # ZeRO-3 changes them
        settings = self._settings
        config = {
            "train_micro_batch_size_per_gpu": settings.micro_batch // self.size,
            "gradient_accumulation_steps": settings.micro_batches,
            # Without ZeRO the engine would not tell the norm: `_step` clips.
            "gradient_clipping": settings.clip if self._zero else 0.0,
            "zero_optimization": {"stage": self._zero},
            "zero_allow_untested_optimizer": True,
            # torch's AdamW, whose numbers are those of one process; DeepSpeed's would be compiled first.
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        self._objective = _Objective(self._setup.head, network, settings.bfloat16)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=self._objective, optimizer=adamw(self._parameters, settings), config=config
        )
        self.step = 0

    def _step(self, decay_from: int | None, decay_steps: int) -> dict[str, float]:
        rate = self._settings.rate(self.step, decay_from, decay_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        count, sums, norm = self._settings.micro_batches, None, 0.0
        for index, (seed, batch) in enumerate(
            micro_batches(self._windows, self._settings, self.step, self._device, self._division), 1
        ):
            with divided(self._division):
                value = self._engine(batch, seed)
            parts = {"loss": value.detach(), **self._objective.parts}
            own = torch.stack([part.float() for part in parts.values()])
            sums = own if sums is None else sums + own
            self._engine.backward(value)
            if index == count and not self._zero:
                clip = self._settings.clip or torch.inf
                norm = float(nn.utils.clip_grad_norm_(self._parameters, clip))
            self._engine.step()
        assert sums is not None
        means = (self._total(sums) / self.size / count).tolist()
        named = dict(zip(parts, means, strict=True))
        check_finite(self.step, named["loss"])
        norm = float(self._engine.get_global_grad_norm()) if self._zero else norm
        self.step += 1
        return {**named, "gradient_norm": norm, "lr": rate}

    def _total(self, own: Tensor) -> Tensor:
        torch.distributed.all_reduce(own)
        return own

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        """torch's optimizer, whose parameters are this rank's partitions with ZeRO."""
        inner: torch.optim.Optimizer = self._optimizer.optimizer if self._zero else self._optimizer
        return inner

    def _state(self) -> dict[str, Tensor]:
        """The network's tensors by name, on the CPU of rank 0; empty on the others."""
        state = {}
        for name, tensor in self._network.state_dict(keep_vars=True).items():
            with self._whole(tensor):
                if self.rank == 0:
                    state[name] = tensor.detach().cpu().clone()
        return state

    @contextmanager
    def _whole(self, tensor: Tensor) -> Iterator[None]:
        """Context in which a tensor of the network is whole."""
        if self._zero < 3 or not isinstance(tensor, nn.Parameter):
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield

    def _optimizer_state(self) -> dict[str, Any]:
        """The state of `adamw` in one process, on the CPU of rank 0; all ranks take part."""
        if not self._zero:
            own: dict[str, Any] = self._inner_optimizer.state_dict()
            return own
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[int, dict[str, Tensor]] = {}
        if self.step:
            for index, parameter in enumerate(self._parameters):
                moments = {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
                if self.rank == 0:
                    whole = {key: moment.cpu().view(self._shapes[index]) for key, moment in moments.items()}
                    state[index] = {"step": torch.tensor(float(self.step)), **whole}
        groups = adamw([nn.Parameter(torch.zeros(1)) for _ in self._parameters], self._settings).state_dict()
        return {"state": state, "param_groups": groups["param_groups"]}

    def _set_optimizer_state(self, state: dict[str, Any]) -> None:
        if not self._zero:
            self._inner_optimizer.load_state_dict(state)
            return
        if not state["state"]:
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        step = max(float(moments["step"]) for moments in state["state"].values())
        zero, inner = self._optimizer, self._inner_optimizer
        # DeepSpeed makes the state in its first step only, and has no other way to ask for it.
        flat = zero.fp32_partitioned_groups_flat if self._zero == 3 else zero.single_partition_of_fp32_groups
        for partition in flat:
            moments = {key: torch.zeros_like(partition) for key in _MOMENTS}
            inner.state[partition] = {"step": torch.tensor(step, device=partition.device), **moments}
        if self._zero < 3:
            zero._lazy_init_hp_params_optimizer_state()
        for index, parameter in enumerate(self._parameters):
            for key in _MOMENTS:
                safe_set_full_optimizer_state(parameter, state["state"][index][key], key)


class _Objective(nn.Module):
    """The loss as a module, which an engine runs. parts: see `Loss`, of the last call."""

    def __init__(self, head: DraftHead, network: DraftNetwork, bfloat16: bool) -> None:
        super().__init__()
        self.network, self._head, self._bfloat16 = network, head, bfloat16
        self.parts: dict[str, Tensor] = {}

    def forward(self, batch: HeadBatch, seed: int) -> Tensor:
        """The value, scalar."""
        loss = loss_of(self._head, self.network, batch, seed, self._bfloat16)
        self.parts = dict(loss.parts)
        return loss.value
