"""Answer a batch of prompts of mixed length; each answer is there as soon as it is made."""

import sys

from flexgen_bench import LLM, Output, SamplingParams

PROMPTS = ["The capital of France is", "Once upon a time there was a", "2 + 2 ="]


def show(index: int, output: Output) -> None:
    print(f"[{index}] {PROMPTS[index]}{output.text}   ({output.finish_reason})")


if __name__ == "__main__":
    with LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m") as llm:
        llm.generate(PROMPTS, SamplingParams(max_tokens=16), on_output=show)
