"""A GGUF file as a checkpoint folder: config and tokenizer of transformers, and a link to the file.

transformers reads config and tokenizer from the metadata; keys that it leaves at their defaults are set here. The
folder lies beside the file, where all processes that can read the file find it, or, where nothing can be written there,
in the folder of temporary files. Tensors stay in the file.
"""

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from hasten.accel.errors import UserError
from hasten.accel.models.gguf.families import BY_ARCHITECTURE, FAMILIES
from hasten.accel.models.gguf.header import Header, TensorEntry, read_header
from hasten.accel.models.gguf.metadata import rope_factors
from hasten.accel.models.gguf.place import GgufTensor
from hasten.accel.models.gguf.tokenizer import restore

FILE = "model.gguf"
# No name of a file that outputs copy.
_RECORD = "made_from"
# Tensors that the config stands for.
_OF_CONFIG = ("rope_freqs.weight",)
# Rotary frequencies of the windows of Gemma 3, which files need not name; and Llama 3.1's scaling of them, of which
# files have the result only.
_WINDOW_BASE = 10000.0
_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def folder_of(file: Path) -> Path:
    """Checkpoint folder of a GGUF file, made where it is missing or was made of another file; UserError as a reader."""
    file = file.absolute()
    state = file.stat()
    record = {"file": str(file), "bytes": state.st_size, "changed": state.st_mtime_ns}
    digest = hashlib.sha256(str(file).encode()).hexdigest()[:12]
    places = [file.with_name(f".{file.name}.hasten")]
    places.append(Path(tempfile.gettempdir()) / f"hasten-gguf-{os.getuid()}" / f"{file.name}-{digest}")
    for place in places:
        if (place / _RECORD).is_file() and json.loads((place / _RECORD).read_text()) == record:
            return place
    for place in places:
        try:
            return _make(file, place, record)
        except PermissionError:
            continue
        except OSError as error:
            # A file system without writing gives another error than a folder without the right to write.
            if error.errno != 30:
                raise
    raise UserError(
        f"model={file} needs a folder for its config and tokenizer, and neither {places[0]} nor {places[1]} can be made"
    )


def _make(file: Path, place: Path, record: dict[str, Any]) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    # Made under another name: another process may make it at the same time.
    made = place.with_name(f"{place.name}.{uuid.uuid4().hex[:8]}.tmp")
    made.mkdir()
    try:
        header = read_header(file)
        config = _config(file, header)
        (made / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        _write_tokenizer(file, header, made)
        (made / FILE).symlink_to(os.path.relpath(file, place) if place.parent == file.parent else file)
        (made / _RECORD).write_text(json.dumps(record))
        if place.exists():
            shutil.rmtree(place, ignore_errors=True)
        try:
            made.rename(place)
        except OSError:
            if not (place / _RECORD).is_file():
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return place


def _config(file: Path, header: Header) -> dict[str, Any]:
    from transformers import AutoConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    if header.architecture not in BY_ARCHITECTURE:
        raise UserError(
            f"model={file} has the architecture {header.architecture}: "
            f"readable are {', '.join(sorted(BY_ARCHITECTURE))}"
        )
    values: dict[str, Any] = load_gguf_checkpoint(file, return_tensors=False)["config"]
    kind = values.pop("model_type")
    get = header.of_architecture
    if header.architecture == "llama":
        # Mistral's models are llama's here, and with experts they are Mixtral's.
        kind = "mixtral" if get("expert_count") else "llama"
        values |= (
            {"num_local_experts": get("expert_count"), "num_experts_per_tok": get("expert_used_count")}
            if kind == "mixtral"
            else {}
        )
    for unused in ("_model_name_or_path", "rope_theta"):
        values.pop(unused, None)
    heads = int(get("attention.head_count"))
    head_dim = int(get("attention.key_length") or get("rope.dimension_count") or get("embedding_length") // heads)
    values["head_dim"] = head_dim
    values["rope_parameters"] = _rope(file, header, head_dim)
    if get("expert_feed_forward_length") is not None:
        values["moe_intermediate_size"] = get("expert_feed_forward_length")
    if header.architecture == "qwen3moe":
        values["norm_topk_prob"] = True
    if header.architecture == "gemma2":
        values["attn_logit_softcapping"] = get("attn_logit_softcapping")
        values["final_logit_softcapping"] = get("final_logit_softcapping")
    if header.architecture in ("gemma2", "gemma3"):
        wide = int(get("block_count")) in (46, 62)
        values["query_pre_attn_scalar"] = int(get("embedding_length")) // heads if wide else head_dim
    if header.architecture == "phi3":
        values["original_max_position_embeddings"] = get("rope.scaling.original_context_length", get("context_length"))
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        values[f"{role}_token_id"] = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
    if "attn_q.bias" in " ".join(header.tensors) and header.architecture == "llama":
        values["attention_bias"] = True
    config = AutoConfig.for_model(kind, **values, dtype="float16").to_dict()
    return {**config, "architectures": [_class_of(kind)]}


def _class_of(kind: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])


def _rope(file: Path, header: Header, head_dim: int) -> dict[str, Any]:
    get = header.of_architecture
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(get("rope.freq_base", 10000.0))}
    scaling, width = get("rope.scaling.type", "none"), int(get("rope.dimension_count", head_dim))
    if scaling in ("linear", "yarn"):
        rope |= {"rope_type": scaling, "factor": float(get("rope.scaling.factor"))}
        if scaling == "yarn":
            rope["original_max_position_embeddings"] = int(get("rope.scaling.original_context_length"))
    elif scaling not in ("none", "longrope"):
        raise UserError(f"model={file} has rope.scaling.type={scaling}: readable are none, linear and yarn")
    if width != head_dim:
        rope["partial_rotary_factor"] = width / head_dim
    if "rope_freqs.weight" in header.tensors:
        rope = _llama_3(file, header, rope, head_dim)
    if "rope_factors_long.weight" in header.tensors:
        raise UserError(f"model={file} has rotary factors for long texts, which cannot be read from a GGUF file")
    if header.architecture != "gemma3":
        return rope
    window = {"rope_type": "default", "rope_theta": float(get("rope.freq_base_swa", _WINDOW_BASE))}
    return {"full_attention": rope, "sliding_attention": window}


def _llama_3(file: Path, header: Header, rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """The parameters whose frequencies are those of the file; UserError where they are not Llama 3.1's."""
    from types import SimpleNamespace

    entry = header.tensors["rope_freqs.weight"]
    stored = _tensor(file, entry).read().numpy()
    found = rope | {"rope_type": "llama3", "factor": round(float(stored.max()), 3)} | _LLAMA_3
    made = rope_factors(SimpleNamespace(rope_parameters=found, head_dim=head_dim))
    assert made is not None
    if not np.allclose(made, stored, rtol=1e-3):
        raise UserError(f"model={file} scales its rotary frequencies in a way that is not Llama 3.1's")
    return found


def _write_tokenizer(file: Path, header: Header, folder: Path) -> None:
    if "tokenizer.ggml.tokens" not in header.metadata:
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    restore(tokenizer, header.metadata)
    tokenizer.save_pretrained(folder)


def read_places(file: Path, config: dict[str, Any]) -> tuple[bytes, dict[str, GgufTensor]]:
    """Header of a file, and the places of its tensors by logical name. config: transformers', of the folder."""
    header = read_header(file)
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or family.name != header.architecture:
        raise UserError(f"{file} has the architecture {header.architecture}, and its config.json is of another one")
    blocks = int(header.of_architecture("block_count"))
    experts = int(header.of_architecture("expert_count", 0))
    places: dict[str, GgufTensor] = {}
    used = set(_OF_CONFIG)
    for name in family.logical_names(blocks, experts):
        stored = family.stored_name(name.format(0), blocks)
        if stored not in header.tensors:
            continue
        used.add(stored)
        tensor = _tensor(file, header.tensors[stored], family.heads(name, config), family.offset(name))
        if "{}" in name:
            rows = tensor.shape[1]
            places |= {name.format(number): tensor.part(number, 0, rows) for number in range(experts)}
        else:
            places[name] = tensor
    unknown = sorted(header.tensors.keys() - used)
    if unknown:
        raise UserError(f"tensor {unknown[0]} in {file} is unknown: {header.architecture} has none of this name here")
    return header.raw, places


def _tensor(file: Path, entry: TensorEntry, heads: int = 0, less: float = 0.0) -> GgufTensor:
    rows = int(np.prod(entry.shape[:-1], dtype=np.int64))
    return GgufTensor(file, entry.kind, entry.shape, entry.begin, entry.nbytes // rows, heads, less)
