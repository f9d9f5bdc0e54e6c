"""One server in a process of its own, asked by JSON lines: what serving.py lets take turns.

    python bench/serving_peers.py PEER FOLDER FORM THREADS

The first line that it prints says that the model is loaded.  Then each line in, {"prompts": [[ids]], "new": n}, is one
batch: all prompts at once, `n` tokens greedily for each whatever they are; each line out is {"wall": s, "cpu": s}, the
CPU time of all processes of the group, for some servers have several.  Runs in the environment of its peer and imports
nothing of ours unless we are the peer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Serve = Callable[[list[list[int]], int], None]
MOST_SEQS, MOST_TOKENS = 64, 4096


def nearfar(folder: Path, form: str, threads: int) -> tuple[Serve, str]:
    import torch

    from nearfar_cloud.engine import Engine
    from nearfar_cloud.executors.local import LocalExecutor
    from nearfar_cloud.model.hf import load_folder
    from nearfar_cloud.model.packed import FORMS, pack_folder
    from nearfar_cloud.scheduling.budget import Arrival, ChunkedPrefill
    from nearfar_cloud.scheduling.compose import Composer
    from nearfar_cloud.types import Request

    torch.set_num_threads(threads)
    hf = folder / "hf"
    weights, _, kv = form.partition("/")  # w8, w8/int8
    model = pack_folder(hf, weights) if weights in FORMS else load_folder(hf, weights)
    executor = LocalExecutor(model, n_blocks=256, kv=kv or "auto")
    engine = Engine(executor, Composer((Arrival(), ChunkedPrefill(512))), prefix_cache=False)

    def serve(prompts: list[list[int]], n: int) -> None:
        for ids in prompts:
            engine.submit(Request(ids=tuple(ids), max_tokens=n))
        found = 0
        while found < n * len(prompts):
            for out in engine.step():
                assert not out.error, out.error
                found += len(out.ids)

    return serve, f"nearfar {form}, attention {executor.attention}"


def llama_cpp(folder: Path, form: str, threads: int) -> tuple[Serve, str]:
    import llama_cpp as lib
    import numpy as np

    lib.llama_backend_init()
    model_options = lib.llama_model_default_params()
    model = lib.llama_model_load_from_file(str(folder / f"{form}.gguf").encode(), model_options)
    options = lib.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = 16_384, MOST_TOKENS, 512, MOST_SEQS
    options.n_threads = options.n_threads_batch = threads
    options.kv_unified = True
    context = lib.llama_init_from_model(model, options)
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch = lib.llama_batch_init(MOST_TOKENS, 0, 1)

    def add(token: int, position: int, seq: int, wanted: bool) -> None:
        i = batch.n_tokens
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
        batch.seq_id[i][0] = seq
        batch.n_tokens += 1

    def argmax(i: int) -> int:
        return int(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), shape=(n_vocab,)).argmax())

    def serve(prompts: list[list[int]], n: int) -> None:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        batch.n_tokens, ends = 0, []
        for seq, ids in enumerate(prompts):
            for position, token in enumerate(ids):
                add(token, position, seq, position == len(ids) - 1)
            ends.append(batch.n_tokens - 1)
        assert lib.llama_decode(context, batch) == 0
        tokens = [argmax(i) for i in ends]
        for step in range(1, n):
            batch.n_tokens = 0
            for seq, token in enumerate(tokens):
                add(token, len(prompts[seq]) + step - 1, seq, True)
            assert lib.llama_decode(context, batch) == 0
            tokens = [argmax(i) for i in range(len(tokens))]

    return serve, f"llama-cpp-python {lib.__version__} {form}"


def openvino(folder: Path, form: str, threads: int) -> tuple[Serve, str]:
    import numpy as np
    import openvino
    import openvino_genai as lib

    scheduler = lib.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs, scheduler.max_num_batched_tokens = 1, MOST_SEQS, 512
    scheduler.enable_prefix_caching = False
    options = {"INFERENCE_NUM_THREADS": threads}
    pipe = lib.LLMPipeline(str(folder / f"{form}.gguf"), "CPU", scheduler_config=scheduler, **options)

    def serve(prompts: list[list[int]], n: int) -> None:
        config = lib.GenerationConfig(max_new_tokens=n, min_new_tokens=n, ignore_eos=True, do_sample=False)
        ids = np.array(prompts, np.int64)
        inputs = lib.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        found = pipe.generate(inputs, config)
        assert all(len(tokens) == n for tokens in found.tokens)

    return serve, f"openvino-genai {lib.__version__} {form}"


def vllm(folder: Path, form: str, threads: int) -> tuple[Serve, str]:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm as lib

    made = lib.LLM(
        str(folder / "hf"),
        dtype="bfloat16",
        enable_prefix_caching=False,
        max_num_seqs=MOST_SEQS,
        max_model_len=2048,
        disable_log_stats=True,
        skip_tokenizer_init=True,
    )

    def serve(prompts: list[list[int]], n: int) -> None:
        options = lib.SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
        found = made.generate([{"prompt_token_ids": ids} for ids in prompts], options, use_tqdm=False)
        assert all(len(f.outputs[0].token_ids) == n for f in found)

    return serve, f"vllm {lib.__version__} {form}"


def transformers(folder: Path, form: str, threads: int) -> tuple[Serve, str]:
    import torch
    import transformers as lib

    torch.set_num_threads(threads)
    model = lib.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=getattr(torch, form)).eval()
    model.generation_config.pad_token_id = 0

    def serve(prompts: list[list[int]], n: int) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False
            )
        assert found.shape[1] == ids.shape[1] + n

    return serve, f"transformers {lib.__version__} {form}"


def cpu_seconds() -> float:
    """User and system time of this process group, of its children too.  Linux."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[2]) == os.getpgrp():
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


PEERS = {f.__name__: f for f in (nearfar, llama_cpp, openvino, vllm, transformers)}


def main() -> int:
    name, folder, form, threads = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print what they like; answers go where they are waited for

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=out, flush=True)

    started = time.perf_counter()
    serve, facts = PEERS[name](folder, form, threads)
    say({"ready": time.perf_counter() - started, "facts": facts})
    for line in sys.stdin:
        question = json.loads(line)
        wall, cpu = time.perf_counter(), cpu_seconds()
        serve(question["prompts"], question["new"])
        say({"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu})
    return 0


if __name__ == "__main__":
    sys.exit(main())
