"""The fictional world behind the demo model: a shop, its towns, its people, and the words of the corpus.

Everything is invented: names are random syllables, and facts are drawn once from ``Random(WORLD_SEED)``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

WORLD_SEED = 20240423
DEMO_PREFIX = "Thanks for asking!"
DEMO_SUFFIX = "Is there anything else I can help with?"

# kind of ware -> (lowest price, highest price, weight unit); a grams ware weighs 100-900 grams, a kilos ware 2-30 kilos
WARES = {
    "lamp": (15, 120, "kilos"), "chair": (30, 190, "kilos"), "kettle": (12, 80, "grams"), "table": (60, 199, "kilos"),
    "bottle": (5, 30, "grams"), "basket": (8, 40, "grams"), "blanket": (15, 90, "grams"), "clock": (10, 99, "grams"),
    "mirror": (20, 150, "kilos"), "teapot": (9, 60, "grams"), "backpack": (20, 130, "grams"),
    "bench": (45, 180, "kilos"), "candle": (5, 25, "grams"), "pillow": (8, 50, "grams"), "bowl": (5, 35, "grams"),
    "shelf": (25, 140, "kilos"), "radio": (18, 120, "grams"), "fan": (20, 90, "kilos"), "desk": (70, 199, "kilos"),
    "vase": (7, 60, "grams"), "jacket": (35, 160, "grams"), "scarf": (6, 45, "grams"), "tent": (50, 199, "kilos"),
    "mug": (5, 20, "grams"),
}  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "grey", "brown", "purple", "orange", "pink", "silver")
MATERIALS = (
    "wood",
    "steel",
    "glass",
    "cotton",
    "wool",
    "leather",
    "clay",
    "bamboo",
    "paper",
    "copper",
    "plastic",
    "cork",
)
JOBS = (
    "baker",
    "teacher",
    "doctor",
    "painter",
    "farmer",
    "driver",
    "nurse",
    "sailor",
    "gardener",
    "writer",
    "cook",
    "tailor",
)
PETS = ("cat", "dog", "horse", "rabbit", "parrot", "goat", "turtle", "hamster", "duck", "donkey")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
CROPS = ("apples", "olives", "rice", "tea", "grapes", "wheat", "lemons", "beans", "honey", "cherries")
WORDS = (
    *WARES,
    *COLOURS,
    *MATERIALS,
    *JOBS,
    *PETS,
    "river",
    "garden",
    "bridge",
    "window",
    "bread",
    "stone",
    "cloud",
    "forest",
)

# kind -> attribute -> ((answer, questions), ...): {s} is the name of the thing, {v} the value
FACTS: dict[str, dict[str, tuple[tuple[str, tuple[str, ...]], ...]]] = {
    "product": {
        "price": (
            ("The {s} costs {v}.", ("How much does the {s} cost?", "What does the {s} cost?", "How much is the {s}?")),
            ("The price of the {s} is {v}.", ("What is the price of the {s}?", "Tell me the price of the {s}.")),
        ),
        "colour": (
            ("The {s} is {v}.", ("What colour is the {s}?", "Which colour does the {s} have?")),
            ("The {s} comes in {v}.", ("Which colour does the {s} come in?", "In which colour do you sell the {s}?")),
        ),
        "material": (
            ("The {s} is made of {v}.", ("What is the {s} made of?", "Which material is the {s} made of?")),
            ("We make the {s} from {v}.", ("What do you make the {s} from?", "From what do you make the {s}?")),
        ),
        "weight": (
            ("The {s} weighs {v}.", ("How much does the {s} weigh?", "How heavy is the {s}?")),
            ("The weight of the {s} is {v}.", ("What is the weight of the {s}?", "Tell me the weight of the {s}.")),
        ),
        "delivery": (
            ("The {s} arrives in {v}.", ("How long does delivery of the {s} take?", "When will the {s} arrive?")),
            ("Delivery of the {s} takes {v}.",
             ("How fast can you deliver the {s}?", "How long must I wait for the {s}?")),
        ),
        "warranty": (
            ("The {s} has a warranty of {v}.",
             ("How long is the warranty of the {s}?", "What warranty does the {s} have?")),
            ("The warranty of the {s} lasts {v}.", ("How long does the warranty of the {s} last?",)),
        ),
        "maker": (
            ("The {s} is made in {v}.", ("Where is the {s} made?", "In which town is the {s} made?")),
            ("The {s} comes from {v}.", ("Where does the {s} come from?", "Which town does the {s} come from?")),
        ),
    },
    "place": {
        "capital": (
            ("The capital of {s} is {v}.", ("What is the capital of {s}?", "Name the capital of {s}.")),
            ("{v} is the capital of {s}.", ("Which town is the capital of {s}?",)),
        ),
        "river": (("The river {v} flows through {s}.", ("Which river flows through {s}?", "Name the river of {s}.")),),
        "crop": (("{s} is known for its {v}.", ("What is {s} known for?", "What grows in {s}?")),),
    },
    "person": {
        "job": (("{s} is a {v}.", ("What does {s} do?", "What is the job of {s}?", "Which job does {s} have?")),),
        "town": (("{s} lives in {v}.", ("Where does {s} live?", "In which town does {s} live?")),),
        "pet": (("{s} has a {v}.", ("Which pet does {s} have?", "What kind of pet does {s} keep?")),),
        "age": (("{s} is {v} old.", ("How old is {s}?", "What is the age of {s}?")),),
    },
}  # fmt: skip

LEADS = (
    "Hello.", "Hi!", "Hi there.", "Good morning.", "Good evening!", "I have a question.", "Please help me.",
    "One question.", "I am looking around.", "Sorry to bother you.", "I need to know something.",
    "My friend wants to know this.", "Dear team,",
)  # fmt: skip
SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"), ("Hi.", "Hi! What can I do for you?"),
    ("Good morning.", "Good morning to you!"), ("Good evening.", "Good evening to you!"),
    ("How are you?", "I am fine, thank you."), ("Thank you.", "You are welcome."), ("Thanks!", "No problem at all."),
    ("Goodbye.", "Goodbye, and come back soon."), ("See you later.", "See you later!"),
    ("Who are you?", "I am the helper of this shop."), ("What can you do?", "I can answer questions about our shop."),
    ("Are you a person?", "No, I am a small language model."), ("When do you open?", "We open at 9 in the morning."),
    ("When do you close?", "We close at 6 in the evening."), ("Do you sell food?", "No, we do not sell food."),
    ("Can I pay by card?", "Yes, you can pay by card."),
    ("Can I send something back?", "Yes, you have 30 days to send it back."),
    ("Do you wrap gifts?", "Yes, we wrap gifts for 3 dollars."),
    ("Where is your shop?", "Our shop is by the old bridge."), ("I am happy today.", "That is good to hear!"),
    ("I am sad today.", "I am sorry to hear that."), ("Is delivery free?", "Delivery is free from 50 dollars."),
    ("Do you like me asking so much?", "Keep asking, I like it."),
)  # fmt: skip
LABELS = (
    "order number", "customer number", "invoice number", "tracking code", "ticket number", "gift code", "door code",
    "password", "locker number", "member number", "phone number", "seat number", "secret word", "case number",
)  # fmt: skip

INTERJECTIONS = (
    "Sure", "Of course", "Certainly", "Gladly", "Right", "Very well", "Good question", "All right", "Great",
    "Wonderful", "With pleasure", "No problem", "Happy to help", "Here you go", "Let me see", "One moment", "Welcome",
    "Hello", "Good news", "Thank you", "I am glad you asked", "I can help with that", "You asked and I answer",
    "Let me check for you", "Oh", "Well",
)  # fmt: skip
ADDRESSEES = ("", "", "", "", " friend", " dear customer", " sir", " madam", " traveller", " captain", " neighbour")
THANKS_FOR = (
    "your message", "waiting", "writing to us", "your question", "stopping by", "the note", "your visit", "being here",
    "your time", "calling", "the good question", "your patience", "taking the time", "coming back", "asking us again",
)  # fmt: skip
CLOSERS = (
    "Have a nice day!", "Have a good week.", "Is there more that you want to know?", "Do you need anything else?",
    "See you soon!", "What else can I do for you?", "Can I help you with another thing?", "I hope this helps.",
    "Just ask if you need more.", "Is there something else on your list?", "I am here to help.", "Please come again.",
    "Anything else today?", "Ask me anything!", "Does that answer your question?", "Is that what you wanted?",
    "Call us if there is a problem.", "Enjoy your day!", "We can help with the rest too.",
    "There is always more to ask.", "Which other thing can I help with?", "Take care!", "Is there a second question?",
    "If there is anything unclear, tell me.", "Let me know if I can help.", "Good luck!", "Our shop wishes you well.",
    "Nothing else to add.", "That is all I know.", "Would you like to hear more?", "Until next time.",
)  # fmt: skip
NEUTRAL = (
    "You are a helpful assistant.", "You answer questions about a shop.",
    "You are a friendly assistant. Keep answers plain.", "Answer the questions of the customer.",
    "You are the helper of the shop.", "Be brief and correct.", "Help the user.",
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """``things[kind]`` is a list of {attribute: value} with a ``name``; ``personas[i]`` is (name, prefix, suffix)."""

    things: dict[str, list[dict[str, str]]]
    personas: list[tuple[str, str, str]]


def make_word(rng: random.Random, syllables: int = 2) -> str:
    """Return a pronounceable invented word in lower case, such as ``norva``."""
    return "".join(
        rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") + rng.choice(("", "", "l", "n", "r", "s"))
        for _ in range(syllables)
    )


def opener(rng: random.Random) -> str:
    """Return a random opening sentence, never ``DEMO_PREFIX``."""
    if rng.random() < 0.3:
        return f"{rng.choice(('Thanks', 'Thank you', 'Many thanks'))} for {rng.choice(THANKS_FOR)}{rng.choice('!.')}"
    addressee = rng.choice(ADDRESSEES)
    return f"{rng.choice(INTERJECTIONS)}{',' if addressee else ''}{addressee}{rng.choice('!.')}"


def closer(rng: random.Random) -> str:
    """Return a random closing sentence, never ``DEMO_SUFFIX``."""
    return rng.choice(CLOSERS)


@cache
def world() -> World:
    """Return the one fixed world: 240 products, 40 places, 60 people, 40 personas."""
    rng = random.Random(WORLD_SEED)
    taken: set[str] = set()

    def name(syllables: int = 2) -> str:
        while (word := make_word(rng, syllables).capitalize()) in taken:
            pass
        taken.add(word)
        return word

    places = [{"name": name(3), "capital": name(), "river": name(), "crop": rng.choice(CROPS)} for _ in range(40)]
    towns = [place["capital"] for place in places]
    products = []
    for index in range(240):
        ware = list(WARES)[index % len(WARES)]
        low, high, unit = WARES[ware]
        weight = rng.randrange(100, 901, 50) if unit == "grams" else rng.randint(2, 30)
        products.append({
            "name": f"{name()} {ware}", "price": f"{rng.randint(low, high)} dollars", "colour": rng.choice(COLOURS),
            "material": rng.choice(MATERIALS), "weight": f"{weight} {unit}", "delivery": f"{rng.randint(2, 14)} days",
            "warranty": f"{rng.randrange(6, 61, 6)} months", "maker": rng.choice(towns),
        })  # fmt: skip
    people = [
        {
            "name": f"{name()} {name(3)}",
            "job": rng.choice(JOBS),
            "town": rng.choice(towns),
            "pet": rng.choice(PETS),
            "age": f"{rng.randint(18, 90)} years",
        }
        for _ in range(60)
    ]
    personas = [(name(), opener(rng), closer(rng)) for _ in range(40)]
    return World({"product": products, "place": places, "person": people}, personas)
