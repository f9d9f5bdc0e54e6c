"""Prompts that the shipped model can answer, written for this bench: requests at home, and openings of plain text."""

from __future__ import annotations

from nearfar.forms import home_prompt
from nearfar.home import demo_home
from nearfar.llm import Prompt

REQUESTS = (
    "turn off the kitchen lights in ten minutes",
    "make the bedroom lamp blue",
    "what is the temperature in the living room",
    "set the thermostat to twenty one degrees",
    "add oat milk and apples to the shopping list",
    "is the garage door open",
    "start a timer for twelve minutes called pasta",
    "dim the lights in the hall to thirty percent",
    "pause the music in the kitchen",
    "open the blinds in the office half way",
    "play some jazz in the living room",
    "send the vacuum back to its dock",
    "turn the volume down to twenty percent",
    "cancel the egg timer",
    "what will the weather be like",
    "lock the back door",
)
OPENINGS = (
    "Once upon a time there was a little girl who lived near the sea. One day she",
    "Tom had a red ball. He took it to the park, where",
    "The old man looked out of the window and saw that",
    "It was late in the evening when the two brothers came to the house, and",
    "Lily wanted to help her mother in the kitchen. She",
    "The wind blew all night, and in the morning",
    "A small bird sat on the fence. It was",
    "When the king heard this he was very glad, and he said",
)


def prompts(kind: str, n: int) -> list[Prompt]:
    """`n` of "home" or "text", from the beginning again where there are fewer."""
    if kind == "home":
        setting = demo_home().setting()
        return [home_prompt(setting, REQUESTS[i % len(REQUESTS)]) for i in range(n)]
    return [OPENINGS[i % len(OPENINGS)] for i in range(n)]
