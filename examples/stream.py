"""Print one answer while it is made."""

import sys

from flexgen_bench import LLM, SamplingParams

if __name__ == "__main__":
    prompt = "Once upon a time"
    print(prompt, end="", flush=True)
    with LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m") as llm:
        for piece in llm.stream(prompt, SamplingParams(max_tokens=40)):
            print(piece.text, end="", flush=True)
    print()
