"""Tiny chat models: a tokenizer with the template of one of four families, and a writer that holds scripted talks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tokenizers import Tokenizer, decoders, processors
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

MARKS = {
    "<|im_start|>": 3,
    "<|im_end|>": 4,
    "<|start_header_id|>": 5,
    "<|end_header_id|>": 6,
    "<|eot_id|>": 7,
    "<start_of_turn>": 8,
    "<end_of_turn>": 11,
    "[INST]": 12,
    "[/INST]": 14,
}
"""Tokens of the templates, in place of bytes that no text has."""
END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>"}
"""What ends a turn of the assistant, by style."""
ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
)
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are tiny.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{% for message in messages %}"
        "{% set turn = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
        "+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.first %}{% set turn = bos_token + turn %}{% endif %}{{ turn }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}" + ALTERNATE + "{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
        "{% else %}{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ message['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
    ),
}
"""As those families of models bring them: ChatML adds a system prompt of its own, Gemma and Mistral refuse any."""
STYLES = tuple(TEMPLATES)


def chat_tokenizer(style: str = "chatml", template: str | None = None) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with the tokens of all templates; another template where one is given.

    As Llama's, it puts `<s>` before a text that is not said to have its special tokens already.
    """
    alphabet = bytes_to_unicode()
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, **MARKS}
    letters = {alphabet[i]: i for i in range(3, 128) if i not in special.values()}
    tokenizer = Tokenizer(BPE({**special, **letters}, [], unk_token="<pad>"))
    tokenizer.add_special_tokens(list(special))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token=END[style], unk_token="<pad>"
    )
    made.chat_template = template or TEMPLATES[style]
    return made


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


class Writer:
    """In place of `continuations`: users ask what a list says, and every answer is the same function of the prompt.

    Args:
        tokenizer: From `chat_tokenizer`.
        questions: What users write; None in place of a text is a turn that does not end.
        answer: Text of an answer, by the number of the prompt; None as in `questions`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        questions: Iterable[str | None],
        answer: Callable[[int], str | None] = lambda number: f"Answer {number}.",
    ) -> None:
        self._tokenizer, self._questions, self._answer = tokenizer, iter(questions), answer
        self.calls: list[dict] = []
        """Arguments of each call; `prompts` are texts."""

    def __call__(self, _model, prompts, most, *, ends=(), **more) -> list[list[int]]:
        told = {"prompts": [self._tokenizer.decode(ids) for ids in prompts], "most": most, "ends": set(ends), **more}
        self.calls.append(told)
        asking = more["what"] == "writing questions"
        written = []
        for number in range(len(prompts)):
            text = next(self._questions, None) if asking else self._answer(number)
            ids = self._tokenizer("x" * most if text is None else text, add_special_tokens=False)["input_ids"]
            written.append([*ids, *([] if text is None else [self._tokenizer.eos_token_id])][:most])
        return written

    def of(self, what: str) -> list[dict]:
        """Calls of one kind."""
        return [call for call in self.calls if call["what"] == f"writing {what}"]
