"""Words that the generators draw from: rooms, things, fillers, numbers, and names that nobody has."""

from __future__ import annotations

import random


def listed(text: str) -> tuple[str, ...]:
    """`a|b c` as ("a", "b c")."""
    return tuple(text.split("|"))


# ---------------------------------------------------------------- names and numbers

_ONSETS = listed(
    "|b|bl|br|c|ch|cl|cr|d|dr|f|fl|fr|g|gl|gr|h|j|k|kl|kr|l|m|n|p|pl|pr|qu|r|s|sc|sh|sk|sl|sm|sn|sp|st|str|sw|t|th|tr|"
    "v|w|wh|y|z|b|d|f|g|h|k|l|l|m|m|n|n|p|r|r|s|s|t|t|v"
)
_VOWELS = listed("a|a|a|e|e|e|i|i|i|o|o|o|u|u|ai|ea|ee|ie|oa|oo|ou|y")
_CODAS = listed("b|ck|d|f|g|k|l|l|ld|ll|m|n|n|n|nd|ng|nt|p|r|r|rd|rk|rn|rt|s|s|sh|ss|st|t|t|th|x|z")
CODA_SHARE = 0.4
DIGITS = listed("zero|one|two|three|four|five|six|seven|eight|nine")
ONES = (*DIGITS, *listed("ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen"))
TENS = listed("zero|ten|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety")


def invented_word(rng: random.Random, n_syllables: int) -> str:
    """A word nobody knows, lower case, of so many syllables."""
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + (rng.choice(_CODAS) if rng.random() < CODA_SHARE else "")
        for _ in range(n_syllables)
    )


def invented_name(rng: random.Random) -> str:
    """A name nobody has: one word of two to four syllables, or two or three words of one to three."""
    n_words = rng.choice((1, 1, 2, 2, 3))
    syllables = (2, 2, 3, 4) if n_words == 1 else (1, 2, 2, 3)
    return " ".join(invented_word(rng, rng.choice(syllables)) for _ in range(n_words))


def number_words(n: int, rng: random.Random) -> str:
    """0..100 in words: `twenty five` or `twenty-five`."""
    if n < 20:
        return ONES[n]
    if n == 100:
        return rng.choice(("one hundred", "a hundred"))
    ten, one = divmod(n, 10)
    return TENS[ten] + (rng.choice((" ", "-")) + ONES[one] if one else "")


DAYS = listed("monday|tuesday|wednesday|thursday|friday|saturday|sunday")
MONTHS = listed("january|february|march|april|may|june|july|august|september|october|november|december")

# ---------------------------------------------------------------- the home

# The first dozen are what most homes have and are drawn as often as all others.
AREAS = listed(
    "kitchen|living room|bedroom|bathroom|garage|hallway|office|dining room|basement|garden|guest room|kids room|"
    "laundry room|pantry|study|library|porch|patio|attic|balcony|entrance|entryway|den|playroom|master bedroom|nursery|"
    "front yard|back yard|driveway|shed|workshop|studio|utility room|conservatory|sunroom|mudroom|gym|media room|"
    "wine cellar|greenhouse|terrace|loft|landing|cloakroom|stairwell|family room|breakfast room|music room|sewing room|"
    "barn|pool house|sauna|guest bathroom|front porch|closet|foyer|home office|lounge|bar|chapel|kitchenette|corridor|"
    "storage room"
)
N_COMMON_AREAS = 12
FLOORS = listed("upstairs|downstairs|first floor|second floor|ground floor|top floor|basement|third floor|attic")
NOUNS = {
    "light": listed(
        "light|lights|lamp|ceiling light|floor lamp|desk lamp|chandelier|spotlight|led strip|pendant|night light|"
        "bedside lamp|reading light|wall light|strip light|counter lights|main light|overhead light|mood light"
    ),
    "switch": listed(
        "outlet|plug|coffee maker|kettle|heater|fountain|string lights|pump|toaster|christmas tree|humidifier|charger"
    ),
    "fan": listed("fan|ceiling fan|extractor fan|tower fan|desk fan|ventilation|exhaust fan"),
    "cover": listed(
        "blinds|curtain|shade|shutter|awning|garage door|gate|window|left blind|roller blind|skylight|sliding door"
    ),
    "lock": listed("door|lock|front door|back door|side door|gate lock|patio door|cellar door"),
    "media_player": listed("tv|speaker|soundbar|radio|stereo|projector|record player|sonos|echo|music box"),
    "climate": listed("thermostat|air conditioner|heating|radiator|heat pump|climate control"),
    "vacuum": listed("vacuum|robot|roomba|sweeper|robot vacuum|hoover"),
    "valve": listed("water valve|sprinkler|irrigation valve|gas valve|drip line|garden tap"),
    "scene": listed(
        "movie night|party time|romantic|good night|morning|dinner|relax|bedtime|reading time|focus|sunset|cinema"
    ),
    "script": listed("stealth mode|goodbye|coffee routine|wake up|leave home|clean up|alarm test|start the day"),
    "input_boolean": listed("guest mode|vacation mode|away mode|night mode|holiday mode"),
    "sensor": listed("sensor|meter|probe|station|monitor|tracker|phone"),
    "binary_sensor": listed("sensor|detector|door|window|phone|pump|monitor"),
    "person": listed(
        "anna|ben|carla|david|ella|frank|grace|henry|iris|jack|karin|leo|mona|nils|olga|paul|rosa|sam|tina|victor"
    ),
    "weather": listed("berlin|london|oslo|new york|paris|tokyo|lisbon|home|prague|denver|madrid|sydney|vienna|dublin"),
    "todo": listed("groceries|chores|packing|work|to do|weekend|errands|gift ideas|garden jobs|reading"),
}
CLASS_NOUNS = {"garage": "garage door", "blind": "blinds", "curtain": "curtains", "shade": "shades"}

# ---------------------------------------------------------------- what people say

BEFORE = listed(
    "please |hey, |can you |could you |would you |ok, |um, |i'd like you to |hey |now |can you please |so |"
    "i want you to |uh |go ahead and "
)
AFTER = listed(" please| for me| now| thanks|, please| right now| will you| thank you")
# Commands for later as people say them, beside those that the templates give; {} is a name, an area or a number.
COMMANDS = {
    "area": listed(
        "turn {onoff} the {area} {things}|switch {onoff} the {area} {things}|turn the {area} {things} {onoff}|"
        "turn {onoff} all the {things} in the {area}|turn {onoff} the {things} in the {area}|"
        "turn {onoff} {area} {things}|close the blinds in the {area}|open the {area} blinds|"
        "set the {area} lights to {n} percent|dim the {area} lights|play some music in the {area}|"
        "set the {area} to {degrees} degrees|make the {area} lights {color}"
    ),
    "name": listed(
        "turn {onoff} the {name}|turn the {name} {onoff}|switch {onoff} {name}|turn {onoff} my {name}|start the {name}|"
        "close the {name}|open the {name}|lock the {name}|unlock the {name}|set the {name} to {n} percent|"
        "stop the {name}"
    ),
    "": listed(
        "turn {onoff} all the lights|turn {onoff} everything|turn {onoff} the {things}|lock all the doors|"
        "start the vacuum|pause the music|close all the blinds|remind me to call {name}|tell me the weather"
    ),
}
THINGS = listed("lights|lights|lights|light|fans|fan|lamps|lamp|heater|switches|tv|speakers|heating")
FOODS = listed(
    "milk|eggs|bread|butter|apples|rice|coffee|tea|oranges|soap|batteries|flour|cheese|onions|pasta|bananas|sugar"
)
MESSAGES = listed(
    "dinner is ready|the bus is here|time for bed|we leave in five minutes|breakfast is on the table|"
    "somebody is at the door|please come down|the movie starts now|your homework is due|lunch time"
)
ZONES = listed("home|work|school|gym|office|park|beach")
TIMER_NAMES = listed(
    "pizza|pasta|eggs|laundry|tea|bread|workout|nap|homework|cookies|rice|oven|break|meeting|bath|cake"
)
WORDS = listed(
    "apple|river|yellow|window|seven|garden|music|paper|orange|bridge|winter|summer|doctor|kitchen|pencil|mountain|"
    "island|candle|rocket|silver|turtle|ladder|basket|button|rabbit|planet|castle|forest|mirror|engine|butter|coffee|"
    "ticket|market"
)
