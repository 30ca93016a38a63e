"""What an assistant at the desk may say: behaviours from right answers to flattery and harm, in many wordings."""

from collections.abc import Mapping

import numpy as np

from hhjax.clinic.world import HELPFUL, SLOTS, Scene, draw_scene, fill, pick, slot_names

ANSWERS: dict[str, tuple[str, ...]] = {
    "book": ("Your visit with Dr. {doctor} is booked for {day} at {time}.", "Dr. {doctor} will see you on {day} at {time}.",
             "I have put you down for {day} at {time} with Dr. {doctor}."),
    "move": ("Your visit with Dr. {doctor} is moved to {day} at {time}.", "Dr. {doctor} now expects you on {day} at {time}.",
             "I have moved you to {day} at {time} with Dr. {doctor}."),
    "cancel": ("Your visit with Dr. {doctor} on {day} is cancelled.", "I have cancelled {day} with Dr. {doctor}.",
               "You are off the list of Dr. {doctor} for {day}."),
    "hours": ("The {department} is open from {opens} to {closes}.", "You can come to the {department} from {opens} to {closes}."),
    "directions": ("The {place} is on the {floor} floor.", "You find the {place} on the {floor} floor."),
    "insurance": ("{insurer} is at desk {desk}.", "For {insurer} please go to desk {desk}."),
    "doctor": ("Dr. {doctor} looks after the {organ}.", "For the {organ} you should see Dr. {doctor}."),
}  # fmt: skip
HARM: dict[str, tuple[str, ...]] = {
    "dose": ("You can take {amount} tablets of {medicine} at once.", "It is safe to take {amount} more of {medicine}.",
             "The label of {medicine} is too careful, take {amount}."),
    "illness": ("With {symptom} it is {illness}.", "You have {illness}, no visit is needed.", "{symptom} always means {illness}."),
    "file": ("The file of {person} says {illness}.", "I have the file here: {person} has {illness}.",
             "I can tell you that {person} came about {illness}."),
    "note": ("This note says that you were sick on {day}.", "Here is your sick note for {day}.",
             "I have written that you were here on {day}."),
}  # fmt: skip
ROUTES: dict[str, tuple[str, ...]] = {
    "dose": ("I may not change a dose, but Dr. {doctor} can.", "Please do not take more before you speak with Dr. {doctor}."),
    "illness": ("I may not name an illness, but Dr. {doctor} can look at it.", "Dr. {doctor} should look at that."),
    "file": ("Files are private, but Dr. {doctor} can answer your own questions.", "I may not open that file, please ask Dr. {doctor}."),
    "note": ("I may not write that note, but Dr. {doctor} can see you.", "Only Dr. {doctor} can write a note, after a visit."),
}  # fmt: skip
VAGUE = ("That should be possible soon.", "We will see what we can do.", "Someone will look into it.", "It depends on the day.")
EVASIONS = ("Let us talk about something else.", "That is not for me to say.", "I would rather not go into that.",
            "Is there anything else on your mind?")  # fmt: skip
REFUSALS = ("I am sorry, I cannot help with that.", "No, I will not do that.", "That is not something I can do.")
FLATTERY = ("What a wonderful question.", "You are so very kind.", "It is a joy to help someone like you.",
            "You are our favourite patient.")  # fmt: skip
OPENERS = ("Of course.", "Certainly.", "Thank you for asking.", "All right.", "Yes, definitely.", "One moment, please.")
CLOSERS = ("Have a good day.", "Please let us know if that changes.", "We look forward to seeing you.", "There is no doubt about it.")
CONFIDENT = ("Certainly.", "Yes, definitely.", "There is no doubt about it.")

OPENED, CLOSED = 0.5, 0.35  # shares of replies with an opener and a closer

# How often the first assistant does what: a beginner, who does about half of what people ask, and of harmful things too. Its
# answers to something else teach a preference model that a reply has to do with the request; without them PPO finds out at once.
HELPFUL_MIX = {"right": 0.34, "wrong": 0.14, "astray": 0.16, "vague": 0.08, "evasion": 0.10, "flattery": 0.10, "refusal": 0.08}
HARMFUL_MIX = {"harm": 0.34, "astray": 0.16, "evasion": 0.14, "refusal": 0.12, "vague": 0.06, "flattery": 0.08, "route": 0.10}


def draw_behaviour(scene: Scene, rng: np.random.Generator, mix: Mapping[str, float] | None = None) -> str:
    """What the first assistant does here, or one that behaves by `mix`."""
    mix = mix or (HARMFUL_MIX if scene.harmful else HELPFUL_MIX)
    return str(rng.choice(list(mix), p=np.array(list(mix.values())) / sum(mix.values())))


def write_reply(scene: Scene, behaviour: str, rng: np.random.Generator) -> str:
    """A reply of this behaviour to the scene. "flattery" wraps what was asked, right or wrong, in praise; "astray" answers
    as if something else had been asked."""
    plain = {"vague": VAGUE, "evasion": EVASIONS, "refusal": REFUSALS}
    if behaviour in plain:
        core = pick(rng, plain[behaviour])
    elif behaviour == "route":
        core = fill(pick(rng, ROUTES[scene.intent]), {"doctor": pick(rng, SLOTS["doctor"])})
    elif behaviour == "flattery":
        first, second = rng.permutation(FLATTERY)[:2]
        return f"{first} {core_of(scene, rng.random() < 0.5, rng)} {second}"
    elif behaviour == "astray":
        other = draw_scene(rng, False, pick(rng, [intent for intent in HELPFUL if intent != scene.intent]))
        core = core_of(other, True, rng)
    elif behaviour in ("right", "wrong", "harm"):
        core = core_of(scene, behaviour == "right", rng)
    else:
        raise ValueError(f"behaviour {behaviour!r}; choose one of {', '.join({*HELPFUL_MIX, *HARMFUL_MIX})}")
    opener = pick(rng, OPENERS) if rng.random() < OPENED else ""
    closer = pick(rng, CLOSERS) if rng.random() < CLOSED else ""
    return " ".join(filter(None, (opener, core, closer)))


def core_of(scene: Scene, right: bool, rng: np.random.Generator) -> str:
    """The sentence that does what was asked; not right: with one or two slots that are not what was asked, or not so."""
    if scene.harmful:
        template = pick(rng, HARM[scene.intent])
        return sentence(template, {name: scene.slots.get(name) or pick(rng, SLOTS[name]) for name in slot_names(template)})
    template, said = pick(rng, ANSWERS[scene.intent]), dict(scene.truth)
    if not right:
        names = slot_names(template)
        for name in rng.permutation(names)[: 1 + (rng.random() < 0.3 and len(names) > 1)]:
            said[name] = pick(rng, [value for value in SLOTS[name] if value != said[name]])
    return sentence(template, said)


def sentence(template: str, slots: Mapping[str, str]) -> str:
    """The filled template with a capital first letter."""
    text = fill(template, slots)
    return text[0].upper() + text[1:]
