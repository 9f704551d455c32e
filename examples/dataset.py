"""A column of prompts becomes a column of answers: in a DataFrame of pandas, a Dataset of Hugging Face, a plain
list."""

import sys

import pandas as pd

from flexgen_bench import LLM, SamplingParams

PROMPTS = ["The opposite of hot is", "A synonym of large is", "The plural of mouse is"]

if __name__ == "__main__":
    params = SamplingParams(max_tokens=8)
    with LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m") as llm:
        frame = pd.DataFrame({"id": range(3), "prompt": PROMPTS})
        print(llm.map(frame, "prompt", params))
        print(llm.map([{"prompt": prompt} for prompt in PROMPTS], "prompt", params, output="text")[0])
        try:
            from datasets import Dataset
        except ImportError:
            print("pip install datasets for the same with a datasets.Dataset")
        else:
            print(llm.map(Dataset.from_dict({"prompt": PROMPTS}), "prompt", params)[0])
