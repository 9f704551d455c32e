"""GGUF files, as llama.cpp and its converters write them, as checkpoints of this project."""
