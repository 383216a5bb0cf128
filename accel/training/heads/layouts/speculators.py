"""The speculators format of EAGLE-3 heads, which vLLM serves.

Source: github.com/vllm-project/speculators, version 0.9.0.
Tensors are stored one for each projection, where ours are joined. Rotary positions are of halves in both, and layers of
the target are numbered alike: the hidden states of layer i are those that layer i reads, the embedding those of 0. Only
differences of positions count, so it does not matter that the package begins at 1.
Safetensors metadata `hasten` holds what the format has no place for: the target's fingerprint, and the loss's decay.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from hasten.accel.errors import UserError
from hasten.accel.outputs.resumable import write_whole
from hasten.accel.training.heads.draft_head import (
    WEIGHTS,
    DraftHead,
    DraftNetwork,
    TargetFacts,
    TargetWeights,
    check_target,
)
from hasten.accel.training.heads.eagle import FEATURES, Eagle, EagleNetwork
from hasten.accel.training.heads.layouts.base import CONFIG, Layout, fill, read_config, write_config
from hasten.accel.training.heads.vocabulary import DraftVocabulary

TYPE = "speculators_model_type"
VERSION = "0.9.0"
_NOTE = "hasten"
# Names of the format, and of our network without `.weight`.
_SAME = {
    "fc": "fuse",
    "layers.0.input_layernorm": "embedding_norm",
    "layers.0.hidden_norm": "hidden_norm",
    "layers.0.self_attn.o_proj": "attention.out",
    "layers.0.post_attention_layernorm": "mlp_norm",
    "layers.0.mlp.down_proj": "mlp.down",
    "norm": "norm",
    "lm_head": "output",
}
_QKV = tuple(f"layers.0.self_attn.{name}_proj" for name in "qkv")
_GATE_UP = tuple(f"layers.0.mlp.{name}_proj" for name in ("gate", "up"))
_EMBEDDING = "embed_tokens.weight"
# Tensors of the target that the package may leave in a checkpoint; a draft does not use them.
_TARGETS = {"verifier_lm_head.weight", "verifier_norm.weight"}
# Settings of a folder that our network does not have, with the value that means none.
_UNSUPPORTED = {"norm_before_fc": False, "fc_norm": False, "norm_output": False}
_UNSUPPORTED_LAYER = {"model_type": "llama", "num_hidden_layers": 1, "hidden_act": "silu", "attention_bias": False}


class SpeculatorsNetwork(EagleNetwork):
    """EAGLE's network with the embedding of its folder, (V, D), where this differs from the target's."""

    own_embedding: Tensor | None = None

    def attach(self, embedding: Tensor) -> None:
        """Take the target's embedding, unless the folder's is another one."""
        own = self.own_embedding
        if own is not None:
            own = own.to(embedding.device, embedding.dtype)
        # Equal ones are not held twice.
        super().attach(embedding if own is None or torch.equal(own, embedding) else own)
        self.own_embedding = None


class SpeculatorsLayout(Layout):
    """Layout of EAGLE-3-style heads."""

    name: ClassVar[str] = "speculators"
    heads: ClassVar[tuple[type[DraftHead], ...]] = (Eagle,)

    def matches(self, folder: Path) -> bool:
        """Whether config.json names a type of speculators."""
        return TYPE in read_config(folder)

    def write(self, network: DraftNetwork, head: DraftHead, folder: Path, facts: TargetFacts, target: str) -> None:
        """The folder, in bfloat16; UserError for the state after the target's final norm, which has no number there.

        target: `vllm serve FOLDER` loads it. If it is a folder, its embedding is written as the package does; without
        it, the package and vLLM take the target's.
        """
        assert type(head) is Eagle
        assert isinstance(network, EagleNetwork)
        layers = head.layers(facts)
        if min(layers) < 0:
            raise UserError(
                f"feature_layers={list(layers)} cannot be written in the layout {self.name}: it numbers decoder "
                "layers, and -1 is after the final norm; train with other layers"
            )
        sizes = head.sizes(facts)
        tensors = _split(network.state_dict(), sizes)
        if len(network.vocabulary) < facts.vocabulary:
            tensors["d2t"], tensors["t2d"] = network.vocabulary.d2t, _drafted(network.vocabulary)
        architecture, checkpoint = "LlamaForCausalLM", Path(target).expanduser()
        if (checkpoint / CONFIG).is_file():
            architecture = (read_config(checkpoint).get("architectures") or [architecture])[0]
            if TargetFacts.of(checkpoint) != facts:
                raise UserError(f"target={target} is another model than the one that the head was trained for")
            tensors[_EMBEDDING] = TargetWeights.of(checkpoint).embedding
        stored = {
            name: (value.bfloat16() if value.is_floating_point() else value).detach().cpu().contiguous()
            for name, value in tensors.items()
        }
        note = {"format": "pt", _NOTE: json.dumps({"fingerprint": facts.fingerprint, "decay": head.decay})}
        write_whole(folder / WEIGHTS, lambda temporary: save_file(stored, temporary, note))
        config = self._config(head, layers, sizes, len(network.vocabulary))
        config["speculators_config"]["verifier"] = {"name_or_path": target, "architectures": [architecture]}
        write_config(folder, config)

    def _config(self, head: Eagle, layers: tuple[int, ...], sizes: TargetFacts, entries: int) -> dict[str, Any]:
        """config.json. without the target's name. sizes: of the layer. entries: R."""
        return {
            "architectures": ["Eagle3DraftModel"],
            TYPE: "eagle3",
            "speculators_version": VERSION,
            "draft_vocab_size": entries,
            "dtype": "bfloat16",
            "eagle_aux_hidden_state_layer_ids": list(layers),
            "embed_requires_grad": False,
            "norm_before_residual": head.normed_residual,
            "target_hidden_size": None,
            "tie_word_embeddings": False,
            **_UNSUPPORTED,
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [
                    {
                        "proposal_type": "greedy",
                        "speculative_tokens": head.ttt_steps,
                        "verifier_accept_k": 1,
                        "accept_tolerance": 0.0,
                    }
                ],
            },
            "transformer_layer_config": {
                **_UNSUPPORTED_LAYER,
                "vocab_size": sizes.vocabulary,
                "hidden_size": sizes.hidden_size,
                "intermediate_size": sizes.intermediate_size,
                "num_attention_heads": sizes.heads,
                "num_key_value_heads": sizes.kv_heads,
                "head_dim": sizes.head_dim,
                "rms_norm_eps": sizes.rms_norm_eps,
                "rope_theta": sizes.rope_theta,
                "max_position_embeddings": sizes.max_length,
                "mlp_bias": False,
                "tie_word_embeddings": False,
            },
        }

    def read(self, folder: Path, facts: TargetFacts) -> tuple[Eagle, SpeculatorsNetwork]:
        """Head and network; the layer may have other sizes than the target's, except for hidden size and vocabulary."""
        try:
            config = read_config(folder)
            layer = config["transformer_layer_config"]
            _check_supported(folder, config, layer)
            # The package leaves out what transformers takes by default.
            layer = LlamaConfig(**layer).to_dict()
            with safe_open(folder / WEIGHTS, framework="pt") as file:
                note = json.loads((file.metadata() or {}).get(_NOTE, "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            ids = _layers(config, facts)
            steps = int(config["speculators_config"]["proposal_methods"][0]["speculative_tokens"])
            sizes = _sizes(layer, facts)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"head={folder} is no folder of the speculators format: {error!r}") from error
        # The layer's own sizes are free; the rest is the target's.
        trained = replace(facts, vocabulary=sizes.vocabulary, hidden_size=sizes.hidden_size)
        check_target(folder, replace(trained, fingerprint=note.get("fingerprint", "")), facts)
        width = sizes.intermediate_size
        head = Eagle(
            ttt_steps=steps,
            decay=note.get("decay", Eagle.decay),
            feature_layers=() if ids == Eagle().layers(facts) else ids,
            intermediate_size=0 if width == facts.intermediate_size else width,
            normed_residual=config.get("norm_before_residual", False),
        )
        vocabulary = DraftVocabulary.full(sizes.vocabulary)
        if (d2t := tensors.pop("d2t", None)) is not None:
            vocabulary = DraftVocabulary(d2t + torch.arange(len(d2t)), sizes.vocabulary)
        tensors = {name: value for name, value in tensors.items() if name not in {"t2d", *_TARGETS}}
        network = SpeculatorsNetwork(sizes, vocabulary, steps, head.normed_residual)
        network.own_embedding = tensors.pop(_EMBEDDING, None)
        try:
            joined = _joined(tensors)
        except KeyError as error:
            raise UserError(f"head={folder} has no tensor {error}, which EAGLE-3 heads have") from error
        fill(network, {name: value.float() for name, value in joined.items()}, folder)
        return head, network


def _drafted(vocabulary: DraftVocabulary) -> Tensor:
    """The format's t2d, (V,) bool: which of the target's ids the draft has."""
    return torch.zeros(vocabulary.size, dtype=torch.bool).index_fill_(0, vocabulary.ids.cpu(), True)


def _split(state: Mapping[str, Tensor], sizes: TargetFacts) -> dict[str, Tensor]:
    """The format's tensors of ours."""
    tensors = {f"{theirs}.weight": state[f"{ours}.weight"] for theirs, ours in _SAME.items()}
    rows = [count * sizes.head_dim for count in (sizes.heads, sizes.kv_heads, sizes.kv_heads)]
    for names, parts in (
        (_QKV, state["attention.qkv.weight"].split(rows)),
        (_GATE_UP, state["mlp.gate_up.weight"].chunk(2)),
    ):
        tensors |= {f"{name}.weight": part for name, part in zip(names, parts, strict=True)}
    return tensors


def _joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors of the format's; those of other names keep them."""
    left = dict(tensors)
    joined = {
        "attention.qkv.weight": torch.cat([left.pop(f"{name}.weight") for name in _QKV]),
        "mlp.gate_up.weight": torch.cat([left.pop(f"{name}.weight") for name in _GATE_UP]),
    }
    return joined | {f"{ours}.weight": left.pop(f"{theirs}.weight") for theirs, ours in _SAME.items()} | left


def _check_supported(folder: Path, config: Mapping[str, Any], layer: Mapping[str, Any]) -> None:
    """UserError with the first setting that our network does not have; layer: the config's settings of the layer."""
    rope = layer.get("rope_parameters") or layer.get("rope_scaling") or {}
    hidden, ids = layer.get("hidden_size"), config.get("eagle_aux_hidden_state_layer_ids")
    settings: list[tuple[str, Any, Any]] = [(TYPE, config[TYPE], "eagle3")]
    settings += [(name, config.get(name, value), value) for name, value in _UNSUPPORTED.items()]
    settings += [(name, layer.get(name, value), value) for name, value in _UNSUPPORTED_LAYER.items()]
    settings += [
        ("rope_type", rope.get("rope_type") or rope.get("type") or "default", "default"),
        ("target_hidden_size", config.get("target_hidden_size") or hidden, hidden),
        ("number of eagle_aux_hidden_state_layer_ids", FEATURES if ids is None else len(ids), FEATURES),
        ("sliding_attention in layer_types", "sliding_attention" in (layer.get("layer_types") or ()), False),
    ]
    for name, value, expected in settings:
        if value != expected:
            raise UserError(
                f"head={folder} has {name}={value}, which hasten's eagle head does not: expected {expected}"
            )


def _layers(config: Mapping[str, Any], facts: TargetFacts) -> tuple[int, ...]:
    """Layers of the target that the head reads; the format's default is of the target's number of layers."""
    ids = config.get("eagle_aux_hidden_state_layer_ids")
    return (2, facts.layers // 2, facts.layers - 3) if ids is None else tuple(ids)


def _sizes(layer: Mapping[str, Any], facts: TargetFacts) -> TargetFacts:
    """The target's facts with the sizes of a folder's layer."""
    return replace(
        facts,
        vocabulary=layer["vocab_size"],
        hidden_size=layer["hidden_size"],
        heads=layer["num_attention_heads"],
        kv_heads=layer["num_key_value_heads"],
        head_dim=layer["head_dim"],
        intermediate_size=layer["intermediate_size"],
        rms_norm_eps=layer["rms_norm_eps"],
        rope_theta=float(layer["rope_parameters"]["rope_theta"]),
    )
