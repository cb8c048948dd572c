"""What a saved model brings besides its weights: a tokenizer that loads anywhere, and a card that fits it."""

from __future__ import annotations

import pytest
from support.chatting import chat_tokenizer
from support.checks import check_tokenizer_without_package
from support.tiny import tiny_tokenizer

from selfpruner_hub.pruned_model import PrunedModel


@pytest.mark.parametrize("make", [tiny_tokenizer, chat_tokenizer], ids=["base", "chat"])
def test_the_tokenizer_and_the_card(make, saved_model, tmp_path):
    pruned = PrunedModel.from_pretrained(saved_model)
    pruned.tokenizer = make()
    pruned.save_pretrained(tmp_path / "again")
    check_tokenizer_without_package(tmp_path / "again", make(), tmp_path)
    card = (tmp_path / "again" / "README.md").read_text()
    assert ("apply_chat_template" in card) == bool(make().chat_template)
