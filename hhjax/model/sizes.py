"""Model sizes: the paper's ladder, the laptop rungs, and how many parameters each has."""

from dataclasses import replace

from hhjax.model.transformer import ModelConfig


def rung(layers: int, width: int, head_dim: int) -> ModelConfig:
    """A GPT-style decoder of the ladder: full attention, MLP four times the width, rotary positions, tied embeddings."""
    heads = width // head_dim
    return ModelConfig(
        layers=layers, width=width, heads=heads, kv_heads=heads, head_dim=head_dim, mlp_width=4 * width
    )  # fmt: skip


# Names count parameters without embeddings, 12 x layers x width^2 (layers and widths as in Askell et al. 2021, whose
# models Bai et al. 2022 section 3.1 reuses: width = 128 x layers). The heads' width is ours: the papers do not state it.
SIZES: dict[str, ModelConfig] = {
    "0.1M": rung(2, 64, 32),
    "0.4M": rung(2, 128, 32),
    "1M": rung(3, 192, 64),
    "3M": rung(4, 256, 64),
    "13M": rung(4, 512, 64),
    "42M": rung(6, 768, 64),
    "197M": rung(10, 1280, 128),
    "810M": rung(16, 2048, 128),
    "2.7B": rung(24, 3072, 128),
    "13B": rung(40, 5120, 128),
    "52B": rung(64, 8192, 128),
}


def model_config(name: str, vocab_size: int) -> ModelConfig:
    """The size's config for a tokenizer of `vocab_size`, its embedding rounded up to a multiple of 128.

    Raises ValueError on an unknown name.
    """
    if name not in SIZES:
        raise ValueError(f"model size {name!r}; choose one of {', '.join(SIZES)}")
    return replace(SIZES[name], vocab=-(-vocab_size // 128) * 128)


def matmul_params(cfg: ModelConfig) -> int:
    """Weights of the blocks' matrix products, the N of the cost model: 12 x layers x width^2 on the ladder."""
    attention = cfg.width * cfg.head_dim * (2 * cfg.heads + 2 * cfg.kv_heads)
    mlp = cfg.width * cfg.mlp_width * (3 if cfg.gated_mlp else 2)
    return cfg.layers * (attention + mlp)
