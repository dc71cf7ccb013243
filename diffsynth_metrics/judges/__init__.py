"""Judges: asking a generative vision-language model, and reading its answer.

engine.py         a question in, a text out: what every engine can do
local.py          the engine that runs a network of transformers
server.py         the engine that asks a server
cached.py         the engine that keeps the answers of another one
architectures.py  the two networks, on the meta device
answers.py        a text in, numbers or a reason out; reading.py and verdicts.py are its parts
metric.py         what the judge metrics share
prompts/*.json    the texts that the judges were trained with, and their published architectures
"""
