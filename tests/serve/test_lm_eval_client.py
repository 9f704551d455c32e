"""lm-eval's own client of OpenAI's API, ``local-completions``, against the server: its figures are those of the
library's own scores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexgen_bench import LLM, SamplingParams
from tests.support.server_process import ServerProcess

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity", reason="of lm-eval[api]")

TASKS = {
    "tiny_choice": """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
""",
    "tiny_text": """\
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
doc_to_text: "{{{{question}}}}"
doc_to_target: "x"
metric_list: [{{metric: exact_match}}]
""",
}


def samples(model: str, arguments: str, folder: Path) -> list[dict[str, Any]]:
    """What lm-eval has got for each item: log-likelihoods, or text."""
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", model, "--model_args", arguments),
        *("--tasks", "tiny_choice,tiny_text", "--include_path", str(folder / "tasks")),
        *("--output_path", str(folder / "found"), "--log_samples", "--batch_size", "4"),
    ]
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OPENAI_API_KEY": "none"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    paths = sorted((folder / "found").rglob("samples_*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def test_local_completions(server: ServerProcess, model: Path, llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    data = tmp_path / "data.json"
    items = [{"question": f"{n} + {n} is", "choices": [f" {n}", f" {2 * n}", " many"], "answer": 1} for n in range(5)]
    data.write_text("\n".join(map(json.dumps, items)))
    for name, text in TASKS.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text.format(data=data))
    where = f"base_url={server.url}/v1/completions,tokenizer={model}"
    options = "num_concurrent=4,max_length=300,tokenized_requests=True"
    found = samples("local-completions", f"model=tiny,{where},{options}", tmp_path)
    assert len(found) == 10
    for sample in found:
        asked = list(sample["arguments"].values())
        if len(asked) == 1:
            expected = llm.generate(asked[0]["arg_0"], SamplingParams(max_tokens=6, stop="\n"))[0].text
            assert sample["resps"][0][0] == expected
            continue
        own = llm.score([a["arg_0"] for a in asked], [a["arg_1"] for a in asked])
        for (told,), score in zip(sample["resps"], own, strict=True):
            assert float(told[0]) == pytest.approx(score.logprob, abs=1e-3)
            assert str(told[1]) == str(score.is_greedy)
