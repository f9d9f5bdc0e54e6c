"""What a request in words needs of a model: its tokenizer, its chat form, grammars over its vocabulary."""

from __future__ import annotations

from collections.abc import Callable

from nearfar.tokenizer import Tokenizer
from nearfar_cloud.gateway.grammar import Grammars
from nearfar_cloud.gateway.prompts import ChatPrompts
from nearfar_cloud.gateway.served import Served


class Texts:
    """Of a model that reads text; upper layers alone do not."""

    def __init__(self, served: Served, tokenizer: Tokenizer, on_grammar: Callable[[str], None]) -> None:
        self.tokenizer = tokenizer
        self.grammars = Grammars(tokenizer, on_grammar)
        self.prompts = ChatPrompts(served.meta, tokenizer)
        longest = max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.n_vocab))
        self.most_bytes = longest * served.n_ctx  # of a prompt that could fit
