"""Requests and answers in OpenAI's forms, and conversations in the form a model was trained on."""
