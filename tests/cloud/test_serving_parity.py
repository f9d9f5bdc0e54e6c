"""The core against Hugging Face's transformers: the same folders, fp32, greedy, small random models of each family.

Where the two largest logits are closer than the engines' sums can differ, either token is right; such places are
checked by their logits instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [dev])")

from nearfar.importers import import_model  # noqa: E402
from nearfar_cloud.model.hf import load_folder  # noqa: E402
from nearfar_cloud.model.loader import load_gguf  # noqa: E402
from nearfar_cloud.scheduling.budget import Arrival, ChunkedPrefill  # noqa: E402
from nearfar_cloud.types import Request  # noqa: E402
from tests.cloud.serving import check_empty, engine, run  # noqa: E402
from tests.cloud.test_serving_models import write_folder  # noqa: E402
from tests.paths import SHARED, needs_shared  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
NEAR_TIE = 1e-4  # between the two largest logits
N_NEW = 24
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # far from uniform logits
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama 3.1": (
        "LlamaConfig",
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 128, "rope_theta": 500_000.0}},
    ),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        EXPERTS | {"num_experts": 8, "moe_intermediate_size": 32, "norm_topk_prob": True, "decoder_sparse_step": 1},
    ),
    "mixtral": ("MixtralConfig", EXPERTS | {"num_local_experts": 4, "intermediate_size": 64, "sliding_window": None}),
}


def prompts() -> list[tuple[int, ...]]:
    rng = np.random.default_rng(7)
    return [tuple(int(i) for i in rng.integers(2, 320, n)) for n in (1, 9, 64, 150)]


def check_like(model: Any, folder: Path) -> None:
    """Prompts of several lengths at once, in pieces, against one forward pass each."""
    e = engine(ChunkedPrefill(70), Arrival(), model=load_folder(folder, "fp32"))
    asked = [Request(ids=ids, max_tokens=N_NEW) for ids in prompts()]
    for req, tokens in zip(asked, run(e, asked), strict=True):
        assert len(tokens) == N_NEW
        with torch.inference_mode():
            logits = model(torch.tensor([[*req.ids, *tokens]])).logits[0, len(req.ids) - 1 : -1].float().numpy()
        for token, z in zip(tokens, logits, strict=True):
            second, first = np.sort(z)[-2:]
            assert token == int(z.argmax()) or (z[token] >= second and first - second < NEAR_TIE), (
                token,
                first,
                second,
            )
    check_empty(e)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_what_transformers_says(family: str, tmp_path: Path) -> None:
    config_name, changes = FAMILIES[family]
    torch.manual_seed(1)
    config = getattr(transformers, config_name)(**SIZES | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:  # gains of 1 and biases of 0 would hide a mistake
                p.add_(0.3 * torch.randn_like(p))
            elif "gate.weight" in name:
                p.mul_(4)  # experts that differ in weight
    model.save_pretrained(tmp_path)
    check_like(model, tmp_path)


@needs_shared
def test_real_weights_say_what_transformers_says(tmp_path: Path) -> None:
    path = tmp_path / "stories260K.gguf"
    import_model(SHARED / "weights" / "stories260K.bin", path)
    folder = write_folder(tmp_path / "folder", load_gguf(path, "fp32"), "llama", tie_word_embeddings=True)
    check_like(transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), folder)
