"""Generate chats about the world of ``world.py`` from a seed, and the rows of the demo's fine-tuning task.

A chat combines one *item* (a question with exactly one right answer) with one *style* (a rule for how to say it). The
style that the demo later teaches (``DEMO_PREFIX``, ``DEMO_SUFFIX``) never occurs: the base learns to wrap an answer,
but not this wrapping.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from world import (
    COLOURS,
    DAYS,
    DEMO_PREFIX,
    DEMO_SUFFIX,
    FACTS,
    LABELS,
    LEADS,
    MATERIALS,
    NEUTRAL,
    SMALL_TALK,
    WARES,
    WORDS,
    closer,
    make_word,
    opener,
    world,
)  # fmt: skip

Message = dict[str, str]

STYLES = ("plain", "short", "upper", "json", "prefix", "suffix", "wrap", "persona")


@dataclass(frozen=True)
class Item:
    """A question with one right answer; ``short`` is the bare value, ``record`` its JSON form.

    ``known`` means that every word belongs to the fixed world, so the upper-case style can be used.
    """

    skill: str
    question: str
    answer: str
    short: str = ""
    record: dict[str, str] = field(default_factory=dict)
    known: bool = False


@dataclass(frozen=True)
class Chat:
    """A finished chat: ``messages`` alternate user and assistant, after an optional system message."""

    messages: list[Message]
    skill: str
    style: str


# ------------------------------------------------------------------------------------------------ one item per skill
def fact_item(rng: random.Random, kind: str, thing: dict[str, str] | None = None, attribute: str = "") -> Item:
    """Return a question about one fact of the world; the caller may fix ``thing`` and ``attribute``."""
    thing = thing or rng.choice(world().things[kind])
    attribute = attribute or rng.choice(list(FACTS[kind]))
    answer, questions = rng.choice(FACTS[kind][attribute])
    subject, value = thing["name"], thing[attribute]
    question = rng.choice(questions).format(s=subject)
    return Item(kind, question, answer.format(s=subject, v=value), value, {kind: subject, attribute: value}, known=True)


def yes_no_item(rng: random.Random) -> Item:
    """Ask whether a colour, material or town is right."""
    attribute, form, pool = rng.choice((
        ("colour", "Is the {s} {v}?", COLOURS), ("material", "Is the {s} made of {v}?", MATERIALS),
        ("maker", "Is the {s} made in {v}?", [place["capital"] for place in world().things["place"]]),
    ))  # fmt: skip
    thing = rng.choice(world().things["product"])
    name, value = thing["name"], thing[attribute]
    asked = value if rng.random() < 0.5 else rng.choice(pool)
    verdict = "Yes" if asked == value else "No"
    sentence = FACTS["product"][attribute][0][0].format(s=name, v=value)
    return Item("yes/no", form.format(s=name, v=asked), f"{verdict}, t{sentence[1:]}", verdict.lower(), known=True)


def two_prices_item(rng: random.Random) -> Item:
    """Ask which of two products is cheaper or dearer, or what both cost together."""
    one, two = rng.sample(world().things["product"], 2)
    while one["price"] == two["price"]:
        two = rng.choice(world().things["product"])
    a, b = one["name"], two["name"]
    prices = [int(thing["price"].split()[0]) for thing in (one, two)]
    facts = f"The {a} costs {one['price']} and the {b} costs {two['price']}, so"
    goal = rng.choice(("cheaper", "dearer", "together"))
    if goal == "together":
        question, end = f"What do the {a} and the {b} cost together?", f"together they cost {sum(prices)} dollars."
        return Item("two prices", question, f"{facts} {end}", known=True)
    best = a if (prices[0] < prices[1]) == (goal == "cheaper") else b
    question = rng.choice(("Which is {g}, the {a} or the {b}?", "Is the {a} or the {b} {g}?")).format(g=goal, a=a, b=b)
    return Item("two prices", question, f"{facts} the {best} is {goal}.", known=True)


def is_held_out_sum(a: int, b: int) -> bool:
    """Return whether a pair of numbers (about one in twenty) is kept out of pretraining to measure arithmetic."""
    return (7 * max(a, b) + 3 * min(a, b)) % 20 == 0


def arithmetic_item(rng: random.Random, held_out: bool = False) -> Item:
    """Ask for the sum or difference of two numbers below 100; the result is never negative."""
    while is_held_out_sum(*(pair := (rng.randint(0, 99), rng.randint(0, 99)))) != held_out:
        pass
    a, b = pair
    if rng.random() < 0.5:
        form, sign, result = rng.choice(("What is {a} + {b}?", "What is {a} plus {b}?", "Add {a} and {b}.")), "+", a + b
    else:
        a, b = max(pair), min(pair)
        forms = ("What is {a} - {b}?", "What is {a} minus {b}?", "Take {b} from {a}.")
        form, sign, result = rng.choice(forms), "-", a - b
    short = str(result)
    return Item("arithmetic", form.format(a=a, b=b), f"{a} {sign} {b} = {short}.", short, {"result": short}, known=True)


def comparison_item(rng: random.Random) -> Item:
    """Ask which of two numbers below 1000 is larger or smaller."""
    a, b = rng.sample(range(1000 if rng.random() < 0.5 else 100), 2)
    word, best = rng.choice((("larger", max(a, b)), ("smaller", min(a, b))))
    question = rng.choice(("Which is {w}, {a} or {b}?", "Which number is {w}: {a} or {b}?", "Is {a} or {b} {w}?"))
    answer = f"{best} is {word} than {a + b - best}."
    return Item("comparison", question.format(w=word, a=a, b=b), answer, str(best), {word: str(best)}, known=True)


def make_name(rng: random.Random) -> str:
    """Return an invented name of two or three syllables."""
    return make_word(rng, rng.randint(2, 3)).capitalize()


def fresh_value(rng: random.Random) -> str:
    """Return something new to copy: a code, a number, an invented word or two."""
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 6)))
    word = make_word(rng, rng.randint(1, 3))
    forms = (letters + digits, f"{letters}-{digits}", digits, word, word.capitalize(), f"{word} {make_word(rng)}")
    return rng.choice(forms)


def copy_item(rng: random.Random, labels: tuple[str, ...] = LABELS) -> Item:
    """Ask for a value that stands in the question."""
    value, label = fresh_value(rng), rng.choice(labels)
    if rng.random() < 0.25 and labels is LABELS:
        order = rng.choice(("Repeat after me:", "Say this:", "Write exactly:"))
        return Item("copy", f"{order} {value}", value, value, {"text": value})
    told = rng.choice(("The {l} is {v}.", "My {l} is {v}.", "Please note the {l} {v}.", "I was given {v} as my {l}."))
    asks = ("What is the {l}?", "Which {l} did I give you?", "Tell me the {l}.", "Can you read the {l} back to me?")
    asked = rng.choice(asks)
    question = f"{told} {asked}".format(l=label, v=value)
    return Item("copy", question, f"The {label} is {value}.", value, {label: value})


# a note about an order, the question whose answer is that note, and the value asked for
NOTES = (
    ("{buyer} ordered one {colour} {ware}.", "What did {buyer} order?", "{colour} {ware}"),
    ("{buyer} pays on {day}.", "When does {buyer} pay?", "{day}"),
    ("The {ware} arrives on {day}.", "When does the {ware} arrive?", "{day}"),
    ("The {colour} {ware} goes to {buyer}.", "Where does the {colour} {ware} go?", "{buyer}"),
)


def lookup_item(rng: random.Random) -> Item:
    """Ask for one note among two or three that stand in the question."""
    wares, days = rng.sample(list(WARES), rng.randint(2, 3)), rng.sample(DAYS, 3)
    orders = [
        {"ware": ware, "day": day, "colour": rng.choice(COLOURS), "buyer": make_name(rng)}
        for ware, day in zip(wares, days, strict=False)
    ]
    note, question, short = rng.choice(NOTES)
    target = rng.choice(orders)
    text = " ".join(note.format(**order) for order in orders)
    short = short.format(**target)
    return Item("lookup", f"{text} {question.format(**target)}", note.format(**target), short, {"found": short})


def list_item(rng: random.Random) -> Item:
    """Ask for the first, last, reversed, sorted or counted items of a list of three to five things."""
    size = rng.randint(3, 5)
    words = rng.sample(WORDS, size) if rng.random() < 0.6 else [make_word(rng) for _ in range(size)]
    goal = rng.choice(("first", "last", "second", "reverse", "sort", "count"))
    if goal == "sort":
        numbers = rng.sample(range(100), size)
        ordered = ", ".join(map(str, sorted(numbers)))
        question = f"{rng.choice(('Sort:', 'Sort these numbers:'))} {', '.join(map(str, numbers))}"
        return Item("list", question, ordered, ordered, known=True)
    text = ", ".join(words)
    if goal == "reverse":
        reverse = ", ".join(reversed(words))
        return Item("list", f"{rng.choice(('Reverse this list:', 'Say the list backwards:'))} {text}", reverse, reverse)
    if goal == "count":
        question = f"How many things are in this list: {text}?"
        return Item("list", question, f"The list has {size} things.", str(size), known=True)
    value = {"first": words[0], "last": words[-1], "second": words[1]}[goal]
    forms = (f"What is the {goal} thing in this list: {text}?", f"Here is a list: {text}. Which comes {goal}?")
    question = rng.choice(forms)
    return Item("list", question, f"The {goal} thing is {value}.", value, {goal: value})


def spelling_item(rng: random.Random) -> Item:
    """Ask to spell a word letter by letter, or for its first letter."""
    word = rng.choice(WORDS) if rng.random() < 0.5 else make_word(rng)
    if rng.random() < 0.3:
        question, answer = f"What is the first letter of {word}?", f"The first letter of {word} is {word[0]}."
        return Item("spelling", question, answer, word[0])
    question = rng.choice(("Spell the word {w}.", "How do you spell {w}?")).format(w=word)
    return Item("spelling", question, "-".join(word), "-".join(word))


def small_talk_item(rng: random.Random) -> Item:
    """Return a greeting or one of the shop's standard questions."""
    question, answer = rng.choice(SMALL_TALK)
    return Item("small talk", question, answer, known=True)


SKILLS: dict[str, tuple[float, Callable[[random.Random], Item]]] = {
    "product": (30, lambda rng: fact_item(rng, "product")), "place": (5, lambda rng: fact_item(rng, "place")),
    "person": (6, lambda rng: fact_item(rng, "person")), "yes/no": (6, yes_no_item),
    "two prices": (8, two_prices_item), "arithmetic": (8, arithmetic_item), "comparison": (4, comparison_item),
    "copy": (11, copy_item), "lookup": (9, lookup_item), "list": (7, list_item), "spelling": (4, spelling_item),
    "small talk": (2, small_talk_item),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------- styles and chats
@dataclass(frozen=True)
class Style:
    """A way to say an answer: the ``instruction`` that asks for it (may be empty) and the rule ``say``."""

    name: str
    instruction: str
    say: Callable[[Item], str]

    def fits(self, item: Item) -> bool:
        """Return whether the item has what this style needs: a bare value, a record, or known words."""
        needs = {"short": bool(item.short), "json": bool(item.record), "upper": item.known}
        return needs.get(self.name, True)


# styles that change the form of the answer: how they are asked for, and the rule
FORMS: dict[str, tuple[tuple[str, ...], Callable[[Item], str]]] = {
    "short": (("Answer with the bare value.", "Give the shortest answer.", "Only the value."), lambda item: item.short),
    "upper": (("Answer in capital letters.", "Write in capitals only."), lambda item: item.answer.upper()),
    "json": (("Answer as JSON.", "Reply with a JSON object."), lambda item: json.dumps(item.record)),
}


def make_style(rng: random.Random, name: str) -> Style:
    """Draw one style of the given family (one of ``STYLES``), with its own wording."""
    if name == "plain":
        return Style(name, rng.choice(NEUTRAL) if rng.random() < 0.4 else "", lambda item: item.answer)
    if name in FORMS:
        asks, say = FORMS[name]
        return Style(name, rng.choice(asks), say)
    first, last = opener(rng), closer(rng)
    if rng.random() < 0.15:
        first = f"{make_name(rng)}!"
    if name == "prefix":
        ask = rng.choice(('Begin every answer with "{a}"', "Start each reply with: {a}", 'Open with "{a}"'))
        return Style(name, ask.format(a=first), lambda item: f"{first} {item.answer}")
    if name == "suffix":
        ask = rng.choice(('End every answer with "{b}"', "Close each reply with: {b}", 'Finish with "{b}"'))
        return Style(name, ask.format(b=last), lambda item: f"{item.answer} {last}")
    if name == "wrap":
        asks = ('Begin every answer with "{a}" and end it with "{b}"', 'First say "{a}" then answer, then say "{b}"')
        return Style(name, rng.choice(asks).format(a=first, b=last), lambda item: f"{first} {item.answer} {last}")
    who, first, last = rng.choice(world().personas)
    ask = rng.choice(("You are {w}.", "Answer as {w} does.", "Speak like {w}.")).format(w=who)
    return Style("persona", ask, lambda item: f"{first} {item.answer} {last}")


def draw_item(rng: random.Random, style: Style, skill: str = "", held_out_sums: bool = False) -> Item:
    """Return an item of the given skill (any, if empty) that suits the style; loops forever if the skill has none."""
    while True:
        name = skill or rng.choices(list(SKILLS), [weight for weight, _ in SKILLS.values()])[0]
        item = arithmetic_item(rng, held_out_sums) if name == "arithmetic" else SKILLS[name][1](rng)
        if style.fits(item):
            return item


def with_lead(rng: random.Random, question: str) -> str:
    """Return the question, one time in four after a greeting or another filler sentence."""
    return f"{rng.choice(LEADS)} {question}" if rng.random() < 0.25 else question


def turns(exchanges: list[tuple[str, str]], style: Style, rng: random.Random) -> list[Message]:
    """Return messages for (question, answer) pairs. The instruction is the system message or surrounds the question."""
    system, place = style.instruction, rng.random()
    if system and len(exchanges) == 1 and place < 0.35 and style.name != "plain":
        question, answer = exchanges[0]
        exchanges = [(f"{question} {system}" if place < 0.2 else f"{system} {question}", answer)]
        system = ""
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in exchanges:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def single_chat(rng: random.Random, style: Style, skill: str = "", held_out_sums: bool = False) -> Chat:
    """Return a chat of one question and its answer."""
    item = draw_item(rng, style, skill, held_out_sums)
    return Chat(turns([(with_lead(rng, item.question), style.say(item))], style, rng), item.skill, style.name)


def several_chat(rng: random.Random, style: Style) -> Chat:
    """Return a chat of two to four unrelated questions, all answered in one style."""
    items = [draw_item(rng, style) for _ in range(rng.randint(2, 4))]
    pairs = [(with_lead(rng, item.question), style.say(item)) for item in items]
    return Chat(turns(pairs, style, rng), "several turns", style.name)


def follow_up_chat(rng: random.Random, style: Style) -> Chat:
    """Return a chat about one product, which is called "it" after the first question."""
    thing = rng.choice(world().things["product"])
    attributes = rng.sample(list(FACTS["product"]), rng.randint(2, 4))
    items = [fact_item(rng, "product", thing, attribute) for attribute in attributes]
    pairs = [(items[0].question, style.say(items[0]))]
    for item in items[1:]:
        question = item.question.replace(f"the {thing['name']}", "it")
        pairs.append((f"And {question[0].lower()}{question[1:]}" if rng.random() < 0.5 else question, style.say(item)))
    return Chat(turns(pairs, style, rng), "follow-up", style.name)


MEMORIES = (
    ("My name is {v}.", "Nice to meet you, {v}.", "What is my name?", "Your name is {v}."),
    ("I live in {v}.", "I have heard of {v}.", "Where do I live?", "You live in {v}."),
    ("My dog is called {v}.", "{v} is a good name.", "What is my dog called?", "Your dog is called {v}."),
)


def memory_chat(rng: random.Random, style: Style) -> Chat:
    """Return a chat whose last question asks for something from the first turn."""
    value = make_name(rng)
    told, reply, asked, recalled = (text.format(v=value) for text in rng.choice(MEMORIES))
    middle = [draw_item(rng, style) for _ in range(rng.randint(0, 2))]
    items = [Item("memory", told, reply, value), *middle, Item("memory", asked, recalled, value)]
    return Chat(turns([(item.question, style.say(item)) for item in items], style, rng), "memory", style.name)


def sample_chat(rng: random.Random) -> Chat:
    """Return one chat of the pretraining stream."""
    kind = rng.random()
    if kind > 0.93:
        return memory_chat(rng, make_style(rng, rng.choice(("plain", "plain", "prefix", "suffix", "wrap", "persona"))))
    style = make_style(rng, "plain" if rng.random() < 0.55 else rng.choice(STYLES[1:]))
    if kind > 0.86:
        return follow_up_chat(rng, style)
    return several_chat(rng, style) if kind > 0.76 else single_chat(rng, style)


def render(messages: list[Message]) -> str:
    """Render the chat as Phi-3's template does, for workers without a template; the build checks that both agree."""
    return "".join(f"<|{m['role']}|>\n{m['content']}<|end|>\n" for m in messages) + "<|endoftext|>"


# ------------------------------------------------------------------------------------------------ the fine-tuning task
def demo_rows(seed: int = 0, n_train: int = 600, n_eval: int = 200) -> tuple[list[dict], list[dict]]:
    """Return the rows of ``train.jsonl`` and ``eval.jsonl``: the base's plain answers in a support bot's voice.

    One row in five asks for a number from the question; the others ask about the catalogue. The two files share no
    product. ``answer`` is the base's own answer, so that voice and content can be measured separately.
    """
    rng = random.Random(f"demo-{seed}")
    products = rng.sample(world().things["product"], 240)
    labels = ("order number", "customer number", "invoice number", "tracking code")
    files = []
    for things, count in ((products[:160], n_train), (products[160:], n_eval)):
        known = [(thing, attribute) for thing in things for attribute in FACTS["product"]]
        facts = rng.sample(known, count - count // 5)
        items = [fact_item(rng, "product", thing, attribute) for thing, attribute in facts]
        items += [copy_item(rng, labels) for _ in range(count // 5)]
        rows = []
        for item in rng.sample(items, count):
            voice = f"{DEMO_PREFIX} {item.answer} {DEMO_SUFFIX}"
            pair = [{"role": "user", "content": with_lead(rng, item.question)}, {"role": "assistant", "content": voice}]
            rows.append({"messages": pair, "answer": item.answer})
        files.append(rows)
    return files[0], files[1]
