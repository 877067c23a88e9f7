"""How much memory a GPU needs to train a base: the arithmetic of memory_plan, planned and not measured.

    python -m benchmarks.what_fits

nf4, LoRA r=32 on all linear layers, 8 rows a step of 130 tokens in the mean, the longest of 512.
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from benchmarks.markdown import print_table
from benchmarks.train_throughput import project_lora
from steps.text2sql import adapter, base_model, memory_plan
from steps.text2sql.errors import UserError

# What CUDA itself and this process take before the first tensor.
CONTEXT_BYTES = int(0.75 * 2**30)
LONGEST, STEP_TOKENS = 512, 1040
CARDS_GIB = range(1, 161)


def llama(hidden: int, intermediate: int, layers: int, heads: int, keys: int, vocabulary: int) -> LlamaConfig:
    """A shape of the Llama family."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocabulary,
    )


# As their config.json says.
BASES = {
    "SmolLM2-135M": llama(576, 1536, 30, 9, 3, 49152),
    "Qwen2.5-Coder-1.5B": Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "Mistral-7B": MistralConfig(),
    "Llama-3.1-8B": llama(4096, 14336, 32, 32, 8, 128256),
    "CodeLlama-13B": llama(5120, 13824, 40, 40, 40, 32016),
    "CodeLlama-34B": llama(8192, 22016, 48, 64, 8, 32000),
    "Llama-3.1-70B": llama(8192, 28672, 80, 64, 8, 128256),
}
WAYS = {"least": (False, True), "activations kept": (False, False), "weights dequantized too": (True, False)}


def smallest_cards(config: PreTrainedConfig) -> list[int | None]:
    """GiB of the smallest card for each of `WAYS`, by what `memory_plan` would choose on it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    held, trainable = base_model.held(model, "nf4", torch.bfloat16), adapter.size(model, project_lora())
    shape = memory_plan.Shape.of(config, torch.bfloat16)
    found: dict[tuple[bool, bool], int] = {}
    for card in CARDS_GIB:
        try:
            plan = memory_plan.make(
                shape,
                device="cuda",
                free=card * 2**30 - CONTEXT_BYTES - held.bytes,
                trainable=trainable,
                four_bit=held.four_bit,
                longest=LONGEST,
                step_tokens=STEP_TOKENS,
                gradient_checkpointing="auto",
            )
        except UserError:
            continue
        found.setdefault((plan.dequantize, plan.recompute), card)
    # A way that no card is too small for is the least.
    least = min(found.values())
    kept = min(card for (_, recompute), card in found.items() if not recompute)
    return [least, kept, found.get((True, False))]


def main() -> None:
    """Print the table."""
    head = ("base", *(f"GiB, {way}" for way in WAYS))
    cards = ((name, *(card or "-" for card in smallest_cards(config))) for name, config in BASES.items())
    print_table([head, *cards])


if __name__ == "__main__":
    main()
