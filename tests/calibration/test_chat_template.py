"""Chat templates: the same tokens as transformers writes."""

from datetime import datetime

import pytest
from support.chat import END, MARKS, STYLES, TEMPLATES, assistant, chat_tokenizer, system, user
from support.tiny import tiny_tokenizer

from selfpruner_hub.calibration.chat_template import (
    conversation_ids,
    decoded,
    has_chat_template,
    prompt_ids,
    rendered,
    template_date,
    user_turn,
)
from selfpruner_hub.errors import DataError

ONE = [user("What is the capital of France?"), assistant("Paris.\nIt is on the Seine.")]
TWO = [*ONE, user("And of Italy?"), assistant("Rome")]
each_style = pytest.mark.parametrize("style", STYLES)
takes_system = pytest.mark.parametrize("style", ["chatml", "llama3"])


def test_a_tokenizer_has_a_template_or_not():
    assert has_chat_template(chat_tokenizer())
    assert not has_chat_template(tiny_tokenizer())
    assert not has_chat_template(None)


def test_special_tokens_of_the_tiny_tokenizer_are_single_tokens():
    tokenizer = chat_tokenizer()
    assert [tokenizer(mark, add_special_tokens=False)["input_ids"] for mark in MARKS] == [[i] for i in MARKS.values()]
    assert decoded(tokenizer, [3, *b" Hi\n", 4]) == "Hi"


@each_style
@pytest.mark.parametrize("messages", [ONE, TWO, ONE[:1], TWO[:3]], ids=len)
def test_tokens_are_those_of_transformers(style, messages):
    tokenizer = chat_tokenizer(style)
    made = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert conversation_ids(tokenizer, messages) == made


@each_style
@pytest.mark.parametrize("messages", [ONE[:1], TWO[:3]], ids=len)
def test_prompts_are_those_of_transformers(style, messages):
    tokenizer = chat_tokenizer(style)
    made = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=True)
    assert prompt_ids(tokenizer, messages) == made


@pytest.mark.parametrize(
    ("style", "messages", "said"),
    [
        ("gemma", [system("Be brief."), *ONE], "System role not supported"),
        ("mistral", ONE[1:], "must alternate"),
        ("gemma", [*ONE, ONE[1]], "must alternate"),
        ("chatml", [{"role": "user"}], "no attribute 'content'"),
        ("chatml", [{"from": "human", "value": "Hi"}], "cannot write"),
        ("chatml", [{"role": "user", "content": 5}], "cannot write"),
        ("chatml", [], "at least one message"),
    ],
    ids=str,
)
def test_what_a_template_refuses_is_one_line_with_a_remedy(style, messages, said):
    with pytest.raises(DataError, match=said) as caught:
        conversation_ids(chat_tokenizer(style), messages)
    assert "\n" not in str(caught.value)
    assert '"role"' in caught.value.hint


@pytest.mark.parametrize(
    ("template", "said"),
    [("{{ 1 // 0 }}", "division"), ("{{ messages[0].content.encode('x-none') }}", "unknown encoding")],
)
def test_whatever_a_template_raises_is_one_line(template, said):
    with pytest.raises(DataError, match=f"The chat template cannot write these messages: .*{said}"):
        conversation_ids(chat_tokenizer(template=template), ONE)


FORMATS = "%d %b %Y|%Y-%m-%d|%A, %B %-d|%-m/%-d/%y"


@each_style
def test_a_template_writes_one_date_on_every_day(style):
    """As transformers renders it, but for the day."""
    plain, dated = chat_tokenizer(style), chat_tokenizer(style)
    macro = "{% macro day(format) %}{{ strftime_now(format) }}{% endmacro %}"
    says = f"{{% if strftime_now is defined %}}{{{{ day('{FORMATS}') }}}}{{% endif %}}"
    dated.chat_template = f"\n{macro}  {says}\n{plain.chat_template}"
    now, then = (day.strftime(FORMATS) for day in (datetime.now(), datetime(2026, 1, 1)))
    assert "Thursday, January 1" in then
    assert now in dated.apply_chat_template(ONE, tokenize=False)
    assert rendered(dated, ONE) == dated.apply_chat_template(ONE, tokenize=False).replace(now, then)
    assert rendered(dated, ONE).endswith(rendered(plain, ONE))
    assert (template_date(dated), template_date(plain), template_date(None)) == ("2026-01-01", None, None)


@each_style
def test_around_a_users_turn_is_all_that_the_template_writes(style):
    tokenizer = chat_tokenizer(style)
    turn = user_turn(tokenizer, None)
    question = tokenizer("Why?", add_special_tokens=False)["input_ids"]
    assert [*turn.before, *question, *turn.after] == prompt_ids(tokenizer, [user("Why?")])
    assert tokenizer.decode(turn.after[0]) == {"mistral": " "}.get(style, END[style])


@takes_system
def test_and_the_system_prompt_before_it(style):
    tokenizer = chat_tokenizer(style)
    turn = user_turn(tokenizer, "Be brief.")
    question = tokenizer("Why?", add_special_tokens=False)["input_ids"]
    assert [*turn.before, *question, *turn.after] == prompt_ids(tokenizer, [system("Be brief."), user("Why?")])
    assert turn.before != user_turn(tokenizer, None).before


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (TEMPLATES["gemma"], "Be brief."),  # refuses it
        (TEMPLATES["chatml"].replace("for message in messages", "for message in messages[-1:]"), "Be brief."),
        ("{{ raise_exception('No.') }}", None),
        ("Nothing of what was said.", None),
        ("{% for message in messages %}{{ message['content'] | length }}; {% endfor %}", None),
        ("{% for message in messages %}User: {{ message['content'] }}{% endfor %}", None),  # no beginning of an answer
    ],
)
def test_no_users_turn_to_write(template, prompt):
    assert user_turn(chat_tokenizer(template=template), prompt) is None


THINKING = (
    "{% set silent = enable_thinking is defined and not enable_thinking %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}"
    "{% if silent and message['role'] == 'user' %}/nothink{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if silent %}<think></think>{% endif %}{% endif %}"
)
"""As those of models that think unless they are told not to; GLM-4.5 writes a word into the user's turn, too."""


@pytest.mark.parametrize("dated", ["", "{% if strftime_now is defined %}{% endif %}"])
def test_a_model_that_thinks_is_told_to_answer_at_once(dated):
    tokenizer = chat_tokenizer(template=dated + THINKING)
    asked = "<|im_start|>user\nWhy?/nothink<|im_end|>\n<|im_start|>assistant\n<think></think>"
    assert rendered(tokenizer, [user("Why?")], prompt=True) == asked
    turn = user_turn(tokenizer, None)
    assert tokenizer.decode(turn.after).startswith("/nothink")
    assert tokenizer.decode(turn.stop) == "<|im_end|>"  # a user writes no such word
