"""Rank endings of a sentence by their log-likelihood."""

import sys

from flexgen_bench import LLM

CONTEXT = "Water freezes at zero degrees"
ENDINGS = [" Celsius", " Fahrenheit", " kilometres"]

if __name__ == "__main__":
    with LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m") as llm:
        scores = llm.score([CONTEXT] * len(ENDINGS), ENDINGS)
    for score, ending in sorted(zip([s.logprob for s in scores], ENDINGS, strict=True))[::-1]:
        print(f"{score:8.2f}  {CONTEXT}{ending}")
