"""Short questions that the parent writes as plain text, after a few examples, and answers as a chat model.

A small chat model that opens a user's turn asks far-fetched questions. In plain text, after three plain ones, it goes
on with plain ones (few-shot generation, as in Self-Instruct, arXiv 2212.10560).
"""

from __future__ import annotations

import random
from functools import partial
from itertools import cycle, islice

from transformers import PreTrainedTokenizerBase

from selfpruner_hub.calibration.chat_template import decoded, encoded
from selfpruner_hub.calibration.conversations import (
    Conversation,
    Distinct,
    Style,
    TurnStart,
    answered,
    end_tokens,
    write_turns,
)
from selfpruner_hub.calibration.generated_text import TextModel
from selfpruner_hub.errors import DataError
from selfpruner_hub.progress import Progress

SHOTS = 3
"""Examples that stand in front of a question."""
QUESTION_EXAMPLES = (
    ("What do beavers build?", "Dams."),
    ("Who painted the ceiling of the Sistine Chapel?", "Michelangelo."),
    ("Which country pays with the zloty?", "Poland."),
    ("What is a young kangaroo called?", "A joey."),
    ("Which river flows through Budapest?", "The Danube."),
    ('Who wrote "The Jungle Book"?', "Rudyard Kipling."),
    ("How many strings does a violin have?", "Four."),
    ("Which sense do you use with your nose?", "Smell."),
    ("Which wood are cricket bats made of?", "Willow."),
    ("Where do reindeer live?", "In the Arctic."),
    ("What does a botanist study?", "Plants."),
    ("Which metal is extracted from bauxite?", "Aluminium."),
)
"""Plain questions with short answers. None of them is among those that measure (evaluation/questions.jsonl)."""
QUESTIONS = Style(
    systems=(None,),
    openings=(
        *("What is the", "Which", "Who", "Where", "How many", "What do", "", "In which", "What is a"),
        *("When", "What kind of", "Name the", "What are", "Why do", "Is", "How does"),
    ),
    user_tokens=24,
    answer_tokens=32,
    user_temperature=0.7,
    answer_temperature=0.0,
)
"""Short questions, with the likeliest answers."""
TOPICS = (
    *("animals", "birds", "fish", "insects", "plants", "trees", "farming", "food", "fruit", "cooking", "drinks"),
    *("the human body", "health", "medicine", "clothes", "houses", "furniture", "tools", "kitchens", "schools"),
    *("jobs", "money", "trade", "laws", "families", "feelings", "languages", "words and their opposites", "letters"),
    *("numbers", "arithmetic", "shapes", "measures", "time and the calendar", "colours", "weather", "seasons"),
    *("rivers and lakes", "oceans", "mountains", "deserts", "continents", "countries", "capitals", "cities"),
    *("flags", "buildings", "bridges", "roads", "cars", "trains", "ships", "aircraft", "the sun and the planets"),
    *("stars", "space travel", "physics", "electricity", "light and sound", "chemistry", "metals", "rocks"),
    *("computers", "the internet", "inventions", "scientists", "ancient history", "modern history", "wars"),
    *("kings and presidents", "explorers", "religions", "myths", "holidays", "books", "writers", "fairy tales"),
    *("poems", "paintings", "music", "instruments", "films", "dances", "sports", "games", "toys"),
)
"""Topics of short questions: the breadth of a general encyclopedia."""


def write_questions(
    model: TextModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seed: int,
    *,
    distinct: Distinct | None = None,
    progress: Progress | None = None,
) -> list[Conversation]:
    """Let a chat model write short questions about many topics, and answer them.

    Args:
        model: The dense model.
        tokenizer: Its tokenizer, with a chat template.
        count: Number of questions, at least 1.
        seed: Random seed.
        distinct: User's turns written before; the new questions are added to it.
        progress: Callback that receives the number of questions, then of answers, that are written.

    Returns:
        At most `count` conversations of one question and its answer; fewer only if the model keeps repeating itself.

    Raises:
        DataError: The model writes no new question.
    """
    draw = random.Random(seed)
    pairs = [(topic, opening) for topic in TOPICS for opening in QUESTIONS.openings]
    draw.shuffle(pairs)
    stops = end_tokens(model, tokenizer) | _newlines(tokenizer)

    def asked(opening: str, ids: list[int]) -> str:
        rest = decoded(tokenizer, ids)
        return f"{opening} {rest}".strip() if rest else ""

    opened = (
        TurnStart(encoded(tokenizer, _shown(topic, opening, draw)), stops, partial(asked, opening))
        for topic, opening in cycle(pairs)
    )
    distinct = distinct or Distinct()
    turns = write_turns(model, QUESTIONS, lambda number: islice(opened, number), count, seed, distinct, progress)
    if not turns:
        raise DataError("The model wrote no question that ends, or none that is new.", "Use question_share=0.")
    return answered(model, tokenizer, QUESTIONS, turns, seed, progress)


def _shown(topic: str, opening: str, draw: random.Random) -> str:
    """The plain text in front of a question."""
    examples = "".join(f"Q: {question}\nA: {answer}\n\n" for question, answer in draw.sample(QUESTION_EXAMPLES, SHOTS))
    return f"Common knowledge: {topic}\n\n{examples}Q: {opening}".rstrip()


def _newlines(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of all tokens with a line break."""
    return {number for number in range(len(tokenizer)) if "\n" in tokenizer.decode([number])}
