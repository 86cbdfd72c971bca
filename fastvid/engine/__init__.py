"""One request on one loaded model, step by step."""
