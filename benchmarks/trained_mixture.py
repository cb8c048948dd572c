"""A small mixture of experts with real routing, trained in about a minute on text of Python itself: pydoc's topics.

Four layers of 32 experts and a shared one, of which a token is routed to four; 2 M parameters. No download.
"""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

STEPS = 300
"""Steps of the training, each on `BATCH` windows."""
BATCH, WINDOW = 16, 128
VOCABULARY = 1024
UNSEEN = 4
"""One topic in this many is not trained on, nor read by calibration."""
RATE = 3e-3


def texts() -> tuple[str, str]:
    """The topics that the model is trained on, and the unseen ones."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    unseen = topics[UNSEEN - 1 :: UNSEEN]
    return "\n\n".join(text for text in topics if text not in unseen), "\n\n".join(unseen)


def tokenizer_of(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens that is trained on a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def windows_of(text: str, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Token ids of a text in windows, `[N, WINDOW]`; what is left at its end is dropped."""
    ids = torch.tensor(tokenizer(text).input_ids)
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def train(seed: int, windows: Tensor, steps: int = STEPS) -> Qwen2MoeForCausalLM:
    """Train a mixture from scratch, with the loss that balances its experts.

    Args:
        seed: Seed of the weights and of the batches.
        windows: Token ids, `[N, WINDOW]`.
        steps: Number of steps.

    Returns:
        The mixture in eval mode, without that loss.
    """
    torch.manual_seed(seed)
    config = Qwen2MoeConfig(
        vocab_size=VOCABULARY, hidden_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, moe_intermediate_size=48, shared_expert_intermediate_size=48, num_experts=32,
        num_experts_per_tok=4, norm_topk_prob=True, max_position_embeddings=2 * WINDOW, output_router_logits=True,
        router_aux_loss_coef=0.01, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.98))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 30) * (1 - step / steps) ** 0.7
        batch = windows[torch.randint(len(windows), (BATCH,))]
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.config.output_router_logits = False
    return model.eval()


def trained_mixture(
    directory: Path, seed: int = 0, steps: int = STEPS
) -> tuple[Qwen2MoeForCausalLM, PreTrainedTokenizerFast]:
    """Load a trained mixture and its tokenizer from a directory, or train it and save it there.

    Args:
        directory: Directory of this seed's model.
        seed: Seed of the training.
        steps: Number of steps.

    Returns:
        The mixture in float32, in eval mode, and its tokenizer.
    """
    if not (directory / "tokenizer.json").is_file():  # saved last
        text, _ = texts()
        tokenizer = tokenizer_of(text)
        train(seed, windows_of(text, tokenizer), steps).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    model = Qwen2MoeForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(directory)
