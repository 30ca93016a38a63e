"""Makes the golden files of tests/io: tiny random GPT-NeoX, Llama and Qwen models and transformers' logits for them.

Needs the `oracle` extra:  python scripts/make_goldens.py tests/io/golden
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

COMMON = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
FAMILIES = {
    "gpt_neox": transformers.GPTNeoXConfig(**COMMON, intermediate_size=64, hidden_act="gelu"),
    "llama": transformers.LlamaConfig(**COMMON, intermediate_size=48, num_key_value_heads=2),
    "qwen2": transformers.Qwen2Config(**COMMON, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**COMMON, intermediate_size=48, num_key_value_heads=2, head_dim=16),
}


def main(out: Path) -> None:
    for seed, (family, config) in enumerate(FAMILIES.items()):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():  # norms and biases start at 1 and 0, which would hide a missing one
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            tokens = torch.randint(0, config.vocab_size, (3, 17))
            logits = model(tokens).logits
        model.save_pretrained(out / family)
        (out / family / "generation_config.json").unlink(missing_ok=True)
        expected = {"tokens": tokens.numpy().astype(np.int32), "logits": logits.numpy()}
        save_file(expected, out / family / "expected.st")
        print(family, "max |logit|", float(logits.abs().max()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
