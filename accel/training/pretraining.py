"""Pretraining of the embedded models: a tokenizer, a small target model and a smaller draft model.

The model starts shallow and gains layers during training (progressive depth: Gong et al. 2019, ICML,
"Efficient training of BERT by progressively stacking"; Reddi et al. 2023), so that early tokens train the
embedding and the first layers at a fraction of the cost. A new layer starts as the identity (its output
projections are zero), so that the loss does not jump.
"""

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hasten.accel.training.muon import Muon

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"


@dataclass(frozen=True)
class Shape:
    """Shape of a Llama-style model, in the words of its transformers config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 64
    max_position_embeddings: int = 2048


@dataclass(frozen=True)
class Schedule:
    """Stages, batch size and learning rates.

    depths: (layers, tokens) of each stage; the last one has all layers of the shape. batch: sequences in a step.
    sequence: tokens of a sequence. decay: share of all steps, at the end, in which the learning rate falls to zero.
    """

    depths: tuple[tuple[int, int], ...]
    batch: int = 32
    sequence: int = 512
    lr: float = 5e-3
    embedding_lr: float = 5e-3
    weight_decay: float = 0.05
    warmup_steps: int = 40
    decay: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.depths or any(layers < 1 or tokens < 1 for layers, tokens in self.depths):
            raise ValueError(f"depths must be (layers, tokens) stages of at least 1 each, got {self.depths}")

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        return sum(self.stage_steps)

    @property
    def stage_steps(self) -> list[int]:
        """Optimizer steps of each stage."""
        return [math.ceil(tokens / (self.batch * self.sequence)) for _, tokens in self.depths]

    def rate(self, step: int) -> float:
        """Factor on the learning rates at a step: linear warm-up, constant, linear decay to zero."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, (step + 1) / self.warmup_steps, left)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer of vocab_size entries, as transformers' PreTrainedTokenizerFast."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PADDING
    )


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    token = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    assert isinstance(token, int)
    return token


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> np.ndarray:
    """One stream (N,) uint16: every document after an end-of-text token."""
    end = _end_of_text(tokenizer)
    stream: list[int] = []
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        stream.append(end)
        stream.extend(ids)
    return np.asarray(stream, dtype=np.uint16)


def windows(stream: np.ndarray, length: int, seed: int) -> Iterable[np.ndarray]:
    """Endless windows (length,) of the stream: every epoch starts at a random offset and shuffles its windows."""
    epoch = 0
    while True:
        generator = np.random.default_rng((seed, epoch))
        offset = int(generator.integers(length))
        starts = np.arange(offset, len(stream) - length + 1, length)
        generator.shuffle(starts)
        for start in starts:
            yield stream[start : start + length]
        epoch += 1


def build(shape: Shape, layers: int, vocab_size: int) -> LlamaForCausalLM:
    """An untrained Llama of a shape with this number of layers, in float32; all its layers are identities."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position_embeddings,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        assert isinstance(layer, LlamaDecoderLayer)
        _make_identity(layer)
    return model


def _make_identity(layer: LlamaDecoderLayer) -> None:
    """Make a layer the identity: zero its output projections, so that it adds nothing to the residual stream."""
    torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    torch.nn.init.zeros_(layer.mlp.down_proj.weight)


def grow(model: LlamaForCausalLM, shape: Shape, layers: int) -> LlamaForCausalLM:
    """A deeper copy of the model: its layers are spread evenly, with identity layers after each of them."""
    deeper = build(shape, layers, model.config.vocab_size)
    old = len(model.model.layers)
    deeper.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    deeper.model.norm.load_state_dict(model.model.norm.state_dict())
    for index, layer in enumerate(model.model.layers):
        deeper.model.layers[index * layers // old].load_state_dict(layer.state_dict())
    return deeper


def _optimizers(model: LlamaForCausalLM, schedule: Schedule) -> list[torch.optim.Optimizer]:
    hidden: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (hidden if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return [
        Muon(hidden, lr=schedule.lr, weight_decay=schedule.weight_decay),
        torch.optim.AdamW(others, lr=schedule.embedding_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _loss(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _average_gradients(model: LlamaForCausalLM, world: int) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    flat /= world
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def train(
    stream: np.ndarray,
    vocab_size: int,
    shape: Shape,
    schedule: Schedule,
    state_path: Path,
    rank: int = 0,
    world: int = 1,
    report: Callable[[int, int, float], None] | None = None,
    save_every: int = 50,
) -> LlamaForCausalLM:
    """Train a model on a token stream; returns it in float32.

    With world > 1 every rank calls this inside an initialised process group and takes its part of each
    batch. The state is saved to state_path every save_every steps and read from there at the start, so that a
    killed training resumes. Rank 0 calls report(step, tokens, loss) after every step.
    """
    torch.manual_seed(schedule.seed)
    source = iter(windows(stream, schedule.sequence, schedule.seed))
    # All ranks read the state before rank 0 can overwrite it.
    state = torch.load(state_path, weights_only=True) if state_path.exists() else None
    if world > 1:
        torch.distributed.barrier()
    done = 0
    model: LlamaForCausalLM | None = None
    if state:
        done, model = int(state["step"]), build(shape, int(state["layers"]), vocab_size)
        model.load_state_dict(state["model"])
    for _ in range(done * schedule.batch):
        next(source)
    first = 0
    for (layers, _), steps in zip(schedule.depths, schedule.stage_steps, strict=True):
        stage = range(max(first, done), first + steps)
        first += steps
        if not stage:
            continue
        if model is None:
            model = build(shape, layers, vocab_size)
        elif len(model.model.layers) != layers:
            model, state = grow(model, shape, layers), None
        optimizers = _optimizers(model, schedule)
        for optimizer, saved in zip(optimizers, state["optimizers"] if state else (), strict=False):
            optimizer.load_state_dict(saved)
        state = None
        loss_of = torch.compile(lambda tokens, model=model: _loss(model, tokens))
        for step in stage:
            batch = np.stack([next(source) for _ in range(schedule.batch)]).astype(np.int64)
            loss = loss_of(torch.from_numpy(np.array_split(batch, world)[rank]))
            loss.backward()
            if world > 1:
                _average_gradients(model, world)
            _step(optimizers, schedule, step)
            if rank == 0:
                if report:
                    report(step + 1, (step + 1) * schedule.batch * schedule.sequence, loss.item())
                if (step + 1) % save_every == 0 or step + 1 == first:
                    _save(state_path, step + 1, layers, model, optimizers)
    assert model is not None, schedule
    return model


def _step(optimizers: list[torch.optim.Optimizer], schedule: Schedule, step: int) -> None:
    for optimizer, lr in zip(optimizers, (schedule.lr, schedule.embedding_lr), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule.rate(step)
        optimizer.step()
        optimizer.zero_grad()


def _save(path: Path, step: int, layers: int, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(
        {
            "step": step,
            "layers": layers,
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        },
        temporary,
    )
    os.replace(temporary, path)


def bits_per_byte(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    sequence: int = 512,
    stride: int = 256,
) -> float:
    """Bits per UTF-8 byte of the texts: every token is scored once, with at least sequence - stride tokens before it.

    Each text starts after an end-of-text token, which is not scored.
    """
    end = _end_of_text(tokenizer)
    rows: list[tuple[list[int], int]] = []
    total_bytes = 0
    for text in texts:
        total_bytes += len(text.encode())
        ids = [end, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        scored = 1
        while scored < len(ids):
            stop = min(len(ids), sequence if scored == 1 else scored + stride)
            rows.append((ids[max(0, stop - sequence) : stop], stop - scored))
            scored = stop
    rows.sort(key=lambda row: len(row[0]))
    nats = 0.0
    with torch.inference_mode():
        for begin in range(0, len(rows), 16):
            chunk = rows[begin : begin + 16]
            width = max(len(ids) for ids, _ in chunk)
            tokens = torch.tensor([ids + [end] * (width - len(ids)) for ids, _ in chunk])
            log_probs = model(input_ids=tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            nll = -log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
            for row, (ids, fresh) in zip(nll, chunk, strict=True):
                nats += float(row[len(ids) - 1 - fresh : len(ids) - 1].double().sum())
    return nats / math.log(2) / total_bytes


def train_in_processes(workers: int, threads: int, arguments: dict[str, Any], log_path: Path) -> None:
    """Run `train` in `workers` processes, which average gradients over gloo; progress is written to log_path."""
    torch.multiprocessing.start_processes(
        _train_rank, args=(workers, threads, arguments, str(log_path)), nprocs=workers, start_method="spawn"
    )


def _train_rank(rank: int, world: int, threads: int, arguments: dict[str, Any], log_path: str) -> None:
    torch.set_num_threads(threads)
    if world > 1:
        rendezvous = Path(arguments["state_path"]).with_suffix(".rendezvous")
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=timedelta(hours=1)
        )
    started = time.time()

    def report(step: int, tokens: int, loss: float) -> None:
        if step % 10 == 0:
            with open(log_path, "a") as log:
                log.write(f"{step} {tokens} {loss:.4f} {time.time() - started:.0f}\n")

    train(rank=rank, world=world, report=report, **arguments)
    if world > 1:
        torch.distributed.destroy_process_group()
