"""Zero-shot tasks from files, against likelihoods counted by hand."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from support.checks import logits
from support.tiny import save_tiny, tiny_model, tiny_tokenizer

from selfpruner_hub.cli import main
from selfpruner_hub.errors import DataError, MissingExtraError, ModelError, UserError
from selfpruner_hub.evaluation import tasks as module
from selfpruner_hub.evaluation.tasks import SEVEN, check_tasks, evaluate_tasks, named

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason='not installed: pip install "selfpruner-hub[eval]"'
)
ITEMS = [
    {"query": f"Question: what is {word}?\n", "choices": [word, "a " + word * 2, "no"], "gold": number % 3}
    for number, word in enumerate(("red", "green", "blue", "grey", "pink", "black", "white", "cyan"))
]
PAIRS = [
    {"context_options": [f"the {a} met {b} so {a}", f"the {a} met {b} so {b}"], "continuation": "left.", "gold": gold}
    for a, b, gold in (("fox", "hen", 0), ("cat", "dog", 1), ("ant", "bee", 1), ("owl", "elk", 0), ("cow", "pig", 1))
]


@pytest.fixture
def directory(tmp_path):
    for name, items in (("colours", ITEMS), ("pairs", PAIRS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return tmp_path


@pytest.fixture
def harness(monkeypatch):
    """Let a function stand in the place of the harness's evaluation."""
    from lm_eval import evaluator

    return lambda function: monkeypatch.setattr(evaluator, "simple_evaluate", function)


def report_of(task, **results):
    """What the harness says of a task."""
    return {"results": {task: results}, "configs": {task: {}}, "n-samples": {task: {"effective": 8}}}


def likelihood(model, tokenizer, prompt, ending):
    """Of the ending's tokens after the prompt's, in nats."""
    before, whole = (tokenizer(text)["input_ids"] for text in (prompt, prompt + ending))
    rows = logits(model, torch.tensor([whole])).float().log_softmax(-1)[0]
    return sum(rows[i - 1, whole[i]].item() for i in range(len(before), len(whole)))


@needs_harness
@pytest.mark.slow
def test_against_hand_counted_likelihoods(directory):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    colours, pairs = evaluate_tasks(model, tokenizer, ["colours", "pairs"], directory=directory, progress=False)
    hits = {"acc": 0, "acc_norm": 0}
    for item in ITEMS:
        own = [likelihood(model, tokenizer, f"{item['query'].strip()}\nAnswer:", f" {c}") for c in item["choices"]]
        by_byte = [value / len(choice) for value, choice in zip(own, item["choices"], strict=True)]
        hits["acc"] += max(range(3), key=own.__getitem__) == item["gold"]
        hits["acc_norm"] += max(range(3), key=by_byte.__getitem__) == item["gold"]
    assert colours.items == 8
    assert colours.source == "colours.jsonl"
    assert colours.figures == {name: count / 8 for name, count in hits.items()}
    assert colours.errors["acc"] > 0
    right = 0
    for item in PAIRS:
        own = [likelihood(model, tokenizer, context, f" {item['continuation']}") for context in item["context_options"]]
        right += (own[1] > own[0]) == bool(item["gold"])
    assert pairs.figures == {"acc": right / 5}


@needs_harness
@pytest.mark.slow
def test_a_limit_and_a_cache(directory, tmp_path):
    words = {"directory": directory, "limit": 3, "cache": tmp_path / "cache", "progress": False}
    model = tiny_model("llama")
    first = evaluate_tasks(model, tiny_tokenizer(), ["colours"], **words)
    assert first[0].items == 3
    kept = list((tmp_path / "cache").iterdir())
    assert kept

    class Broken(type(model)):
        def forward(self, *args, **kwargs):
            raise AssertionError("it was to be read from the cache")

    model.__class__ = Broken
    assert evaluate_tasks(model, tiny_tokenizer(), ["colours"], **words) == first
    evaluate_tasks(tiny_model("llama", seed=1), tiny_tokenizer(), ["colours"], **words)
    assert len(list((tmp_path / "cache").iterdir())) == 2 * len(kept)  # another model's are its own


@needs_harness
def test_likelihoods_of_a_bfloat16_model_are_not_rounded_to_it(directory, tmp_path, harness):
    asked = []
    harness(lambda lm, use_cache, **_: asked.append((lm, use_cache)) or report_of("colours", **{"acc,none": 0.5}))
    words = {"directory": directory, "cache": tmp_path / "cache", "progress": False}
    evaluate_tasks(tiny_model("llama").bfloat16(), tiny_tokenizer(), ["colours"], **words)
    ((lm, cache),) = asked
    assert lm.softmax_dtype == torch.float32
    assert cache.endswith("-bfloat16-float32-colours")  # those of older runs are rounded


@needs_harness
def test_no_cache_of_a_model_whose_weights_are_elsewhere(directory, tmp_path):
    model = tiny_model("llama")
    model.lm_head.to("meta")
    with pytest.raises(UserError, match=r"partly offloaded.*Leave out --cache"):
        evaluate_tasks(model, tiny_tokenizer(), ["colours"], directory=directory, cache=tmp_path, progress=False)


@needs_harness
@pytest.mark.slow
def test_command_line(directory, tmp_path, capsys):
    dense = save_tiny("llama", tmp_path / "dense")
    words = ["evaluate", str(dense), "--tasks", "colours,pairs", "--tasks-dir", str(directory), "--quiet", "--json"]
    assert main(words) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert set(metrics) == {"acc (colours)", "acc_norm (colours)", "acc (pairs)"}
    assert metrics["acc (pairs)"]["protocol"].startswith("zero-shot, 5 items, ± 0.")


@needs_harness
@pytest.mark.parametrize(
    ("tasks", "text", "said"),
    [
        ("nothing", None, "There is no"),
        ("odd", "[1, 2]\n", "is no file of JSON objects"),
        ("odd", '{"question": "x"}\n', "have the fields question"),
        ("odd", "not json\n", "is no file of JSON objects"),
        (",", None, "No task was named"),
    ],
)
def test_mistakes(tasks, text, said, tmp_path, capsys):
    if text is not None:
        (tmp_path / f"{tasks}.jsonl").write_text(text)
    assert main(["evaluate", "no-model-is-loaded", "--tasks", tasks, "--tasks-dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@needs_harness
@pytest.mark.slow
def test_tasks_of_the_hub():
    """No Hub here: their names are known, their items cannot be had."""
    check_tasks(SEVEN, None)
    with pytest.raises(UserError, match="knows no task 'eight'"):
        check_tasks(["eight"], None)
    with pytest.raises(DataError, match=r"Cannot load the items of piqa.*--tasks-dir"):
        evaluate_tasks(tiny_model("llama"), tiny_tokenizer(), ["piqa"], progress=False)


@needs_harness
def test_groups_tags_and_tasks_without_a_known_figure(tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    (tmp_path / "one.yaml").write_text("task: one\ntag: both\n")
    (tmp_path / "two.yaml").write_text("task: two\ntag: both\nmetric_list:\n  - metric: bleu\n")
    (tmp_path / "group.yaml").write_text("group: all\ntask:\n  - group: part\n    task: [one]\n  - both\n")
    manager = TaskManager(include_defaults=False, include_path=tmp_path)
    monkeypatch.setattr(module, "_manager", lambda defaults: manager)
    check_tasks(["one"], None)
    for group in ("both", "all"):
        with pytest.raises(UserError, match=rf"'{group}' stands for several tasks\. .*: one, two\."):
            check_tasks([group], None)
    with pytest.raises(DataError, match="'two' gives none of the figures"):
        check_tasks(["two"], None)
    with pytest.raises(DataError, match="'colours' gives none of the figures"):
        module._score("colours", report_of("colours", **{"bleu,none": 0.5}), tmp_path)


@needs_harness
def test_too_little_memory_is_no_failure_of_the_network(monkeypatch, harness):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    harness(fail)
    monkeypatch.setattr(module, "check_tasks", lambda *_: None)
    monkeypatch.setattr(module, "_manager", lambda defaults: None)
    with pytest.raises(ModelError, match="Out of memory"):
        evaluate_tasks(tiny_model("llama"), tiny_tokenizer(), ["piqa"], progress=False)


@needs_harness
def test_figures_of_what_is_written():
    """As the harness gives them: by the filter of the replies, some without an error."""
    results = {
        "alias": "gsm8k",
        "exact_match,strict-match": 0.25,
        "exact_match_stderr,strict-match": 0.1,
        "exact_match,flexible-extract": 0.5,
        "exact_match_stderr,flexible-extract": "N/A",
        "prompt_level_strict_acc,none": 0.75,
        "prompt_level_strict_acc_stderr,none": 0.2,
        "other,none": 1.0,
    }
    found = {
        "results": {"gsm8k": results},
        "configs": {"gsm8k": {"dataset_path": "openai/gsm8k"}},
        "n-samples": {"gsm8k": {"effective": 4}},
    }
    score = module._score("gsm8k", found, None, chat=True)
    names = ("exact_match, strict-match", "exact_match, flexible-extract", "prompt_level_strict_acc")
    assert score.figures == dict(zip(names, (0.25, 0.5, 0.75), strict=True))
    assert score.errors == dict(zip(names, (0.1, 0.0, 0.2), strict=True))
    assert (score.items, score.source, score.chat) == (4, "openai/gsm8k", True)


def test_names():
    assert named("seven") == list(SEVEN)
    assert named("piqa, boolq,piqa") == ["piqa", "boolq"]


def test_without_the_harness(monkeypatch, tmp_path):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "selfpruner-hub\[eval\]"'):
        check_tasks(["piqa"], tmp_path)
