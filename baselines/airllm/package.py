"""AirLLM's package, beside this project's: it asks for packages of other versions, and for more than it needs to run
(sentencepiece is for one family's tokenizer)."""

from __future__ import annotations

from baselines.common.beside import Beside

PACKAGE = Beside("airllm", "4.0.0", "airllm/airllm_base.py", {"tqdm": "tqdm"})
