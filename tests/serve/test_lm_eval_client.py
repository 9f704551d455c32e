"""lm-eval's own client of OpenAI's API, ``local-completions``, against the server: its figures are those of lm-eval on
the same model with transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server_process import ServerProcess

pytest.importorskip("lm_eval")

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


def samples(model: str, arguments: str, folder: Path, name: str) -> list[dict[str, object]]:
    """What lm-eval has got for each item: log-likelihoods, or text."""
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", model, "--model_args", arguments),
        *("--tasks", "tiny_choice,tiny_text", "--include_path", str(folder / "tasks")),
        *("--output_path", str(folder / name), "--log_samples", "--batch_size", "4"),
    ]
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OPENAI_API_KEY": "none"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = []
    for path in sorted((folder / name).rglob("samples_*.jsonl")):
        found += [json.loads(line) for line in path.read_text().splitlines()]
    return found


def test_local_completions(server: ServerProcess, model: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    data = tmp_path / "data.json"
    items = [{"question": f"{n} + {n} is", "choices": [f" {n}", f" {2 * n}", " many"], "answer": 1} for n in range(5)]
    data.write_text("\n".join(map(json.dumps, items)))
    for name, text in TASKS.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text.format(data=data))
    served = samples(
        "local-completions",
        f"model=tiny,base_url={server.url}/v1/completions,tokenizer={model},num_concurrent=4,max_length=300,"
        "tokenized_requests=True",
        tmp_path,
        "served",
    )
    own = samples("hf", f"pretrained={model},dtype=float32,device=cpu,max_length=300", tmp_path, "own")
    assert len(served) == len(own) == 10
    for a, b in zip(served, own, strict=True):
        assert a["doc_id"] == b["doc_id"]
        if len(a["resps"]) == 3:  # type: ignore[arg-type]
            for (x,), (y,) in zip(a["resps"], b["resps"], strict=True):  # type: ignore[call-overload]
                assert float(x[0]) == pytest.approx(float(y[0]), abs=1e-3)
                assert str(x[1]) == str(y[1])
        else:
            assert a["resps"] == b["resps"]
