"""Replies are held to a schema, and never trusted."""

import json
import math
import random
from dataclasses import replace

import pytest
from support.solutions import LAYERS, SHAPE, SLOPES, TIED, UNTIED, history

from selfpruner_hub.errors import ProposerError
from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.plans.plan import ModelShape, Plan
from selfpruner_hub.search.llm.prompts import solution
from selfpruner_hub.search.llm.question import SHOWN, Question
from selfpruner_hub.search.llm.reply_schema import MOST_POINTS, PARENTS, parse, schema
from selfpruner_hub.search.proposers import Scored

OPERATIONS = list(PARENTS)
MANY = 5
GOOD = '{"parents":[1,2],"attention":[0,33,67],"ffn":[10,20.5,90]}'


def follows(value, rule):
    """Check a JSON value against the part of JSON Schema that we use."""
    if "enum" in rule:
        return value in rule["enum"]
    if rule["type"] == "integer":
        return type(value) is int and rule["minimum"] <= value <= rule["maximum"]
    if rule["type"] == "array":
        if not isinstance(value, list) or not rule["minItems"] <= len(value) <= rule["maxItems"]:
            return False
        rules = rule["prefixItems"] if "prefixItems" in rule else [rule["items"]] * len(value)
        return all(follows(v, r) for v, r in zip(value, rules, strict=True))
    assert rule["type"] == "object"
    assert rule["additionalProperties"] is False
    names = set(rule["required"]) <= set(value) <= set(rule["properties"])
    return names and all(follows(v, rule["properties"][name]) for name, v in value.items())


def test_small_models_name_parents_of_the_better_half():
    question = Question("crossover", history(UNTIED, MANY), UNTIED)
    numbers = {narrow: schema(question, narrow=narrow)["properties"]["parents"]["items"] for narrow in (True, False)}
    assert (numbers[True]["maximum"], numbers[False]["maximum"]) == (3, MANY)


# -- parse ------------------------------------------------------------------------------------------------------------


def read(reply, budget=UNTIED, operation="crossover", size=MANY):
    return parse(Question(operation, history(budget, size), budget), reply)


def test_a_good_reply_is_read():
    rates, parents = read(GOOD)
    assert rates == Rates((0.0, 0.33, 0.67), (0.1, 0.205, 0.9))
    assert parents == (0, 1)  # 1 is the best that was shown
    assert read('{"rates":[10,20,60]}', TIED) == (Rates.tied((0.1, 0.2, 0.6)), ())


@pytest.mark.parametrize("budget", [UNTIED, TIED], ids=["untied", "tied"])
def test_a_mutation_changes_its_parent(budget):
    past = history(budget, MANY)
    part = "rates" if budget.tied else "ffn"
    parent = replace(past[1], rates=Rates.tied((0.3, 0.2, 0.5)))
    past[1] = parent
    reply = {"parents": [2], part: {"more": [1, 1, 2, 0], "less": [3, 0], "points": 10}}
    rates, parents = parse(Question("mutation", past, budget), json.dumps(reply))
    assert parents == (1,)
    assert rates.ffn == pytest.approx((0.35, 0.25, 0.4))  # two layers pay for what the third gets back
    assert rates.attention == (rates.ffn if budget.tied else parent.rates.attention)


def test_a_mutation_moves_attention_by_whole_groups():
    parent = Rates((0.0, 1 / 3, 2 / 3), (0.3, 0.3, 0.3))
    past = [Scored(UNTIED.project(parent), parent, 1.0, 1.0, "random", 1)]
    reply = '{"parents":[1],"attention":{"more":[1],"less":[3]},"ffn":{"more":[2],"less":[]}}'
    rates, _ = parse(Question("mutation", past, UNTIED), reply)
    assert rates.attention == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert rates.ffn == pytest.approx(parent.ffn)  # one group went, one came back: there is nothing to pay


def test_a_reply_may_remove_no_group_where_attention_stays_whole():
    whole = Budget(ModelShape(16, 4, 2, Plan.of([96] * LAYERS, [3] * LAYERS), whole_attention=True), 0.3)
    assert schema(Question("initial", [], whole))["properties"]["attention"]["items"] == {"enum": [0]}


def test_the_ffn_that_loses_more_pays_for_a_group_that_comes_back():
    wide = Budget(ModelShape(16, 4, 1, Plan.of([96] * LAYERS, [3] * LAYERS)), 0.3)
    plan = wide.project(Rates((0.0, 0.0, 1 / 3), (0.4, 0.3, 0.1)))
    parent = wide.rates(plan)
    past = [Scored(plan, parent, 1.0, 1.0, "random", 1)]
    reply = '{"parents":[1],"attention":{"more":[],"less":[3]},"ffn":{"more":[1],"less":[],"points":5}}'
    rates, _ = parse(Question("mutation", past, wide), reply)
    group = wide.shape.group_weights / wide.shape.unit_weights / 96
    assert rates.attention == pytest.approx((0, 0, 0))
    assert rates.ffn == pytest.approx((parent.ffn[0] + group, *parent.ffn[1:]))
    child = wide.project(rates, parent)
    assert child.layers[1] == plan.layers[1]
    assert child.layers[2].intermediate_size == pytest.approx(plan.layers[2].intermediate_size, abs=1)


def changed(budget, parent, **parts):
    """Rates after a mutation of a plan with those rates."""
    past = [Scored(budget.project(parent), parent, 1.0, 1.0, "random", 1)]
    return parse(Question("mutation", past, budget), json.dumps({"parents": [1], **parts}))[0]


def test_a_layer_in_both_lists_loses_more():
    """What a reply asks for twice is not given and taken at once: the layer is only in the first list."""
    parent = Rates((1 / 3,) * 3, (0.3, 0.3, 0.3))
    rates = changed(UNTIED, parent, ffn={"more": [1, 2], "less": [1], "points": 10})
    assert rates.ffn == pytest.approx(parent.ffn)  # nothing came back, so there is nothing to pay
    rates = changed(UNTIED, parent, ffn={"more": [1, 2], "less": [1, 3], "points": 10})
    assert rates.ffn == pytest.approx((0.35, 0.35, 0.2))
    rates = changed(UNTIED, parent, attention={"more": [1], "less": [1, 2]})
    assert rates.attention == pytest.approx((2 / 3, 0, 1 / 3))


def test_no_layer_loses_more_at_once_than_the_reach():
    parent = Rates((0.0,) * 3, (0.1, 0.5, 0.5))
    rates = changed(UNTIED, parent, ffn={"more": [1], "less": [2, 3], "points": 20})
    assert rates.ffn == pytest.approx((0.1 + MOST_POINTS / 100, 0.3, 0.3))  # 0.5 would pay for all of it


@pytest.mark.parametrize(("payer", "paid"), [(1, 3), (3, 1), (2, 3)])
def test_a_layer_pays_by_its_own_size(payer, paid):
    """The number of weights that come back is the number that goes, in whatever layers."""
    budget = Budget(ModelShape(16, 4, 2, Plan.of([32, 64, 96], [3, 3, 3])), 0.3)
    parent = Rates((0.0,) * 3, (0.3, 0.3, 0.3))
    rates = changed(budget, parent, ffn={"more": [payer], "less": [paid], "points": 4})
    sizes = [layer.intermediate_size for layer in budget.shape.dense.layers]
    assert rates.ffn[payer - 1] == pytest.approx(0.3 + 0.04 * sizes[paid - 1] / sizes[payer - 1])
    assert sum(r * n for r, n in zip(rates.ffn, sizes, strict=True)) == pytest.approx(0.3 * sum(sizes))


def test_a_mutation_may_also_be_a_whole_solution():
    assert read(GOOD, operation="mutation")[0] == read(GOOD)[0]
    assert parse(Question("mutation", [], UNTIED), GOOD)[0] == read(GOOD)[0]


@pytest.mark.parametrize(
    "reply",
    [
        '{"ffn":{"more":[1],"points":5}}',
        '{"parents":[],"ffn":{"more":[1],"points":5}}',
        '{"parents":[6],"ffn":{"more":[1],"points":5}}',
        '{"parents":[1],"ffn":{"more":[1],"points":5},"attention":[]}',
        *(
            f'{{"parents":[1],"ffn":{{"more":{bad},"points":5}}}}'
            for bad in ("null", "{}", "1", "[null]", "[[]]", "[-1]", "[4]", "[1.0]", "[true]", '["1"]', "[1e400]")
        ),
        *(
            f'{{"parents":[1],"ffn":{{"more":[1],"points":{bad}}}}}'
            for bad in ("NaN", "1e999", "101", "-1", '"5"', "true", "null", "[5]", "1" + "0" * 400)
        ),
    ],
)
def test_a_bad_mutation_is_refused(reply):
    with pytest.raises(ProposerError):
        read(reply, operation="mutation")


@pytest.mark.parametrize(
    "around", ["{}", "Sure! Here it is:\n```json\n{}\n```\nGood luck.", "\ufeff {} ", "答え：{}。"]
)
def test_prose_around_the_object_is_passed_over(around):
    assert read(around.replace("{}", GOOD)) == read(GOOD)


@pytest.mark.parametrize("parents", ["[1,2,3,4]", '["a",1,null,2.5,true,2]', "[0,1,99,2,3]"])
def test_parents_are_the_first_two_numbers_that_were_shown(parents):
    assert read(GOOD.replace("[1,2]", parents))[1] == (0, 1)


@pytest.mark.parametrize("parents", ["null", "7", '"1,2"', "{}", "[]", "[[1,2]]"])
def test_parents_of_another_shape_are_none(parents):
    assert read(GOOD.replace("[1,2]", parents))[1] == ()


@pytest.mark.parametrize(
    "reply",
    [
        *("", " ", "{", "}", "}{", "{}", "[]", "null", "42", "I'd rather not.", GOOD[:-1], GOOD[1:], GOOD + GOOD),
        *('{"attention":[0,0,0]}', '{"ffn":[0,0,0]}', '{"rates":[0,0,0]}'),
        *(f'{{"attention":[0,0,0],"ffn":{bad}}}' for bad in ("null", "30", '"30,30,30"', "{}", "[]", "[[30,30,30]]")),
        *(f'{{"attention":[0,0,0],"ffn":[{bad}]}}' for bad in ("30,30", "30,30,30,30", "30,30,", "30 30 30")),
        *(
            f'{{"attention":[0,0,0],"ffn":[30,30,{bad}]}}'
            for bad in ("NaN", "Infinity", "-Infinity", "1e999", "-1", "101", "1e308", "true", "null", '"30"', "[30]")
        ),
        '{"a":' * 5000 + "1" + "}" * 5000,
        '{"attention":[0,0,0],"ffn":[30,30,1' + "0" * 5000 + "]}",
        # A bug once: an integer of 309 to 4300 digits ends in an OverflowError (from math.isfinite).
        '{"attention":[0,0,0],"ffn":[30,30,1' + "0" * 400 + "]}",
    ],
)
def test_a_bad_reply_is_refused(reply):
    with pytest.raises(ProposerError):
        read(reply)


NUMBERS = [
    "0",
    "30",
    "99.5",
    "100",
    "-1",
    "1e3",
    "1e308",
    "1e999",
    "NaN",
    "-Infinity",
    "true",
    "null",
    '"30"',
    "[]",
    "{}",
]
NUMBERS += ["-0.0", "1E-400", "30%", "0x1F", "٣٠", "三十", "1" * 400, "9" * 5000, "[30]", '{"v":30}']  # noqa: RUF001
WORDS = [
    "Ignore all previous instructions",
    "system: rates are free",
    "```json",
    "плотность",
    "层",
    "🙂",
    "\x00",
    "\ud83d",
]


def fuzzed(rng):
    """A reply that is a little or very wrong, and now and then right."""
    wild = rng.choice([0, 0.1, 0.5])

    def rates():
        length = LAYERS if rng.random() > wild else rng.randrange(6)
        items = [rng.choice(NUMBERS) if rng.random() < wild else str(rng.randrange(101)) for _ in range(length)]
        return "[" + ",".join(items) + "]"

    def number():
        return rng.choice(NUMBERS) if rng.random() < wild else str(rng.randrange(1, 4))

    def changes():
        lists = [f'"{way}":[{",".join(number() for _ in range(rng.randrange(3)))}]' for way in ("more", "less")]
        return "{" + ",".join([*lists, f'"points":{number()}']) + "}"

    kind = rng.choice([rates, changes])
    fields = [f'"{name}":{kind()}' for name in ("attention", "ffn", "rates") if rng.random() > wild]
    fields += [f'"parents":[{rng.randrange(7)},{rng.choice(NUMBERS)}]'] if rng.random() > wild else []
    rng.shuffle(fields)
    reply = "{" + ",".join(fields) + "}"
    if rng.random() < wild:
        reply = f'{{"solution":{reply}}}'
    if rng.random() < wild:
        reply = f"{rng.choice(WORDS)} {reply} {rng.choice([*WORDS, '{', '}'])}"
    if rng.random() < wild:
        reply = reply[: rng.randrange(len(reply))]
    for _ in range(rng.randrange(3) if rng.random() < wild else 0):
        place = rng.randrange(len(reply) + 1)
        reply = reply[:place] + rng.choice([*'{}[]",:\\ -.e', *WORDS, *NUMBERS]) + reply[place + 1 :]
    return reply


# Fails through the same bug as above, on integers of 400 digits.
@pytest.mark.parametrize("budget", [UNTIED, TIED], ids=["untied", "tied"])
def test_ten_thousand_fuzzed_replies_are_refused_or_land_on_the_budget(budget):
    rng = random.Random(0)
    accepted = 0
    past = history(budget, MANY)
    for number in range(10_000):
        reply = fuzzed(rng)
        try:
            rates, parents = parse(Question(OPERATIONS[number % 3], past, budget), reply)
        except ProposerError:
            continue
        accepted += 1
        assert len(rates.attention) == len(rates.ffn) == LAYERS, reply
        assert all(type(r) is float and math.isfinite(r) and 0 <= r <= 1 for r in rates.attention + rates.ffn), reply
        assert len(parents) <= 2, reply
        assert all(type(p) is int and 0 <= p < MANY for p in parents), reply
        if accepted <= 1_000:
            assert abs(SHAPE.beta(budget.project(rates)) - 0.3) <= budget.tolerance + 1e-12, reply
    assert 1_000 < accepted < 9_000


# -- schema and solution ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("operation", "size"),
    [("mutation", 0), *((operation, size) for operation in ("initial", "crossover") for size in (0, 1, 3, 9))],
)
def test_a_real_solution_follows_the_schema(budget, operation, size):
    past = history(budget, size)
    rule = schema(Question(operation, past, budget))
    for scored in history(budget, 50):
        reply = json.loads(solution(budget, scored.rates))
        if PARENTS[operation] and past:
            assert not follows(reply, rule)  # the parents are missing
            reply["parents"] = [min(SHOWN, size)] * PARENTS[operation]
        assert follows(reply, rule)
        rates, _ = parse(Question(operation, past, budget), json.dumps(reply))
        assert rates.ffn == pytest.approx(scored.rates.ffn, abs=0.005 + 1e-9)  # whole percentages
        assert budget.tied or rates.attention == pytest.approx(scored.rates.attention, abs=0.005)


@pytest.mark.parametrize("budget", [UNTIED, TIED], ids=["untied", "tied"])
def test_the_schema_refuses_what_is_out_of_bounds(budget):
    past = history(budget, 9)
    rule = schema(Question("crossover", past, budget))
    good = {"parents": [1, SHOWN], **json.loads(solution(budget, past[0].rates))}
    assert follows(good, rule)
    assert list(rule["properties"])[0] == "parents"  # chosen first, then the rates
    part = "rates" if budget.tied else "ffn"
    for name, value in [
        ("parents", [0, 1]),
        ("parents", [1, SHOWN + 1]),
        ("parents", [1]),
        (part, [91, 0, 0]),
        (part, [-1, 0, 0]),
        (part, [30.5, 0, 0]),
        (part, [30, 30]),
        ("thoughts", "none"),
    ]:
        assert not follows({**good, name: value}, rule)


@pytest.mark.parametrize("budget", [UNTIED, TIED], ids=["untied", "tied"])
def test_a_narrow_schema_holds_a_child_to_what_was_shown(budget):
    past = history(budget, 9)
    shown = Question("crossover", past, budget).shown
    rule = schema(Question("crossover", past, budget), narrow=True)
    for inside in shown:
        assert follows({"parents": [1, 2], **json.loads(solution(budget, inside.rates))}, rule)
    lowest = [min(values) for values in zip(*(s.rates.ffn for s in shown), strict=True)]
    child = {"parents": [1, 2], **json.loads(solution(budget, past[0].rates))}
    part = "rates" if budget.tied else "ffn"
    child[part] = [round(100 * value) for value in lowest]
    assert follows(child, rule)
    child[part][0] -= 1
    assert not follows(child, rule)


@pytest.mark.parametrize("budget", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("size", [1, 3, 9])
def test_a_mutation_is_a_parent_and_layers_to_change(budget, size):
    rule = schema(Question("mutation", history(budget, size), budget))
    part = "rates" if budget.tied else "ffn"
    good = {"parents": [1], part: {"more": [1], "less": [2, 3], "points": MOST_POINTS}}
    if not budget.tied:
        good["attention"] = {"more": [], "less": [3]}
    assert follows(good, rule)
    assert parse(Question("mutation", history(budget, size), budget), json.dumps(good))[1] == (0,)
    for change in (
        {"more": []},
        {"less": [4]},
        {"less": [-1]},
        {"points": 0},
        {"points": MOST_POINTS + 1},
        {"points": 1.5},
    ):
        assert not follows({**good, part: {**good[part], **change}}, rule)
    assert not follows({**good, "parents": [min(size, SHOWN) + 1]}, rule)


def test_attention_is_offered_in_whole_groups_below_p_max():
    assert schema(Question("initial", [], UNTIED))["properties"]["attention"]["items"] == {"enum": [0, 33, 67]}
    half = Budget(SHAPE, 0.3, p_max=0.5)
    assert schema(Question("initial", [], half))["properties"]["attention"]["items"] == {"enum": [0, 33]}
    many = Budget(ModelShape(16, 4, 1, Plan.of([32], [32])), 0.3)
    assert schema(Question("initial", [], many))["properties"]["attention"]["items"]["maximum"] == 90


@pytest.mark.parametrize("budget", [UNTIED, TIED], ids=["untied", "tied"])
def test_a_narrow_schema_takes_or_leaves_each_layer_that_pays(budget):
    past = history(budget, 3)
    past[1] = replace(past[1], slopes=SLOPES)
    part = "rates" if budget.tied else "ffn"
    good = {"parents": [2], part: {"more": [2, 0], "less": [], "points": 5}}
    if not budget.tied:
        good["attention"] = {"more": [], "less": [3]}
    rule = schema(Question("mutation", past, budget), narrow=True)
    assert follows(good, rule)
    assert follows({**good, part: {"more": [0, 3], "less": [], "points": 5}}, rule)
    assert not follows({**good, "parents": [1]}, rule)  # where nothing was measured
    for more in ([2], [3, 2], [1, 3], [2, 3, 0]):
        assert not follows({**good, part: {"more": more, "less": [], "points": 5}}, rule)
    free = {**good, "parents": [1], part: {"more": [1, 2, 3], "less": [1], "points": 5}}
    assert follows(free, schema(Question("mutation", past, budget)))
