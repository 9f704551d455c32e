"""Answer conversations in the form a model was trained on; each has its own messages."""

import sys

from flexgen_bench import LLM, SamplingParams

QUESTIONS = ["What is the capital of France?", "Name three colours."]
TEMPLATE = "You answer in one sentence."

if __name__ == "__main__":
    conversations = [[{"role": "system", "content": TEMPLATE}, {"role": "user", "content": q}] for q in QUESTIONS]
    with LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m") as llm:
        for question, output in zip(QUESTIONS, llm.chat(conversations, SamplingParams(max_tokens=32)), strict=True):
            print(f"{question}\n  {output.text}")
