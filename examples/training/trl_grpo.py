"""Train a language model to name shapes, with TRL's GRPOTrainer and a metric of images as reward.

The model answers a prompt such as "draw a red circle" with two words; what they name is drawn, and the
metric says how well the drawing fits the prompt. Two words that name no shape cannot be drawn: they have
no score, and get the one that is declared for failures. The model is tiny and untrained, so it starts by
saying anything.

It needs TRL (`pip install -e ".[trl]"`):

    python examples/training/trl_grpo.py
"""

import argparse
import logging
import random
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from diffsynth_metrics import CLIPMetric, ModelConfig
from diffsynth_metrics.embedded.drawing import COLORS, SHAPES, describe, draw_shape
from diffsynth_metrics.rewards import to_trl

TARGETS = [("circle", "red"), ("square", "blue"), ("star", "yellow")]
WORST = -20.0  # what words get that cannot be drawn; fitting pictures have about 20


def main() -> None:
    """Read the command line, train and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.getLogger("diffsynth_metrics").setLevel(logging.ERROR)  # failures are expected here
    metric = CLIPMetric.from_pretrained(ModelConfig.embedded("shapes"), device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        history = train(metric, arguments.steps, arguments.seed, folder)
    quarter = max(1, len(history) // 4)
    first, last = fmean(history[:quarter]), fmean(history[-quarter:])
    print(f"Mean score: {first:.2f} in the first quarter of the steps, {last:.2f} in the last")


def train(metric: CLIPMetric, steps: int, seed: int, folder: str | Path) -> list[float]:
    """Train a tiny model from scratch; return the metric's mean reward of each step."""
    tokenizer = build_tokenizer()
    trainer = GRPOTrainer(
        model=build_model(tokenizer, seed),
        reward_funcs=to_trl(metric, image=draw, prompt="caption", on_failure=WORST, name="fits"),
        args=GRPOConfig(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=48,
            num_generations=16,
            max_completion_length=2,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(
            [
                {"prompt": f"draw {describe(shape, color)}", "caption": describe(shape, color)}
                for shape, color in TARGETS * 8
            ]
        ),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    key = "rewards/fits/mean"
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def draw(completion: str, **row: Any) -> Image.Image:
    """Draw what a completion names.

    Raises:
        ValueError: It does not name a colour and a shape.
    """
    words = completion.split()
    if len(words) != 2 or words[0] not in COLORS or words[1] not in SHAPES:
        raise ValueError(f"{completion!r} names no shape")
    color, shape = words
    return draw_shape(shape, color, rng=random.Random(completion))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word."""
    words = ["<pad>", "<eos>", "draw", "a", *COLORS, *SHAPES]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Build a language model of two small layers with random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.eos_token_id,
        )
    )


if __name__ == "__main__":
    main()
