"""Ray Data: prompts answered in batches by an actor that holds the model (pip install 'flexgen-bench[ray]')."""

import sys

import pandas as pd
import ray

from flexgen_bench import LLM, SamplingParams

MODEL = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"


class Answers:
    def __init__(self) -> None:
        self.llm = LLM(MODEL)

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        return self.llm.map(frame, "prompt", SamplingParams(max_tokens=8))


if __name__ == "__main__":
    prompts = ray.data.from_items([{"prompt": f"{n} and one make"} for n in range(8)])
    answered = prompts.map_batches(Answers, batch_format="pandas", batch_size=4, concurrency=1)
    for row in answered.take_all():
        print(row["prompt"] + row["answer"])
