"""One training, many budgets: one LoRA pair a matrix and width, trained inside the rounding (LLM-QFA, 2405.20202)."""
