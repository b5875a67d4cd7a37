"""Hugging Face checkpoints: `config.json` to a `LlamaConfig`, safetensors (sharded too) to weights, and back.

A checkpoint that does not fit is refused with the tensor, the setting and both shapes by name: a model that loads
half its weights would still write text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kernels.rope import RopeScaling


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as it is; the message says which file, tensor or setting, and why."""


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama decoder, and the few switches among its relatives."""

    name: str
    vocab: int
    hidden: int
    layers: int
    heads_q: int
    heads_kv: int
    head_dim: int
    ffn: int
    eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    max_positions: int = 8192
    tied: bool = False
    """Whether the LM head is the embedding."""
    qk_norm: bool = False
    """Whether every query and key head passes an RMSNorm (Qwen3)."""

    def __post_init__(self) -> None:
        for field in ("vocab", "hidden", "layers", "heads_q", "heads_kv", "head_dim", "ffn", "max_positions"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} must be a positive integer, got {field}={value!r}")
        if self.heads_q % self.heads_kv:
            raise ValueError(f"heads_q={self.heads_q} must be a multiple of heads_kv={self.heads_kv}")
        for field in ("eps", "rope_theta"):
            _positive(field, getattr(self, field))
        for field, value in vars(self.rope_scaling).items() if self.rope_scaling else ():
            _positive(f"rope_scaling.{field}", value)
        if not isinstance(self.tied, bool):
            raise ValueError(f"tied must be True or False, got tied={self.tied!r}")

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.heads_q + 2 * self.heads_kv) * self.head_dim

    @property
    def parameters(self) -> int:
        """Number of weights; a tied head counts once."""
        norms = 2 * self.hidden + 2 * self.head_dim * self.qk_norm
        attention = self.hidden * (self.qkv_rows + self.heads_q * self.head_dim)
        mlp = 3 * self.hidden * self.ffn
        return self.layers * (norms + attention + mlp) + self.hidden + (2 - self.tied) * self.vocab * self.hidden

    @property
    def weights_read(self) -> int:
        """Number of weights that one pass reads: of an embedding that is not the head too, only some rows are."""
        return self.parameters - (0 if self.tied else self.vocab * self.hidden)


@dataclass
class Layer:
    """Weights of one decoder layer. Projections are ``(out, in)``; what reads the same input is one matrix."""

    norm_1: torch.Tensor
    qkv: torch.Tensor
    o: torch.Tensor
    norm_2: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None


@dataclass
class Weights:
    """Weights of a whole model; ``lm_head`` is ``embed`` itself where the two are tied."""

    embed: torch.Tensor
    layers: list[Layer]
    norm: torch.Tensor
    lm_head: torch.Tensor

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> Weights:
        """``fn`` of every tensor; what was tied is apart afterwards."""

        def each(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else fn(x)

        layers = [Layer(*(each(getattr(layer, f.name)) for f in fields(Layer))) for layer in self.layers]
        return Weights(fn(self.embed), layers, fn(self.norm), fn(self.lm_head))


def empty_weights(config: LlamaConfig, dtype: torch.dtype, device: torch.device | str) -> Weights:
    """Weights of the right shapes, not written yet."""

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    c = config
    layers = [
        Layer(
            norm_1=new(c.hidden),
            qkv=new(c.qkv_rows, c.hidden),
            o=new(c.hidden, c.heads_q * c.head_dim),
            norm_2=new(c.hidden),
            gate_up=new(2 * c.ffn, c.hidden),
            down=new(c.hidden, c.ffn),
            q_norm=new(c.head_dim) if c.qk_norm else None,
            k_norm=new(c.head_dim) if c.qk_norm else None,
        )
        for _ in range(c.layers)
    ]
    embed = new(c.vocab, c.hidden)
    return Weights(embed, layers, new(c.hidden), embed if c.tied else new(c.vocab, c.hidden))


def named_tensors(config: LlamaConfig, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint under the name it has there, as a view into ``weights``."""
    q_rows, kv_rows = config.heads_q * config.head_dim, config.heads_kv * config.head_dim
    yield "model.embed_tokens.weight", weights.embed
    for i, layer in enumerate(weights.layers):
        prefix = f"model.layers.{i}"
        yield f"{prefix}.input_layernorm.weight", layer.norm_1
        for name, rows in zip("qkv", layer.qkv.split((q_rows, kv_rows, kv_rows)), strict=True):
            yield f"{prefix}.self_attn.{name}_proj.weight", rows
        if config.qk_norm:
            yield f"{prefix}.self_attn.q_norm.weight", layer.q_norm
            yield f"{prefix}.self_attn.k_norm.weight", layer.k_norm
        yield f"{prefix}.self_attn.o_proj.weight", layer.o
        yield f"{prefix}.post_attention_layernorm.weight", layer.norm_2
        for name, rows in zip(("gate", "up"), layer.gate_up.chunk(2), strict=True):
            yield f"{prefix}.mlp.{name}_proj.weight", rows
        yield f"{prefix}.mlp.down_proj.weight", layer.down
    yield "model.norm.weight", weights.norm
    if not config.tied:
        yield "lm_head.weight", weights.lm_head


# ------------------------------------------------------------------------------------------- config.json

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _positive(name: str, value: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {name}={value!r}")


def _need(settings: dict, name: str, path: Path):
    if settings.get(name) is None:
        raise CheckpointError(f"{path} lacks {name!r}")
    return settings[name]


def _rope(settings: dict, path: Path) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from either spelling: ``rope_parameters``, or ``rope_theta`` beside ``rope_scaling``."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path}: rope_parameters must be an object, got {rope!r}")
    theta = rope.get("rope_theta", settings.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0))
    if kind not in ("default", "llama3") or partial != 1.0:
        raise CheckpointError(
            f"{path}: rope_type={kind!r}, partial_rotary_factor={partial} is not supported; use 'default' or 'llama3'"
        )
    if kind == "default":
        return theta, None
    fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return theta, RopeScaling(*(_need(rope, field, path) for field in fields))


def read_config(folder: str | Path) -> tuple[LlamaConfig, torch.dtype]:
    """The configuration in ``folder/config.json``, and the dtype its weights were saved in.

    Raises:
        CheckpointError: no such file, a setting that is missing, or one that this model does not implement.
    """
    path = Path(folder) / "config.json"
    settings = _read_json(path)
    architecture = (settings.get("architectures") or [None])[0]
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"{path}: architecture {architecture!r} is not one of {list(ARCHITECTURES)}")
    unsupported = {
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "use_sliding_window": (False, None),
        "quantization_config": (None,),
        "hidden_act": ("silu", None),
    }
    for name, accepted in unsupported.items():
        if settings.get(name) not in accepted:
            raise CheckpointError(f"{path}: {name}={settings[name]!r} is not supported")
    dtype = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: dtype={dtype!r} is not one of {list(DTYPES)}")
    theta, scaling = _rope(settings, path)
    heads, hidden = _need(settings, "num_attention_heads", path), _need(settings, "hidden_size", path)
    try:
        config = LlamaConfig(
            name=Path(folder).resolve().name,
            vocab=_need(settings, "vocab_size", path),
            hidden=hidden,
            layers=_need(settings, "num_hidden_layers", path),
            heads_q=heads,
            heads_kv=settings.get("num_key_value_heads") or heads,
            head_dim=settings.get("head_dim") or hidden // max(heads, 1),
            ffn=_need(settings, "intermediate_size", path),
            eps=_need(settings, "rms_norm_eps", path),
            rope_theta=theta,
            rope_scaling=scaling,
            max_positions=_need(settings, "max_position_embeddings", path),
            tied=settings.get("tie_word_embeddings", False),
            qk_norm=ARCHITECTURES[architecture] == "qwen3",
        )
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{path}: {error}") from None
    return config, DTYPES[dtype]


# ------------------------------------------------------------------------------------------- safetensors


def _files(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor, from the index of a sharded checkpoint or the one file itself."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = _need(_read_json(index), "weight_map", index)
        if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
            raise CheckpointError(f"{index}: weight_map must name a file for every tensor")
        return {name: folder / file for name, file in shards.items()}
    path = folder / "model.safetensors"
    return dict.fromkeys(_open(path).keys(), path)


def _open(path: Path):
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def load_weights(folder: str | Path, config: LlamaConfig, dtype: torch.dtype, device: torch.device | str) -> Weights:
    """The weights in ``folder``, cast to ``dtype``: ``model.safetensors``, or the shards its index names.

    Raises:
        CheckpointError: a file that is missing or broken; tensors that are missing, of another shape (named, with
            both shapes), or that the model has no place for.
    """
    folder = Path(folder)
    where = _files(folder)
    weights = empty_weights(config, dtype, device)
    wanted = dict(named_tensors(config, weights))
    missing = [name for name in wanted if name not in where]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors of {config.name}: {', '.join(missing[:5])}")
    # A tied head is often saved all the same, and old checkpoints carry the rotary frequencies along.
    ignored = {"lm_head.weight"} if config.tied else set()
    extra = [n for n in where if n not in wanted and n not in ignored and not n.endswith("rotary_emb.inv_freq")]
    if extra:
        raise CheckpointError(f"{folder} holds {len(extra)} tensors {config.name} has no place for: {extra[:5]}")
    for path in sorted(set(where.values())):
        shard = _open(path)
        held = set(shard.keys())
        for name, target in wanted.items():
            if where[name] != path:
                continue
            if name not in held:
                raise CheckpointError(f"{path} lacks {name}, which the index says it holds")
            tensor = shard.get_tensor(name)
            if not tensor.is_floating_point():
                raise CheckpointError(f"{path}: {name} has dtype {tensor.dtype}, a weight must be floating point")
            if tensor.shape != target.shape:
                raise CheckpointError(
                    f"{path}: {name} has shape {tuple(tensor.shape)}, {config.name} needs {tuple(target.shape)}"
                )
            target.copy_(tensor)
    return weights


def save_checkpoint(folder: str | Path, config: LlamaConfig, weights: Weights) -> None:
    """Write ``config.json`` and ``model.safetensors`` so that `load_weights` and transformers can read them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if (scaling := config.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_factor,
            "high_freq_factor": scaling.high_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    architecture = "Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"
    settings = {
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture],
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads_q,
        "num_key_value_heads": config.heads_kv,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn,
        "rms_norm_eps": config.eps,
        "rope_parameters": rope,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "hidden_act": "silu",
        "dtype": str(weights.embed.dtype).removeprefix("torch."),
    }
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in named_tensors(config, weights)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
