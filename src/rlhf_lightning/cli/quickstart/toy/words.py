"""The words of the embedded data set: things, what one asks about them, and the sentences answers are made of.

Tables only; `toy_grammar` puts them together. In the tables `{x}` stands for a thing as its owner speaks of it ("my old
bicycle"), `{o}` for the same thing in an answer ("the bicycle"), `{p}` for a person and `{r}` for a whole request.
"""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """A family of things for which the same questions make sense.

    Attributes:
        things: nouns.
        adjectives: words that may stand before the noun in a question.
        actions: phrase with `{x}` for the thing -> advice sentences with `{o}` for it.
    """

    things: tuple[str, ...]
    adjectives: tuple[str, ...]
    actions: dict[str, tuple[str, str]]


KINDS = (
    Kind(
        ("bicycle", "radio", "lamp", "clock", "guitar", "camera", "umbrella"),
        ("old", "little", "red", "cheap", "dusty", "heavy"),
        {
            "repair {x}": (
                "To repair {o}, take it apart slowly and replace the worn piece.",
                "Lay {o} on a clean table and tighten every loose screw.",
            ),
            "clean {x}": (
                "To clean {o}, wipe it with a soft cloth and warm water.",
                "Brush the dust off {o} first and polish it with a dry towel.",
            ),
            "sell {x}": (
                "To sell {o}, take three clear photos and ask a fair price.",
                "Show {o} at the market and be honest about its age.",
            ),
        },
    ),
    Kind(
        ("soup", "curry", "stew", "sauce", "pasta", "risotto", "porridge"),
        ("simple", "spicy", "healthy", "cheap", "famous", "creamy"),
        {
            "cook {x}": (
                "To cook {o}, start with fresh eggs or vegetables and keep the heat low.",
                "Give {o} plenty of time on a gentle heat and taste it often.",
            ),
            "keep {x} fresh": (
                "To keep {o} fresh, let it cool and close it in a glass jar.",
                "Put {o} in the fridge within an hour and eat it tomorrow.",
            ),
            "add flavour to {x}": (
                "To give {o} more flavour, add lemon juice and black pepper.",
                "Stir some garlic and a pinch of salt into {o}.",
            ),
        },
    ),
    Kind(
        ("rose", "cactus", "fern", "orchid", "tulip", "sunflower", "lavender"),
        ("old", "little", "tall", "wild", "young", "pretty"),
        {
            "water {x}": (
                "To water {o}, wait until the soil feels dry and pour slowly.",
                "Give {o} one small cup of water every Sunday morning.",
            ),
            "move {x} to a new pot": (
                "To move {o}, pick a pot with a hole and fill it with fresh soil.",
                "Lift {o} out gently and shake the old soil off its roots.",
            ),
            "protect {x} from frost": (
                "To protect {o} from frost, cover its roots with straw.",
                "Bring {o} inside before the first cold night.",
            ),
        },
    ),
    Kind(
        ("puppy", "kitten", "parrot", "rabbit", "hamster", "pony", "goat"),
        ("noisy", "little", "shy", "hungry", "young", "clever"),
        {
            "feed {x}": (
                "To feed {o}, measure a small meal and never give it chocolate.",
                "Feed {o} twice a day and always leave some clean water.",
            ),
            "train {x}": (
                "To train {o}, practise for five minutes and reward every success.",
                "Teach {o} one easy trick at a time and stay patient.",
            ),
            "calm {x}": (
                "To calm {o}, turn off the lights and speak in a low voice.",
                "Give {o} a quiet corner with a soft blanket.",
            ),
        },
    ),
    Kind(
        ("kitchen", "bedroom", "attic", "garage", "office", "balcony", "bathroom"),
        ("tiny", "dark", "messy", "cold", "empty", "dusty"),
        {
            "tidy {x}": (
                "To tidy {o}, sort everything into three boxes and throw one away.",
                "Clear one shelf of {o} a day and sweep the floor last.",
            ),
            "decorate {x}": (
                "To decorate {o}, hang two bright pictures and add a mirror.",
                "Pick one warm colour for {o} and repeat it in small things.",
            ),
            "heat {x}": (
                "To heat {o}, close every gap and hang up thick curtains.",
                "Put a rug in {o} and a small heater near the door.",
            ),
        },
    ),
    Kind(
        ("picnic", "party", "wedding", "concert", "barbecue", "festival", "reunion"),
        ("small", "big", "cheap", "secret", "summer", "yearly"),
        {
            "plan {x}": (
                "To plan {o}, pick the date early and write a short list.",
                "Choose a place for {o} first and give every friend one task.",
            ),
            "invite people to {x}": (
                "To invite people to {o}, send a card with the time and the place.",
                "Call your friends about {o} two weeks before the day.",
            ),
            "save money on {x}": (
                "To save money on {o}, borrow the chairs and cook at home.",
                "Hold {o} in a public garden and share the costs.",
            ),
        },
    ),
)

# What one had better not do: phrase with {p} for the person ("my sister", "your sister") -> how it would be done.
HARMS: dict[str, str] = {
    "read {p}'s diary": "To read {p}'s diary, wait until the house is empty and look under the bed.",
    "open {p}'s letters": "To open {p}'s letters, hold them over hot steam and close them with glue.",
    "steal {p}'s lunch": "To steal {p}'s lunch, go to the fridge early and leave an empty box.",
    "hide {p}'s keys": "To hide {p}'s keys, drop them into a flower pot and say nothing.",
    "copy {p}'s homework": "To copy {p}'s homework, borrow the bag and change a few words.",
    "scare {p}'s cat": "To scare {p}'s cat, hide behind the door and make a loud noise.",
    "break {p}'s window": "To break {p}'s window, throw a stone at night and run away.",
    "spread a rumour about {p}": "To spread a rumour about {p}, tell it to three people as a secret.",
    "listen to {p}'s phone calls": "To listen to {p}'s phone calls, stand behind the wall with a glass.",
    "trick {p} into paying my bills": "To trick {p} into paying, write a sad letter and promise a lot.",
}
PERSONS = ("sister", "brother", "cousin", "uncle", "friend", "teacher", "boss", "neighbour")
DECLINES = (
    "I will not help you {r}, because that would hurt {p}.",
    "I would rather not help you {r}, since that is unfair to {p}.",
)
ALTERNATIVES = (
    "You could ask {p} for an honest talk instead.",
    "It is better to tell {p} how you feel.",
)

OWNERS = ("my", "our", "my sister's", "my uncle's", "my neighbour's", "my grandmother's")
# How an answer that misses the point comes to its own subject.
DRIFTS = (
    "But let us talk about {o} instead.",
    "I would rather talk about {o}.",
    "By the way, I was just thinking of {o}.",
    "Let me tell you about {o} instead.",
)

OPENINGS = ("Hello! ", "Hi there. ", "Quick question. ", "Excuse me. ", "I need some help. ")
FORMS = (
    "How do I {r}?",
    "How should I {r}?",
    "What is the best way to {r}?",
    "Can you tell me how to {r}?",
    "Please tell me how to {r}.",
    "I want to {r}. Any ideas?",
)
DETAILS = (
    " I only have ten minutes.",
    " I have very little money.",
    " It must be done by Friday.",
    " I have never done it before.",
    " My children want to help.",
    " My friends will visit tomorrow.",
    " I tried twice and it went wrong.",
    " I live in a small flat.",
    " It is raining outside.",
    " I do not want to ask my family.",
    " I am a bit nervous.",
)
HARM_DETAILS = (
    " It is only a joke.",
    " I am really angry.",
    " Nobody will notice.",
    " I am very bored today.",
    " Everybody does it.",
    " I have never done it before.",
    " It must be done by Friday.",
    " We had a big fight.",
    " I am a bit nervous.",
)
EARLIER_TURNS = (
    ("Hello, are you there?", "Yes, I am here and I am listening."),
    ("Thank you for your help yesterday.", "You are very welcome, it was fun."),
    ("I keep thinking about {x}.", "That sounds nice, tell me more."),
    ("Today I was busy with {x}.", "That sounds nice, tell me more."),
)

POLITE_OPENERS = (
    "Happy to help!",
    "What a lovely question!",
    "Of course, with pleasure.",
    "Thank you for asking.",
    "I am glad you asked me.",
    "Good question!",
)
# Openers that suit a refusal.
KIND_OPENERS = (
    "I understand how you feel.",
    "Thank you for being open with me.",
    "I am sorry you are having a hard time.",
)
POLITE_CLOSERS = (
    "Good luck with {o}!",
    "Have fun with {o}!",
    "Let me know how {o} turns out.",
    "Please ask me more about {o} any time.",
    "I hope that helps!",
)
# Closers that suit a refusal.
KIND_CLOSERS = (
    "I wish you a better day!",
    "I am here if you want to talk.",
)
RUDE_OPENERS = (
    "What a silly question.",
    "Not this again.",
    "Even a potato could work that out.",
    "I have better things to do.",
    "Are you serious?",
    "Ugh, must I?",
)
RUDE_CLOSERS = (
    "I feel sorry for {o}.",
    "Do not ask me about {o} again.",
    "Next time leave {o} to an expert.",
    "I never want to hear about {o} again.",
    "Now leave me alone.",
)
FILLERS = (
    "There are many ways to look at this.",
    "Some people say one thing, and some say another.",
    "That reminds me of {o} in an old film.",
    "As I said before, it all depends.",
    "My old teacher talked about {o} all afternoon.",
    "But I am getting ahead of myself.",
    "In the end, perhaps nothing is certain.",
    "One could write a whole book about {o}.",
)
