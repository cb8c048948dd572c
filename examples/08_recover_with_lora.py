"""Recover quality of a saved pruned model with LoRA: train adapters, merge them, measure and save.

pip install "peft>=0.21,<0.22"
python examples/08_recover_with_lora.py smollm2-b30 TRAINING_TEXT UNSEEN_TEXT [STEPS]
"""

import sys
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from selfpruner_hub import PrunedModel
from selfpruner_hub.calibration.corpus import consecutive_windows

RANK, BATCH, WINDOW = 16, 4, 256
name, text, unseen = sys.argv[1:4]
steps = int((sys.argv[4:] or ["200"])[0])
pruned = PrunedModel.from_pretrained(name)
before = pruned.evaluate(unseen, window=WINDOW, windows=32)

adapters = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
windows = consecutive_windows(text, pruned.tokenizer, WINDOW).windows
settings = TrainingArguments(
    "lora-run", max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=2e-4, lr_scheduler_type="cosine",
    report_to="none", save_strategy="no",
)  # fmt: skip
model = get_peft_model(pruned.model, adapters)
Trainer(model, settings, train_dataset=[{"input_ids": ids, "labels": ids} for ids in windows]).train()

how = f"LoRA of rank {RANK} on all linear layers, {steps} steps of {BATCH} x {WINDOW} tokens of {Path(text).name}"
recovered = pruned.retrained(model.merge_and_unload(), how)  # the record forgets the figures of the old weights
after = recovered.evaluate(unseen, window=WINDOW, windows=32)
recovered.save_pretrained(f"{name}-lora")
for figure, old in before.items():
    print(f"{figure}: {old.value:.2f} before, {after[figure].value:.2f} after")
