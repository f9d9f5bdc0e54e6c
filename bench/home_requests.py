"""Prompts for `nearfar calibrate --rows`: requests to homes, from templates that training has never seen.

python bench/home_requests.py DATA 600 > home.jsonl
nearfar calibrate nano.gguf --data DATA --rows home.jsonl -o calibrated.gguf
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nearfar import forms
from nearfar_cloud.training.homes import HomeGenerator

SEED = 7


def main() -> None:
    data, n = Path(sys.argv[1]), int(sys.argv[2])
    generator = HomeGenerator(data, SEED, "dev")
    for i in range(n):
        made, request, *_ = generator.example(i)
        parts = forms.home_prompt(made.setting(), request)
        print(json.dumps({"prompt": [[part.text, part.control] for part in parts]}, ensure_ascii=False))


if __name__ == "__main__":
    main()
