"""Weights on disk and in 4 bits, 16 prompts to every load of a layer."""

import sys

from flexgen_bench import LLM, Compression, Lossy, Placement, Policy, SamplingParams

POLICY = Policy(
    gpu_batch_size=8, num_gpu_batches=2, weights=Placement(disk=1.0), lossy=Lossy(weights=Compression(bits=4))
)

if __name__ == "__main__":
    prompts = [f"A list of {n} animals:" for n in range(1, 17)]
    with LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m", policy=POLICY) as llm:
        for output in llm.generate(prompts, SamplingParams(max_tokens=8)):
            print(f"{output.prompt}{output.text}".replace("\n", " "))
