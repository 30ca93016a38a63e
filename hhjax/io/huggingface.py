"""Weights in and out of Hugging Face folders (config.json + *.safetensors) of the GPT-NeoX, Llama and Qwen layouts."""

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from hhjax.model.transformer import ModelConfig, make_model

FAMILIES = ("gpt_neox", "llama", "qwen2", "qwen3")
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
}


class Entry(NamedTuple):
    """One tensor: our name, theirs (with {i} for the layer) and the maps between the two layouts."""

    ours: str
    theirs: str
    load: Callable = lambda x: x
    dump: Callable = lambda x: x


def load_folder(folder, vocab_size: int = 0) -> tuple[ModelConfig, dict]:
    """ModelConfig and f32 numpy parameters of a Hugging Face folder; the score head is zero.

    vocab_size: rows that the tokenizer needs (it may add <pad> and <eoc>); where the model has fewer, rows
    equal to the mean embedding are added, up to a multiple of 128.
    Raises ValueError on a family, activation, rope scaling or missing tensor that it cannot represent.
    """
    cfg, fields = load_config(folder), read_fields(folder)
    return extend_vocab(cfg, params_from_tensors(cfg, fields["model_type"], read_tensors(Path(folder))), vocab_size)


def load_config(folder, vocab_size: int = 0) -> ModelConfig:
    """The ModelConfig of `load_folder`; reads no tensor."""
    return extend_config(config_from_huggingface(read_fields(folder)), vocab_size)


def is_model(folder) -> bool:
    """Whether a folder's config.json is a Hugging Face model's (a run directory has one of its own)."""
    return (Path(folder) / "config.json").is_file() and "model_type" in read_fields(folder)


def fitted(cfg: ModelConfig, params) -> tuple[str, ModelConfig, dict]:
    """(family, config, parameters) of the first layout that a model fits as it is, or else of GPT-NeoX with the biases that it lacks, all
    zero: the paper's ladder fits so. Raises ValueError where none does."""
    for family in FAMILIES:
        with contextlib.suppress(ValueError):
            config_to_huggingface(cfg, family)
            return family, cfg, params
    biased = replace(cfg, norm_bias=True, qkv_bias=True, out_bias=True, mlp_bias=True)
    config_to_huggingface(biased, "gpt_neox")
    shapes = jax.eval_shape(make_model(biased).init, jax.random.key(0))
    zeros = lambda shapes, known: {name: known.get(name, np.zeros(x.shape, np.float32)) for name, x in shapes.items()}  # noqa: E731
    blocks = zeros(shapes["blocks"], params["blocks"])
    return "gpt_neox", biased, zeros({n: x for n, x in shapes.items() if n != "blocks"}, params) | {"blocks": blocks}


def save_folder(folder, cfg: ModelConfig, params, family: str, **more) -> None:
    """Writes config.json, with `more` fields, and model.safetensors (f32) that transformers loads. The score head is left out.

    Raises ValueError where the config is not of the family's layout.
    """
    fields = config_to_huggingface(cfg, family) | more
    tensors = {}
    for e in entries(cfg, family):
        if e.theirs.count("{i}"):
            for i in range(cfg.layers):
                tensors[e.theirs.format(i=i)] = np.ascontiguousarray(e.dump(np.asarray(params["blocks"][e.ours][i])))
        else:
            tensors[e.theirs] = np.ascontiguousarray(e.dump(np.asarray(params[e.ours])))
    if family == "gpt_neox":
        tensors = fuse_neox(cfg, tensors)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # which its library leaves to its owner alone


def config_from_huggingface(fields: dict) -> ModelConfig:
    """ModelConfig of a transformers config.json, in the spelling of versions 4 and 5."""
    family = fields["model_type"]
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not supported; choose one of {', '.join(FAMILIES)}")
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"rope scaling {rope} is not supported; only the default type is")
    if fields.get("use_sliding_window"):
        raise ValueError("use_sliding_window is not supported; every layer attends to the whole row")
    if fields["hidden_act"] not in ACTIVATIONS:
        raise ValueError(f"hidden_act {fields['hidden_act']!r}; choose one of {', '.join(ACTIVATIONS)}")
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    shared = dict(
        layers=fields["num_hidden_layers"],
        width=width,
        heads=heads,
        head_dim=fields.get("head_dim") or width // heads,
        mlp_width=fields["intermediate_size"],
        vocab=fields["vocab_size"],
        activation=ACTIVATIONS[fields["hidden_act"]],
        tied_embeddings=fields.get("tie_word_embeddings", False),
    )
    if family == "gpt_neox":
        bias = fields.get("attention_bias", True)
        return ModelConfig(
            **shared,
            kv_heads=heads,
            norm_eps=fields["layer_norm_eps"],
            rotary_fraction=fields.get("rotary_pct", rope.get("partial_rotary_factor", 0.25)),
            rotary_base=float(fields.get("rotary_emb_base", rope.get("rope_theta", 10_000))),
            parallel_residual=fields.get("use_parallel_residual", True),
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=True,
        )
    if fields.get("mlp_bias"):
        raise ValueError("mlp_bias is not supported with a gated MLP")
    bias = fields.get("attention_bias", family == "qwen2")
    return ModelConfig(
        **shared,
        kv_heads=fields.get("num_key_value_heads") or heads,
        norm="rms",
        norm_eps=fields["rms_norm_eps"],
        rotary_base=float(rope.get("rope_theta", fields.get("rope_theta", 10_000))),
        gated_mlp=True,
        qkv_bias=bias or family == "qwen2",
        out_bias=bias and family != "qwen2",
        qk_norm=family == "qwen3",
    )


def config_to_huggingface(cfg: ModelConfig, family: str) -> dict:
    """The config.json fields of `cfg`; ValueError where reading them back would not give `cfg`."""
    fields = {
        "model_type": family,
        "architectures": [{"gpt_neox": "GPTNeoX", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family] + "ForCausalLM"],
        "num_hidden_layers": cfg.layers,
        "hidden_size": cfg.width,
        "num_attention_heads": cfg.heads,
        "intermediate_size": cfg.mlp_width,
        "vocab_size": cfg.vocab,
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "silu": "silu"}[cfg.activation],
        "tie_word_embeddings": cfg.tied_embeddings,
        "dtype": "float32",
    }
    if family == "gpt_neox":
        fields |= {
            "layer_norm_eps": cfg.norm_eps,
            "rotary_pct": cfg.rotary_fraction,
            "rotary_emb_base": cfg.rotary_base,
            "use_parallel_residual": cfg.parallel_residual,
            "attention_bias": cfg.qkv_bias,
        }
    else:
        fields |= {
            "num_key_value_heads": cfg.kv_heads,
            "head_dim": cfg.head_dim,
            "rms_norm_eps": cfg.norm_eps,
            "rope_theta": cfg.rotary_base,
            "attention_bias": cfg.qkv_bias,
        }
    if config_from_huggingface(fields) != cfg:
        raise ValueError(f"{cfg} does not fit the {family} layout; choose another of {', '.join(FAMILIES)}")
    return fields


def entries(cfg: ModelConfig, family: str) -> list[Entry]:
    """Every tensor of the model. Their matrices are [out, in]; ours [in, out], with heads as an axis."""
    d, hd = cfg.width, cfg.head_dim
    flip = (lambda x: x.T, lambda x: x.T)

    def heads_out(n):  # [n * hd, d] <-> [d, n, hd]
        return lambda x: x.reshape(n, hd, d).transpose(2, 0, 1), lambda x: x.transpose(1, 2, 0).reshape(n * hd, d)

    def heads_bias(n):  # [n * hd] <-> [n, hd]
        return lambda x: x.reshape(n, hd), lambda x: x.reshape(n * hd)

    heads_in = (lambda x: x.T.reshape(cfg.heads, hd, d), lambda x: x.reshape(cfg.heads * hd, d).T)
    neox = family == "gpt_neox"
    layer = "gpt_neox.layers.{i}" if neox else "model.layers.{i}"
    attention = f"{layer}.attention" if neox else f"{layer}.self_attn"
    out = "dense" if neox else "o_proj"
    up, down = ("dense_h_to_4h", "dense_4h_to_h") if neox else ("up_proj", "down_proj")
    found = [
        Entry("embed", "gpt_neox.embed_in.weight" if neox else "model.embed_tokens.weight"),
        Entry("final_norm_scale", "gpt_neox.final_layer_norm.weight" if neox else "model.norm.weight"),
        Entry("attn_norm_scale", f"{layer}.input_layernorm.weight"),
        Entry("mlp_norm_scale", f"{layer}.post_attention_layernorm.weight"),
        *(Entry(n, f"{attention}.{n}_proj.weight", *heads_out(k)) for n, k in _projections(cfg)),
        Entry("o", f"{attention}.{out}.weight", *heads_in),
        Entry("up", f"{layer}.mlp.{up}.weight", *flip),
        Entry("down", f"{layer}.mlp.{down}.weight", *flip),
    ]
    if cfg.norm == "layer":
        found += [
            Entry("final_norm_bias", "gpt_neox.final_layer_norm.bias"),
            Entry("attn_norm_bias", f"{layer}.input_layernorm.bias"),
            Entry("mlp_norm_bias", f"{layer}.post_attention_layernorm.bias"),
        ]
    if cfg.gated_mlp:
        found.append(Entry("gate", f"{layer}.mlp.gate_proj.weight", *flip))
    if cfg.qkv_bias:
        found += [Entry(f"{n}_bias", f"{attention}.{n}_proj.bias", *heads_bias(k)) for n, k in _projections(cfg)]
    if cfg.out_bias:
        found.append(Entry("o_bias", f"{attention}.{out}.bias"))
    if cfg.mlp_bias:
        found += [Entry("up_bias", f"{layer}.mlp.{up}.bias"), Entry("down_bias", f"{layer}.mlp.{down}.bias")]
    if cfg.qk_norm:
        found += [Entry(f"{n}_norm_scale", f"{attention}.{n}_norm.weight") for n in "qk"]
    if not cfg.tied_embeddings:
        found.append(Entry("unembed", "embed_out.weight" if neox else "lm_head.weight", *flip))
    return found


def params_from_tensors(cfg: ModelConfig, family: str, tensors: dict) -> dict:
    """Our parameter tree, f32 numpy, from tensors by their names."""
    if family == "gpt_neox":
        tensors = split_neox(cfg, tensors)

    def read(name, load):
        if name not in tensors:
            raise ValueError(f"the folder has no tensor {name!r}, which a {family} model needs")
        return np.asarray(load(tensors[name]), np.float32)

    params = {"blocks": {}, "score": np.zeros(cfg.width, np.float32)}
    for e in entries(cfg, family):
        if "{i}" in e.theirs:
            params["blocks"][e.ours] = np.stack([read(e.theirs.format(i=i), e.load) for i in range(cfg.layers)])
        else:
            params[e.ours] = read(e.theirs, e.load)
    return params


def extend_vocab(cfg: ModelConfig, params: dict, vocab_size: int) -> tuple[ModelConfig, dict]:
    """Rows for tokens that a tokenizer added, equal to the mean embedding; unchanged where there are enough."""
    extended = extend_config(cfg, vocab_size)
    rows = lambda table: np.concatenate([table, np.repeat(table.mean(0, keepdims=True), extended.vocab - cfg.vocab, 0)])  # noqa: E731
    if extended != cfg:
        params = params | {"embed": rows(params["embed"])}
        params |= {"unembed": rows(params["unembed"].T).T} if "unembed" in params else {}
    return extended, params


def extend_config(cfg: ModelConfig, vocab_size: int) -> ModelConfig:
    """`cfg` with a vocabulary that `vocab_size` fits in: its own, or the next multiple of 128."""
    return cfg if vocab_size <= cfg.vocab else replace(cfg, vocab=-(-vocab_size // 128) * 128)


def split_neox(cfg: ModelConfig, tensors: dict) -> dict:
    """GPT-NeoX's fused query_key_value, [heads, 3, head_dim, ...] flattened, as three separate projections."""
    out = {}
    for name, x in tensors.items():
        if ".query_key_value." in name:
            parts = np.moveaxis(x.reshape(cfg.heads, 3, cfg.head_dim, *x.shape[1:]), 1, 0)
            for n, part in zip("qkv", parts):
                out[name.replace("query_key_value", f"{n}_proj")] = part.reshape(-1, *x.shape[1:])
        else:
            out[name] = x
    return out


def fuse_neox(cfg: ModelConfig, tensors: dict) -> dict:
    """The inverse of `split_neox`."""
    out = {}
    for name, x in tensors.items():
        if ".q_proj." in name:
            parts = [tensors[name.replace("q_proj", f"{n}_proj")] for n in "qkv"]
            parts = [p.reshape(cfg.heads, cfg.head_dim, *x.shape[1:]) for p in parts]
            out[name.replace("q_proj", "query_key_value")] = np.stack(parts, 1).reshape(-1, *x.shape[1:])
        elif ".k_proj." not in name and ".v_proj." not in name:
            out[name] = x
    return out


def read_fields(folder) -> dict:
    return json.loads((Path(folder) / "config.json").read_text())


def read_tensors(folder: Path) -> dict:
    """All tensors of a folder's *.safetensors as f32 numpy, bfloat16 included. Raises ValueError when there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors; convert the checkpoint to safetensors first")
    tensors = {}
    for file in files:
        with safe_open(file, framework="flax") as f:  # numpy has no bfloat16 of its own, jax's arrays do
            tensors |= {name: np.asarray(f.get_tensor(name)).astype(np.float32) for name in f.keys()}
    return tensors


def _projections(cfg: ModelConfig):
    return (("q", cfg.heads), ("k", cfg.kv_heads), ("v", cfg.kv_heads))
