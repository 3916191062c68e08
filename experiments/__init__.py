"""Experiments: each a question, a prediction, and a verdict that its numbers can contradict."""
